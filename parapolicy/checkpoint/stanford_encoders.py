"""The image encoders in checkpoints of real-stanford/diffusion_policy: their settings and tensors."""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch

from parapolicy.checkpoint.archive import Archive
from parapolicy.checkpoint.inert import TensorRef
from parapolicy.checkpoint.stanford_networks import Saved
from parapolicy.spec import Feature

# Blocks in each of the four layers, and whether they are bottlenecks.
RESNETS = {((2, 2, 2, 2), False): "resnet18", ((3, 4, 6, 3), False): "resnet34", ((3, 4, 6, 3), True): "resnet50"}
# robomimic and UMI store the layers of a ResNet in a Sequential.
RESNET_SEQUENCE = {"0": "conv1", "1": "bn1", "4": "layer1", "5": "layer2", "6": "layer3", "7": "layer4"}


class FoundEncoder(NamedTuple):
    """An encoder, as read from the tensors.

    Attributes:
        observation: in the order of the encoder's features.
        settings: arguments of :class:`parapolicy.networks.vision.ObservationEncoder`.
        tensors: by our encoder's names.
        places: for each camera, tensors that follow from the settings; for :func:`check_places`.
    """

    observation: dict[str, Feature]
    settings: dict[str, Any]
    tensors: dict[str, TensorRef]
    places: Mapping[str, tuple[TensorRef, TensorRef]] = {}


def read_shapes(saved: Saved, at: str) -> dict[str, Feature]:
    """A policy's observations, from ``shape_meta`` at a path of the configuration, in its order."""
    features = {}
    for key in saved.config.keys(f"{at}.obs"):
        # Other entries of a key are not needed, and may be expressions.
        shape = saved.config.get(f"{at}.obs.{key}.shape", None)
        kind = saved.config.get(f"{at}.obs.{key}.type", "low_dim")
        if not isinstance(shape, list) or not all(type(n) is int and 0 < n < 2**20 for n in shape):
            raise saved.archive.error(f"{at}.obs.{key!s:.60} has no shape in its config; expected positive sizes")
        if kind == "rgb" and len(shape) == 3:
            features[key] = Feature((shape[1], shape[2], shape[0]), "image")
        elif kind == "low_dim" and len(shape) == 1:
            features[key] = Feature(tuple(shape))
        else:
            raise saved.archive.error(
                f"the observation {key!r:.60} has type {kind!r:.40} and shape {shape!r:.60}, expected 'rgb' with three "
                "axes or 'low_dim' with one"
            )
    return features


def find_robomimic_encoder(saved: Saved) -> FoundEncoder:
    """The encoders of the hybrid policies: robomimic's ResNet18, spatial softmax and linear layer for each camera."""
    config, archive = saved.config, saved.archive
    observation = read_shapes(saved, "policy.shape_meta")
    crop = config.get("policy.crop_shape", [76, 76])
    if crop is not None and not config.flag("policy.eval_fixed_crop", False):
        raise archive.error(
            "policy.eval_fixed_crop is off: the published code then crops at random also at evaluation, so its chunks "
            "cannot be reproduced. Train with eval_fixed_crop: True, or save with it on to crop the middle"
        )
    cameras, tensors, places = {}, dict[str, TensorRef](), {}
    images = [key for key, feature in observation.items() if feature.kind == "image"]
    for i, key in enumerate(images):
        found = saved.take(f"obs_encoder.obs_nets.{key}.")
        _drop_copies(archive, key, found)
        backbone = {
            f"{RESNET_SEQUENCE.get(part, part)}.{rest}": found.pop(f"backbone.nets.{part}.{rest}")
            for part, rest in _split(found, "backbone.nets.")
        }
        renamed = {"pool.conv.weight": "pool.nets.weight", "pool.conv.bias": "pool.nets.bias"}
        renamed |= {"pool.temperature": "pool.temperature"}
        renamed |= {"linear.weight": "nets.3.weight", "linear.bias": "nets.3.bias"}
        missing = [name for name in (*renamed.values(), "pool.pos_x", "pool.pos_y") if name not in found]
        if missing:
            raise archive.error(f"the encoder of {key!r:.60} lacks {missing}; save the checkpoint again")
        heads = {ours: found.pop(name) for ours, name in renamed.items()}
        places[key] = found.pop("pool.pos_x"), found.pop("pool.pos_y")
        saved.tensors.update({f"obs_encoder.obs_nets.{key}.{name}": ref for name, ref in found.items()})
        norm = norm_of(backbone)
        saved.agree("policy.obs_encoder_group_norm", norm == "group")
        cameras[key] = {
            "backbone": resnet_of(archive, key, backbone),
            "norm": norm,
            "resize": None,
            "crop": crop,
            "imagenet": False,
            "keypoints": heads["pool.conv.weight"].shape[0] if heads["pool.conv.weight"].shape else 0,
            "features": heads["linear.weight"].shape[0] if heads["linear.weight"].shape else 0,
            "relu": True,
        }
        tensors |= placed(i, {f"backbone.{name}": ref for name, ref in backbone.items()} | heads)
    return FoundEncoder(observation, {"cameras": cameras, "shared": False}, tensors, places)


def find_image_encoder(saved: Saved) -> FoundEncoder:
    """``MultiImageObsEncoder``: ResNets of torchvision, one per camera or one for all."""
    config, archive = saved.config, saved.archive
    at = "policy.obs_encoder"
    kind = config.text(f"{at}._target_", "").rpartition(".")[2]
    if kind != "MultiImageObsEncoder":
        raise archive.error(
            f"{at}._target_ is {kind!r:.80}, expected MultiImageObsEncoder; other encoders are not supported"
        )
    shapes = read_shapes(saved, "policy.shape_meta")
    if config.known(f"{at}.shape_meta.obs") not in (None, config.get("policy.shape_meta.obs")):
        raise archive.error(f"{at}.shape_meta and policy.shape_meta differ in its config, expected the same")
    # The published code sorts the cameras, and then the other keys.
    ordered = sorted(shapes, key=lambda key: (shapes[key].kind != "image", key))
    observation = {key: shapes[key] for key in ordered}
    images = [key for key, feature in observation.items() if feature.kind == "image"]
    shared = config.flag(f"{at}.share_rgb_model", False)
    saved.take("obs_encoder._dummy_variable")
    crops = config.flag(f"{at}.random_crop", True)  # at evaluation a centre crop; off: no crop at all, as published
    cameras, tensors = {}, dict[str, TensorRef]()
    backbone: dict[str, TensorRef] = {}
    for i, key in enumerate(images):
        if i == 0 or not shared:
            _check_rgb_model(saved, f"{at}.rgb_model", key)
            backbone = saved.take(f"obs_encoder.key_model_map.{'rgb' if shared else key}.")
            tensors |= placed(i, {f"backbone.{name}": ref for name, ref in without_counts(backbone).items()})
        if not shared:  # the published code keeps BatchNorm in a shared model
            saved.agree(f"{at}.use_group_norm", norm_of(backbone) == "group")
        size, resize = list(observation[key].shape[:2]), _for_camera(saved, f"{at}.resize_shape", key)
        cameras[key] = {
            "backbone": resnet_of(archive, key, backbone),
            "norm": norm_of(backbone),
            "resize": None if resize == size else resize,
            "crop": _for_camera(saved, f"{at}.crop_shape", key) if crops else None,
            "imagenet": config.flag(f"{at}.imagenet_norm", False),
            "keypoints": None,
            "features": None,
            "relu": False,
        }
    return FoundEncoder(observation, {"cameras": cameras, "shared": shared}, tensors)


def check_places(saved: Saved, found: FoundEncoder, encoder: Any) -> None:
    """Raise CheckpointError unless the positions of the spatial softmax fit the images' size."""
    for key, refs in found.places.items():
        camera = encoder.cameras[encoder.place[key]]
        across = np.linspace(-1, 1, camera.pool.width), np.linspace(-1, 1, camera.pool.height)
        for grid, ref in zip(np.meshgrid(*across), refs, strict=True):
            expected = torch.from_numpy(grid.reshape(1, -1)).float()
            if ref.shape != tuple(expected.shape) or not torch.allclose(ref.load().float(), expected, atol=1e-6):
                raise saved.archive.error(
                    f"the spatial softmax of {key!r:.60} is for another picture size than shape_meta and crop_shape "
                    "give; copy the checkpoint again"
                )


def _check_rgb_model(saved: Saved, at: str, key: str) -> None:
    """Check that the backbone is made by the published ``get_resnet``."""
    target = saved.config.known(f"{at}._target_")
    if target is None:
        at = f"{at}.{key}"
        target = saved.config.text(f"{at}._target_")
    unknown = sorted(set(saved.config.keys(at)) - {"_target_", "name", "weights"})
    if str(target).rpartition(".")[2] != "get_resnet" or unknown:
        raise saved.archive.error(
            f"{at} is {target!r:.80} with {unknown} in its config, expected get_resnet with a name and weights; other "
            "backbones are not supported"
        )


def _for_camera(saved: Saved, path: str, key: str) -> Any:
    """A size given for all cameras, or for each."""
    value = saved.config.get(path, None)
    if isinstance(value, dict):
        if key not in value:
            raise saved.archive.error(f"{path} has no size for {key!r:.60} in its config")
        return value[key]
    return value


def _drop_copies(archive: Archive, key: str, tensors: dict[str, TensorRef]) -> None:
    """Drop copies: robomimic's state dict has backbone and pooling twice, under two names of one module."""
    for name in [name for name in tensors if re.match(r"nets\.[01]\.", name)]:
        original = name.replace("nets.0.", "backbone.", 1) if name[5] == "0" else name.replace("nets.1.", "pool.", 1)
        copy = tensors.pop(name)
        if original not in tensors or not tensors[original].equals(copy):
            raise archive.error(
                f"the encoder of {key!r:.60} has different values in {original} and {name}, which are one tensor in "
                "the published code; copy the checkpoint again"
            )
    for name in [name for name in tensors if name.endswith(".num_batches_tracked")]:
        tensors.pop(name)


def _split(tensors: Mapping[str, TensorRef], prefix: str) -> list[tuple[str, str]]:
    """Split each name with the prefix, without it, into first part and rest, such as ("4", "0.conv1.weight")."""
    parts = [name[len(prefix) :].partition(".") for name in tensors if name.startswith(prefix)]
    return [(first, rest) for first, _, rest in parts]


def without_counts(tensors: Mapping[str, TensorRef]) -> dict[str, TensorRef]:
    """The tensors without BatchNorm's counts of batches, which are not needed."""
    return {name: ref for name, ref in tensors.items() if not name.endswith(".num_batches_tracked")}


def norm_of(backbone: Mapping[str, TensorRef]) -> str:
    return "batch" if "bn1.running_mean" in backbone else "group"


def resnet_of(archive: Archive, key: str, backbone: Mapping[str, TensorRef], levels: int = 4) -> str:
    """The name of the ResNet whose first ``levels`` layers have these tensors."""
    counts = []
    for level in range(1, levels + 1):
        count = 0
        while f"layer{level}.{count}.conv1.weight" in backbone:
            count += 1
        counts.append(count)
    bottleneck = "layer1.0.conv3.weight" in backbone
    names = [name for (blocks, kind), name in RESNETS.items() if [*blocks[:levels]] == counts and kind == bottleneck]
    if not names:
        raise archive.error(f"the backbone of {key!r:.60} has {counts} blocks, expected ResNet18, 34 or 50")
    return names[0]


def placed(camera: int, tensors: Mapping[str, TensorRef]) -> dict[str, TensorRef]:
    return {f"cameras.{camera}.{name}": ref for name, ref in tensors.items()}
