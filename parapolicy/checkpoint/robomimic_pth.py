"""A diffusion policy as saved by robomimic 0.5 or newer: a ``.pth`` file of ``torch.save``, read without running code.

Averaged weights are used if the file has them. Every tensor must exist with its shape, and no others; tensors that
robomimic stores under two names must be equal.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from parapolicy.checkpoint.archive import Archive, holds
from parapolicy.checkpoint.folder_files import MAX_JSON, cut, parse_json, some
from parapolicy.checkpoint.inert import Instance, TensorRef, UnsafeValue, read_array
from parapolicy.checkpoint.pickles import unpickle
from parapolicy.checkpoint.robomimic_config import ENCODER, UNET, Described, describe
from parapolicy.checkpoint.stand_ins import NUMPY
from parapolicy.errors import CheckpointError
from parapolicy.networks import Network, build_network
from parapolicy.normalizer import Affine, Normalizer
from parapolicy.spec import PolicySpec

UNSCALED = (
    "the config normalises actions, but the file has no action_normalization_stats: the network's output, from -1 to "
    "1, is used as the action, as robomimic does"
)
FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
# Indices in the backbone's Sequential.
PLACES = {"conv1": 0, "bn1": 1, "layer1": 4, "layer2": 5, "layer3": 6, "layer4": 7}


def recognises(path: Path) -> bool:
    """Whether a file of ``torch.save`` has robomimic's keys."""
    return holds(path, b"algo_name", b"shape_metadata")


def read(path: Path) -> tuple[PolicySpec, Network, Normalizer]:
    """Read a checkpoint onto the CPU.

    Raises:
        CheckpointError: a damaged or hostile file, another algorithm, a setting that is not supported, or weights,
            statistics and config that do not match.
    """
    with Archive(path) as archive:
        payload = unpickle(archive, NUMPY)
        if not isinstance(payload, dict) or payload.get("algo_name") != "diffusion_policy":
            name = payload.get("algo_name") if isinstance(payload, dict) else payload
            raise archive.error(f"algo_name is {cut(repr(name), 60)}, expected 'diffusion_policy'")
        config = _config(archive, payload)
        references = _weights(archive, payload, config)
        shapes = {name: reference.shape for name, reference in references.items()}
        described = describe(path, payload, config, shapes)
        try:
            with torch.device("meta"):
                network = build_network(described.spec)
        except (ValueError, TypeError, RuntimeError, ArithmeticError) as error:
            raise archive.error(f"it does not describe a policy: {cut(error)}") from error
        averaged = payload["model"].get("ema") is not None
        maps = _normalizer(archive, payload, described, averaged)
        spec = described.spec
        if described.actions_normalized and payload.get("action_normalization_stats") is None:
            warnings = [*spec.provenance.get("warnings", []), UNSCALED]
            spec = dataclasses.replace(spec, provenance={**spec.provenance, "warnings": warnings})
        tensors = _read_tensors(archive, references, network, described.spec)
    network.load_state_dict(tensors, assign=True)
    network.requires_grad_(False).eval()
    try:
        return spec, network, Normalizer(maps)
    except ValueError as error:
        raise CheckpointError(f"{path}: {cut(error)}") from error


def _config(archive: Archive, payload: Mapping[str, Any]) -> dict[str, Any]:
    text = payload.get("config")
    if not isinstance(text, str) or len(text) > MAX_JSON:
        raise archive.error(
            f"its config is a {type(text).__name__}, expected a JSON text of at most {MAX_JSON} characters"
        )
    try:
        config = parse_json(text)
    except (ValueError, RecursionError) as error:
        raise archive.error(f"its config is not a JSON text ({cut(error)}); copy it again") from error
    if not isinstance(config, dict):
        raise archive.error(f"its config is {cut(repr(config), 60)}, expected a map")
    return config


def _weights(archive: Archive, payload: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, TensorRef]:
    """The weights in use: the averaged ones if there are any."""
    model = payload.get("model")
    if not isinstance(model, dict) or "nets" not in model:
        raise archive.error("its model has no 'nets', expected a robomimic model")
    algo = config.get("algo")
    ema = algo.get("ema") if isinstance(algo, dict) else None
    enabled = ema.get("enabled") if isinstance(ema, dict) else False
    if bool(enabled) != (model.get("ema") is not None):
        raise archive.error(
            f"config: algo.ema.enabled is {cut(enabled, 60)}, but the file {'has no' if enabled else 'has'} averaged "
            "weights (model.ema), so the weights in use are unknown; save it again"
        )
    name = "ema" if enabled else "nets"
    found = model[name]
    if not isinstance(found, dict) or not all(isinstance(v, TensorRef) for v in found.values()):
        raise archive.error(f"model.{name} holds values that are not tensors")
    return {str(key): value for key, value in found.items()}


def _normalizer(
    archive: Archive, payload: Mapping[str, Any], described: Described, averaged: bool
) -> dict[str, Affine]:
    """One map per observation and for the action.

    Some published files without averaged weights lack the action's statistics although their config normalises actions.
    robomimic then uses the network's output unchanged, and so do we, with a warning in the spec. No such file with
    averaged weights is known; there, the statistics must have been lost.
    """
    maps = {}
    for key, shape in described.spec.normalizer_shapes.items():
        maps[key] = Affine(torch.ones(shape), torch.zeros(shape))
    stored = payload.get("obs_normalization_stats")
    if described.normalized != (stored is not None):
        raise archive.error(
            f"config: train.hdf5_normalize_obs is {described.normalized}, but obs_normalization_stats "
            f"{'are missing' if stored is None else 'are there'}; save it again"
        )
    if stored is not None:
        for key, feature in described.spec.observation.items():
            maps[key] = _affine(archive, "obs_normalization_stats", stored, key, feature.shape)
    stored = payload.get("action_normalization_stats")
    if stored is None:
        if described.actions_normalized and averaged:
            raise archive.error(
                "action_normalization_stats are missing, but train.action_config of its config normalises actions; "
                "save it again"
            )
        return maps
    parts = [_affine(archive, "action_normalization_stats", stored, k, (n,)) for k, n in described.actions.items()]
    maps["action"] = Affine(*(torch.cat([getattr(part, name) for part in parts]) for name in Affine._fields))
    return maps


def _affine(archive: Archive, name: str, stored: Any, key: str, shape: tuple[int, ...]) -> Affine:
    """The map ``(value - offset) / scale`` of one key; both are stored with a leading axis of length 1."""
    own = stored.get(key) if isinstance(stored, dict) else None
    if not isinstance(own, dict) or not {"scale", "offset"} <= own.keys():
        raise archive.error(f"{name} lack scale and offset of {key}")
    scale, offset = (_numbers(archive, f"{name}.{key}.{part}", own[part], shape) for part in ("scale", "offset"))
    if not scale.all():
        raise archive.error(f"{name}.{key}.scale holds a 0, expected divisors; save it again")
    return Affine(1 / scale, torch.zeros(shape), offset)


def _numbers(archive: Archive, name: str, value: Any, shape: tuple[int, ...]) -> Tensor:
    """A nested list (1, *shape), or a numpy array, as float32 (*shape)."""
    try:
        if isinstance(value, Instance):
            numbers = torch.from_numpy(read_array(value)).float()
        elif isinstance(value, TensorRef):
            numbers = value.load().float()
        else:
            numbers = torch.tensor(_nested(value, (1, *shape)), dtype=torch.float32).reshape(1, *shape)
    except (UnsafeValue, ValueError, TypeError, OverflowError) as error:
        raise archive.error(f"{name} is not a list of numbers of shape {(1, *shape)} ({cut(error, 100)})") from error
    if tuple(numbers.shape) != (1, *shape) or not torch.isfinite(numbers).all():
        raise archive.error(f"{name} has shape {tuple(numbers.shape)}, expected {(1, *shape)} and finite numbers")
    return numbers[0].clone()


def _nested(value: Any, shape: tuple[int, ...]) -> list[float]:
    """The numbers of a nested list, whose lengths are checked before it is walked."""
    if not shape:
        if type(value) not in (int, float):
            raise ValueError(f"a {type(value).__name__}")
        return [value]
    if not isinstance(value, list) or len(value) != shape[0]:
        raise ValueError(f"{len(value) if isinstance(value, list) else type(value).__name__}, expected {shape[0]}")
    return [number for inner in value for number in _nested(inner, shape[1:])]


def _read_tensors(
    archive: Archive, references: Mapping[str, TensorRef], network: Network, spec: PolicySpec
) -> dict[str, Tensor]:
    """The network's tensors, by our names. Any other tensor of the file must be a known one."""
    cameras = [key for key, feature in spec.observation.items() if feature.kind == "image"]
    own = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    theirs = {name: _published(name, cameras) for name in own}
    grids: dict[str, tuple[str, Any, Any]] = {}
    for i, key in enumerate(cameras):
        if f"encoder.cameras.{i}.pool.conv.weight" in own:
            pool = network.get_submodule(f"encoder.cameras.{i}.pool")
            for place in ("pool", "nets.1"):
                grids |= {f"{ENCODER}.{key}.{place}.pos_{axis}": (axis, pool.height, pool.width) for axis in "xy"}
    expected = {*grids, *(name for names in theirs.values() for name in names)}
    missing, unknown = sorted(expected - references.keys()), sorted(references.keys() - expected)
    if missing or unknown:
        raise archive.error(
            f"its weights do not match its config: missing tensors {cut(some(missing), 150)}, unexpected tensors "
            f"{cut(some(unknown), 150)}"
        )
    for name, names in theirs.items():  # check all shapes before reading
        for published in names:
            found = references[published].shape
            if found != own[name] and not (own[name] == () and found == (1,)):
                raise archive.error(f"{published} has shape {cut(found, 60)}, expected {own[name]}")
            if references[published].dtype not in FLOATS:
                raise archive.error(f"{published} has type {references[published].dtype}, expected float32")
    _check_grids(archive, references, grids)
    tensors = {}
    for name, (first, *others) in theirs.items():
        value = references[first].load()
        for other in others:
            if not references[other].equals(references[first]):
                raise archive.error(f"{other} differs from {first}, which is the same tensor in robomimic")
        if not torch.isfinite(value).all():
            raise archive.error(f"{first} holds a value that is not finite; the training run diverged")
        tensors[name] = value.float().reshape(own[name])
    return tensors


def _published(name: str, cameras: list[str]) -> list[str]:
    """robomimic's names of a tensor: two for tensors of a camera's backbone and pooling, else one."""
    if not name.startswith("encoder."):
        return [f"{UNET}.{name}"]
    _, _, number, part, rest = name.split(".", 4)
    camera = f"{ENCODER}.{cameras[int(number)]}"
    if part == "linear":
        return [f"{camera}.nets.3.{rest}"]
    if part == "pool":
        rest = rest.replace("conv.", "nets.")
        return [f"{camera}.pool.{rest}", f"{camera}.nets.1.{rest}"]
    first, rest = rest.split(".", 1)
    return [f"{camera}.{place}.nets.{PLACES[first]}.{rest}" for place in ("backbone", "nets.0")]


def _check_grids(
    archive: Archive, references: Mapping[str, TensorRef], grids: Mapping[str, tuple[str, Any, Any]]
) -> None:
    """Check that the spatial softmaxes of the file have our coordinates."""
    for name, (axis, height, width) in grids.items():
        if references[name].shape != (1, height * width):
            raise archive.error(f"{name} has shape {references[name].shape}, expected {(1, height * width)}")
        down, across = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
        expected = (across if axis == "x" else down).flatten()
        if not torch.allclose(references[name].load()[0].float(), expected, atol=1e-6):
            raise archive.error(
                f"{name} differs from the coordinates of a feature map of {height} x {width}; save it again"
            )
