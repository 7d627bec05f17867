"""LeRobot folders that are damaged, hostile or elsewhere: each is refused by name, and links lead where they may."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import parapolicy
from parapolicy.checkpoint import hub
from parapolicy.checkpoint.folder_files import find_file
from tests.lerobot_folders import CAMERAS, FEATURES, made_up, read_steps, write_steps
from tests.oracles import assert_answers, oracle_folder

MARKER = Path("/tmp/parapolicy-was-here")  # what the hostile processor file would make


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return made_up(tmp_path / "pretrained_model")[0]


MATTERS = {
    "unknown_policy_type": "type is 'act_turbo'",
    "unknown_scheduler": "noise_scheduler_type is 'PNDM'",
    "unknown_normalization": "norm_map has 'TANH'",
    "missing_statistic": "lacks the tensor action.min",
    "missing_statistics_of_a_key": "lacks the tensor observation.state.min",
    "statistics_under_migrated_name": "lacks the tensor observation.state.min",
    "no_processors": "does not say how to normalise",
    "missing_state_file": "policy_preprocessor_step_3_normalizer_processor.safetensors is missing",
    "statistic_wrong_shape": "action.min has shape .3,., expected .2,.",
    "statistic_nan": "action.max holds a value that is not finite",
    "statistic_inf": "action.max holds a value that is not finite",
    "wrong_shape": "mid_modules.0.conv1.block.0.weight has shape",
    "missing_weight": "missing tensors .'diffusion.unet.mid_modules.0.conv1",
    "extra_weight": "unexpected tensors .'diffusion.unet.down_modules.5",
    "nan_weight": "mid_modules.0.conv1.block.0.weight holds a value that is not finite",
    "config_against_weights": "action.min has shape .2,., expected .3,.",
    "horizon_not_a_multiple": "horizon is 10",
    "too_many_action_steps": "n_action_steps is 8, expected at most 7",
    "weights_truncated": "model.safetensors is damaged",
    "weights_header_huge": "model.safetensors is damaged .* header is larger",
    "config_not_json": "config.json is not a JSON text",
    "config_huge_dims": "down_dims.1. is 2000000000",
    "state_file_parent": "policy_preprocessor.json names the file '../../outside.safetensors'",
    "state_file_absolute": "policy_preprocessor.json names the file '/etc/hostname'",
    "state_file_symlink": "step_3_normalizer_processor.safetensors is a link .* out of the folder",
    "weights_symlink": "model.safetensors is a link .* out of the folder",
    "processor_class_import": "subprocess.Popen.* Classes named in a file are never imported",
    "unknown_step": "'delta_to_absolute_action_processor' is not supported",
}


def test_hostile_folders_are_refused_by_name(tmp_path: Path) -> None:
    hostile = oracle_folder("lerobot") / "hostile"
    cases = json.loads((hostile / "cases.json").read_text())
    assert cases.keys() == MATTERS.keys()
    shutil.copytree(hostile, tmp_path / "hostile", symlinks=True)
    for name, matter in MATTERS.items():
        folder = tmp_path / "hostile" / name / "pretrained_model"
        _restore_links(folder)
        with pytest.raises(parapolicy.CheckpointError, match=matter) as caught:
            parapolicy.load_policy(folder, device="cpu", engine="eager")
        assert str(folder) in str(caught.value), name
    policy = parapolicy.load_policy(hostile / "sound", "sequential", "cpu", engine="eager")
    assert_answers(policy, hostile / "sound.npz")
    assert not MARKER.exists()


def _restore_links(folder: Path) -> None:
    """A link that was copied as a small file with the target's name becomes one again."""
    for path in folder.glob("*.safetensors"):
        if not path.is_symlink() and path.stat().st_size < 100 and path.read_bytes().startswith(b"../"):
            target = path.read_text().strip()
            path.unlink()
            path.symlink_to(target)


def edit(name: str, **changes: Any) -> Callable[[Path], None]:
    """A change of ``config.json``, or of the settings of a step in a processor file; ... takes one out."""

    def change(folder: Path) -> None:
        if name == "config":
            config = json.loads((folder / "config.json").read_text()) | changes
            (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))
            return
        file, number = name.split(":")
        steps = read_steps(folder, file)
        steps[int(number)]["config"] |= changes
        write_steps(folder, file, *steps)

    return change


def drop_step(file: str, number: int) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        steps = read_steps(folder, file)
        write_steps(folder, file, *steps[:number], *steps[number + 1 :])

    return change


def to_fifo(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return change


def weights(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return edit


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "other policy of 2024": (edit("config", type=..., noise_scheduler_type=...), "noise_scheduler_type is missing"),
    "adapter": (edit("config", use_peft=True), "use_peft is True"),
    "no horizon": (edit("config", horizon=...), "horizon is missing"),
    "text for a number": (edit("config", n_obs_steps="2"), "n_obs_steps is '2'"),
    "flag for a number": (edit("config", kernel_size=True), "kernel_size is True"),
    "velocity": (edit("config", prediction_type="v_prediction"), "prediction_type is 'v_prediction'"),
    "too many steps": (edit("config", num_inference_steps=21), "num_inference_steps is 21"),
    "no betas": (edit("config", beta_start=...), "beta_start is missing"),
    "odd betas": (edit("config", beta_schedule="odd"), "beta_schedule is 'odd'"),
    "no levels": (edit("config", down_dims=[]), "down_dims is"),
    "no inputs": (edit("config", input_features={}), "the inputs are .., expected observation.state"),
    "wrong type": (edit("config", output_features={"action": {"type": "STATE", "shape": [2]}}), "output_features"),
    "other width": (edit("config", down_dims=[8, 24]), "has shape"),
    "no pre-processor": (lambda f: (f / "policy_preprocessor.json").unlink(), "policy_preprocessor.json is missing"),
    "no post-processor": (lambda f: (f / "policy_postprocessor.json").unlink(), "policy_postprocessor.json is missing"),
    "no steps": (lambda f: (f / "policy_preprocessor.json").write_text("[]"), "has no list of steps"),
    "no normaliser": (drop_step("policy_preprocessor", 3), "has no step normalizer_processor"),
    "no unnormaliser": (drop_step("policy_postprocessor", 0), "has no step unnormalizer_processor"),
    "half precision": (edit("policy_preprocessor:2", float_dtype="float16"), "float_dtype is 'float16'"),
    "unknown setting": (edit("policy_preprocessor:3", stats={"a": 1}), "'stats'"),
    "no feature": (edit("policy_preprocessor:3", features={}), "features lack observation.state"),
    "unknown type": (
        edit("policy_preprocessor:3", features={"observation.state": {"type": "STAT", "shape": [2]}}),
        "features lack observation.state or its type",
    ),
    "unknown type of a mode": (edit("policy_preprocessor:3", norm_map={"STAT": "MIN_MAX"}), "norm_map has 'STAT'"),
    "huge numbers": (
        edit("config", input_features=FEATURES | {"observation.environment_state": {"type": "ENV", "shape": [2**33]}}),
        "observation.environment_state is .* expected its type and shape",
    ),
    "negative eps": (edit("policy_preprocessor:3", eps=-1), "eps is -1"),
    "two names": (
        edit("policy_preprocessor:0", rename_map={"a": "observation.state", "b": "observation.state"}),
        "one name",
    ),
    "pipe for weights": (to_fifo("model.safetensors"), "model.safetensors is not a regular file"),
    "pipe for statistics": (
        to_fifo("policy_preprocessor_step_4_normalizer_processor.safetensors"),
        "is not a regular file",
    ),
    "buffers, too": (
        weights(lambda t: t.update({"normalize_inputs.buffer_observation_state.min": torch.zeros(2)})),
        "in addition to the processor files",
    ),
    "compiled, too": (
        weights(lambda t: t.update({"diffusion.unet._orig_mod.final_conv.1.bias": torch.zeros(2)})),
        "holds a tensor twice",
    ),
    "integers": (
        weights(lambda t: t.update({"diffusion.unet.final_conv.1.bias": torch.zeros(2, dtype=torch.int64)})),
        "has type I64",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named(folder: Path, damage: str) -> None:
    change, message = DAMAGES[damage]
    change(folder)
    with pytest.raises(parapolicy.CheckpointError, match=message) as caught:
        parapolicy.load_policy(folder, device="cpu", engine="eager")
    assert str(folder) in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_other_coordinates_are_refused(tmp_path: Path) -> None:
    path = made_up(tmp_path / "policy", input_features=CAMERAS)[0]
    weights(lambda t: t["diffusion.rgb_encoder.pool.pos_grid"].mul_(-1))(path)
    with pytest.raises(parapolicy.CheckpointError, match="pos_grid differs from the coordinates"):
        parapolicy.load_policy(path, device="cpu", engine="eager")


def test_a_snapshot_of_the_hubs_cache_loads_and_no_other_link(folder: Path, tmp_path: Path) -> None:
    cache = tmp_path / "models--owner--name"
    snapshot = cache / "snapshots" / "0123abc"
    shutil.copytree(folder, cache / "blobs")
    snapshot.mkdir(parents=True)
    for file in folder.iterdir():
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    expected = parapolicy.load_policy(folder, device="cpu", engine="eager").network.state_dict()
    found = parapolicy.load_policy(snapshot, device="cpu", engine="eager").network.state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)

    elsewhere = tmp_path / "elsewhere"
    shutil.move(snapshot, elsewhere)  # beside no blobs
    for file in folder.iterdir():
        (elsewhere / file.name).unlink()
        (elsewhere / file.name).symlink_to(cache / "blobs" / file.name)
    with pytest.raises(parapolicy.CheckpointError, match="out of the folder"):
        parapolicy.load_policy(elsewhere, device="cpu", engine="eager")
    for name in ("", ".", "..", "a/b", "a\\b", "a\0b", "x" * 256, None, 3):
        with pytest.raises(parapolicy.CheckpointError, match="expected a plain name"):
            find_file(folder, name)


def test_hub_names(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def download(repository: str, **settings: Any) -> str:
        asked.update(settings, repository=repository)
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert (
        parapolicy.load_policy("hf://lerobot/diffusion_pusht@v1.0", device="cpu", engine="eager").spec.action_dim == 2
    )
    assert (asked["repository"], asked["revision"]) == ("lerobot/diffusion_pusht", "v1.0")
    assert not any(pattern.endswith(("*", ".py", ".pt", ".bin", ".ckpt")) for pattern in asked["allow_patterns"])
    assert hub.resolve("hf://owner/name").name == "pretrained_model"
    assert asked["revision"] is None
    for name in ("hf://", "hf://name", "hf://a/b/c", "hf://a/b@", "hf://a/../b", "hf://a/b@x..y", "hf://a b/c"):
        with pytest.raises(parapolicy.CheckpointError, match="expected hf://owner/name"):
            hub.resolve(name)


def test_a_hub_policy_that_is_not_there_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(parapolicy.CheckpointError, match="hf://nobody/nothing is neither in the cache"):
        hub.resolve("hf://nobody/nothing")
