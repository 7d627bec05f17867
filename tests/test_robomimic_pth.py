"""robomimic checkpoints: what robomimic itself answers, made-up files, and a clear error for hostile ones."""

import copy
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import parapolicy
from parapolicy.checkpoint import robomimic_pth
from parapolicy.networks import build_network
from parapolicy.spec import PolicySpec
from tests.helpers import DDPM_CONFIG, some_observation
from tests.oracles import assert_answers, oracle_folder

MARKER = Path("/tmp/parapolicy-was-here")
LAYERS = {"conv1": 0, "bn1": 1, "layer1": 4, "layer2": 5, "layer3": 6, "layer4": 7}
CAMERAS = ["front", "hand"]


def unpacked(path: Path, folder: Path) -> Path:
    if path.suffix != ".xz":
        return path
    target = folder / path.stem
    target.write_bytes(lzma.decompress(path.read_bytes()))
    return target


@pytest.mark.parametrize("name", ["lift_lowdim.pth", "lift_lowdim_no_ema_ddim10.pth", "lift_image.pth.xz"])
def test_policies_answer_as_robomimic(name: str, tmp_path: Path) -> None:
    folder = oracle_folder("robomimic")
    policy = parapolicy.load_policy(unpacked(folder / name, tmp_path), "sequential", "cpu", engine="eager")
    assert policy.spec.control_hz == 20
    assert_answers(policy, folder / f"{name.split('.')[0]}.npz")


MATTERS = {
    "pickle_runs_code": "the global '(posix|os).system'",
    "pickle_unknown_global": "the global 'pathlib.PosixPath'",
    "other_algorithm": "algo_name is 'bc'",
    "transformer": "algo.unet.enabled is False",
    "ema_wrong_shape": "mid_modules.0.blocks.0.block.0.weight has shape .15, 16, 3., expected .16, 16, 3.",
    "ema_missing_weight": "missing tensors .'policy.noise_pred_net.mid_modules.0.blocks.0.block.0.weight'",
    "nan_weight": "mid_modules.0.blocks.0.block.0.weight holds a value that is not finite",
    "statistics_lost": "action_normalization_stats are missing",
    "statistics_wrong_shape": "action_normalization_stats have sizes {'actions': 3}, expected a sum of 4",
    "scale_zero": "action_normalization_stats.actions.scale holds a 0",
    "observation_statistics_lost": "obs_normalization_stats are missing",
    "shape_metadata_against_weights": "expected a sum of 5, ac_dim of shape_metadata",
    "config_not_json": "its config is not a JSON text",
    "no_observation_key": "observes .'robot0_joint_pos'., but shape_metadata has",
    "truncated": "truncated.pth",
}


def test_hostile_files_are_refused_by_name(tmp_path: Path) -> None:
    hostile = oracle_folder("robomimic") / "hostile"
    assert json.loads((hostile / "cases.json").read_text()).keys() == MATTERS.keys()
    for name, matter in MATTERS.items():
        path = unpacked(hostile / f"{name}.pth.xz", tmp_path)
        with pytest.raises(parapolicy.CheckpointError, match=matter) as caught:
            parapolicy.load_policy(path, device="cpu", engine="eager")
        assert str(path) in str(caught.value), name
    policy = parapolicy.load_policy(unpacked(hostile / "sound.pth.xz", tmp_path), "sequential", "cpu", engine="eager")
    assert_answers(policy, hostile / "sound.npz")
    assert not MARKER.exists()


def robomimic_config() -> dict[str, Any]:
    """The parts of a config that play a role, and sizes that play none."""
    return {
        "algo_name": "diffusion_policy",
        "algo": {
            "horizon": {"observation_horizon": 2, "action_horizon": 4, "prediction_horizon": 8},
            "unet": {"enabled": True, "diffusion_step_embed_dim": 256, "down_dims": [256, 512, 1024]},
            "ema": {"enabled": True, "power": 0.75},
            "ddpm": {
                "enabled": True,
                "num_train_timesteps": 20,
                "num_inference_timesteps": 6,
                "beta_schedule": "squaredcos_cap_v2",
                "clip_sample": True,
                "prediction_type": "epsilon",
            },
            "ddim": {"enabled": False},
        },
        "observation": {
            "modalities": {"obs": {"low_dim": ["pose", "arm"], "rgb": [], "depth": [], "scan": []}},
            "encoder": {
                "low_dim": {"core_class": None},
                "rgb": {
                    "core_class": "VisualCore",
                    "core_kwargs": {"feature_dimension": 6},
                    "obs_randomizer_class": ["ColorRandomizer", "CropRandomizer"],
                    "obs_randomizer_kwargs": [{}, {"crop_height": 33, "crop_width": 36, "num_crops": 2}],
                },
            },
        },
        "train": {
            "hdf5_normalize_obs": False,
            "action_keys": ["actions"],
            "action_config": {"actions": {"normalization": "min_max"}},
        },
    }


def random_weights(observation: dict[str, Any], encoder: dict[str, Any] | None, action_dim: int) -> dict[str, Any]:
    """A network's, under robomimic's names."""
    network: dict[str, Any] = {"name": "unet1d", "diffusion_step_embed_dim": 8, "down_dims": [16, 24], "kernel_size": 3}
    network |= {"encoder": encoder} if encoder else {}
    spec = PolicySpec(observation, 2, 8, 4, action_dim, network, DDPM_CONFIG, None)
    found: dict[str, Any] = {}
    for name, value in build_network(spec).state_dict().items():
        value = value + 0.1 * torch.randn(value.shape)
        if not name.startswith("encoder."):
            found[f"policy.noise_pred_net.{name}"] = value
            continue
        _, _, number, part, rest = name.split(".", 4)
        prefix = f"policy.obs_encoder.nets.obs.obs_nets.{CAMERAS[int(number)]}."
        if part == "linear":
            found[f"{prefix}nets.3.{rest}"] = value
        elif part == "pool":
            value = torch.full((1,), 0.7) if rest == "temperature" else value
            for place in ("pool.", "nets.1."):
                found[prefix + place + rest.replace("conv", "nets")] = value
        else:
            layer, rest = rest.split(".", 1)
            for place in ("backbone.nets.", "nets.0.nets."):
                found[f"{prefix}{place}{LAYERS[layer]}.{rest}"] = value
    for camera in CAMERAS if encoder else ():
        prefix = f"policy.obs_encoder.nets.obs.obs_nets.{camera}."
        across, down = np.meshgrid(np.linspace(-1, 1, 2), np.linspace(-1, 1, 2))
        for place in ("pool.", "nets.1."):
            found[f"{prefix}{place}pos_x"] = torch.tensor(across.reshape(1, -1), dtype=torch.float32)
            found[f"{prefix}{place}pos_y"] = torch.tensor(down.reshape(1, -1), dtype=torch.float32)
    return found


def low_dim() -> dict[str, Any]:
    """What a checkpoint of robomimic holds."""
    observation = {"arm": (3,), "pose": (4,)}
    return {
        "model": {
            "nets": random_weights(observation, None, 5),
            "ema": random_weights(observation, None, 5),
            "optimizers": {},
            "lr_schedulers": {},
        },
        "config": robomimic_config(),
        "algo_name": "diffusion_policy",
        "env_metadata": {"env_name": "Lift", "env_kwargs": {"control_freq": 10}},
        "shape_metadata": {"ac_dim": 5, "all_shapes": {"arm": [3], "pose": [4], "unused": [2]}},
        "variable_state": {"epoch": np.int64(3), "best": np.float32(0.5)},
        "action_normalization_stats": {"actions": {"scale": [[1.0, 2, 3, 4, 5]], "offset": [[0.0, 1, 2, 3, 4]]}},
    }


def save(payload: dict[str, Any], path: Path) -> Path:
    torch.save({**payload, "config": json.dumps(payload["config"])}, path)
    return path


def load(payload: dict[str, Any], folder: Path) -> parapolicy.Policy:
    return parapolicy.load_policy(save(payload, folder / "model.pth"), "sequential", "cpu", engine="eager")


def test_averaged_weights_act_and_sizes_come_from_the_tensors(tmp_path: Path) -> None:
    payload = low_dim()
    policy = load(payload, tmp_path)
    assert policy.spec.network["down_dims"] == [16, 24]
    assert list(policy.spec.observation) == ["arm", "pose"]  # the order of all_shapes
    assert policy.spec.control_hz == 10
    for name, value in policy.network.state_dict().items():
        assert torch.equal(value, payload["model"]["ema"][f"policy.noise_pred_net.{name}"])
    # diffusers 0.11.1 takes 0, 3, … 18 for 6 of 20 steps
    assert policy.schedule.timesteps.tolist() == [18, 15, 12, 9, 6, 3, 0]
    actions = policy.normalizer.unnormalize("action", torch.ones(5))
    assert actions.tolist() == pytest.approx([1, 3, 5, 7, 9])
    assert np.isfinite(policy.predict(some_observation(policy.spec)).actions).all()


def test_observations_are_normalised(tmp_path: Path) -> None:
    payload = low_dim()
    payload["config"]["train"]["hdf5_normalize_obs"] = True
    values = {"arm": ([1.0, 2, 3], [0.5, 1, 2]), "pose": ([0.0] * 4, [1.0] * 4)}
    payload["obs_normalization_stats"] = {k: {"offset": [o], "scale": [s]} for k, (o, s) in values.items()}
    policy = load(payload, tmp_path)
    assert policy.normalizer.normalize("arm", torch.tensor([2.0, 3, 5])).tolist() == [2, 1, 1]
    payload["obs_normalization_stats"]["arm"]["offset"] = np.array([[1.0, 2, 3]])  # an array is as good
    assert load(payload, tmp_path).normalizer.normalize("arm", torch.tensor([2.0, 3, 5])).tolist() == [2, 1, 1]


def test_rotations_of_action_dictionaries_are_converted(tmp_path: Path) -> None:
    payload = low_dim()
    names = {"position": 3, "rotation": 6, "gripper": 1}
    for part in ("nets", "ema"):
        payload["model"][part] = random_weights({"arm": (3,), "pose": (4,)}, None, 10)
    payload["shape_metadata"]["ac_dim"] = 10
    payload["action_normalization_stats"] = {k: {"scale": [[2.0] * n], "offset": [[0.5] * n]} for k, n in names.items()}
    train = payload["config"]["train"]
    train["action_keys"] = list(names)
    train["action_config"] = {
        "position": {"normalization": "min_max"},
        "rotation": {"format": "rot_6d"},
        "gripper": {},
    }
    policy = load(payload, tmp_path)
    chunk = policy.predict(some_observation(policy.spec))
    assert chunk.actions.shape == (4, 7)
    np.testing.assert_allclose(chunk.actions[:, :3], chunk.trajectory[1:5, :3])
    assert [part["convert"] for part in policy.spec.action_parts] == [None, "axis_angle", None]
    train["action_config"]["rotation"]["convert_at_runtime"] = "rot_euler"
    assert load(payload, tmp_path).spec.action_parts[1]["convert"] == "euler"
    train["action_config"]["rotation"]["convert_at_runtime"] = "quat"
    with pytest.raises(parapolicy.CheckpointError, match="convert_at_runtime of rotation"):
        load(payload, tmp_path)


def images() -> dict[str, Any]:
    """Two cameras of 44 x 42 pixels, cropped to 33 x 36: the margins' halves 5.5 and 3 are rounded down."""
    payload = low_dim()
    camera = {"norm": "group", "crop": [33, 36], "keypoints": 4, "features": 6}
    observation = {
        "arm": (3,),
        **{key: parapolicy.Feature((44, 42, 3), "image") for key in CAMERAS},
        "pose": (4,),
    }
    payload["model"]["ema"] = random_weights(observation, {"cameras": dict.fromkeys(CAMERAS, camera)}, 5)
    payload["model"]["nets"] = {}
    payload["config"]["observation"]["modalities"]["obs"]["rgb"] = ["hand", "front"]
    payload["shape_metadata"]["all_shapes"] = {"arm": [3], "front": [3, 44, 42], "hand": [3, 44, 42], "pose": [4]}
    return payload


def test_cameras_are_in_the_order_of_the_shapes(tmp_path: Path) -> None:
    payload = images()
    policy = load(payload, tmp_path)
    assert list(policy.spec.observation) == ["arm", "front", "hand", "pose"]
    pictures = np.random.default_rng(0).integers(0, 256, (2, 44, 42, 3), dtype=np.uint8)
    observation = {"arm": np.zeros((2, 3)), "pose": np.zeros((2, 4)), "front": pictures, "hand": pictures}
    first = policy.predict(observation).actions
    outside = pictures.copy()
    outside[:, :5], outside[:, 38:], outside[:, :, :3], outside[:, :, 39:] = 0, 0, 0, 0
    np.testing.assert_array_equal(policy.predict({**observation, "hand": outside}).actions, first)
    outside[:, 5] = 0
    assert (policy.predict({**observation, "hand": outside}).actions != first).any()
    encoder = policy.network.get_submodule("encoder.cameras.1")
    assert encoder.get_buffer("pool.temperature") == pytest.approx(0.7)
    name = "policy.obs_encoder.nets.obs.obs_nets.hand.nets.0.nets.0.weight"
    assert torch.equal(encoder.get_parameter("backbone.conv1.weight"), payload["model"]["ema"][name])


def test_tensors_that_stand_twice_must_be_equal(tmp_path: Path) -> None:
    payload = images()
    weights = payload["model"]["ema"]
    name = "policy.obs_encoder.nets.obs.obs_nets.hand.nets.0.nets.0.weight"
    weights[name] = weights[name].clone()
    load(payload, tmp_path)
    weights[name][0, 0, 0, 0] += 1
    with pytest.raises(parapolicy.CheckpointError, match=r"hand.nets.0.nets.0.weight differs from .*hand.backbone"):
        load(payload, tmp_path)


def setting(*path: str, to: Any) -> Callable[[dict[str, Any]], None]:
    """A change of the payload at a path of keys; ... takes one out."""

    def change(payload: dict[str, Any]) -> None:
        inner = payload
        for name in path[:-1]:
            inner = inner[name]
        if to is ...:
            del inner[path[-1]]
        else:
            inner[path[-1]] = to

    return change


ALGO, TRAIN, RGB = ("config", "algo"), ("config", "train"), ("config", "observation", "encoder", "rgb")
DAMAGES: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "no averaged weights": (setting("model", "ema", to=None), "ema.enabled is True, but the file has no averaged"),
    "averaged weights not asked for": (setting(*ALGO, "ema", "enabled", to=False), "the file has averaged weights"),
    "no solver": (setting(*ALGO, "ddpm", "enabled", to=False), "ddpm.enabled is False, and ddim is not"),
    "no horizon": (setting(*ALGO, "horizon", "action_horizon", to=...), "horizon.action_horizon is missing"),
    "long actions": (setting(*ALGO, "horizon", "action_horizon", to=8), "n_action_steps is 8"),
    "other prediction": (setting(*ALGO, "ddpm", "prediction_type", to="flow"), "prediction_type is 'flow'"),
    "depth": (setting("config", "observation", "modalities", "obs", "depth", to=["arm"]), "are depth observations"),
    "encoded numbers": (setting("config", "observation", "encoder", "low_dim", "core_class", to="MLP"), "is 'MLP'"),
    "normalised pictures": (setting(*TRAIN, "hdf5_normalize_obs", to=True), "robomimic itself cannot run"),
    "other core": (setting(*RGB, "core_class", to="ViT"), "core_class is 'ViT'"),
    "other backbone": (setting(*RGB, "core_kwargs", "backbone_class", to="R3MConv"), "backbone_class is 'R3MConv'"),
    "other pool": (setting(*RGB, "core_kwargs", "pool_class", to=None), "pool_class is None"),
    "coordinates": (setting(*RGB, "core_kwargs", "backbone_kwargs", to={"input_coord_conv": True}), "input_coord_conv"),
    "variance": (setting(*RGB, "core_kwargs", "pool_kwargs", to={"output_variance": True}), "output_variance is True"),
    "other randomizer": (setting(*RGB, "obs_randomizer_class", to="Cutout"), "obs_randomizer_class is 'Cutout'"),
    "position": (setting(*RGB, "obs_randomizer_kwargs", to=[{}, {"pos_enc": True}]), "pos_enc is True"),
    "large crop": (setting(*RGB, "obs_randomizer_kwargs", to=[{}, {"crop_height": 90, "crop_width": 9}]), "crop is"),
    "other dimension": (setting("shape_metadata", "ac_dim", to=6), "expected a sum of 6"),
    "no statistics": (setting("action_normalization_stats", to={}), "have sizes {'actions': 0}"),
    "odd statistics": (
        setting("action_normalization_stats", "actions", "scale", to=[[1.0, 2, 3, "4", 5]]),
        "scale is not a list of numbers",
    ),
    "unexpected statistics": (setting("obs_normalization_stats", to={}), "obs_normalization_stats are there"),
    "empty weights": (setting("model", "ema", to={}), "is missing or has shape"),
    "no model": (setting("model", to=3), "its model has no 'nets'"),
    "gray pictures": (setting("shape_metadata", "all_shapes", "hand", to=[1, 44, 42]), "hand is rgb with shape"),
    "half a picture": (setting("shape_metadata", "all_shapes", "hand", to=[3, 20, 42]), "crop is"),
}


@pytest.fixture(scope="module")
def with_images() -> dict[str, Any]:
    torch.manual_seed(0)
    return images()


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named(tmp_path: Path, with_images: dict[str, Any], damage: str) -> None:
    change, message = DAMAGES[damage]
    payload = {key: value if key == "model" else copy.deepcopy(value) for key, value in with_images.items()}
    payload["model"] = dict(payload["model"])
    change(payload)
    with pytest.raises(parapolicy.CheckpointError, match=message) as caught:
        load(payload, tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_formats_are_told_apart_by_content(tmp_path: Path) -> None:
    path = save(low_dim(), tmp_path / "any.name")
    assert robomimic_pth.recognises(path)
    assert not robomimic_pth.recognises(tmp_path)
    assert not robomimic_pth.recognises(tmp_path / "nowhere")
    other = tmp_path / "other.pth"
    torch.save({"state_dict": {}}, other)
    assert not robomimic_pth.recognises(other)
    other.write_bytes(path.read_bytes()[:1000])
    assert not robomimic_pth.recognises(other)
