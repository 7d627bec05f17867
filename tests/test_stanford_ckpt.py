"""Checkpoints that real-stanford/diffusion_policy wrote: answers equal to its own, and hostile copies refused."""

import json
import lzma
import os
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import parapolicy
from parapolicy import CheckpointError
from parapolicy.networks import Network
from parapolicy.observation import normalize_observation
from tests.conftest import ROOT

ORACLES = (
    "unet_lowdim_pusht",
    "unet_lowdim_pusht_unresolved",
    "transformer_lowdim_pusht",
    "unet_lowdim_modern",
    "unet_hybrid_pusht_image",
    "unet_image_real_pusht",
    "transformer_hybrid_pusht_image",
    "unet_timm_umi_vit",
)
MARKER = Path("/tmp/pwned")  # what the hostile files would make


@pytest.fixture(scope="session")
def published() -> Path:
    """Checkpoints that the published code wrote, with its answers, where they are at hand."""
    data = Path(os.environ.get("PARAPOLICY_DEMONSTRATIONS", ROOT.parent / "shared" / "data"))
    path = (data if data.is_absolute() else ROOT / data) / "checkpoints" / "real-stanford"
    if not path.is_dir():
        pytest.skip(f"no checkpoints at {path}; set PARAPOLICY_DEMONSTRATIONS to the folder that holds checkpoints/")
    return path


def unpack(path: Path, folder: Path) -> Path:
    """A plain file of an .xz one."""
    if path.suffix != ".xz":
        return path
    target = folder / path.stem
    with lzma.open(path) as packed, target.open("wb") as plain:
        while part := packed.read(2**24):
            plain.write(part)
    return target


def read_oracle(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    with np.load(path, allow_pickle=False) as data:
        values = {name: data[name] for name in data.files if name != "meta"}
        return values, json.loads(str(data["meta"]))


def condition_of(network: Network, oracle: dict[str, np.ndarray], inputs: dict[str, Tensor]) -> Tensor:
    """What the raw calls were conditioned on, as our network has it."""
    if "global_cond" in oracle:
        return torch.tensor(oracle["global_cond"])
    if "cond" not in oracle:
        return network.embed_condition(inputs)
    transformer: Any = network
    tokens = transformer.cond_obs_emb(torch.tensor(oracle["cond"])) + transformer.cond_pos_emb[:, 1:]
    return transformer._project(transformer.encoder(tokens))


@torch.inference_mode()
def check_answers(policy: parapolicy.Policy, oracle: dict[str, np.ndarray], meta: dict[str, Any]) -> None:
    """Condition and raw calls within 1e-5, the chunk within 1e-4, as their README asks."""
    observation = {name[4:]: value for name, value in oracle.items() if name.startswith("obs.")}
    inputs, _ = normalize_observation(policy.spec, policy.normalizer, observation)
    network = policy.network
    if "features" in oracle:
        encoder: Any = getattr(network, "obs_encoder", None) or getattr(network, "encoder", None)
        expected = oracle["features"].reshape(len(oracle["features"]), -1)
        np.testing.assert_allclose(encoder(inputs), expected, atol=1e-5 * np.abs(expected).max())
    if "global_cond" in oracle:
        expected = oracle["global_cond"]
        np.testing.assert_allclose(network.embed_condition(inputs), expected, atol=1e-5 * np.abs(expected).max())
    condition = condition_of(network, oracle, inputs)
    entry = torch.arange(len(condition))
    for x, t, expected in zip(oracle["net.x"], oracle["net.t"], oracle["net.out"], strict=True):
        found = network(torch.tensor(x), network.embed_steps(torch.full((len(x),), int(t))), condition, entry, entry)
        np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())

    np.testing.assert_array_equal(policy.schedule.timesteps, oracle["timesteps"])
    chunk = policy.predict(observation, noise=torch.tensor(oracle["noise"]))
    scale = oracle["norm.action.scale"]
    np.testing.assert_allclose(chunk.actions * scale, oracle["action"] * scale, atol=1e-4)
    np.testing.assert_allclose(chunk.trajectory * scale, oracle["action_pred"] * scale, atol=1e-4)
    assert np.abs((chunk.trajectory - oracle["raw_model.action_pred"]) * scale).max() > 0.1  # the other weights
    begin, end = meta["action_slice"]
    assert policy.spec.executed == slice(begin, end)


@pytest.mark.parametrize("name", ORACLES)
def test_published_answers(published: Path, tmp_path: Path, name: str) -> None:
    packed = published / f"{name}.ckpt.xz"
    path = unpack(packed if packed.exists() else published / f"{name}.ckpt", tmp_path)
    policy = parapolicy.load_policy(path, sampler="sequential", device="cpu", engine="eager")
    if path.parent == tmp_path:
        path.unlink()  # up to 700 MB
    oracle, meta = read_oracle(published / f"{name}.npz")
    check_answers(policy, oracle, meta)
    if meta["feature_order"]:
        assert list(policy.spec.observation) == [key for key, _, _ in meta["feature_order"]]
    parapolicy.save_policy(policy, tmp_path / "native")
    again = parapolicy.load_policy(tmp_path / "native", device="cpu", engine="eager")
    assert again.spec == policy.spec
    assert all(torch.equal(a, b) for a, b in zip(again.network.parameters(), policy.network.parameters(), strict=True))
    shutil.rmtree(tmp_path / "native")


def test_hostile_and_damaged_files(published: Path, tmp_path: Path) -> None:
    folder = published / "hostile"
    outcomes = json.loads((folder / "expected.json").read_text())
    assert len(outcomes) == 38
    oracle, meta = read_oracle(folder / "honest_base.npz")
    refused: dict[str, str] = {}
    for name, case in outcomes.items():
        path = unpack(folder / name, tmp_path)
        begin, loads = time.process_time(), case["outcome"] == "load"
        try:
            policy = parapolicy.load_policy(path, sampler="sequential", device="cpu", engine="eager")
        except CheckpointError as error:
            refused[path.name] = str(error)
        else:
            assert "load" in case["outcome"], name
            if loads:
                check_answers(policy, oracle, meta)
        assert loads != (path.name in refused) or "or load" in case["outcome"], (name, refused.get(path.name))
        assert loads or time.process_time() - begin < 2, name
        assert not MARKER.exists(), name
    assert all(f"{name}: " in message for name, message in refused.items())
