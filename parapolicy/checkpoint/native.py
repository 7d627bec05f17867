"""The native checkpoint: a folder with ``config.json`` and ``model.safetensors``.

Neither file can carry code. Loading is strict in both directions: every tensor that the configuration calls for must
be there with its shape, and nothing else may be. Shapes are compared before memory is allocated, so a hostile
configuration cannot ask for a network larger than the weights beside it.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from parapolicy.errors import CheckpointError
from parapolicy.networks import Network, build_network
from parapolicy.normalizer import Affine, Normalizer
from parapolicy.spec import PolicySpec

FORMAT, VERSION = "parapolicy", 2
READABLE = (1, 2)  # version 1 has its observations in a map, whose order counts
CONFIG, WEIGHTS = "config.json", "model.safetensors"


def write_checkpoint(
    folder: str | os.PathLike[str], spec: PolicySpec, network: Mapping[str, Tensor], normalizer: Normalizer
) -> None:
    """Write a policy folder; each file appears whole or not at all."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {f"network.{name}": value for name, value in network.items()}
    tensors |= {f"normalizer.{name}": value for name, value in normalizer.state_dict().items()}
    for name, value in tensors.items():
        if not torch.isfinite(value).all():
            raise CheckpointError(f"{name} holds a value that is not finite; not saved to {folder}")
    config = {"format": FORMAT, "version": VERSION, "spec": spec.to_dict()}
    partial = folder / f".{WEIGHTS}.partial"
    save_file({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, partial)
    partial.replace(folder / WEIGHTS)
    partial = folder / f".{CONFIG}.partial"
    partial.write_text(json.dumps(config, indent=2) + "\n")
    partial.replace(folder / CONFIG)


def recognises(path: Path) -> bool:
    """Whether a folder has the native configuration file."""
    return (path / CONFIG).is_file()


def read(folder: str | os.PathLike[str]) -> tuple[PolicySpec, Network, Normalizer]:
    """Read a policy folder onto the CPU.

    Raises:
        CheckpointError: a file is missing, truncated, of another format, or does not match the other one.
    """
    folder = Path(folder)
    config = _read_config(folder)
    try:
        spec = PolicySpec.from_dict(config["spec"])
        with torch.device("meta"):
            network = build_network(spec)
    except (ValueError, TypeError, AttributeError, RuntimeError, ArithmeticError) as error:
        raise CheckpointError(f"{folder / CONFIG} describes no policy: {error}") from error

    expected = {f"network.{name}": tuple(value.shape) for name, value in network.state_dict().items()}
    for key, shape in spec.normalizer_shapes.items():
        expected |= {f"normalizer.{key}.scale": shape, f"normalizer.{key}.offset": shape}
    tensors = _read_weights(folder / WEIGHTS, expected)

    network.load_state_dict({name: tensors[f"network.{name}"] for name in network.state_dict()}, assign=True)
    network.requires_grad_(False).eval()
    maps = {
        key: Affine(tensors[f"normalizer.{key}.scale"], tensors[f"normalizer.{key}.offset"])
        for key in spec.normalizer_shapes
    }
    try:
        return spec, network, Normalizer(maps)
    except ValueError as error:
        raise CheckpointError(f"{folder / WEIGHTS}: {error}") from error


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise CheckpointError(
                f"no checkpoint at {str(folder)!r}: {name} is missing. Expected a folder with {CONFIG} and {WEIGHTS}, "
                "such as checkpoints/pusht_lowdim"
            )
    try:
        config = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is no JSON text ({error}); copy the folder again") from error
    if not isinstance(config, dict) or config.get("format") != FORMAT or not isinstance(config.get("spec"), dict):
        raise CheckpointError(f"{path} is not the configuration of a parapolicy checkpoint (format {FORMAT!r})")
    if config.get("version") not in READABLE:
        raise CheckpointError(
            f"{path} has version {config.get('version')!r}, this release reads {READABLE}; update parapolicy"
        )
    return config


def _read_weights(path: Path, expected: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    try:
        tensors = load_file(path)
    except (SafetensorError, ValueError, OSError) as error:
        raise CheckpointError(f"{path} is damaged or no safetensors file ({error}); copy it again") from error
    missing, unknown = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
    if missing or unknown:
        raise CheckpointError(
            f"{path} does not match {CONFIG}: missing tensors {_some(missing)}, unexpected tensors {_some(unknown)}"
        )
    for name, shape in expected.items():
        tensor = tensors[name]
        if tuple(tensor.shape) != shape:
            raise CheckpointError(f"{path}: {name} has shape {tuple(tensor.shape)}, {CONFIG} calls for {shape}")
        if tensor.dtype != torch.float32:
            raise CheckpointError(f"{path}: {name} is {tensor.dtype}, expected torch.float32")
        if not torch.isfinite(tensor).all():
            raise CheckpointError(f"{path}: {name} holds a value that is not finite; the training run diverged")
    return tensors


def _some(names: list[str]) -> str:
    return f"{names[:4]} and {len(names) - 4} more" if len(names) > 4 else str(names)
