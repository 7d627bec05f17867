"""``TimmObsEncoder`` in checkpoints of the Universal Manipulation Interface: its settings and tensors."""

import re
from typing import Any

import torch

from parapolicy.checkpoint.inert import TensorRef
from parapolicy.checkpoint.stanford_encoders import (
    RESNET_SEQUENCE,
    FoundEncoder,
    norm_of,
    placed,
    resnet_of,
    without_counts,
)
from parapolicy.checkpoint.stanford_networks import Saved, size_of
from parapolicy.spec import Feature

AT = "policy.obs_encoder"
MODELS = "obs_encoder.key_model_map."
# Widths and heads of timm's transformers; files do not contain the number of heads.
TRANSFORMERS = {"tiny": (192, 3), "small": (384, 6), "base": (768, 12), "large": (1024, 16), "huge": (1280, 16)}
_TRANSFORMER = re.compile(
    r"vit_(?P<size>tiny|small|base|large|huge)_patch\d+_(?:(?P<clip>clip_)(?P<quick>quickgelu_)?\d+|"
    r"(?:reg(?P<registers>\d+)_)?(?P<dino>dinov2)|\d+)(?:\.\w+)?"
)
_RESNET = re.compile(r"(resnet18|resnet34|resnet50)(?:\.\w+)?")
# Names of the tensors of feature aggregation, theirs -> ours.
AGGREGATIONS = {
    "avg": {},
    "max": {},
    "soft_attention": {"attention.0.weight": "linear.weight"},
    "spatial_embedding": {"spatial_embedding": "factors"},
    "attention_pool_2d": {
        f"attention_pool_2d.{name}": name
        for name in ("positional_embedding", *(f"{p}_proj.{kind}" for p in "qkvc" for kind in ("weight", "bias")))
    },
}
# Random transforms: their range arguments, and the values that change nothing.
NEUTRAL = {
    "ColorJitter": {"brightness": 1.0, "contrast": 1.0, "saturation": 1.0, "hue": 0.0},
    "RandomRotation": {"degrees": 0.0},
}


def find_timm_encoder(saved: Saved, observation: dict[str, Feature], warnings: list[str]) -> FoundEncoder:
    config, error = saved.config, saved.archive.error
    kind = config.text(f"{AT}._target_", "").rpartition(".")[2]
    if kind != "TimmObsEncoder":
        raise error(f"{AT}._target_ is {kind!r:.80}, expected TimmObsEncoder; other encoders are not supported")
    if config.get(f"{AT}.global_pool") != "":
        raise error(
            f"{AT}.global_pool is {config.get(f'{AT}.global_pool')!r:.40}, expected '', as in the published code"
        )
    images = [key for key, feature in observation.items() if feature.kind == "image"]
    shared = config.flag(f"{AT}.share_rgb_model", False)
    saved.take("obs_encoder._dummy_variable")
    models = {key: saved.take(f"{MODELS}{key}.") for key in images}
    if shared:
        _drop_copies(saved, models)
    name = config.text(f"{AT}.model_name")
    transformer, resnet = _TRANSFORMER.fullmatch(name), _RESNET.fullmatch(name)
    if transformer is None and resnet is None:
        raise error(
            f"{AT}.model_name is {name!r:.80}, expected one of timm's vit_… of CLIP or DINOv2, or resnet18, 34 or 50; "
            "other backbones are not supported"
        )
    aggregation = None if transformer else config.get(f"{AT}.feature_aggregation", "spatial_embedding")
    _check_aggregation(saved, bool(transformer), aggregation)
    pictures = _find_transforms(saved, observation[images[0]], images, warnings)
    heads: dict[str, TensorRef] = {}
    for theirs, ours in AGGREGATIONS[aggregation].items() if aggregation else ():
        if f"obs_encoder.{theirs}" not in saved.tensors:
            raise error(f"it lacks the tensor 'obs_encoder.{theirs}' of its feature_aggregation; save it again")
        heads[f"aggregation.{ours}"] = saved.tensors.pop(f"obs_encoder.{theirs}")
    cameras, tensors = {}, dict[str, TensorRef]()
    for i, key in enumerate(images):
        model = models[images[0] if shared else key]
        if transformer:
            backbone, renamed = _find_transformer(saved, key, transformer, model), model
        else:
            assert resnet is not None
            backbone, renamed = _find_resnet(saved, key, resnet[1], model)
        cameras[key] = {"encoder": "timm", "backbone": backbone, "aggregation": aggregation, **pictures}
        if i == 0 or not shared:  # all cameras share the head
            tensors |= placed(i, {f"backbone.{name}": ref for name, ref in renamed.items()} | heads)
    return FoundEncoder(observation, {"cameras": cameras, "shared": shared, "layout": "key"}, tensors)


def _drop_copies(saved: Saved, models: dict[str, dict[str, TensorRef]]) -> None:
    """Drop copies: the file has a shared model once per camera."""
    first, *others = models
    for key in others:
        copies = models[key]
        if copies.keys() != models[first].keys() or not all(
            ref.equals(models[first][name]) for name, ref in copies.items()
        ):
            raise saved.archive.error(
                f"share_rgb_model is on, but the models of {first!r:.60} and {key!r:.60} differ; copy it again"
            )


def _check_aggregation(saved: Saved, transformer: bool, aggregation: Any) -> None:
    if transformer and saved.config.get(f"{AT}.feature_aggregation", None) == "all_tokens":
        raise saved.archive.error(f"{AT}.feature_aggregation is 'all_tokens', which the published code cannot run")
    if transformer or (isinstance(aggregation, str) and aggregation in AGGREGATIONS):
        return
    if aggregation == "transformer":
        raise saved.archive.error(
            f"{AT}.feature_aggregation is 'transformer', where the published code lets the elements of a batch attend "
            "to each other, so that a chunk depends on the rest of its batch. Train with another one of "
            f"{[*AGGREGATIONS]}"
        )
    raise saved.archive.error(f"{AT}.feature_aggregation is {aggregation!r:.60}, expected one of {[*AGGREGATIONS]}")


def _find_transformer(saved: Saved, key: str, name: re.Match[str], model: dict[str, TensorRef]) -> dict[str, Any]:
    """Settings of :class:`parapolicy.networks.vit.VisionTransformer`."""
    error = saved.archive.error
    depth = 0
    while f"blocks.{depth}.norm1.weight" in model:
        depth += 1
    width, heads = TRANSFORMERS[name["size"]]
    patch, there = (size_of(saved, model, "patch_embed.proj.weight", axis, 4) for axis in (3, 0))
    if there != width or not depth:
        raise error(
            f"the backbone of {key!r:.60} has {depth} blocks and {there} numbers per token, but {name[0]!r:.60} has "
            f"{width}; copy the checkpoint again"
        )
    registers = int(name["registers"] or 0)
    settings = {
        "name": "vit",
        "patch": patch,
        "width": width,
        "depth": depth,
        "heads": heads,
        "hidden": size_of(saved, model, "blocks.0.mlp.fc1.weight", 0, 2),
        "eps": 1e-5 if name["clip"] else 1e-6,
        "activation": "quick_gelu" if name["quick"] else "gelu",
        "norm_pre": bool(name["clip"]),
        "layer_scale": bool(name["dino"]),
        "registers": registers,
        "place_class": not registers,
    }
    said = {"norm_pre": "norm_pre.weight" in model, "layer_scale": "blocks.0.ls1.gamma" in model}
    for part, there in said.items():
        if there != settings[part]:
            raise error(
                f"the backbone of {key!r:.60} {'has' if there else 'lacks'} {part}, but {name[0]!r:.60} "
                f"{'has' if settings[part] else 'has none'}; copy the checkpoint again"
            )
    return settings


def _find_resnet(
    saved: Saved, key: str, name: str, model: dict[str, TensorRef]
) -> tuple[dict[str, Any], dict[str, TensorRef]]:
    """Settings of :class:`parapolicy.networks.resnet.ResNet`, and its tensors."""
    renamed = {}
    for there, ref in without_counts(model).items():
        part, _, rest = there.partition(".")
        renamed[f"{RESNET_SEQUENCE.get(part, part)}.{rest}"] = ref
    ratio = saved.config.get(f"{AT}.downsample_ratio", 32)
    levels = {32: 4, 16: 3}.get(ratio) if type(ratio) is int else None
    if levels is None:
        raise saved.archive.error(f"{AT}.downsample_ratio is {ratio!r:.40}, expected 32 or 16")
    norm = norm_of(renamed)
    wanted = saved.config.flag(f"{AT}.use_group_norm", False) and not saved.config.flag(f"{AT}.pretrained")
    if wanted != (norm == "group"):
        raise saved.archive.error(
            f"{AT}.use_group_norm and pretrained ask for {'GroupNorm' if wanted else 'BatchNorm'}, but the backbone of "
            f"{key!r:.60} has the other; copy the checkpoint again"
        )
    found = resnet_of(saved.archive, key, renamed, levels)
    if found != name:
        raise saved.archive.error(f"the backbone of {key!r:.60} is a {found}, but model_name says {name}")
    return {"name": name, "norm": norm, "levels": levels}, renamed


def _find_transforms(saved: Saved, image: Feature, images: list[str], warnings: list[str]) -> dict[str, Any]:
    """The crop, resize and antialiasing of pictures, with the published code's random draws at their middle."""
    config, error = saved.config, saved.archive.error
    transforms = config.get(f"{AT}.transforms")
    height, width, _ = image.shape
    settings: dict[str, Any] = {"crop": None, "resize": None, "antialias": True}
    if transforms is None:
        return settings
    if not isinstance(transforms, list) or not all(isinstance(each, dict) for each in transforms) or not transforms:
        raise error(f"{AT}.transforms is {transforms!r:.80}, expected a list of transforms, or null")
    drawn, rest = [], list(transforms)
    if "_target_" not in rest[0]:  # the published shorthand: a square crop, scaled back to the picture's height
        first = rest.pop(0)
        ratio = first.get("ratio")
        if first.get("type") != "RandomCrop" or type(ratio) not in (int, float) or not 0 < ratio <= 1:
            raise error(f"{AT}.transforms begins with {first!r:.80}, expected type RandomCrop with a ratio up to 1")
        side = int(height * ratio)
        if not 1 <= side <= width:
            raise error(
                f"{AT}.transforms cuts out squares of {side} from pictures of {height} x {width}; make them fit"
            )
        settings |= {"crop": [side, side], "resize": [height, height]}
        drawn.append("RandomCrop")
    for each in rest:
        name = str(each.get("_target_", "")).rpartition(".")[2]
        if name == "Resize" and settings["resize"] is None:
            settings |= _find_resize(saved, each, height, width)
        elif name in NEUTRAL and _may_change_nothing(each, NEUTRAL[name]):
            drawn.append(name)
        else:
            raise error(f"{AT}.transforms has {each!r:.120}, which is not supported there; train without it")
    if "ColorJitter" in drawn:
        _check_range(saved, images)
    if drawn:
        warnings.append(
            f"the published code changes pictures at random also at evaluation ({', '.join(drawn)}), so its chunks "
            "scatter; here the middle is cropped, without rotation or tint"
        )
    if settings["resize"] == (settings["crop"] or [height, width]):
        settings["resize"] = None
    return settings


def _may_change_nothing(each: dict[str, Any], neutral: dict[str, float]) -> bool:
    """Whether all ranges contain the value that changes nothing. A single number means a range around that value."""
    ranges = [(each[name], value) for name, value in neutral.items() if name in each]
    return not each.get("expand", False) and all(
        isinstance(given, int | float)
        or (isinstance(given, list) and len(given) == 2 and given[0] <= value <= given[1])
        for given, value in ranges
    )


def _find_resize(saved: Saved, each: dict[str, Any], height: int, width: int) -> dict[str, Any]:
    unknown = sorted(each.keys() - {"_target_", "size", "antialias"})
    size = each.get("size")
    if type(size) is int and size > 0:  # the length of the shorter side
        short = min(height, width)
        size = [int(size * height / short), int(size * width / short)]
    fits = isinstance(size, list) and len(size) == 2 and all(type(side) is int and side > 0 for side in size)
    if unknown or not fits or each.get("antialias") not in (None, True, False):
        raise saved.archive.error(f"{AT}.transforms has {each!r:.120}, expected Resize with size and antialias alone")
    return {"resize": size, "antialias": each.get("antialias") is True}


def _check_range(saved: Saved, images: list[str]) -> None:
    """Refuse ColorJitter on normalised pictures: it always clips values to 0 to 1."""
    for key in images:
        refs = [saved.tensors.get(f"normalizer.params_dict.{key}.{name}") for name in ("scale", "offset")]
        if any(ref is None or ref.dtype is not torch.float32 for ref in refs):
            continue  # refused when the normaliser is read
        scale, offset = (ref.load() for ref in refs if ref is not None)
        if (scale != 1).any() or (offset != 0).any():
            raise saved.archive.error(
                f"the normaliser of {key!r:.60} is not the identity, but ColorJitter, which the published code runs at "
                "evaluation, clips values to 0 to 1; train with get_image_identity_normalizer"
            )
