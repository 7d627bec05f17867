"""From the robot's observations to the network's inputs: checking, history, normalising."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from parapolicy.errors import ObservationError
from parapolicy.normalizer import Normalizer
from parapolicy.spec import Feature, PolicySpec

ROOM = 8  # steps that a block of memory holds after its first history


class ObservationHistory:
    """The latest observations of one episode: for each key, as many steps as the policy takes.

    Before the first step, the first observation is repeated. Pushing copies a step; the histories handed out are views
    of these copies. ``copy.copy`` gives an independent history.
    """

    def __init__(self, spec: PolicySpec) -> None:
        self.spec = spec
        self.reset()

    def __copy__(self) -> "ObservationHistory":
        other = ObservationHistory(self.spec)
        other._recent = {key: copy.copy(recent) for key, recent in self._recent.items()}
        return other

    def reset(self) -> None:
        """Start a new episode with an empty history."""
        self._recent: dict[str, _Recent] = {}

    def push(self, observation: Mapping[str, Any]) -> None:
        """Add one control step's observation, {key: (...)}; see :meth:`parapolicy.Policy.predict` for its values.

        Raises:
            ObservationError: a missing or unknown key, a wrong shape, or a value that is not finite; the history is
                unchanged.
        """
        _check_keys(self.spec, observation)
        step = {}
        for key, feature in self.spec.observation.items():
            value = _as_array(key, feature, observation[key])
            expected = _step_shape(feature, value)
            if value.shape != expected:
                raise ObservationError(f"observation {key!r} has shape {value.shape}, expected {expected} for one step")
            if self._recent and self._recent[key].dtype != value.dtype:
                raise ObservationError(
                    f"observation {key!r} is {value.dtype}, expected {self._recent[key].dtype} as in the step before"
                )
            _check_values(key, feature, value)
            step[key] = value
        if self._recent:
            for key, value in step.items():
                self._recent[key].push(value)
        else:
            self._recent = {key: _Recent(self.spec.obs_steps(key), value) for key, value in step.items()}

    @property
    def newest(self) -> dict[str, np.ndarray]:
        """The last step pushed, {key: (...)}: float32, or uint8 for images pushed as uint8.

        Raises:
            ObservationError: no observation was pushed yet.
        """
        return {key: value[-1] for key, value in self.stacked().items()}

    def stacked(self) -> dict[str, np.ndarray]:
        """The history as ``predict`` takes it, {key: (To, ...)}.

        These are views, which later steps do not change. Copy them before writing to them, or to keep many of them.

        Raises:
            ObservationError: no observation was pushed yet.
        """
        if not self._recent:
            raise ObservationError("the observation history is empty; push an observation first")
        return {key: recent.view() for key, recent in self._recent.items()}


class _Block:
    """Memory for successive values of one key. Each place is written once.

    Attributes:
        values: (places, ...).
        begin: the first place that holds a value.
        end: the place after the last value.
    """

    def __init__(self, places: int, value: np.ndarray, begin: int) -> None:
        self.values = np.empty((places, *value.shape), value.dtype)
        self.begin = self.end = begin

    def add(self, values: np.ndarray) -> None:
        """Append a copy of values (n, ...)."""
        self.values[self.end : self.end + len(values)] = values
        self.end += len(values)


class _Recent:
    """The newest ``steps`` values of one key, contiguous in memory, so that they are handed out without a copy.

    When a block is full, or a copy of this object has appended to it, the newest ``steps - 1`` are copied to a new one.
    """

    def __init__(self, steps: int, first: np.ndarray) -> None:
        self._steps, self._places = steps, steps + (ROOM if steps > 1 else 0)
        self._block = _Block(self._places, first, steps - 1)
        self._block.add(first[None])
        self._end = steps  # in the block, of this object's values

    @property
    def dtype(self) -> np.dtype:
        return self._block.values.dtype

    def push(self, value: np.ndarray) -> None:
        """Add the newest value (...)."""
        if self._end < self._block.end or self._end == self._places:
            kept = self.view()[1:]
            self._block = _Block(self._places, value, 0)
            self._block.add(kept)
        self._block.add(value[None])
        self._end = self._block.end

    def view(self) -> np.ndarray:
        """The values (steps, ...), oldest first; the first value is repeated for the steps before it."""
        block = self._block
        if self._end - self._steps < block.begin:
            block.values[: block.begin] = block.values[block.begin]
            block.begin = 0
        return block.values[self._end - self._steps : self._end]


def stack_observations(observations: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """Stack observations {key: (…)} into a batch {key: (B, …)}; a single observation is not copied."""
    if len(observations) == 1:
        return {key: np.asarray(value)[None] for key, value in observations[0].items()}
    return {key: np.stack([observation[key] for observation in observations]) for key in observations[0]}


def copy_observation(observation: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A copy that does not keep the memory of the observation's history alive."""
    return {key: value.copy() for key, value in observation.items()}


def to_pixels(frames: np.ndarray) -> np.ndarray:
    """Convert frames (…, H, W, C) uint8, or (…, C, H, W) from 0 to 1, to pixels (…, H, W, C) uint8."""
    return frames if frames.dtype == np.uint8 else np.rint(255 * np.moveaxis(frames, -3, -1)).astype(np.uint8)


def normalize_observation(
    spec: PolicySpec, normalizer: Normalizer, observation: Mapping[str, Any]
) -> tuple[dict[str, Tensor], bool]:
    """Network inputs {key: (B, To, ...)}, normalised and on the normalizer's device, and whether the observation
    {key: (To, ...)} or {key: (B, To, ...)} had a batch axis.

    Raises:
        ObservationError: a missing or unknown key, a wrong shape, or a value that is not finite.
    """
    _check_keys(spec, observation)
    tensors: dict[str, Tensor] = {}
    batched: bool | None = None
    batch = 1
    for key, feature in spec.observation.items():
        value = _as_array(key, feature, observation[key])
        expected = (spec.obs_steps(key), *_step_shape(feature, value))
        has_batch = value.ndim == len(expected) + 1
        if value.shape[has_batch:] != expected or value.size == 0:
            raise ObservationError(
                f"observation {key!r} has shape {value.shape}, expected {expected}, or (B, …) with a batch axis"
            )
        if batched is not None and (has_batch != batched or (batched and len(value) != batch)):
            raise ObservationError(
                f"observation {key!r} has shape {value.shape}, whose batch axis differs from that of the keys before it"
            )
        batched, batch = has_batch, len(value) if has_batch else 1
        _check_values(key, feature, value)
        # Images are moved as uint8, a quarter of the bytes.
        tensor = torch.from_numpy(value).to(normalizer.maps[key].scale.device)
        if tensor.dtype == torch.uint8:
            tensor = tensor.movedim(-1, -3) / 255
        tensors[key] = normalizer.normalize(key, tensor if has_batch else tensor[None])
    return tensors, bool(batched)


def _check_keys(spec: PolicySpec, observation: Mapping[str, Any]) -> None:
    if not isinstance(observation, Mapping):
        kind = type(observation).__name__
        raise ObservationError(f"the observation is a {kind}, expected a dictionary of {list(spec.observation)}")
    missing = [key for key in spec.observation if key not in observation]
    unknown = [key for key in observation if key not in spec.observation]
    if missing or unknown:
        raise ObservationError(
            f"the observation lacks {missing} and has unknown keys {unknown}; expected {list(spec.observation)}"
        )


def _as_array(key: str, feature: Feature, value: Any) -> np.ndarray:
    """The value as a float32 array; uint8 images stay uint8."""
    if np.ma.isMaskedArray(value):
        raise ObservationError(f"observation {key!r} is a masked array; fill in its masked values")
    try:
        if isinstance(value, Tensor):
            value = value.detach().cpu()
            value = (value.float() if value.is_floating_point() else value).numpy()  # numpy has no bfloat16
        array = np.asarray(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ObservationError(f"observation {key!r} is not an array of numbers: {error}") from error
    if array.dtype.kind not in "biuf":
        raise ObservationError(f"observation {key!r} is an array of {array.dtype}, expected real numbers")
    if feature.kind == "image" and array.dtype != np.uint8 and array.dtype.kind != "f":
        raise ObservationError(
            f"the image {key!r} is {array.dtype}, expected uint8 (…, height, width, channels), or floating point "
            "(…, channels, height, width) from 0 to 1"
        )
    if feature.kind == "image" and array.dtype == np.uint8:
        return array
    with np.errstate(over="ignore"):  # what becomes infinite is refused with its key
        return array.astype(np.float32, copy=False)


def _step_shape(feature: Feature, value: np.ndarray) -> tuple[int, ...]:
    """Shape of one control step's value: (H, W, C) of uint8 images, (C, H, W) of float images."""
    return feature.shape if feature.kind == "state" or value.dtype == np.uint8 else feature.tensor_shape


def _check_values(key: str, feature: Feature, value: np.ndarray) -> None:
    if value.dtype == np.uint8:
        return
    finite = np.isfinite(value)
    if not finite.all():
        where = tuple(int(i) for i in np.argwhere(~finite)[0])
        raise ObservationError(
            f"observation {key!r} holds {value[where]} at index {where}, expected finite numbers; drop or repair the "
            "sensor reading before it reaches the policy"
        )
    if feature.kind == "image" and not (value.min() >= 0 and value.max() <= 1):
        raise ObservationError(
            f"the image {key!r} holds numbers from {value.min():g} to {value.max():g}, expected 0 to 1, or uint8"
        )
