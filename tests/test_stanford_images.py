"""Image checkpoints of real-stanford/diffusion_policy, made up from our own networks: every option, and refusals."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import parapolicy
from parapolicy import CheckpointError
from parapolicy.checkpoint import read_checkpoint
from parapolicy.networks import Network
from tests import stanford_files as files
from tests.stanford_files import assert_same

SHAPES = {"agent_pos": [2], "image": [3, 40, 80]}
CAMERA = {"backbone": "resnet18", "crop": [36, 48], "keypoints": 4, "features": 6, "relu": True}


def hybrid_file(folder: Path, kind: str, norm: str, **policy: Any) -> tuple[Path, Network, dict[str, Any]]:
    """A made-up hybrid image policy: its file, network and state."""
    inpaints = policy.get("obs_as_cond", policy.get("obs_as_global_cond", True)) is False
    network = {**(files.UNET if kind == "Unet" else files.TRANSFORMER)}
    network |= {"encoder": {"cameras": {"image": {**CAMERA, "norm": norm}}}}
    network |= {"condition": "inpaint"} if inpaints else {}
    observation = {"agent_pos": (2,), "image": parapolicy.Feature((40, 80, 3), "image")}
    _, built = files.network_of(network, observation, observed_dim=8 if inpaints else 0)
    x, y = np.meshgrid(np.linspace(-1, 1, 2), np.linspace(-1, 1, 2))
    state = files.model_state(built) | files.robomimic_state(built, ["image"])
    for name, grid in {"pos_x": x, "pos_y": y}.items():
        for at in ("pool", "nets.1"):
            state[f"obs_encoder.obs_nets.image.{at}.{name}"] = torch.tensor(grid.reshape(1, -1)).float()
    state |= files.normaliser_state(agent_pos=2, image=1, action=2)
    arguments = {k: v for k, v in network.items() if k not in ("name", "encoder", "condition")}
    options = {"crop_shape": [36, 48], "eval_fixed_crop": True, "obs_encoder_group_norm": norm == "group"}
    config = files.image_config(SHAPES, f"{kind}Hybrid", **{**arguments, **options, **policy})
    return files.save(folder / "x.ckpt", config, state, model={}), built, state


@pytest.mark.parametrize(
    ("kind", "norm", "policy"),
    [
        ("Unet", "group", {}),
        ("Unet", "batch", {"obs_as_global_cond": False}),
        ("Transformer", "group", {"obs_as_cond": False}),
        ("Transformer", "batch", {"n_cond_layers": 0}),
    ],
)
def test_hybrid_image_policies(tmp_path: Path, kind: str, norm: str, policy: dict[str, Any]) -> None:
    path, built, _ = hybrid_file(tmp_path, kind, norm, **policy)
    loaded = read_checkpoint(path)
    assert_same(loaded.network, built)
    assert list(loaded.spec.observation) == ["agent_pos", "image"]  # the order of shape_meta
    assert loaded.spec.observation["image"] == parapolicy.Feature((40, 80, 3), "image")
    assert loaded.normalizer.maps["image"].scale.shape == (3, 1, 1)
    assert loaded.spec.executed == slice(1, 5)


def test_hybrid_encoders_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    path, _, state = hybrid_file(tmp_path, "Unet", "group")
    name = "obs_encoder.obs_nets.image"

    def refused(message: str, changed: dict[str, Any] | None = None, **policy: Any) -> None:
        options = {"crop_shape": [36, 48], "eval_fixed_crop": True, **files.UNET, **policy}
        config = files.image_config(SHAPES, "UnetHybrid", **{k: v for k, v in options.items() if k != "name"})
        files.save(path, config, {**state, **(changed or {})}, model={})
        with pytest.raises(CheckpointError, match=message):
            read_checkpoint(path)

    refused("crops at random also at evaluation", eval_fixed_crop=False)
    refused("for another picture size", crop_shape=None)
    refused("obs_encoder_group_norm is False", obs_encoder_group_norm=False)
    copied = state[f"{name}.nets.0.nets.0.weight"]
    refused("has different values", {f"{name}.nets.0.nets.0.weight": copied + 1})
    refused(r"unknown tensors", {f"{name}.nets.5.weight": torch.ones(2)})
    refused("has type 'depth'", shape_meta={"obs": {"a": {"shape": [2], "type": "depth"}}, "action": {"shape": [2]}})


IMAGES = {"low_b": [1], "camera_9": [3, 32, 40], "low_a": [2], "camera_10": [3, 32, 40]}


def image_file(folder: Path, shared: bool, norm: str, **encoder: Any) -> tuple[Path, Network]:
    """A made-up policy with MultiImageObsEncoder."""
    camera = {"backbone": "resnet18", "norm": norm, "keypoints": None, "features": None, "relu": False}
    camera |= {"resize": [36, 44], "crop": [33, 40], "imagenet": True} if not encoder else {}
    picture = parapolicy.Feature((32, 40, 3), "image")
    observation = {"camera_10": picture, "camera_9": picture, "low_a": (2,), "low_b": (1,)}
    network = {**files.UNET, "encoder": {"cameras": dict.fromkeys(("camera_10", "camera_9"), camera), "shared": shared}}
    _, built = files.network_of(network, observation)
    settings = {
        "_target_": "diffusion_policy.model.vision.multi_image_obs_encoder.MultiImageObsEncoder",
        "rgb_model": {"_target_": "diffusion_policy.model.vision.model_getter.get_resnet", "name": "resnet18"},
        "resize_shape": [36, 44], "crop_shape": {"camera_9": [33, 40], "camera_10": [33, 40]}, "random_crop": True,
        "use_group_norm": True, "share_rgb_model": shared, "imagenet_norm": True, **encoder,
    }  # fmt: skip
    arguments = {k: v for k, v in files.UNET.items() if k != "name"}
    config = files.image_config(IMAGES, "Unet", obs_encoder=settings, **arguments)
    state = files.model_state(built) | files.image_state(built, ["rgb"] if shared else ["camera_10", "camera_9"])
    state |= files.normaliser_state(camera_9=1, camera_10=1, low_a=2, low_b=1, action=2)
    return files.save(folder / "x.ckpt", config, state, model={}), built


def test_image_policies_sort_their_keys(tmp_path: Path) -> None:
    path, built = image_file(tmp_path, shared=False, norm="group")
    loaded = read_checkpoint(path)
    assert_same(loaded.network, built)
    assert list(loaded.spec.observation) == ["camera_10", "camera_9", "low_a", "low_b"]
    assert loaded.spec.network["encoder"]["cameras"]["camera_9"] == {
        "backbone": "resnet18", "norm": "group", "resize": [36, 44], "crop": [33, 40], "imagenet": True,
        "keypoints": None, "features": None, "relu": False,
    }  # fmt: skip


def test_a_shared_encoder_keeps_batch_norm_and_may_not_crop(tmp_path: Path) -> None:
    """As published: use_group_norm passes a shared encoder by, and random_crop False means no crop at all."""
    options = {"random_crop": False, "imagenet_norm": False, "resize_shape": [32, 40]}
    path, built = image_file(tmp_path, shared=True, norm="batch", **options)
    loaded = read_checkpoint(path)
    assert_same(loaded.network, built)
    camera = loaded.spec.network["encoder"]["cameras"]["camera_10"]
    assert (camera["norm"], camera["crop"], camera["resize"], camera["imagenet"]) == ("batch", None, None, False)
    assert loaded.spec.network["encoder"]["shared"] is True


@pytest.mark.parametrize(
    ("encoder", "message"),
    [
        ({"_target_": "x.TimmObsEncoder"}, "TimmObsEncoder"),
        ({"rgb_model": {"_target_": "torchvision.models.resnet18"}}, "expected get_resnet"),
        ({"rgb_model": {"_target_": "x.get_resnet", "name": "resnet18", "norm_layer": "x"}}, "norm_layer"),
        ({"use_group_norm": False}, "use_group_norm is False in its config"),
        ({"crop_shape": [33, 400]}, "crop is"),
        ({"crop_shape": {"camera_9": [30, 30]}}, "has no size for 'camera_10'"),
        ({"shape_meta": {"obs": {}}}, "differ"),
    ],
)
def test_image_encoders_that_are_not_supported_are_refused(
    tmp_path: Path, encoder: dict[str, Any], message: str
) -> None:
    path, _ = image_file(tmp_path, shared=False, norm="group", **encoder)
    with pytest.raises(CheckpointError, match=message):
        read_checkpoint(path)
