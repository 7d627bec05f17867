"""Made-up LeRobot folders in every layout: small random weights under LeRobot's names, written without its code."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from parapolicy.checkpoint.lerobot_config import describe
from parapolicy.networks import build_network
from parapolicy.spec import PolicySpec

STATISTICS = ("min", "max", "mean", "std", "q01", "q10", "q90", "q99")
LAYERS = {"conv1": 0, "bn1": 1, "layer1": 4, "layer2": 5, "layer3": 6, "layer4": 7}


def lerobot_config(**changes: Any) -> dict[str, Any]:
    """A ``config.json`` of 0.4 to 0.6; a change to None takes the setting out."""
    config: dict[str, Any] = {
        "type": "diffusion",
        "n_obs_steps": 2,
        "input_features": {
            "observation.environment_state": {"type": "ENV", "shape": [3]},
            "observation.state": {"type": "STATE", "shape": [2]},
        },
        "output_features": {"action": {"type": "ACTION", "shape": [2]}},
        "device": "cuda",
        "use_peft": False,
        "horizon": 8,
        "n_action_steps": 4,
        "normalization_mapping": {"VISUAL": "MEAN_STD", "STATE": "MIN_MAX", "ACTION": "MIN_MAX"},
        "drop_n_last_frames": 7,
        "vision_backbone": "resnet18",
        "resize_shape": None,
        "crop_ratio": 1.0,
        "crop_shape": None,
        "pretrained_backbone_weights": None,
        "use_group_norm": True,
        "spatial_softmax_num_keypoints": 4,
        "use_separate_rgb_encoder_per_camera": False,
        "down_dims": [8, 16],
        "kernel_size": 3,
        "n_groups": 4,
        "diffusion_step_embed_dim": 8,
        "use_film_scale_modulation": True,
        "noise_scheduler_type": "DDIM",
        "num_train_timesteps": 20,
        "beta_schedule": "squaredcos_cap_v2",
        "beta_start": 0.0001,
        "beta_end": 0.02,
        "prediction_type": "epsilon",
        "clip_sample": True,
        "clip_sample_range": 1.0,
        "num_inference_steps": 5,
        "optimizer_lr": 0.0001,
    }
    return config | changes


def statistics(config: dict[str, Any]) -> dict[str, Tensor]:
    """Random ones of each feature, {key.name: value}, with min < q01 < q10 < q90 < q99 < max."""
    found = {}
    for key, feature in {**config["input_features"], **config["output_features"]}.items():
        shape = feature["shape"] if len(feature["shape"]) == 1 else [feature["shape"][0], 1, 1]
        rising = torch.rand(8, *shape).cumsum(0) + torch.randn(shape)
        names = ("min", "q01", "q10", "mean", "q90", "q99", "max")
        found |= {f"{key}.{name}": value.clone() for name, value in zip(names, rising, strict=False)}
        found[f"{key}.std"] = torch.rand(shape) + 0.1
    return found


def network_tensors(spec: PolicySpec, separate: bool = False) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Random weights of a policy's network, by our names and by LeRobot's."""
    own, theirs = {}, {}
    for name, value in build_network(spec).state_dict().items():
        spread = torch.randn(value.shape) * 0.1
        own[name] = spread.abs() + 0.5 if "running_var" in name else spread + value
        if name.endswith("temperature"):
            own[name] = value
            continue
        camera = re.fullmatch(r"encoder\.cameras\.(\d+)\.(backbone|pool|linear)\.(.+)", name)
        if camera is None:
            changed = re.sub(r"\.blocks\.(\d)\.", lambda m: f".conv{int(m[1]) + 1}.", name)
            theirs["diffusion.unet." + re.sub(r"\.2\.conv\.", ".2.", changed)] = own[name]
            continue
        number, part, rest = camera.groups()
        prefix = f"diffusion.rgb_encoder.{number}." if separate else "diffusion.rgb_encoder."
        if part == "backbone":
            layer, rest = rest.split(".", 1)
            theirs[f"{prefix}backbone.{LAYERS[layer]}.{rest}"] = own[name]
        else:
            theirs[prefix + ("out." + rest if part == "linear" else rest.replace("conv", "pool.nets"))] = own[name]
    return own, theirs


def step(name: str, config: dict[str, Any], state_file: str | None = None) -> dict[str, Any]:
    """One step of a processor file."""
    return {"registry_name": name, "config": config, **({"state_file": state_file} if state_file else {})}


def write_folder(
    folder: Path, config: dict[str, Any], weights: dict[str, Tensor], values: dict[str, Tensor], **changes: Any
) -> Path:
    """A folder as LeRobot 0.4 to 0.6 writes it; ``changes`` are of the normalisers' settings."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(weights, folder / "model.safetensors")
    settings = {"eps": 1e-8, "norm_map": config["normalization_mapping"]}
    features = {**config["input_features"], **config["output_features"]}
    before = settings | {"features": features} | changes
    after = settings | {"features": config["output_features"]} | changes
    save_file(values, folder / "policy_preprocessor_step_4_normalizer_processor.safetensors")
    save_file(values, folder / "policy_postprocessor_step_0_unnormalizer_processor.safetensors")
    write_steps(
        folder,
        "policy_preprocessor",
        step("rename_observations_processor", {"rename_map": {}}),
        step("to_batch_processor", {}),
        step("device_processor", {"device": "cuda", "float_dtype": None}),
        step("normalizer_processor", before, "policy_preprocessor_step_4_normalizer_processor.safetensors"),
    )
    write_steps(
        folder,
        "policy_postprocessor",
        step("unnormalizer_processor", after, "policy_postprocessor_step_0_unnormalizer_processor.safetensors"),
        step("device_processor", {"device": "cpu", "float_dtype": None}),
    )
    return folder


def write_steps(folder: Path, name: str, *steps: dict[str, Any]) -> None:
    """A processor file."""
    (folder / f"{name}.json").write_text(json.dumps({"name": name, "steps": steps}))


def read_steps(folder: Path, name: str) -> list[dict[str, Any]]:
    """The steps of a processor file."""
    steps: list[dict[str, Any]] = json.loads((folder / f"{name}.json").read_text())["steps"]
    return steps


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


FEATURES = lerobot_config()["input_features"]
CAMERAS = {
    "observation.images.wrist": {"type": "VISUAL", "shape": [3, 48, 40]},
    "observation.images.front": {"type": "VISUAL", "shape": [3, 48, 40]},
    "observation.state": {"type": "STATE", "shape": [2]},
}
