"""The native checkpoint: a folder with ``config.json`` and ``model.safetensors``.

Neither file can contain code. Loading is strict in both directions: every tensor of the configuration must exist with
its shape, and no others. Shapes are compared before memory is allocated, so a hostile configuration cannot ask for a
network larger than the weights beside it.

Each file has a digest of the other: ``config.json`` has the SHA-256 of the weights file (as printed by ``sha256sum``),
and the weights' metadata have the digest of the spec, which depends on the order of the observations but not on the
text's layout. A damaged or edited file is refused. Files from before the digests have neither, and load.
"""

import hashlib
import json
import mmap
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from parapolicy.checkpoint.folder_files import MAX_HEADER, MAX_JSON, cut, read_json, some
from parapolicy.errors import CheckpointError
from parapolicy.files import replacing, write_whole
from parapolicy.networks import Network, build_network
from parapolicy.normalizer import Affine, Normalizer
from parapolicy.spec import PolicySpec

FORMAT, VERSION = "parapolicy", 2
READABLE = (1, 2)  # version 1 has the observations in a map, whose order counts
CONFIG, WEIGHTS = "config.json", "model.safetensors"
WEIGHTS_DIGEST, SPEC_DIGEST = "weights_sha256", "spec_sha256"


def write_checkpoint(
    folder: str | os.PathLike[str], spec: PolicySpec, network: Mapping[str, Tensor], normalizer: Normalizer
) -> None:
    """Write a policy folder. Each file is written whole or not at all."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {f"network.{name}": value for name, value in network.items()}
    tensors |= {f"normalizer.{name}": value for name, value in normalizer.state_dict().items()}
    for name, value in tensors.items():
        if not torch.isfinite(value).all():
            raise CheckpointError(f"{name} holds a value that is not finite; not saved to {folder}")
    plain = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    with replacing(folder / WEIGHTS) as partial:
        save_file(plain, partial, {SPEC_DIGEST: _spec_digest(spec)})
        digests = {WEIGHTS_DIGEST: _file_digest(partial)}
        text = json.dumps({"format": FORMAT, "version": VERSION, **digests, "spec": spec.to_dict()}, indent=2) + "\n"
        if len(text) > MAX_JSON:
            raise CheckpointError(
                f"{CONFIG} would have {len(text)} characters, expected at most {MAX_JSON}; shorten it"
            )
    write_whole(folder / CONFIG, text)


def recognises(path: Path) -> bool:
    """Whether a folder has the native configuration file."""
    return (path / CONFIG).is_file()


def read(folder: str | os.PathLike[str]) -> tuple[PolicySpec, Network, Normalizer]:
    """Read a policy folder onto the CPU.

    Raises:
        CheckpointError: a file is missing, truncated or of another format, or the two files do not match.
    """
    folder = Path(folder)
    config = _read_config(folder)
    try:
        spec = PolicySpec.from_dict(config["spec"])
        with torch.device("meta"):
            network = build_network(spec)
    except (ValueError, TypeError, AttributeError, RuntimeError, ArithmeticError) as error:
        raise CheckpointError(f"{folder / CONFIG} does not describe a policy: {cut(error)}") from error

    expected = {f"network.{name}": tuple(value.shape) for name, value in network.state_dict().items()}
    centres = {f"normalizer.{key}.centre": shape for key, shape in spec.normalizer_shapes.items()}
    for key, shape in spec.normalizer_shapes.items():
        expected |= {f"normalizer.{key}.scale": shape, f"normalizer.{key}.offset": shape}
    tensors = _read_weights(folder, expected, centres, config.get(WEIGHTS_DIGEST), _spec_digest(spec))

    network.load_state_dict({name: tensors[f"network.{name}"] for name in network.state_dict()}, assign=True)
    network.requires_grad_(False).eval()
    maps = {
        key: Affine(*(tensors.get(f"normalizer.{key}.{part}") for part in Affine._fields))  # type: ignore[arg-type]
        for key in spec.normalizer_shapes
    }
    try:
        return spec, network, Normalizer(maps)
    except ValueError as error:
        raise CheckpointError(f"{folder / WEIGHTS}: {cut(error)}") from error


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    if not folder.exists():
        raise CheckpointError(
            f"no checkpoint at {str(folder)!r}: there is no such file or folder. Expected one, or a name on the "
            "Hugging Face hub, hf://owner/name"
        )
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise CheckpointError(
                f"no checkpoint at {str(folder)!r}: {name} is missing, expected a folder with {CONFIG} and {WEIGHTS}, "
                "such as checkpoints/pusht_lowdim"
            )
    config = read_json(path)
    if not isinstance(config, dict) or config.get("format") != FORMAT or not isinstance(config.get("spec"), dict):
        raise CheckpointError(f"{path} is not the configuration of a parapolicy checkpoint (format {FORMAT!r})")
    version = config.get("version")
    if type(version) is not int or version not in READABLE:
        raise CheckpointError(
            f"{path} has version {cut(repr(version))}, this release reads {READABLE}; update parapolicy"
        )
    unknown = sorted(config.keys() - {"format", "version", "spec", WEIGHTS_DIGEST})
    if unknown:
        raise CheckpointError(f"{path} has unknown keys {cut(some(unknown))}; copy the folder again")
    return config


def _read_weights(
    folder: Path,
    expected: Mapping[str, tuple[int, ...]],
    optional: Mapping[str, tuple[int, ...]],
    weights_digest: Any,
    spec_digest: str,
) -> dict[str, Tensor]:
    path = folder / WEIGHTS
    try:
        with path.open("rb") as file:
            if int.from_bytes(file.read(8), "little") > MAX_HEADER:
                raise ValueError(f"its header is larger than {MAX_HEADER} bytes")
        with safe_open(path, "pt") as weights:
            saved = (weights.metadata() or {}).get(SPEC_DIGEST)
            if saved not in (None, spec_digest):
                raise CheckpointError(
                    f"{folder / CONFIG} differs from the one that {WEIGHTS} was saved with ({SPEC_DIGEST} differs); "
                    "copy the folder again, or undo the edit. To change a policy on purpose, load it unchanged as "
                    "policy, then parapolicy.save_policy(replace(policy, spec=replace(policy.spec, control_hz=20)), "
                    "folder), with replace of dataclasses"
                )
            found = {name: weights.get_slice(name) for name in weights.keys()}  # noqa: SIM118
            expected = {**expected, **{name: shape for name, shape in optional.items() if name in found}}
            _check_tensors(path, found, expected)
            both = saved is not None and weights_digest is not None
            if not (weights_digest == _file_digest(path) if both else saved is weights_digest):
                raise CheckpointError(
                    f"{path} differs from the file that {CONFIG} was saved with ({WEIGHTS_DIGEST} is missing or "
                    "differs): it is damaged, or belongs to another policy; copy both files again"
                )
            # Cloned: rounding of matrix products depends on memory alignment, which in a file depends on its header.
            tensors = {name: weights.get_tensor(name).clone() for name in expected}
    except CheckpointError:
        raise
    except (SafetensorError, ValueError, OSError) as error:
        raise CheckpointError(f"{path} is damaged or not a safetensors file ({cut(error)}); copy it again") from error
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise CheckpointError(f"{path}: {name} holds a value that is not finite; the training run diverged")
    return tensors


def _check_tensors(path: Path, found: Mapping[str, Any], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Compare names, shapes and types before reading."""
    missing, unknown = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    if missing or unknown:
        raise CheckpointError(
            f"{path} does not match {CONFIG}: missing tensors {cut(some(missing), 150)}, "
            f"unexpected tensors {cut(some(unknown), 150)}"
        )
    for name, shape in expected.items():
        given, kind = tuple(found[name].get_shape()), found[name].get_dtype()
        if given != shape:
            raise CheckpointError(f"{path}: {name} has shape {cut(given, 60)}, expected {shape} from {CONFIG}")
        if kind != "F32":
            raise CheckpointError(f"{path}: {name} has type {kind}, expected F32")


def _spec_digest(spec: PolicySpec) -> str:
    """SHA-256 of a spec. The order of maps, and writing a whole number as 1 or 1.0, do not change it."""
    text = json.dumps(_whole(spec.to_dict()), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _whole(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _whole(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_whole(inner) for inner in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _file_digest(path: Path) -> str:
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return hashlib.sha256(data).hexdigest()
