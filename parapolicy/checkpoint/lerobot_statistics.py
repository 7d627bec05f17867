"""How a LeRobot folder normalises: by its processor files, or in older saves by buffers among the weights.

The files name classes and other files. A class is never looked up: steps are recognised by their registered name, and
unknown steps that may change a value are refused.

LeRobot skips missing statistics and leaves the value unnormalised. Here that is an error.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from parapolicy.checkpoint.folder_files import Tensors, cut, find_file, open_tensors, read_json
from parapolicy.errors import CheckpointError
from parapolicy.normalizer import Affine

PREPROCESSOR, POSTPROCESSOR = "policy_preprocessor.json", "policy_postprocessor.json"
# The statistics that each mode needs. Except for MEAN_STD, the first maps to -1 and the second to 1.
MODES = {
    "MEAN_STD": ("mean", "std"),
    "MIN_MAX": ("min", "max"),
    "QUANTILES": ("q01", "q99"),
    "QUANTILE10": ("q10", "q90"),
}
TYPES = ("STATE", "VISUAL", "ENV", "ACTION", "REWARD", "LANGUAGE")  # LeRobot's, of features
FORMER_MODES = ("MEAN_STD", "MIN_MAX")  # of buffers
FORMER_EPS = 1e-8
STILL = 2.0**40  # scale of an action that never moved: the network's output then changes no digit of it
# Steps that change no value that the policy uses: batches, devices, and words, which a diffusion policy does not read.
PASSIVE = ("to_batch_processor", "device_processor", "tokenizer_processor")
FLOATS = (None, "float32", "float")

Statistic = Callable[[str, str, tuple[int, ...]], Tensor]  # of (key, name of the statistic, shape)


class Value(NamedTuple):
    """One observation key, or ``"action"``: LeRobot's type of it, and the shape of its statistics."""

    type: str
    shape: tuple[int, ...]


class Processing(NamedTuple):
    """One affine map per key, ``"action"`` included, and the observations' names used by callers: {key: name}."""

    maps: dict[str, Affine]
    given: dict[str, str]


def has_processors(folder: Path) -> bool:
    """Whether a folder has either of the processor files. From LeRobot 0.4 on, every folder has both."""
    return any((folder / name).exists() or (folder / name).is_symlink() for name in (PREPROCESSOR, POSTPROCESSOR))


def from_processors(folder: Path, values: Mapping[str, Value]) -> Processing:
    """The normalisation in the two processor files of a folder.

    Args:
        folder: of the policy.
        values: the policy's observations and ``"action"``.

    Raises:
        CheckpointError: a file is missing or damaged, a step or setting is not supported, or a statistic is missing or
            does not fit.
    """
    renamed: dict[str, str] = {}
    maps: dict[str, Affine] = {}
    path, steps = _read_steps(folder, PREPROCESSOR)
    for name, config, state in steps:
        if name == "rename_observations_processor" and not maps and not renamed:
            renamed = _texts(path, "rename_map", config.get("rename_map", {}))
        elif name == "normalizer_processor" and not maps:
            maps |= _observations(folder, path, config, state, values)
        else:
            _check_passive(path, name, config)
    _require(path, maps, "normalizer_processor")
    path, steps = _read_steps(folder, POSTPROCESSOR)
    for name, config, state in steps:
        if name == "unnormalizer_processor" and "action" not in maps:
            maps["action"] = _action(folder, path, config, state, values["action"])
        else:
            _check_passive(path, name, config)
    _require(path, "action" in maps, "unnormalizer_processor")
    given = {key: key for key in values if key != "action"}
    given |= {new: old for old, new in renamed.items() if new in given}
    if len(set(given.values())) < len(given) or len(set(renamed.values())) < len(renamed):
        raise CheckpointError(f"{folder / PREPROCESSOR}: rename_map gives two observations one name, {cut(renamed)}")
    return Processing(maps, given)


def from_buffers(weights: Tensors, values: Mapping[str, Value], modes: Mapping[str, str]) -> Processing:
    """The normalisation in the buffers among the weights of LeRobot up to 0.3.3.

    Args:
        weights: the open weights file.
        values: the policy's observations and ``"action"``.
        modes: normalisation mode of each of them.

    Raises:
        CheckpointError: a mode is not supported, or a statistic is missing or does not fit.
    """

    def statistic(key: str, name: str, shape: tuple[int, ...]) -> Tensor:
        # LeRobot uses unnormalize_outputs. If two buffers share their memory, the file has only the other one.
        places = ("unnormalize_outputs", "normalize_targets") if key == "action" else ("normalize_inputs",)
        names = [f"{place}.{buffer_name(key)}.{name}" for place in places]
        return weights.read(next((found for found in names if found in weights.shapes), names[0]), shape)

    for key in values:
        if (mode := modes[key]) not in (*FORMER_MODES, "IDENTITY"):
            raise CheckpointError(
                f"{weights.path}: {key} is normalised by {cut(repr(mode), 60)}, expected one of {FORMER_MODES} for "
                f"statistics among the weights; a newer save has {PREPROCESSOR}"
            )
    maps = {key: _affine(key, modes[key], value, statistic, FORMER_EPS, True) for key, value in values.items()}
    return Processing(maps, {key: key for key in values if key != "action"})


def buffer_name(key: str) -> str:
    """The name of a key's buffer. It cannot be inverted: keys may have underscores."""
    return "buffer_" + key.replace(".", "_")


def _read_steps(folder: Path, name: str) -> tuple[Path, list[tuple[str, dict[str, Any], Any]]]:
    """The path of a processor file, and each step's registered name, settings and state file."""
    path = find_file(folder, name)
    content = read_json(path)
    steps = content.get("steps") if isinstance(content, dict) else None
    if not isinstance(steps, list):
        raise CheckpointError(f"{path} has no list of steps, expected a LeRobot processor file; copy it again")
    found = []
    for step in steps:
        registered = step.get("registry_name") if isinstance(step, dict) else None
        if not isinstance(registered, str) or "class" in step:
            raise CheckpointError(
                f"{path}: the step {cut(step, 150)} has no registered name. Classes named in a file are never imported "
                "here; remove the step, and do its work in your own program"
            )
        config = step.get("config", {})
        if not isinstance(config, dict):
            raise CheckpointError(f"{path}: the config of {registered} is {cut(config, 60)}, expected a map")
        found.append((registered, config, step.get("state_file")))
    return path, found


def _check_passive(path: Path, name: str, config: Mapping[str, Any]) -> None:
    if name not in PASSIVE:
        raise CheckpointError(
            f"{path}: the step {cut(repr(name), 100)} is not supported at its place, and without it actions would be "
            "wrong. Supported: rename_observations_processor, then one normalizer_processor (unnormalizer_processor "
            f"after the policy), besides {', '.join(PASSIVE)}. Remove the step, and do its work in your own program"
        )
    if name == "device_processor" and config.get("float_dtype") not in FLOATS:
        raise CheckpointError(
            f"{path}: float_dtype is {cut(repr(config['float_dtype']), 60)}, which rounds observations; expected null "
            "or 'float32'"
        )


def _require(path: Path, found: object, name: str) -> None:
    if not found:
        raise CheckpointError(f"{path} has no step {name}, which says how to normalise; save the policy again")


def _texts(path: Path, name: str, value: Any) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise CheckpointError(f"{path}: {name} is {cut(repr(value), 100)}, expected a map from texts to texts")
    return value


class _Step:
    """The settings of a normalizer or unnormalizer step."""

    def __init__(self, path: Path, config: Mapping[str, Any]) -> None:
        known = {"eps", "features", "norm_map", "normalize_observation_keys"}
        if unknown := sorted(config.keys() - known):
            raise CheckpointError(f"{path}: a normalizer has the settings {cut(unknown)}, which are not supported")
        self.path = path
        self.modes = _texts(path, "norm_map", config.get("norm_map"))
        for kind, mode in self.modes.items():
            if kind not in TYPES:
                raise CheckpointError(f"{path}: norm_map has {cut(repr(kind), 60)}, expected types of {TYPES}")
            if mode not in (*MODES, "IDENTITY"):
                raise CheckpointError(
                    f"{path}: norm_map has {cut(repr(mode), 60)}, expected one of {[*MODES, 'IDENTITY']}"
                )
        eps = config.get("eps", FORMER_EPS)
        if not isinstance(eps, int | float) or isinstance(eps, bool) or not 0 <= eps <= 1:
            raise CheckpointError(f"{path}: eps is {cut(repr(eps), 60)}, expected a small number of at least 0")
        self.eps = float(eps)
        self.only = config.get("normalize_observation_keys")
        if self.only is not None and not isinstance(self.only, list):
            raise CheckpointError(f"{path}: normalize_observation_keys is {cut(repr(self.only), 60)}, expected a list")
        self.features = config.get("features")

    def type_of(self, key: str) -> str:
        """The step's LeRobot type of an observation."""
        feature = self.features.get(key) if isinstance(self.features, dict) else None
        kind = feature.get("type") if isinstance(feature, dict) else None
        if kind not in TYPES:
            raise CheckpointError(
                f"{self.path}: the normaliser's features lack {key} or its type, one of {TYPES}; it would not be "
                "normalised"
            )
        assert isinstance(kind, str)
        return kind


def _observations(
    folder: Path, path: Path, config: Mapping[str, Any], state: Any, values: Mapping[str, Value]
) -> dict[str, Affine]:
    step = _Step(path, config)
    maps = {}
    with _statistics(folder, path, state) as statistic:
        for key, value in values.items():
            if key != "action":
                mode = step.modes.get(step.type_of(key), "IDENTITY")
                mode = mode if step.only is None or key in step.only else "IDENTITY"
                maps[key] = _affine(key, mode, value, statistic, step.eps, False)
    return maps


def _action(folder: Path, path: Path, config: Mapping[str, Any], state: Any, value: Value) -> Affine:
    step = _Step(path, config)
    with _statistics(folder, path, state) as statistic:
        return _affine("action", step.modes.get(value.type, "IDENTITY"), value, statistic, step.eps, False)


@contextmanager
def _statistics(folder: Path, path: Path, state: Any) -> Iterator[Statistic]:
    """The statistics in a step's state file."""

    def missing(key: str, name: str, shape: tuple[int, ...]) -> Tensor:
        raise CheckpointError(f"{path} normalises {key}, but its step has no state_file with {key}.{name}")

    if state is None:
        yield missing
        return
    with open_tensors(find_file(folder, state, path)) as tensors:

        def statistic(key: str, name: str, shape: tuple[int, ...]) -> Tensor:
            full = f"{key}.{name}"
            # Of an image, saved without the axes of length 1.
            if len(shape) == 3 and tensors.shapes.get(full) == shape[:1]:
                return tensors.read(full, shape[:1]).reshape(shape)
            return tensors.read(full, shape)

        yield statistic


def _affine(key: str, mode: str, value: Value, statistic: Statistic, eps: float, always: bool) -> Affine:
    """The map of one key, in float32 as LeRobot computes it.

    Args:
        always: eps is added to every range, as in LeRobot up to 0.3.3, and not only to ranges of 0.
    """
    if mode == "IDENTITY":
        return Affine(torch.ones(value.shape), torch.zeros(value.shape))
    first, second = (statistic(key, name, value.shape) for name in MODES[mode])
    if mode == "MEAN_STD":
        if key == "action":  # LeRobot unnormalises by std, without eps
            return Affine(torch.where(second == 0, STILL, 1 / second), torch.zeros(value.shape), first)
        return Affine(1 / (second + eps), torch.zeros(value.shape), first)
    size = second - first
    if key == "action" and always:  # LeRobot unnormalises by the range, without eps
        scale = torch.where(size == 0, STILL, 2 / size)
    else:
        scale = 2 / (size + eps if always else torch.where(size == 0, eps, size))
    return Affine(scale, torch.full(value.shape, -1.0), first)
