"""A LeRobot folder's ``config.json`` as a :class:`parapolicy.PolicySpec`.

Every setting that changes the chunks is taken from the file. LeRobot's defaults changed between releases, so a missing
setting is not guessed. Settings of training and the device, and unknown ones, are ignored.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from parapolicy.checkpoint.config_values import Settings, is_shape
from parapolicy.checkpoint.folder_files import cut
from parapolicy.checkpoint.lerobot_statistics import Value
from parapolicy.errors import CheckpointError
from parapolicy.networks.unet1d import MAX_LEVELS
from parapolicy.spec import Feature, PolicySpec

STATE, ENVIRONMENT, ACTION = "observation.state", "observation.environment_state", "action"
KINDS = {"STATE": "state", "ENV": "state", "VISUAL": "image"}
SCHEDULERS: dict[str, dict[str, Any]] = {
    "DDPM": {"_class_name": "DDPMScheduler", "variance_type": "fixed_small"},
    "DDIM": {"_class_name": "DDIMScheduler", "set_alpha_to_one": True},
}
SCHEDULE = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "clip_sample", "clip_sample_range")
PREDICTIONS = ("epsilon", "sample")
# Arguments of the network, and their names and types in LeRobot's config.
UNET: dict[str, tuple[str, type]] = {
    "diffusion_step_embed_dim": ("diffusion_step_embed_dim", int),
    "down_dims": ("down_dims", list),
    "kernel_size": ("kernel_size", int),
    "n_groups": ("n_groups", int),
    "cond_predict_scale": ("use_film_scale_modulation", bool),
}
FINAL_GROUPS = 8  # of the UNet's last GroupNorm, for every n_groups


class Described(NamedTuple):
    """The contents of ``config.json``.

    Attributes:
        spec: the policy, with its observations in the order of the condition: state, cameras, environment state.
        values: LeRobot's type and the statistics' shape of each observation and of ``"action"``.
        modes: the normalisation mode of each of them, for statistics among the weights.
        others: keys that the config lists as inputs, but LeRobot's network does not use.
        separate: each camera has its own encoder.
    """

    spec: PolicySpec
    values: dict[str, Value]
    modes: dict[str, str]
    others: list[str]
    separate: bool


def is_lerobot(config: Any) -> bool:
    """Whether a config is of a LeRobot policy of any type."""
    named = isinstance(config, dict) and bool(config.keys() & {"input_features", "input_shapes"})
    return named and "format" not in config


def describe(path: Path, config: Mapping[str, Any]) -> Described:
    """The policy that a config describes.

    Raises:
        CheckpointError: another kind of policy, or a setting that is missing, contradictory or not supported.
    """
    settings = Settings(path, config)
    if config.get("type", "diffusion") != "diffusion":
        raise settings.wrong("type", "expected 'diffusion', the only supported policy of LeRobot")
    if "type" not in config and "noise_scheduler_type" not in config:
        raise settings.wrong("noise_scheduler_type", "and 'type' is missing, expected a diffusion policy")
    if config.get("use_peft"):
        raise settings.wrong("use_peft", "expected false: merge the adapter into the weights and save the policy again")
    features, action, modes = (_former if "input_shapes" in config else _features)(settings)
    order = [STATE, *(key for key, (kind, _) in features.items() if kind == "VISUAL"), ENVIRONMENT]
    used = [key for key in order if key in features]
    if STATE not in features or len(used) < 2:
        raise CheckpointError(
            f"{path}: the inputs are {cut([*features])}, expected {STATE}, and a camera or {ENVIRONMENT}"
        )
    observation = {key: _observed(settings, key, *features[key]) for key in used}
    cameras = [key for key in used if features[key][0] == "VISUAL"]
    separate = bool(cameras) and settings.get("use_separate_rgb_encoder_per_camera", bool, False)
    horizon, down_dims = settings.get("horizon", int), settings.get("down_dims", list)
    if not 1 <= len(down_dims) <= MAX_LEVELS:
        raise settings.wrong("down_dims", f"expected 1 to {MAX_LEVELS} numbers of channels")
    if horizon % 2 ** len(down_dims):
        raise settings.wrong(
            "horizon", f"expected a multiple of {2 ** len(down_dims)}, for LeRobot's {len(down_dims)} levels"
        )
    network = {
        "name": "unet1d",
        **{name: settings.get(theirs, kind) for name, (theirs, kind) in UNET.items()},
        "final_groups": FINAL_GROUPS,
    }
    if cameras:
        camera = _camera(settings, observation[cameras[0]])
        network["encoder"] = {"cameras": dict.fromkeys(cameras, camera), "shared": not separate}
    for name in SCHEDULE:
        if name not in config:
            raise settings.wrong(name, "expected the value that the network was trained with")
    train_steps = settings.get("num_train_timesteps", int)
    steps = config.get("num_inference_steps")
    if steps is not None and (type(steps) is not int or not 1 <= steps <= train_steps):
        raise settings.wrong("num_inference_steps", f"expected null or 1 to {train_steps}, num_train_timesteps")
    scheduler = {
        **SCHEDULERS[settings.choice("noise_scheduler_type", SCHEDULERS)],
        **{name: config[name] for name in SCHEDULE},
        "prediction_type": settings.choice("prediction_type", PREDICTIONS),
        "timestep_spacing": "leading",
        "steps_offset": 0,
    }
    try:
        spec = PolicySpec(
            observation=observation,
            n_obs_steps=settings.get("n_obs_steps", int),
            horizon=horizon,
            n_action_steps=settings.get("n_action_steps", int),
            action_dim=action[0],
            network=network,
            scheduler=scheduler,
            control_hz=None,
            inference={"steps": train_steps if steps is None else steps, "spacing": "diffusers"},
            provenance={"format": "LeRobot", **_warnings(config, [*features], used, cameras)},
        )
    except ValueError as error:
        raise CheckpointError(f"{path} does not describe a policy: {cut(error)}") from error
    values = {key: Value(features[key][0], observation[key].normalizer_shape) for key in used}
    values[ACTION] = Value("ACTION", tuple(action))
    return Described(spec, values, modes, [key for key in features if key not in used], separate)


def _warnings(config: Mapping[str, Any], features: list[str], used: list[str], cameras: list[str]) -> dict[str, Any]:
    """Warnings for the user, as an entry of the spec's provenance."""
    found = []
    if unused := [key for key in features if key not in used]:
        found.append(
            f"the config has the inputs {cut(unused, 200)}, which LeRobot's network does not use; they are left out"
        )
    if "input_shapes" in config and len(cameras) > 1:
        found.append(
            f"the config of 2024 was saved with sorted keys: cameras are used in its order, {cut(cameras, 200)}, as by "
            "LeRobot. The order in training may have been different"
        )
    return {"warnings": found} if found else {}


def _features(settings: Settings) -> tuple[dict[str, tuple[str, list[int]]], list[int], dict[str, str]]:
    """Types and shapes of the inputs, the action's shape, and the modes of all of them."""
    inputs = {key: _typed(settings, key, value) for key, value in settings.get("input_features", dict).items()}
    outputs = settings.get("output_features", dict)
    kind, action = _typed(settings, ACTION, outputs.get(ACTION))
    if kind != "ACTION" or len(action) != 1:
        raise settings.wrong("output_features", f"expected {ACTION!r} of type ACTION, with one axis")
    mapping = settings.get("normalization_mapping", dict)
    kinds = {key: kind for key, (kind, _) in inputs.items()} | {ACTION: "ACTION"}
    return inputs, action, {key: mapping.get(kind, "IDENTITY") for key, kind in kinds.items()}


def _former(settings: Settings) -> tuple[dict[str, tuple[str, list[int]]], list[int], dict[str, str]]:
    """As :func:`_features`, from the config of 2024, where the keys tell the types."""
    shapes, outputs = settings.get("input_shapes", dict), settings.get("output_shapes", dict)
    inputs = {}
    for key, shape in shapes.items():
        known = {STATE: "STATE", ENVIRONMENT: "ENV"}.get(key, "STATE")
        kind = "VISUAL" if key.startswith("observation.image") else known
        inputs[key] = _typed(settings, key, {"type": kind, "shape": shape})
    _, action = _typed(settings, ACTION, {"type": "ACTION", "shape": outputs.get(ACTION)})
    if len(action) != 1:
        raise settings.wrong("output_shapes", f"expected {ACTION!r} with one axis")
    given = {**settings.get("input_normalization_modes", dict), **settings.get("output_normalization_modes", dict)}
    return inputs, action, {key: str(given.get(key, "identity")).upper() for key in (*inputs, ACTION)}


def _typed(settings: Settings, key: str, value: Any) -> tuple[str, list[int]]:
    kind, shape = (value.get("type"), value.get("shape")) if isinstance(value, dict) else (None, None)
    fits = is_shape(shape, picture=kind == "VISUAL")
    if not isinstance(kind, str) or not isinstance(shape, list) or not fits:
        raise CheckpointError(f"{settings.path}: the feature {key} is {cut(value, 100)}, expected its type and shape")
    return kind, shape


def _observed(settings: Settings, key: str, kind: str, shape: list[int]) -> Feature:
    if {STATE: "STATE", ENVIRONMENT: "ENV"}.get(key, "VISUAL") != kind or len(shape) != (3 if kind == "VISUAL" else 1):
        raise CheckpointError(f"{settings.path}: {key} has type {cut(kind, 60)} and shape {shape}, which do not fit")
    if kind == "VISUAL" and shape[0] != 3:
        raise CheckpointError(f"{settings.path}: {key} has shape {shape}, expected (3, height, width)")
    return Feature((*shape[1:], shape[0]) if kind == "VISUAL" else tuple(shape), KINDS[kind])


def _camera(settings: Settings, image: Feature) -> dict[str, Any]:
    """The settings of all cameras' encoders; see :class:`parapolicy.networks.vision.CameraEncoder`."""
    if "crop_shape" not in settings.values:
        raise settings.wrong("crop_shape", "expected [height, width] or null")
    resize, crop = settings.size("resize_shape"), settings.size("crop_shape")
    ratio = settings.get("crop_ratio", float, 1.0)
    if not 0 < ratio <= 1:
        raise settings.wrong("crop_ratio", "expected a number above 0, at most 1")
    if resize:  # the crop is then always derived from it
        crop = [int(side * ratio) for side in resize] if ratio < 1 else None
    keypoints = settings.get("spatial_softmax_num_keypoints", int)
    return {
        "backbone": settings.get("vision_backbone", str),
        "norm": "group" if settings.get("use_group_norm", bool) else "batch",
        "resize": resize,
        "crop": crop,
        "keypoints": keypoints,
        "features": 2 * keypoints,
        "relu": True,
        "antialias": True,
    }
