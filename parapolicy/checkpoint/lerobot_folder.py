"""A diffusion policy as saved by LeRobot: ``config.json``, ``model.safetensors``, and processor files from 0.4 on.

All layouts since 2024 are read: statistics in the processors' files (0.4 to 0.6) or among the weights (up to 0.3.3),
and the config of 2024 with ``input_shapes``. LeRobot loads weights with ``strict=False`` and keeps random values for
missing tensors. Here every tensor must exist with its shape, and no others.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from parapolicy.checkpoint.folder_files import Tensors, cut, find_file, open_tensors, read_json, some
from parapolicy.checkpoint.lerobot_config import Described, describe, is_lerobot
from parapolicy.checkpoint.lerobot_statistics import (
    FORMER_MODES,
    MODES,
    Processing,
    buffer_name,
    from_buffers,
    from_processors,
    has_processors,
)
from parapolicy.errors import CheckpointError
from parapolicy.networks import Network, build_network
from parapolicy.normalizer import Normalizer
from parapolicy.spec import PolicySpec

CONFIG, WEIGHTS = "config.json", "model.safetensors"
PRETRAINED, EMA = "pretrained_model", "pretrained_model_ema"
COMPILED = "._orig_mod"  # torch.compile inserts this into the names of a module's tensors
BUFFERS = ("normalize_inputs", "normalize_targets", "unnormalize_outputs")


def recognises(path: Path) -> bool:
    """Whether a folder, or ``pretrained_model`` in it, has a LeRobot policy's ``config.json``."""
    file = _folder(path) / CONFIG
    try:
        return file.is_file() and is_lerobot(read_json(file))
    except CheckpointError:  # damaged; no other program has the inner folder, and read says what is wrong with the file
        return file.parent != path


def find_ema(path: Path) -> Path:
    """The folder of the averaged weights that LeRobot 0.6 saves beside ``pretrained_model``.

    Raises:
        CheckpointError: there is none.
    """
    folder = _folder(path)
    found = folder.resolve().parent / EMA if folder.name != EMA else folder
    if not (found / CONFIG).is_file():
        raise CheckpointError(
            f"{path} has no averaged weights: {EMA} is missing beside {folder.name!r}. Leave out ema=True; formats "
            "with averaged weights in the same file always use them"
        )
    return found


def read(path: Path) -> tuple[PolicySpec, Network, Normalizer]:
    """Read a folder onto the CPU.

    Raises:
        CheckpointError: a file is missing, damaged or outside of the folder; a setting or step is not supported; or
            the weights, statistics and config do not match.
    """
    folder = _folder(path)
    config_path = find_file(folder, CONFIG)
    described = describe(config_path, read_json(config_path))
    with open_tensors(find_file(folder, WEIGHTS)) as weights:
        weights.rename({name: name.replace(COMPILED, "") for name in weights.shapes if COMPILED in name})
        processing = _processing(folder, weights, described)
        spec = _renamed(described.spec, processing.given)
        try:
            with torch.device("meta"):
                network = build_network(spec)
        except (ValueError, TypeError, RuntimeError, ArithmeticError) as error:
            raise CheckpointError(f"{config_path} does not describe a policy: {cut(error)}") from error
        tensors = _read_tensors(weights, described, network)
    network.load_state_dict(tensors, assign=True)
    network.requires_grad_(False).eval()
    try:
        normalizer = Normalizer({processing.given.get(key, key): affine for key, affine in processing.maps.items()})
    except ValueError as error:
        raise CheckpointError(f"{folder}: {cut(error)}") from error
    return spec, network, normalizer


def _renamed(spec: PolicySpec, given: Mapping[str, str]) -> PolicySpec:
    """The spec with observations renamed to the names used by callers, {key: name}."""
    network = dict(spec.network)
    if "encoder" in network:
        cameras = network["encoder"]["cameras"]
        network["encoder"] = {**network["encoder"], "cameras": {given[key]: value for key, value in cameras.items()}}
    observation = {given[key]: feature for key, feature in spec.observation.items()}
    return dataclasses.replace(spec, observation=observation, network=network)


def _folder(path: Path) -> Path:
    inner = path / PRETRAINED
    return inner if not (path / CONFIG).is_file() and (inner / CONFIG).is_file() else path


def _processing(folder: Path, weights: Tensors, described: Described) -> Processing:
    former = [name for name in weights.shapes if name.split(".")[0] in BUFFERS]
    if has_processors(folder):
        if former:
            raise CheckpointError(
                f"{weights.path} holds statistics ({some(former)}) in addition to the processor files; expected one of "
                "both: save the policy again"
            )
        return from_processors(folder, described.values)
    if not former and any(described.modes[key] != "IDENTITY" for key in described.values):
        raise CheckpointError(
            f"{folder} does not say how to normalise: expected policy_preprocessor.json and policy_postprocessor.json, "
            f"or in older saves normalize_inputs.* in {WEIGHTS}; copy the whole folder"
        )
    return from_buffers(weights, described.values, described.modes)


def _read_tensors(weights: Tensors, described: Described, network: Network) -> dict[str, Tensor]:
    """The network's tensors, by our names. Any other tensor of the file must be a known one."""
    own = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    theirs = {name: published for name in own if (published := published_name(name, described.separate))}
    grids = {published: own[name] for name, published in theirs.items() if published.endswith("pool.nets.weight")}
    grids = {name.replace("nets.weight", "pos_grid"): shape for name, shape in grids.items()}
    counters = {
        name.replace("running_mean", "num_batches_tracked") for name in theirs.values() if "running_mean" in name
    }
    buffers = _buffers([*described.values, *described.others])
    missing = sorted({*theirs.values(), *grids} - weights.shapes.keys())
    unknown = sorted(weights.shapes.keys() - {*theirs.values(), *grids, *counters, *buffers})
    if missing or unknown:
        raise CheckpointError(
            f"{weights.path} does not match {CONFIG}: missing tensors {cut(some(missing), 150)}, unexpected tensors "
            f"{cut(some(unknown), 150)}"
        )
    for name, published in theirs.items():  # check all shapes before reading
        if weights.shapes[published] != own[name]:
            raise CheckpointError(
                f"{weights.path}: {published} has shape {cut(weights.shapes[published], 60)}, expected from {CONFIG}  "
                f"{own[name]}"
            )
    _check_grids(weights, network, [*grids])
    tensors = {name: weights.read(published, own[name]) for name, published in theirs.items()}
    return {name: tensors[name] if name in tensors else torch.ones(shape) for name, shape in own.items()}


def published_name(name: str, separate: bool) -> str | None:
    """LeRobot's name of a tensor; None for the temperature of the spatial softmax, which LeRobot does not have."""
    if name.endswith("pool.temperature"):
        return None
    if not name.startswith("encoder."):
        for ours, theirs in ((".blocks.0.", ".conv1."), (".blocks.1.", ".conv2."), (".2.conv.", ".2.")):
            name = name.replace(ours, theirs)
        return f"diffusion.unet.{name}"
    _, _, camera, part, rest = name.split(".", 4)
    if part == "backbone":  # a Sequential: convolution, norm, ReLU, pooling, four layers
        first, rest = rest.split(".", 1)
        place = {"conv1": 0, "bn1": 1, "layer1": 4, "layer2": 5, "layer3": 6, "layer4": 7}[first]
        rest = f"{place}.{rest}"
    part = {"linear": "out"}.get(part, part)
    if part == "pool":
        rest = rest.replace("conv.", "nets.")
    return ".".join(("diffusion.rgb_encoder", *([camera] if separate else []), part, rest))


def _buffers(keys: Iterable[str]) -> set[str]:
    """The possible names of statistics among the weights."""
    kinds = {name for mode in FORMER_MODES for name in MODES[mode]}
    return {f"{place}.{buffer_name(key)}.{kind}" for place in BUFFERS for key in keys for kind in kinds}


def _check_grids(weights: Tensors, network: Network, names: Iterable[str]) -> None:
    """Check that the spatial softmaxes of the file have our coordinates."""
    pools = [module for name, module in network.named_modules() if name.endswith(".pool")]
    for name, pool in zip(names, pools, strict=True):
        height, width = int(pool.height), int(pool.width)
        found = weights.read(name, (height * width, 2))  # also bounds the size
        down, across = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
        expected = torch.stack((across.flatten(), down.flatten()), 1)
        if not torch.allclose(found, expected, atol=1e-6):
            raise CheckpointError(
                f"{weights.path}: {name} differs from the coordinates of a {height} x {width} map; save it again"
            )
