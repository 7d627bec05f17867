"""The native checkpoint: the same bits back, and a clear error for everything that is not one."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import parapolicy
from parapolicy.normalizer import Affine, Normalizer
from parapolicy.spec import PolicySpec
from tests.conftest import SHIPPED
from tests.helpers import small_policy, small_spec, some_observation


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    parapolicy.save_policy(small_policy(), tmp_path / "policy")
    return tmp_path / "policy"


def edit_config(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        change(config)
        (folder / "config.json").write_text(json.dumps(config))

    return edit


def edit_scheduler(**changes: Any) -> Callable[[Path], None]:
    return edit_config(lambda config: config["spec"]["scheduler"].update(changes))


def edit_weights(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return edit


def truncate(name: str, keep: float) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: int(len(data) * keep)])

    return edit


def test_round_trip_is_exact(folder: Path, tmp_path: Path) -> None:
    first = parapolicy.load_policy(folder, device="cpu")
    parapolicy.save_policy(first, tmp_path / "again")
    second = parapolicy.load_policy(tmp_path / "again", device="cpu")
    assert first.spec == second.spec
    for name, value in first.network.state_dict().items():
        assert torch.equal(value, second.network.state_dict()[name])
    observation = some_observation(first.spec)
    assert (first.predict(observation).actions == second.predict(observation).actions).all()
    assert sorted(path.name for path in (tmp_path / "again").iterdir()) == ["config.json", "model.safetensors"]


def test_film_without_scale_round_trips(tmp_path: Path) -> None:
    network = {**small_spec().network, "cond_predict_scale": False}
    parapolicy.save_policy(small_policy(network=network), tmp_path)
    assert parapolicy.load_policy(tmp_path).spec.network["cond_predict_scale"] is False


DAMAGES = {
    "no config": (lambda f: (f / "config.json").unlink(), "config.json is missing"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "model.safetensors is missing"),
    "truncated config": (truncate("config.json", 0.5), "no JSON text"),
    "binary config": (lambda f: (f / "config.json").write_bytes(b"\x80\x04\x95\xff"), "no JSON text"),
    "deep config": (lambda f: (f / "config.json").write_text("[" * 100_000), "no JSON text"),
    "other JSON": (lambda f: (f / "config.json").write_text("[]"), "not the configuration of a parapolicy"),
    "foreign config": (edit_config(lambda c: c.update(format="lerobot")), "not the configuration of a parapolicy"),
    "newer version": (edit_config(lambda c: c.update(version=3)), "has version 3"),
    "unknown key": (edit_config(lambda c: c["spec"].update(horizn=8)), "unknown keys .'horizn'"),
    "missing key": (edit_config(lambda c: c["spec"].pop("horizon")), "lacks .'horizon'"),
    "text for a number": (edit_config(lambda c: c["spec"].update(horizon="8")), "horizon is '8'"),
    "odd horizon": (edit_config(lambda c: c["spec"].update(horizon=9)), "horizon is 9"),
    "too many actions": (edit_config(lambda c: c["spec"].update(n_action_steps=8)), "n_action_steps is 8"),
    "unknown network": (edit_config(lambda c: c["spec"]["network"].update(name="mlp")), "network name is 'mlp'"),
    "unknown argument": (edit_config(lambda c: c["spec"]["network"].update(depth=3)), "depth"),
    "no levels": (edit_config(lambda c: c["spec"]["network"].update(down_dims=[])), "describes no policy"),
    "negative width": (edit_config(lambda c: c["spec"]["network"].update(down_dims=[-16, 32])), "describes no policy"),
    "huge network": (edit_config(lambda c: c["spec"]["network"].update(down_dims=[2**18, 2**19])), "calls for"),
    "other width": (edit_config(lambda c: c["spec"]["network"].update(down_dims=[16, 64])), "calls for"),
    "other observation": (edit_config(lambda c: c["spec"]["observation"][0].update(shape=[3])), "calls for"),
    "renamed observation": (edit_config(lambda c: c["spec"]["observation"][0].update(key="other")), "missing tensors"),
    "endless horizon": (edit_config(lambda c: c["spec"].update(horizon=2**40)), "horizon is 1099511627776"),
    "endless schedule": (edit_scheduler(num_train_timesteps=10**12), "num_train_timesteps is 1000000000000"),
    "unknown scheduler": (edit_scheduler(_class_name="PNDMScheduler"), "PNDMScheduler"),
    "text for a beta": (edit_scheduler(beta_schedule="linear", beta_start="x"), "gives no schedule"),
    "list of observations": (edit_config(lambda c: c["spec"].update(observation=[1])), "describes no policy"),
    "odd embedding": (edit_config(lambda c: c["spec"]["network"].update(diffusion_step_embed_dim=3)), "embed_dim is 3"),
    "truncated weights": (truncate("model.safetensors", 0.5), "damaged"),
    "empty weights": (truncate("model.safetensors", 0.0), "damaged"),
    "pickled weights": (lambda f: torch.save({"a": 1}, f / "model.safetensors"), "damaged"),
    "missing tensor": (
        edit_weights(lambda t: t.pop("network.final_conv.1.bias")),
        "missing tensors .'network.final_conv",
    ),
    "extra tensor": (edit_weights(lambda t: t.update(extra=torch.ones(1))), "unexpected tensors .'extra'"),
    "no normalizer": (edit_weights(lambda t: t.pop("normalizer.action.scale")), "missing tensors .'normalizer.action"),
    "zero scale": (edit_weights(lambda t: t["normalizer.action.scale"].zero_()), "scale of 0"),
    "NaN weight": (edit_weights(lambda t: t["network.final_conv.1.bias"].fill_(torch.nan)), "not finite"),
    "half weight": (
        edit_weights(lambda t: t.update({"network.final_conv.1.bias": torch.ones(2).half()})),
        "is torch.float16",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named(folder: Path, damage: str) -> None:
    edit, message = DAMAGES[damage]
    edit(folder)
    with pytest.raises(parapolicy.CheckpointError, match=message):
        parapolicy.load_policy(folder)


def test_no_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(parapolicy.CheckpointError, match=r"no checkpoint at .*nowhere"):
        parapolicy.load_policy(tmp_path / "nowhere")


def test_diverged_weights_are_not_saved(folder: Path) -> None:
    policy = small_policy()
    policy.network.final_conv[1].bias.fill_(torch.inf)
    before = (folder / "model.safetensors").read_bytes()
    with pytest.raises(parapolicy.CheckpointError, match=r"final_conv.1.bias"):
        parapolicy.save_policy(policy, folder)
    assert (folder / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize(("name", "value"), [("n_obs_steps", 0), ("action_dim", True), ("control_hz", 0)])
def test_bad_counts_are_named(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"{name} is {value}"):
        small_spec(**{name: value})


def test_spec_survives_json() -> None:
    spec = small_spec(provenance={"data": "made up"})
    assert PolicySpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


def test_normalizer_fits_range_and_inverts() -> None:
    values = torch.rand(50, 3) * torch.tensor([500.0, 1.0, 0.0]) + torch.tensor([10.0, -3.0, 7.0])
    normalizer = Normalizer.fit({"action": values})
    normalized = normalizer.normalize("action", values)
    torch.testing.assert_close(normalized.amin(0), torch.tensor([-1.0, -1.0, 0.0]))
    torch.testing.assert_close(normalized.amax(0), torch.tensor([1.0, 1.0, 0.0]))
    torch.testing.assert_close(normalizer.unnormalize("action", normalized), values, rtol=1e-5, atol=1e-4)
    with pytest.raises(ValueError, match="not finite"):
        Normalizer({"action": Affine(torch.tensor([torch.nan]), torch.zeros(1))})


def test_the_shipped_policy_is_small_and_complete(shipped: parapolicy.Policy) -> None:
    assert (SHIPPED / "model.safetensors").stat().st_size <= 20e6
    spec = shipped.spec
    assert (spec.n_obs_steps, spec.horizon, spec.n_action_steps) == (2, 16, 8)
    assert len(shipped.schedule) == 100
    assert shipped.schedule.solver == "ddpm"
    assert "success rate" in (SHIPPED / "README.md").read_text()


def test_files_with_observations_in_a_map_keep_loading(tmp_path: Path) -> None:
    """Version 1 kept them so; their order counts."""
    policy = small_policy()
    parapolicy.save_policy(policy, tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    config["version"] = 1
    config["spec"]["observation"] = {entry["key"]: entry["shape"] for entry in config["spec"]["observation"]}
    path.write_text(json.dumps(config))
    assert parapolicy.load_policy(tmp_path, device="cpu").spec == policy.spec
