"""The spec of a robomimic diffusion policy, from the config and metadata in its checkpoint.

robomimic ignores the UNet's sizes in its config, so they are taken from the tensors.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from parapolicy.checkpoint.config_values import MAX_NUMBERS, Settings, is_shape
from parapolicy.checkpoint.folder_files import cut
from parapolicy.checkpoint.inert import Instance
from parapolicy.errors import CheckpointError
from parapolicy.spec import Feature, PolicySpec

Shapes = Mapping[str, tuple[int, ...]]

UNET, ENCODER = "policy.noise_pred_net", "policy.obs_encoder.nets.obs.obs_nets"
GROUPS, OWN_DIMS = 8, [256, 512, 1024]  # always, in robomimic's UNet; the config's numbers are not used
BACKBONES = {"ResNet18Conv": "resnet18", "ResNet50Conv": "resnet50"}
POOLS = ("SpatialSoftmax", "SpatialMeanPool")
TRAINING_ONLY = ("ColorRandomizer", "GaussianNoiseRandomizer")  # no effect at evaluation
CONVERSIONS = {"rot_axis_angle": "axis_angle", "rot_euler": "euler"}
# Predictions that diffusers 0.11.1, robomimic's version, handles. Its DDIM treats a 'sample' as noise.
PREDICTIONS = {"ddpm": ("epsilon", "sample", "v_prediction"), "ddim": ("epsilon", "v_prediction")}
SCHEDULERS: dict[str, dict[str, Any]] = {
    "ddpm": {"_class_name": "DDPMScheduler", "variance_type": "fixed_small"},
    "ddim": {"_class_name": "DDIMScheduler"},
}


class Described(NamedTuple):
    """The contents of the config and metadata.

    Attributes:
        spec: the policy.
        normalized: whether observations are normalised: all of them or none.
        actions: the parts of the action, and the count of numbers in each.
        actions_normalized: whether the config normalises actions.
    """

    spec: PolicySpec
    normalized: bool
    actions: dict[str, int]
    actions_normalized: bool


def describe(path: Path, payload: Mapping[str, Any], config: Mapping[str, Any], shapes: Shapes) -> Described:
    """The policy that a checkpoint describes.

    Args:
        path: the checkpoint.
        payload: its content.
        config: its config, decoded.
        shapes: of the tensors in use.

    Raises:
        CheckpointError: another algorithm, or a setting that is missing, contradictory or not supported.
    """
    settings, metadata = Settings(path, config, "config: "), Settings(path, payload).inner("shape_metadata")
    algo, train = settings.inner("algo"), settings.inner("train")
    if config.get("algo_name") != "diffusion_policy":
        raise settings.wrong("algo_name", "expected 'diffusion_policy', the only supported algorithm")
    if not algo.inner("unet").get("enabled", bool):
        raise algo.inner("unet").wrong("enabled", "expected true: the UNet is robomimic's only diffusion policy")
    observation = _observation(settings, metadata)
    action_dim = metadata.get("ac_dim", int)
    if not is_shape([action_dim]):
        raise metadata.wrong("ac_dim", f"expected a number from 1 to {MAX_NUMBERS}")
    parts, actions, actions_normalized = _actions(train, action_dim, payload)
    network = _network(path, shapes, action_dim)
    cameras = [key for key, feature in observation.items() if feature.kind == "image"]
    normalized = train.get("hdf5_normalize_obs", bool, False)
    if normalized and cameras:
        raise train.wrong(
            "hdf5_normalize_obs",
            f"with the cameras {cameras}, expected false: robomimic itself cannot run such a policy",
        )
    if cameras:
        camera = _camera(settings.inner("observation", "encoder", "rgb"), shapes, cameras)
        network["encoder"] = {"cameras": camera, "shared": False}
    low_dim = settings.inner("observation", "encoder", "low_dim")
    for name in ("core_class", "obs_randomizer_class"):
        if low_dim.values.get(name) not in (None, [], [None], *TRAINING_ONLY):
            raise low_dim.wrong(name, "expected null: low_dim encoders are not supported")
    scheduler, inference = _schedule(algo)
    horizon = algo.inner("horizon")
    try:
        spec = PolicySpec(
            observation=observation,
            n_obs_steps=horizon.get("observation_horizon", int),
            horizon=horizon.get("prediction_horizon", int),
            n_action_steps=horizon.get("action_horizon", int),
            action_dim=action_dim,
            network=network,
            scheduler=scheduler,
            control_hz=_control_hz(payload.get("env_metadata")),
            inference=inference,
            provenance={"format": "robomimic", **_warnings(network)},
            action_parts=parts,
        )
    except ValueError as error:
        raise CheckpointError(f"{path} does not describe a policy: {cut(error)}") from error
    return Described(spec, normalized, actions, actions_normalized)


def _observation(settings: Settings, metadata: Settings) -> dict[str, Feature]:
    """The features in the order of ``all_shapes``, which is the order in the condition."""
    kinds: dict[str, str] = {}
    for kind, keys in settings.inner("observation", "modalities").get("obs", dict).items():
        if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
            raise CheckpointError(
                f"{settings.path}: the {cut(kind, 60)} observations are {cut(keys, 100)}, expected keys"
            )
        if keys and kind not in ("low_dim", "rgb"):
            raise CheckpointError(
                f"{settings.path}: {cut(keys, 100)} are {cut(kind, 60)} observations, expected low_dim or rgb"
            )
        kinds |= dict.fromkeys(keys, kind)
    shapes = metadata.get("all_shapes", dict)
    if unknown := [key for key in kinds if key not in shapes]:
        raise CheckpointError(
            f"{settings.path}: the config observes {cut(unknown, 150)}, but shape_metadata has {cut([*shapes], 150)}"
        )
    features = {}
    for key, shape in shapes.items():
        if key not in kinds:
            continue
        fits = is_shape(shape, picture=kinds[key] == "rgb")
        if not isinstance(key, str) or not fits or (kinds[key] == "rgb" and (len(shape) != 3 or shape[0] != 3)):
            raise CheckpointError(
                f"{settings.path}: {key} is {kinds[key]} with shape {cut(shape, 60)}, which does not fit"
            )
        image = kinds[key] == "rgb"
        features[key] = Feature((*shape[1:], shape[0]) if image else tuple(shape), "image" if image else "state")
    return features


def _actions(
    train: Settings, action_dim: int, payload: Mapping[str, Any]
) -> tuple[list[dict[str, Any]], dict[str, int], bool]:
    """The action's parts (empty if nothing is converted), their sizes, and whether any is normalised."""
    keys, config = train.get("action_keys", list, ["actions"]), train.get("action_config", dict, {})
    stored = payload.get("action_normalization_stats")
    parts: list[dict[str, Any]] = []
    sizes: dict[str, int] = {}
    normalized = False
    for key in keys:
        if not isinstance(key, str) or key in sizes:
            raise train.wrong("action_keys", "expected the names of the action's parts, each once")
        own = config.get(key, {})
        if not isinstance(own, dict):
            raise train.wrong("action_config", f"expected a map for {key}")
        convert = None
        if own.get("format") == "rot_6d":
            wanted = own.get("convert_at_runtime", "rot_axis_angle")
            if wanted not in CONVERSIONS:
                raise train.wrong(
                    "action_config", f"expected convert_at_runtime of {key} to be one of {[*CONVERSIONS]}"
                )
            convert = CONVERSIONS[wanted]
        normalized |= own.get("normalization") is not None
        sizes[key] = _width(stored.get(key)) if isinstance(stored, dict) else 0
        parts.append({"key": key, "size": sizes[key], "convert": convert})
    if stored is not None and sum(sizes.values()) != action_dim:
        raise CheckpointError(
            f"{train.path}: action_normalization_stats have sizes {cut(sizes, 150)}, expected a sum of {action_dim}, "
            "ac_dim of shape_metadata"
        )
    parts = parts if any(part["convert"] for part in parts) else []
    if stored is None and parts:
        raise CheckpointError(
            f"{train.path}: action_normalization_stats are missing, which give the sizes of {cut(keys, 100)}"
        )
    return parts, sizes, normalized


def _width(statistics: Any) -> int:
    """The size of a part of the action, from its statistics (1, n)."""
    offset = statistics.get("offset") if isinstance(statistics, dict) else None
    if isinstance(offset, list) and len(offset) == 1 and isinstance(offset[0], list):
        return len(offset[0])
    if isinstance(offset, Instance) and type(offset.state) is tuple and len(offset.state) == 5:
        shape = offset.state[1]
        return shape[1] if type(shape) is tuple and len(shape) == 2 and type(shape[1]) is int else 0
    return 0


def _network(path: Path, shapes: Shapes, action_dim: int) -> dict[str, Any]:
    """The UNet's sizes, from its tensors."""

    def shape(name: str, rank: int) -> tuple[int, ...]:
        found = shapes.get(f"{UNET}.{name}", ())
        if len(found) != rank:
            raise CheckpointError(f"{path}: {UNET}.{name} is missing or has shape {found}, expected {rank} axes")
        return found

    levels = 0
    while f"{UNET}.down_modules.{levels}.0.blocks.0.block.0.weight" in shapes:
        levels += 1
    blocks = [shape(f"down_modules.{i}.0.blocks.0.block.0.weight", 3) for i in range(max(levels, 1))]
    if blocks[0][1] != action_dim:
        raise CheckpointError(
            f"{path}: the network's actions have {blocks[0][1]} numbers, expected shape_metadata's ac_dim, {action_dim}"
        )
    film = shape("down_modules.0.0.cond_encoder.1.weight", 2)
    return {
        "name": "unet1d",
        "diffusion_step_embed_dim": shape("diffusion_step_encoder.1.weight", 2)[1],
        "down_dims": [block[0] for block in blocks],
        "kernel_size": blocks[0][2],
        "n_groups": GROUPS if blocks[0][0] >= 2 * GROUPS else max(1, blocks[0][0] // 2),
        "final_groups": GROUPS,
        "cond_predict_scale": film[0] == 2 * blocks[0][0],
    }


def _warnings(network: Mapping[str, Any]) -> dict[str, Any]:
    """Warn of sizes that robomimic's class never has: no tensor then tells the number of groups."""
    if network["down_dims"] == OWN_DIMS:
        return {}
    text = (
        f"the UNet has {network['down_dims']} channels, robomimic's own always {OWN_DIMS}; the number of groups of its "
    )
    return {"warnings": [f"{text}GroupNorms is not in the file and is taken as {network['n_groups']}"]}


def _camera(rgb: Settings, shapes: Shapes, cameras: list[str]) -> dict[str, Any]:
    """The settings of each camera's encoder; see :class:`parapolicy.networks.vision.CameraEncoder`."""
    core = rgb.inner("core_kwargs")
    if rgb.values.get("core_class") != "VisualCore":
        raise rgb.wrong("core_class", "expected 'VisualCore'")
    backbone = core.values.get("backbone_class", "ResNet18Conv")
    pool = core.values.get("pool_class", "SpatialSoftmax")
    if backbone not in BACKBONES:
        raise core.wrong("backbone_class", f"expected one of {[*BACKBONES]}")
    if pool not in POOLS:
        raise core.wrong("pool_class", f"expected one of {POOLS}")
    if not core.get("flatten", bool, True):
        raise core.wrong("flatten", "expected true")
    for group, name in (("backbone_kwargs", "input_coord_conv"), ("pool_kwargs", "output_variance")):
        if isinstance(own := core.values.get(group), dict) and own.get(name):
            raise Settings(core.path, own, f"{core.prefix}{group}.").wrong(name, "which is not supported")
    crop = _crop(rgb)
    settings = {}
    for key in cameras:
        keypoints = shapes.get(f"{ENCODER}.{key}.pool.nets.weight", (None,))[0]
        linear = shapes.get(f"{ENCODER}.{key}.nets.3.weight", (None,))[0]
        if pool == "SpatialSoftmax" and keypoints is None:
            raise CheckpointError(f"{rgb.path}: {ENCODER}.{key}.pool.nets.weight is missing, expected num_kp keypoints")
        settings[key] = {
            "backbone": BACKBONES[backbone],
            "norm": "group",
            "crop": crop,
            "crop_offset": "floor",
            "keypoints": keypoints,
            "features": linear,
            "relu": True,
        }
    return settings


def _crop(rgb: Settings) -> list[int] | None:
    """The randomisers' effect at evaluation: at most one centre crop."""
    classes, kwargs = (rgb.values.get(name) for name in ("obs_randomizer_class", "obs_randomizer_kwargs"))
    pairs = zip(*(v if isinstance(v, list) else [v] for v in (classes, kwargs)), strict=False)
    crops = []
    for name, own in pairs:
        if name in (None, *TRAINING_ONLY):
            continue
        if name != "CropRandomizer":
            raise rgb.wrong("obs_randomizer_class", f"expected CropRandomizer, {TRAINING_ONLY} or null")
        crop = Settings(rgb.path, own if isinstance(own, dict) else {}, f"{rgb.prefix}obs_randomizer_kwargs.")
        if crop.get("pos_enc", bool, False):
            raise crop.wrong("pos_enc", "expected false")
        crops.append([crop.get("crop_height", int, 76), crop.get("crop_width", int, 76)])
    if len(crops) > 1:
        raise rgb.wrong("obs_randomizer_class", "expected at most one CropRandomizer")
    return crops[0] if crops else None


def _schedule(algo: Settings) -> tuple[dict[str, Any], dict[str, Any]]:
    """The scheduler's config, and the arguments of ``make_schedule``."""
    named = [name for name in SCHEDULERS if algo.inner(name).get("enabled", bool)]
    if not named:
        raise algo.inner("ddpm").wrong("enabled", "and ddim is not enabled either; expected one of both")
    own = algo.inner(named[0])
    train_steps, steps = own.get("num_train_timesteps", int), own.get("num_inference_timesteps", int)
    steps = min(steps, train_steps) if named[0] == "ddpm" else steps  # as in diffusers 0.11.1
    if not 1 <= steps <= train_steps:
        raise own.wrong("num_inference_timesteps", f"expected 1 to {train_steps}, num_train_timesteps")
    config = {
        **SCHEDULERS[named[0]],
        "num_train_timesteps": train_steps,
        "beta_schedule": own.get("beta_schedule", str),
        "beta_start": 0.0001,
        "beta_end": 0.02,
        "clip_sample": own.get("clip_sample", bool),
        "prediction_type": own.choice("prediction_type", PREDICTIONS[named[0]]),
    }
    if named[0] == "ddim":
        config["set_alpha_to_one"] = own.get("set_alpha_to_one", bool)
        config["steps_offset"] = own.get("steps_offset", int)
    return config, {"steps": steps, "spacing": "diffusers-0.11"}


def _control_hz(environment: Any) -> float | None:
    arguments = environment.get("env_kwargs") if isinstance(environment, dict) else None
    rate = arguments.get("control_freq") if isinstance(arguments, dict) else None
    number = isinstance(rate, int | float) and not isinstance(rate, bool)
    return rate if number and 0.01 <= rate <= 10_000 else None  # type: ignore[operator]
