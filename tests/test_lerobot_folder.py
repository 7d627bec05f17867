"""LeRobot folders: what LeRobot itself answers, and every layout."""

import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import parapolicy
from parapolicy.checkpoint import lerobot_folder
from parapolicy.checkpoint.lerobot_config import describe
from tests.helpers import some_observation
from tests.lerobot_folders import CAMERAS, FEATURES, lerobot_config, made_up, read_steps, step, write_steps
from tests.oracles import assert_answers, oracle_folder

PLAIN = ("pusht_keypoints", "compiled_keypoints", "old_keypoints", "v06_keypoints")
PACKED = ("pusht_image", "two_cameras_ddim10", "v06_two_cameras")


@pytest.mark.parametrize("name", PLAIN)
def test_low_dim_policies_answer_as_lerobot(name: str) -> None:
    folder = oracle_folder("lerobot")
    policy = parapolicy.load_policy(folder / name / "pretrained_model", "sequential", "cpu", engine="eager")
    assert_answers(policy, folder / f"{name}.npz")


@pytest.mark.parametrize("name", PACKED)
def test_image_policies_answer_as_lerobot(name: str, tmp_path: Path) -> None:
    folder = oracle_folder("lerobot")
    with tarfile.open(folder / f"{name}.tar.xz") as packed:
        packed.extractall(tmp_path, filter="data")
    policy = parapolicy.load_policy(tmp_path / name, "sequential", "cpu", engine="eager")
    assert policy.spec.control_hz is None
    assert_answers(policy, folder / f"{name}.npz")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return made_up(tmp_path / "pretrained_model")[0]


MAPS: dict[str, Callable[..., Any]] = {
    "MIN_MAX": lambda x, v: 2 * (x - v["min"]) / (v["max"] - v["min"]) - 1,
    "QUANTILES": lambda x, v: 2 * (x - v["q01"]) / (v["q99"] - v["q01"]) - 1,
    "QUANTILE10": lambda x, v: 2 * (x - v["q10"]) / (v["q90"] - v["q10"]) - 1,
    "MEAN_STD": lambda x, v: (x - v["mean"]) / v["std"],
    "IDENTITY": lambda x, v: x,
}


@pytest.mark.parametrize("mode", MAPS)
def test_every_mode_normalises_as_the_processor_says(tmp_path: Path, mode: str) -> None:
    mapping = {"STATE": mode, "ENV": mode, "ACTION": mode}
    path, values, _ = made_up(tmp_path / "policy", normalization_mapping=mapping)
    policy = parapolicy.load_policy(path, device="cpu", engine="eager")
    for key in ("observation.state", "observation.environment_state", "action"):
        own = {name.rsplit(".", 1)[1]: value for name, value in values.items() if name.startswith(f"{key}.")}
        x = torch.randn(5, len(own["min"]))
        expected = MAPS[mode](x, own)
        torch.testing.assert_close(policy.normalizer.normalize(key, x), expected)
        torch.testing.assert_close(policy.normalizer.unnormalize(key, expected), x, rtol=1e-5, atol=1e-5)


def test_weights_are_told_apart_and_the_order_is_state_then_environment(folder: Path, tmp_path: Path) -> None:
    path, _, own = made_up(tmp_path / "again", use_film_scale_modulation=False, noise_scheduler_type="DDPM")
    policy = parapolicy.load_policy(path, device="cpu", engine="eager")
    assert list(policy.spec.observation) == ["observation.state", "observation.environment_state"]
    assert policy.schedule.solver == "ddpm"
    assert len(policy.schedule) == 5
    assert policy.network.state_dict().keys() == own.keys()
    for name, value in policy.network.state_dict().items():
        assert torch.equal(value, own[name]), name
    assert policy.network.get_submodule("final_conv.0.block.1").num_groups == 8  # whatever n_groups is
    assert np.isfinite(policy.predict(some_observation(policy.spec)).actions).all()


@pytest.mark.parametrize("separate", [True, False])
def test_cameras_keep_the_order_of_the_file(tmp_path: Path, separate: bool) -> None:
    changes = {"resize_shape": [52, 44], "crop_ratio": 0.9, "use_group_norm": not separate}
    path, values, own = made_up(tmp_path / "policy", separate, input_features=CAMERAS, **changes)
    policy = parapolicy.load_policy(path, device="cpu", engine="eager")
    wrist, front = "observation.images.wrist", "observation.images.front"
    assert list(policy.spec.observation) == ["observation.state", wrist, front]
    camera = policy.spec.network["encoder"]["cameras"][wrist]
    assert (camera["resize"], camera["crop"], camera["antialias"]) == ([52, 44], [46, 39], True)
    for name, value in policy.network.state_dict().items():
        assert torch.equal(value, own[name]), name
    picture = torch.rand(2, 3, 48, 40)
    expected = (picture - values[f"{wrist}.mean"]) / values[f"{wrist}.std"]
    torch.testing.assert_close(policy.normalizer.normalize(wrist, picture), expected)
    pictures = {key: np.full((2, 48, 40, 3), 100, np.uint8) for key in (wrist, front)}
    assert np.isfinite(policy.predict({"observation.state": np.zeros((2, 2)), **pictures}).actions).all()


def test_a_crop_without_resizing_is_the_files_own(tmp_path: Path) -> None:
    def crop(**changes: Any) -> Any:
        config = lerobot_config(input_features=CAMERAS, **changes)
        return describe(Path("config.json"), config).spec.network["encoder"]["cameras"]["observation.images.front"][
            "crop"
        ]

    assert crop(crop_shape=[40, 32], crop_ratio=0.5) == [40, 32]
    assert crop(crop_shape=[40, 32], resize_shape=[40, 40]) is None  # a ratio of 1 turns it off


def test_a_number_that_never_moved_is_seen_as_lerobot_sees_it(tmp_path: Path) -> None:
    path, values, _ = made_up(tmp_path / "policy")
    for value in ("observation.state", "action"):
        values[f"{value}.max"][0] = values[f"{value}.min"][0] = 0.3
    for name in ("policy_preprocessor_step_4_normalizer", "policy_postprocessor_step_0_unnormalizer"):
        save_file(values, path / f"{name}_processor.safetensors")
    policy = parapolicy.load_policy(path, device="cpu", engine="eager")
    still, near = (policy.normalizer.normalize("observation.state", torch.tensor([x, 0.0]))[0] for x in (0.3, 0.4))
    assert still == -1
    np.testing.assert_allclose(near, 2 * (np.float32(0.4) - np.float32(0.3)) / 1e-8 - 1, rtol=1e-5)
    actions = policy.normalizer.unnormalize("action", torch.tensor([[-1.0, 0], [1, 0], [0.5, 0]]))
    np.testing.assert_allclose(actions[:, 0], 0.3, rtol=1e-6)
    parapolicy.save_policy(policy, tmp_path / "native")
    again = parapolicy.load_policy(tmp_path / "native", device="cpu", engine="eager")
    observation = some_observation(policy.spec)
    assert (again.predict(observation).actions == policy.predict(observation).actions).all()


def to_former(path: Path, values: dict[str, Any], mapping: dict[str, str], clone: bool = True) -> None:
    """Make the folder one of LeRobot up to 0.3.3."""
    weights = load_file(path / "model.safetensors")
    for key, mode in mapping.items():
        for name in ("min", "max") if mode == "MIN_MAX" else ("mean", "std"):
            places = ("normalize_targets", "unnormalize_outputs") if key == "action" else ("normalize_inputs",)
            for place in places[: 2 if clone else 1]:
                weights[f"{place}.buffer_{key.replace('.', '_')}.{name}"] = values[f"{key}.{name}"].clone()
    save_file(weights, path / "model.safetensors")
    for file in path.glob("policy_*"):
        file.unlink()


@pytest.mark.parametrize("clone", [True, False])  # False: safetensors dropped the second name of shared memory
def test_statistics_among_the_weights(tmp_path: Path, clone: bool) -> None:
    path, values, _ = made_up(tmp_path / "policy")
    values["observation.state.max"][0] = values["observation.state.min"][0] + 1e-6
    to_former(path, values, {"observation.state": "MIN_MAX", "action": "MIN_MAX"}, clone)
    policy = parapolicy.load_policy(path, device="cpu", engine="eager")
    low, high = values["observation.state.min"], values["observation.state.max"]
    x = low + 0.25 * (high - low)
    expected = (x - low) / (high - low + 1e-8) * 2 - 1
    torch.testing.assert_close(policy.normalizer.normalize("observation.state", x), expected)
    assert torch.equal(policy.normalizer.normalize("observation.environment_state", torch.ones(3)), torch.ones(3))
    low, high = values["action.min"], values["action.max"]
    torch.testing.assert_close(policy.normalizer.unnormalize("action", torch.ones(2)), high)


def test_the_hub_layout_of_2024(tmp_path: Path) -> None:
    path, values, _ = made_up(tmp_path / "policy")
    to_former(
        path,
        values,
        {"observation.state": "MIN_MAX", "observation.environment_state": "MEAN_STD", "action": "MEAN_STD"},
    )
    config = json.loads((path / "config.json").read_text())
    for name in ("type", "input_features", "output_features", "normalization_mapping", "resize_shape", "crop_ratio"):
        del config[name]
    config |= {
        "input_shapes": {"observation.state": [2], "observation.environment_state": [3]},
        "output_shapes": {"action": [2]},
        "input_normalization_modes": {"observation.state": "min_max", "observation.environment_state": "mean_std"},
        "output_normalization_modes": {"action": "mean_std"},
    }
    (path / "config.json").write_text(json.dumps(config, sort_keys=True))
    policy = parapolicy.load_policy(path, device="cpu", engine="eager")
    mean, std = values["action.mean"], values["action.std"]
    torch.testing.assert_close(policy.normalizer.unnormalize("action", torch.ones(2)), std + mean)
    mean, std = values["observation.environment_state.mean"], values["observation.environment_state.std"]
    found = policy.normalizer.normalize("observation.environment_state", mean + std)
    torch.testing.assert_close(found, torch.ones(3))


def test_observations_are_given_under_the_names_before_renaming(folder: Path) -> None:
    steps = read_steps(folder, "policy_preprocessor")
    steps[0]["config"]["rename_map"] = {"joints": "observation.state", "elsewhere": "other"}
    steps.insert(1, step("tokenizer_processor", {"max_length": 48}))
    write_steps(folder, "policy_preprocessor", *steps)
    spec = parapolicy.load_policy(folder, device="cpu", engine="eager").spec
    assert list(spec.observation) == ["joints", "observation.environment_state"]


def test_inputs_that_the_network_never_sees_are_named(tmp_path: Path) -> None:
    features = FEATURES | {"observation.velocity": {"type": "STATE", "shape": [7]}}
    policy = parapolicy.load_policy(
        made_up(tmp_path / "policy", input_features=features)[0], device="cpu", engine="eager"
    )
    assert "observation.velocity" not in policy.spec.observation
    assert "observation.velocity" in policy.spec.provenance["warnings"][0]


def test_averaged_weights_are_a_sibling(tmp_path: Path) -> None:
    path, _, own = made_up(tmp_path / "last" / "pretrained_model")
    with pytest.raises(parapolicy.CheckpointError, match="has no averaged weights: pretrained_model_ema is missing"):
        parapolicy.load_policy(path, device="cpu", ema=True, engine="eager")
    _, _, averaged = made_up(tmp_path / "last" / "pretrained_model_ema")
    for given in (path, tmp_path / "last"):
        for ema, expected in ((False, own), (True, averaged)):
            found = parapolicy.load_policy(given, device="cpu", ema=ema, engine="eager").network.state_dict()
            assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_half_precision_weights_are_widened(folder: Path) -> None:
    path = folder / "model.safetensors"
    save_file({name: value.bfloat16() for name, value in load_file(path).items()}, path)
    network = parapolicy.load_policy(folder, device="cpu", engine="eager").network
    assert {value.dtype for value in network.state_dict().values()} == {torch.float32}


def test_formats_are_told_apart_by_content(folder: Path, tmp_path: Path) -> None:
    native = parapolicy.load_policy(folder, device="cpu", engine="eager")
    parapolicy.save_policy(native, tmp_path / "native")
    assert lerobot_folder.recognises(folder)
    assert not lerobot_folder.recognises(tmp_path / "native")
    assert not lerobot_folder.recognises(tmp_path / "nowhere")
    again = parapolicy.load_policy(tmp_path / "native", device="cpu", engine="eager")
    observation = some_observation(native.spec)
    assert (again.predict(observation).actions == native.predict(observation).actions).all()
