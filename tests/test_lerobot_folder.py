"""LeRobot folders: what LeRobot itself answers, every layout, and a clear error for what is damaged or hostile."""

import json
import os
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import parapolicy
from parapolicy.checkpoint import hub, lerobot_folder
from parapolicy.checkpoint.folder_files import find_file
from parapolicy.checkpoint.lerobot_config import describe
from tests.helpers import some_observation
from tests.lerobot_folders import (
    lerobot_config,
    network_tensors,
    read_steps,
    statistics,
    step,
    write_folder,
    write_steps,
)
from tests.oracles import assert_answers, oracle_folder

MARKER = Path("/tmp/parapolicy-was-here")  # what the hostile processor file would make
PLAIN = ("pusht_keypoints", "compiled_keypoints", "old_keypoints", "v06_keypoints")
PACKED = ("pusht_image", "two_cameras_ddim10", "v06_two_cameras")
CAMERAS = {
    "observation.images.wrist": {"type": "VISUAL", "shape": [3, 48, 40]},
    "observation.images.front": {"type": "VISUAL", "shape": [3, 48, 40]},
    "observation.state": {"type": "STATE", "shape": [2]},
}


@pytest.mark.parametrize("name", PLAIN)
def test_low_dim_policies_answer_as_lerobot(name: str) -> None:
    folder = oracle_folder("lerobot")
    policy = parapolicy.load_policy(folder / name / "pretrained_model", "sequential", "cpu")
    assert_answers(policy, folder / f"{name}.npz")


@pytest.mark.parametrize("name", PACKED)
def test_image_policies_answer_as_lerobot(name: str, tmp_path: Path) -> None:
    folder = oracle_folder("lerobot")
    with tarfile.open(folder / f"{name}.tar.xz") as packed:
        packed.extractall(tmp_path, filter="data")
    policy = parapolicy.load_policy(tmp_path / name, "sequential", "cpu")
    assert policy.spec.control_hz is None
    assert_answers(policy, folder / f"{name}.npz")


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
    "config_not_json": "config.json is no JSON text",
    "config_huge_dims": "down_dims.1. is 2000000000",
    "state_file_parent": "policy_preprocessor.json names the file '../../outside.safetensors'",
    "state_file_absolute": "policy_preprocessor.json names the file '/etc/hostname'",
    "state_file_symlink": "step_3_normalizer_processor.safetensors is a link .* out of the folder",
    "weights_symlink": "model.safetensors is a link .* out of the folder",
    "processor_class_import": "subprocess.Popen.* No class that a file names is imported",
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
            parapolicy.load_policy(folder, device="cpu")
        assert str(folder) in str(caught.value), name
    policy = parapolicy.load_policy(hostile / "sound", "sequential", "cpu")
    assert_answers(policy, hostile / "sound.npz")
    assert not MARKER.exists()


def _restore_links(folder: Path) -> None:
    """A link that was copied as a small file with the target's name becomes one again."""
    for path in folder.glob("*.safetensors"):
        if not path.is_symlink() and path.stat().st_size < 100 and path.read_bytes().startswith(b"../"):
            target = path.read_text().strip()
            path.unlink()
            path.symlink_to(target)


def made_up(folder: Path, separate: bool = False, **changes: Any) -> tuple[Path, dict[str, Any], dict[str, Any]]:
    """A folder of 0.4 to 0.6, its statistics and its weights by our names."""
    config = lerobot_config(use_separate_rgb_encoder_per_camera=separate, **changes)
    values = statistics(config)
    own, theirs = network_tensors(describe(Path("config.json"), config).spec, separate)
    for name in [name for name in theirs if name.endswith("running_mean")]:
        theirs[name.replace("running_mean", "num_batches_tracked")] = torch.tensor(1000)
    if any(feature["type"] == "VISUAL" for feature in config["input_features"].values()):
        down, across = np.meshgrid(np.linspace(-1, 1, 2), np.linspace(-1, 1, 2), indexing="ij")
        grid = torch.tensor(np.stack((across.ravel(), down.ravel()), 1), dtype=torch.float32)
        for prefix in ("0.", "1.") if separate else ("",):
            theirs[f"diffusion.rgb_encoder.{prefix}pool.pos_grid"] = grid.clone()
    return write_folder(folder, config, theirs, values), values, own


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
    policy = parapolicy.load_policy(path, device="cpu")
    for key in ("observation.state", "observation.environment_state", "action"):
        own = {name.rsplit(".", 1)[1]: value for name, value in values.items() if name.startswith(f"{key}.")}
        x = torch.randn(5, len(own["min"]))
        expected = MAPS[mode](x, own)
        torch.testing.assert_close(policy.normalizer.normalize(key, x), expected)
        torch.testing.assert_close(policy.normalizer.unnormalize(key, expected), x, rtol=1e-5, atol=1e-5)


def test_weights_are_told_apart_and_the_order_is_state_then_environment(folder: Path, tmp_path: Path) -> None:
    path, _, own = made_up(tmp_path / "again", use_film_scale_modulation=False, noise_scheduler_type="DDPM")
    policy = parapolicy.load_policy(path, device="cpu")
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
    policy = parapolicy.load_policy(path, device="cpu")
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
    policy = parapolicy.load_policy(path, device="cpu")
    still, near = (policy.normalizer.normalize("observation.state", torch.tensor([x, 0.0]))[0] for x in (0.3, 0.4))
    assert still == -1
    np.testing.assert_allclose(near, 2 * (np.float32(0.4) - np.float32(0.3)) / 1e-8 - 1, rtol=1e-5)
    actions = policy.normalizer.unnormalize("action", torch.tensor([[-1.0, 0], [1, 0], [0.5, 0]]))
    np.testing.assert_allclose(actions[:, 0], 0.3, rtol=1e-6)
    parapolicy.save_policy(policy, tmp_path / "native")
    again = parapolicy.load_policy(tmp_path / "native", device="cpu")
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
    policy = parapolicy.load_policy(path, device="cpu")
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
    policy = parapolicy.load_policy(path, device="cpu")
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
    spec = parapolicy.load_policy(folder, device="cpu").spec
    assert list(spec.observation) == ["joints", "observation.environment_state"]


def test_averaged_weights_are_a_sibling(tmp_path: Path) -> None:
    path, _, own = made_up(tmp_path / "last" / "pretrained_model")
    with pytest.raises(parapolicy.CheckpointError, match="has no averaged weights: pretrained_model_ema is missing"):
        parapolicy.load_policy(path, device="cpu", ema=True)
    _, _, averaged = made_up(tmp_path / "last" / "pretrained_model_ema")
    for given in (path, tmp_path / "last"):
        for ema, expected in ((False, own), (True, averaged)):
            found = parapolicy.load_policy(given, device="cpu", ema=ema).network.state_dict()
            assert all(torch.equal(found[name], expected[name]) for name in expected)


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
    "negative eps": (edit("policy_preprocessor:3", eps=-1), "eps is -1"),
    "two names": (
        edit("policy_preprocessor:0", rename_map={"a": "observation.state", "b": "observation.state"}),
        "one name",
    ),
    "pipe for weights": (to_fifo("model.safetensors"), "model.safetensors is no regular file"),
    "pipe for statistics": (to_fifo("policy_preprocessor_step_4_normalizer_processor.safetensors"), "no regular file"),
    "buffers, too": (
        weights(lambda t: t.update({"normalize_inputs.buffer_observation_state.min": torch.zeros(2)})),
        "beside processor files",
    ),
    "compiled, too": (
        weights(lambda t: t.update({"diffusion.unet._orig_mod.final_conv.1.bias": torch.zeros(2)})),
        "holds a tensor twice",
    ),
    "integers": (
        weights(lambda t: t.update({"diffusion.unet.final_conv.1.bias": torch.zeros(2, dtype=torch.int64)})),
        "is of type I64",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named(folder: Path, damage: str) -> None:
    change, message = DAMAGES[damage]
    change(folder)
    with pytest.raises(parapolicy.CheckpointError, match=message) as caught:
        parapolicy.load_policy(folder, device="cpu")
    assert str(folder) in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_other_coordinates_are_refused(tmp_path: Path) -> None:
    path = made_up(tmp_path / "policy", input_features=CAMERAS)[0]
    weights(lambda t: t["diffusion.rgb_encoder.pool.pos_grid"].mul_(-1))(path)
    with pytest.raises(parapolicy.CheckpointError, match="pos_grid holds other coordinates"):
        parapolicy.load_policy(path, device="cpu")


def test_half_precision_weights_are_widened(folder: Path) -> None:
    weights(lambda t: t.update({name: value.bfloat16() for name, value in t.items()}))(folder)
    network = parapolicy.load_policy(folder, device="cpu").network
    assert {value.dtype for value in network.state_dict().values()} == {torch.float32}


def test_a_snapshot_of_the_hubs_cache_loads_and_no_other_link(folder: Path, tmp_path: Path) -> None:
    cache = tmp_path / "models--owner--name"
    snapshot = cache / "snapshots" / "0123abc"
    shutil.copytree(folder, cache / "blobs")
    snapshot.mkdir(parents=True)
    for file in folder.iterdir():
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    expected = parapolicy.load_policy(folder, device="cpu").network.state_dict()
    found = parapolicy.load_policy(snapshot, device="cpu").network.state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)

    elsewhere = tmp_path / "elsewhere"
    shutil.move(snapshot, elsewhere)  # beside no blobs
    for file in folder.iterdir():
        (elsewhere / file.name).unlink()
        (elsewhere / file.name).symlink_to(cache / "blobs" / file.name)
    with pytest.raises(parapolicy.CheckpointError, match="out of the folder"):
        parapolicy.load_policy(elsewhere, device="cpu")
    for name in ("", ".", "..", "a/b", "a\\b", "a\0b", "x" * 256, None, 3):
        with pytest.raises(parapolicy.CheckpointError, match="expected a plain name"):
            find_file(folder, name)


def test_hub_names(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def download(repository: str, **settings: Any) -> str:
        asked.update(settings, repository=repository)
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert parapolicy.load_policy("hf://lerobot/diffusion_pusht@v1.0", device="cpu").spec.action_dim == 2
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


def test_formats_are_told_apart_by_content(folder: Path, tmp_path: Path) -> None:
    native = parapolicy.load_policy(folder, device="cpu")
    parapolicy.save_policy(native, tmp_path / "native")
    assert lerobot_folder.recognises(folder)
    assert not lerobot_folder.recognises(tmp_path / "native")
    assert not lerobot_folder.recognises(tmp_path / "nowhere")
    again = parapolicy.load_policy(tmp_path / "native", device="cpu")
    observation = some_observation(native.spec)
    assert (again.predict(observation).actions == native.predict(observation).actions).all()
