"""Checkpoints of the Universal Manipulation Interface, made up from our own networks: every option, and refusals."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

import parapolicy
from parapolicy import CheckpointError, Feature
from parapolicy.checkpoint import read_checkpoint
from parapolicy.networks import Network
from parapolicy.networks.timm_encoder import AGGREGATIONS
from tests import stanford_files as files
from tests.stanford_files import SEQUENCE, assert_same

TINY = {
    "name": "vit", "patch": 16, "width": 192, "depth": 2, "heads": 3, "hidden": 64, "eps": 1e-6, "activation": "gelu",
    "norm_pre": False, "layer_scale": False, "registers": 0, "place_class": True,
}  # fmt: skip
CLIP = {**TINY, "norm_pre": True, "eps": 1e-5}
DINO = {**TINY, "layer_scale": True}
RESNET = {"name": "resnet18", "norm": "group", "levels": 3}
CROP = {"type": "RandomCrop", "ratio": 0.95}
JITTER = {"_target_": "torchvision.transforms.ColorJitter", "brightness": 0.3, "contrast": [0.6, 1.4], "hue": 0.08}
TURN = {"_target_": "torchvision.transforms.RandomRotation", "degrees": [-5.0, 5.0], "expand": False}
# (shape, steps) as shape_meta has them; cameras and keys are sorted apart.
SEEN = {
    "robot0_gripper_width": ([1], 1), "camera1_rgb": ([3, 48, 48], 1), "robot0_eef_pos": ([3], 2),
    "camera0_rgb": ([3, 48, 48], 2),
}  # fmt: skip
OBSERVATION = {
    "camera0_rgb": Feature((48, 48, 3), "image", 2), "camera1_rgb": Feature((48, 48, 3), "image", 1),
    "robot0_eef_pos": Feature((3,), steps=2), "robot0_gripper_width": Feature((1,), steps=1),
}  # fmt: skip
CAMERAS = ["camera0_rgb", "camera1_rgb"]


def config_of(model_name: str, **encoder: Any) -> dict[str, Any]:
    entries: dict[str, Any] = {
        key: {
            "shape": shape, "horizon": steps, "type": "rgb" if len(shape) == 3 else "low_dim", "down_sample_steps": 3,
            "ignore_by_policy": False, "latency_steps": "${eval:'(${a} - ${b}) * ${c}'}",
        }
        for key, (shape, steps) in SEEN.items()
    }  # fmt: skip
    policy = {
        "_target_": "diffusion_policy.policy.diffusion_unet_timm_policy.DiffusionUnetTimmPolicy",
        "shape_meta": {"obs": entries, "action": {"shape": [10], "horizon": 8, "down_sample_steps": 3}},
        "noise_scheduler": {**files.DDIM, "_target_": "diffusers.DDIMScheduler", "num_train_timesteps": 50},
        "obs_encoder": {
            "_target_": "diffusion_policy.model.vision.timm_obs_encoder.TimmObsEncoder", "model_name": model_name,
            "pretrained": False, "frozen": False, "global_pool": "", "transforms": [CROP, JITTER],
            "use_group_norm": True, "share_rgb_model": False, "imagenet_norm": True, "downsample_ratio": 32,
            "feature_aggregation": "attention_pool_2d", "position_encording": "sinusoidal", **encoder,
        },
        "num_inference_steps": 16, "input_pertub": 0.1, "train_diffusion_n_samples": 1,
        **{k: v for k, v in files.UNET.items() if k != "name"},
    }  # fmt: skip
    poses = {"obs_pose_repr": "relative", "action_pose_repr": "relative"}
    task = {"name": "umi", "pose_repr": poses}
    return copy.deepcopy({"policy": policy, "training": {"use_ema": True}, "task": task, "n_action_steps": 8})


def made_up(
    backbone: dict[str, Any], aggregation: str | None = None, shared: bool = False, pictures: Any = None
) -> tuple[Network, dict[str, torch.Tensor]]:
    """A network and the state dict that the published code would save of it."""
    camera = {"encoder": "timm", "backbone": backbone, "aggregation": aggregation}
    camera |= {"crop": [45, 45], "resize": [48, 48], "antialias": True} if pictures is None else pictures
    settings = {"cameras": dict.fromkeys(CAMERAS, camera), "shared": shared, "layout": "key"}
    network = {**files.UNET, "encoder": settings}
    _, built = files.network_of(network, OBSERVATION, action_dim=10, n_action_steps=8, first_action=0)
    own = built.state_dict()
    heads = "encoder.cameras.0.aggregation."
    for name in [name for name in own if ".aggregation." in name]:  # one head for all cameras
        own[name].copy_(own[heads + name.partition(".aggregation.")[2]])
    state = files.model_state(built) | files.normaliser_state(
        robot0_gripper_width=1, robot0_eef_pos=3, action=10, ignored=2
    )
    state |= {"obs_encoder._dummy_variable": torch.zeros(0)}
    for camera_key in CAMERAS:
        at = f"normalizer.params_dict.{camera_key}"
        state |= {f"{at}.scale": torch.ones(1), f"{at}.offset": torch.zeros(1)}
        number = 0 if shared else CAMERAS.index(camera_key)
        for name, value in own.items():
            prefix, _, rest = name.partition(".backbone.")
            if prefix == f"encoder.cameras.{number}":
                part, _, deeper = rest.partition(".")
                rest = f"{SEQUENCE[part]}.{deeper}" if backbone["name"] != "vit" else rest
                state[f"obs_encoder.key_model_map.{camera_key}.{rest}"] = value.clone()
                if rest.endswith("running_var"):
                    count = rest.replace("running_var", "num_batches_tracked")
                    state[f"obs_encoder.key_model_map.{camera_key}.{count}"] = torch.tensor(5)
    names = {"linear.weight": "attention.0.weight", "factors": "spatial_embedding"}
    state |= {
        f"obs_encoder.{names.get(rest, f'attention_pool_2d.{rest}')}": value.clone()
        for name, value in own.items()
        if (rest := name.removeprefix(heads)) != name
    }
    return built, state


@pytest.mark.parametrize(
    ("model_name", "backbone"),
    [
        ("vit_tiny_patch16_48.augreg_in21k", TINY),
        ("vit_tiny_patch16_clip_48.openai", CLIP),
        ("vit_tiny_patch16_clip_quickgelu_48.openai", {**CLIP, "activation": "quick_gelu"}),
        ("vit_tiny_patch16_dinov2.lvd142m", DINO),
        ("vit_tiny_patch16_reg4_dinov2.lvd142m", {**DINO, "registers": 4, "place_class": False}),
    ],
)
def test_transformers(tmp_path: Path, model_name: str, backbone: dict[str, Any]) -> None:
    built, state = made_up(backbone)
    path = files.save(tmp_path / "x.ckpt", config_of(model_name), state, model={})
    loaded = read_checkpoint(path)
    assert_same(loaded.network, built)
    spec = loaded.spec
    assert list(spec.observation) == [*CAMERAS, "robot0_eef_pos", "robot0_gripper_width"]
    assert [spec.obs_steps(key) for key in spec.observation] == [2, 1, 2, 1]
    assert (spec.n_obs_steps, spec.horizon, spec.action_dim, spec.executed) == (2, 8, 10, slice(0, 8))
    assert spec.inference == {"steps": 16, "spacing": "diffusers"}
    camera = spec.network["encoder"]["cameras"]["camera1_rgb"]
    assert (camera["crop"], camera["resize"], camera["antialias"]) == ([45, 45], [48, 48], True)
    assert spec.provenance["pose_repr"]["action_pose_repr"] == "relative"
    assert spec.provenance["down_sample_steps"] == 3
    drawn, poses, executed = spec.provenance["warnings"]
    assert "at random also at evaluation (RandomCrop, ColorJitter)" in drawn
    assert "parapolicy.pose converts" in poses
    assert "all 8 actions" in executed
    policy = parapolicy.load_policy(path, sampler="sequential", device="cpu", engine="eager")
    assert policy.schedule.timesteps.tolist() == list(range(45, -1, -3))
    (observation,) = parapolicy.planner.made_up_observations(policy, 1)
    assert policy.predict(observation).actions.shape == (8, 10)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_resnets(tmp_path: Path, aggregation: str) -> None:
    built, state = made_up(RESNET, aggregation)
    config = config_of("resnet18.a1_in1k", feature_aggregation=aggregation, downsample_ratio=16)
    loaded = read_checkpoint(files.save(tmp_path / "x.ckpt", config, state, model={}))
    assert_same(loaded.network, built)


def test_a_shared_resnet_with_the_statistics_of_its_training(tmp_path: Path) -> None:
    """``pretrained`` keeps BatchNorm, whatever use_group_norm says; a shared model stands in the file twice."""
    built, state = made_up({**RESNET, "norm": "batch"}, "avg", shared=True)
    options = {"pretrained": True, "share_rgb_model": True, "feature_aggregation": "avg", "downsample_ratio": 16}
    config = config_of("resnet18", **options)
    path = files.save(tmp_path / "x.ckpt", config, state, model={})
    loaded = read_checkpoint(path)
    assert_same(loaded.network, built)
    assert loaded.spec.network["encoder"]["shared"] is True
    name = "obs_encoder.key_model_map.camera1_rgb.0.weight"
    files.save(path, config, {**state, name: state[name] + 1}, model={})
    with pytest.raises(CheckpointError, match="the models of 'camera0_rgb' and 'camera1_rgb' differ"):
        read_checkpoint(path)


@pytest.mark.parametrize(
    ("transforms", "pictures", "warns"),
    [
        (None, {}, False),
        ([TURN, JITTER], {}, True),
        ([{"_target_": "torchvision.transforms.Resize", "size": 32, "antialias": True}], {"resize": [32, 32]}, False),
        (
            [{"_target_": "torchvision.transforms.Resize", "size": [32, 64]}, TURN],
            {"resize": [32, 64], "antialias": False},
            True,
        ),
        ([{"type": "RandomCrop", "ratio": 0.5}], {"crop": [24, 24], "resize": [48, 48]}, True),
    ],
)
def test_transforms(tmp_path: Path, transforms: Any, pictures: dict[str, Any], warns: bool) -> None:
    pictures = {"crop": None, "resize": None, "antialias": True} | pictures
    built, state = made_up(TINY, pictures=pictures)
    config = config_of("vit_tiny_patch16_48", transforms=transforms)
    loaded = read_checkpoint(files.save(tmp_path / "x.ckpt", config, state, model={}))
    assert_same(loaded.network, built)
    camera = loaded.spec.network["encoder"]["cameras"]["camera0_rgb"]
    assert {key: camera[key] for key in pictures} == pictures
    assert any("at random" in warning for warning in loaded.spec.provenance["warnings"]) is warns


def test_keys_that_the_policy_ignores(tmp_path: Path) -> None:
    _, state = made_up(TINY)
    config = config_of("vit_tiny_patch16_48")
    entries = config["policy"]["shape_meta"]["obs"]
    entries["ignored"] = {**entries["robot0_eef_pos"], "shape": [2], "ignore_by_policy": True, "horizon": 9}
    entries["camera0_rgb"]["ignore_by_policy"] = True  # which the published code asks of other keys alone
    loaded = read_checkpoint(files.save(tmp_path / "x.ckpt", config, state, model={}))
    assert list(loaded.spec.observation) == list(OBSERVATION)
    assert set(loaded.normalizer.maps) == {*OBSERVATION, "action"}
    assert any("does not use ['ignored']" in warning for warning in loaded.spec.provenance["warnings"])


def test_keys_of_different_rates_and_unknown_poses_are_warned_of(tmp_path: Path) -> None:
    _, state = made_up(TINY)
    config = config_of("vit_tiny_patch16_48")
    config["policy"]["shape_meta"]["obs"]["robot0_eef_pos"]["down_sample_steps"] = 1
    config["task"]["pose_repr"]["obs_pose_repr"] = "delta"
    loaded = read_checkpoint(files.save(tmp_path / "x.ckpt", config, state, model={}))
    warnings = loaded.spec.provenance["warnings"]
    assert any("supports only ('relative', 'abs')" in warning for warning in warnings)
    assert any("sampled at different rates" in warning for warning in warnings)
    assert "down_sample_steps" not in loaded.spec.provenance


ENCODERS: list[tuple[dict[str, Any], str]] = [
    ({"_target_": "x.TransformerObsEncoder"}, "expected TimmObsEncoder"),
    ({"model_name": "vit_base_patch16_48"}, "192 numbers per token, but 'vit_base_patch16_48' has 768"),
    ({"model_name": "vit_tiny_patch16_clip_48"}, "lacks norm_pre, but 'vit_tiny_patch16_clip_48' has"),
    ({"model_name": "vit_tiny_patch16_dinov2"}, "lacks layer_scale"),
    ({"model_name": "vit_tiny_patch16_reg4_48"}, "other backbones are not supported"),
    ({"model_name": "vit_giant_patch14_dinov2"}, "other backbones are not supported"),
    ({"model_name": "convnext_base"}, "other backbones are not supported"),
    ({"model_name": "resnet50_gn"}, "other backbones are not supported"),
    ({"model_name": "resnet18", "feature_aggregation": "avg"}, r"has \[0, 0, 0, 0\] blocks"),
    ({"global_pool": "avg"}, "global_pool is 'avg'"),
    ({"feature_aggregation": "all_tokens"}, "which the published code cannot run"),
    ({"transforms": [JITTER, CROP]}, "'RandomCrop'"),
    ({"transforms": [CROP, {"_target_": "torchvision.transforms.GaussianBlur"}]}, "GaussianBlur"),
    ({"transforms": [CROP, {**TURN, "degrees": [80, 100]}]}, "RandomRotation"),
    ({"transforms": [CROP, {"_target_": "torchvision.transforms.Resize", "size": 32}]}, "Resize"),
    ({"transforms": [{"_target_": "x.Resize", "size": 32, "interpolation": 3}]}, "size and antialias alone"),
    ({"transforms": [{"type": "RandomCrop", "ratio": 1.5}]}, "with a ratio up to 1"),
    ({"transforms": [{"type": "RandomResizedCrop", "ratio": 0.5}]}, "expected type RandomCrop"),
    ({"transforms": []}, "expected a list of transforms"),
    ({"share_rgb_model": True}, "the models of 'camera0_rgb' and 'camera1_rgb' differ"),
]


def test_encoders_that_are_not_supported_are_refused(tmp_path: Path) -> None:
    _, state = made_up(TINY)
    path = files.save(tmp_path / "x.ckpt", {}, state, model={})
    for encoder, message in ENCODERS:
        config = config_of(**{"model_name": "vit_tiny_patch16_48", **encoder})
        files.save(path, config, state, model={})
        with pytest.raises(CheckpointError, match=message):
            read_checkpoint(path)


def test_resnets_that_are_not_supported_are_refused(tmp_path: Path) -> None:
    _, state = made_up(RESNET, "avg")
    path = tmp_path / "x.ckpt"
    for encoder, message in [
        ({"feature_aggregation": "transformer"}, "lets the elements of a batch attend"),
        ({"feature_aggregation": None}, "feature_aggregation is None, expected one of"),
        ({"feature_aggregation": "soft_attention"}, "lacks the tensor 'obs_encoder.attention.0.weight'"),
        ({"pretrained": True}, "ask for BatchNorm"),
        ({"use_group_norm": False}, "ask for BatchNorm"),
        ({"downsample_ratio": 8}, "downsample_ratio is 8"),
        ({"downsample_ratio": 32}, r"has \[2, 2, 2, 0\] blocks"),
        ({"model_name": "resnet34"}, "is a resnet18, but model_name says resnet34"),
    ]:
        options = {"feature_aggregation": "avg", "downsample_ratio": 16, **encoder}
        files.save(path, config_of(options.pop("model_name", "resnet18"), **options), state, model={})
        with pytest.raises(CheckpointError, match=message):
            read_checkpoint(path)


def test_policies_that_are_not_supported_are_refused(tmp_path: Path) -> None:
    _, state = made_up(TINY)
    path = tmp_path / "x.ckpt"

    def refused(message: str, changed: dict[str, Any] | None = None, **policy: Any) -> None:
        config = config_of("vit_tiny_patch16_48")
        config["policy"] |= policy
        files.save(path, config, {**state, **(changed or {})}, model={})
        with pytest.raises(CheckpointError, match=message):
            read_checkpoint(path)

    refused("obs_as_global_cond is off", obs_as_global_cond=False)
    refused("policy.n_obs_steps is 2 in its config, which reaches the scheduler's step", n_obs_steps=2)
    refused("unknown tensors", {"obs_encoder.extra": torch.ones(2)})
    refused("is not the identity", {"normalizer.params_dict.camera1_rgb.offset": -torch.ones(1)})
    entries = config_of("x")["policy"]["shape_meta"]["obs"]

    def meta(**changes: Any) -> dict[str, Any]:
        changed = {key: {**entry, **changes.get(key, {})} for key, entry in entries.items()}
        return {"obs": changed, "action": {"shape": [10], "horizon": 8}}

    refused("differ in height or width", shape_meta=meta(camera1_rgb={"shape": [3, 48, 64]}))
    refused("cond_encoder.1.weight has shape", shape_meta=meta(robot0_eef_pos={"horizon": 3}))
    refused("horizon is 0", shape_meta=meta(robot0_eef_pos={"horizon": 0}))
    refused("has no camera", shape_meta={**meta(), "obs": {"robot0_eef_pos": entries["robot0_eef_pos"]}})
    refused(r"action.shape is \[7\]", shape_meta={**meta(), "action": {"shape": [7], "horizon": 8}})
    refused("pos_embed has shape", shape_meta=meta(**{key: {"shape": [3, 96, 96]} for key in CAMERAS}))


def test_pictures_of_another_range_need_no_jitter(tmp_path: Path) -> None:
    """The published code clips behind ColorJitter; without it, the normaliser may be any."""
    _, state = made_up(TINY)
    state["normalizer.params_dict.camera0_rgb.scale"] = torch.full((1,), 2.0)
    config = config_of("vit_tiny_patch16_48", transforms=[CROP])
    loaded = read_checkpoint(files.save(tmp_path / "x.ckpt", config, state, model={}))
    assert loaded.normalizer.maps["camera0_rgb"].scale.flatten().tolist() == [2, 2, 2]


def places_in(value: Any) -> list[tuple[Any, ...]]:
    """Of every value in nested maps and lists."""
    if not isinstance(value, dict | list):
        return []
    inner = value.items() if isinstance(value, dict) else enumerate(value)
    return [(key, *rest) for key, item in inner for rest in [(), *places_in(item)]]


def test_odd_values_in_the_config_are_errors_that_name_the_file(tmp_path: Path) -> None:
    """Every value of the policy, replaced by each of these."""
    _, state = made_up(TINY)
    honest = config_of("vit_tiny_patch16_48", transforms=[CROP, JITTER, TURN])
    loads = 0
    for place in places_in(honest["policy"]):
        if "camera1_rgb" in place or "robot0_eef_pos" in place:  # as the others
            continue
        for value in (None, {"y": 1}):
            config = copy.deepcopy(honest)
            inner = config["policy"]
            for key in place[:-1]:
                inner = inner[key]
            inner[place[-1]] = value
            path = files.save(tmp_path / "odd.ckpt", config, state, model={})
            try:
                read_checkpoint(path)
                loads += 1
            except CheckpointError as error:
                if "odd.ckpt" not in str(error):
                    pytest.fail(f"{place} {value!r}: {error}")
    assert loads  # of what plays no part
