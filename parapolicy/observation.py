"""From what the robot sees to what the network takes: checking, history, normalising."""

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from parapolicy.errors import ObservationError
from parapolicy.normalizer import Normalizer
from parapolicy.spec import Feature, PolicySpec


class ObservationHistory:
    """The last observations of one episode, of each key as many steps as the policy sees of it.

    Before the first step it repeats the first.
    """

    def __init__(self, spec: PolicySpec) -> None:
        self.spec = spec
        self._steps: deque[dict[str, np.ndarray]] = deque(maxlen=spec.n_obs_steps)

    def reset(self) -> None:
        """Forget everything: a new episode begins."""
        self._steps.clear()

    def push(self, observation: Mapping[str, Any]) -> None:
        """Add one control step's observation, {key: (...)}; see :meth:`parapolicy.Policy.predict` for its values.

        Raises:
            ObservationError: a missing or unknown key, a wrong shape, or a value that is not finite; the history
                stays as it was.
        """
        _check_keys(self.spec, observation)
        step = {}
        for key, feature in self.spec.observation.items():
            value = _as_array(key, feature, observation[key])
            expected = _step_shape(feature, value)
            if value.shape != expected:
                raise ObservationError(f"observation {key!r} has shape {value.shape}, expected {expected} for one step")
            if self._steps and self._steps[-1][key].dtype != value.dtype:
                raise ObservationError(
                    f"observation {key!r} is {value.dtype}, expected {self._steps[-1][key].dtype} as in the step before"
                )
            _check_values(key, feature, value)
            step[key] = value.copy()
        while len(self._steps) < self.spec.n_obs_steps - 1:
            self._steps.append(step)
        self._steps.append(step)

    @property
    def newest(self) -> dict[str, np.ndarray]:
        """The last step pushed, {key: (...)}: float32, or uint8 of images that came so.

        Raises:
            ObservationError: nothing was pushed yet.
        """
        self._require_steps()
        return self._steps[-1]

    def stacked(self) -> dict[str, np.ndarray]:
        """The history as ``predict`` takes it, {key: (To, ...)}.

        Raises:
            ObservationError: nothing was pushed yet.
        """
        self._require_steps()
        steps = list(self._steps)
        return {
            key: np.stack([step[key] for step in steps[-self.spec.obs_steps(key) :]]) for key in self.spec.observation
        }

    def _require_steps(self) -> None:
        if not self._steps:
            raise ObservationError("the observation history is empty; push an observation first")


def stack_observations(observations: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """Observations {key: (…)} of the same keys and shapes as one batch, {key: (B, …)}."""
    return {key: np.stack([observation[key] for observation in observations]) for key in observations[0]}


def normalize_observation(
    spec: PolicySpec, normalizer: Normalizer, observation: Mapping[str, Any]
) -> tuple[dict[str, Tensor], bool]:
    """What the network takes, {key: (B, To, ...)} normalised and on the normalizer's device, and whether there was a
    batch axis in {key: (To, ...)} or {key: (B, To, ...)}.

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
                f"observation {key!r} has shape {value.shape}, expected {expected}, or that behind a batch axis"
            )
        if batched is not None and (has_batch != batched or (batched and len(value) != batch)):
            raise ObservationError(
                f"observation {key!r} has shape {value.shape}, whose batch axis differs from that of the keys before it"
            )
        batched, batch = has_batch, len(value) if has_batch else 1
        _check_values(key, feature, value)
        tensor = torch.from_numpy(value).to(
            normalizer.maps[key].scale.device
        )  # images as uint8, a quarter of the bytes
        if tensor.dtype == torch.uint8:
            tensor = tensor.movedim(-1, -3) / 255
        tensors[key] = normalizer.normalize(key, tensor if has_batch else tensor[None])
    return tensors, bool(batched)


def _check_keys(spec: PolicySpec, observation: Mapping[str, Any]) -> None:
    missing = [key for key in spec.observation if key not in observation]
    unknown = [key for key in observation if key not in spec.observation]
    if missing or unknown:
        raise ObservationError(
            f"the observation lacks {missing} and has unknown keys {unknown}; expected {list(spec.observation)}"
        )


def _as_array(key: str, feature: Feature, value: Any) -> np.ndarray:
    """float32; an image that is uint8 stays so."""
    if np.ma.isMaskedArray(value):
        raise ObservationError(f"observation {key!r} is a masked array; fill in what is masked")
    try:
        if isinstance(value, Tensor):
            value = value.detach().cpu()
            value = (value.float() if value.is_floating_point() else value).numpy()  # numpy has no bfloat16
        array = np.asarray(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ObservationError(f"observation {key!r} is no array of numbers: {error}") from error
    if array.dtype.kind not in "biuf":
        raise ObservationError(f"observation {key!r} is no array of numbers, but of {array.dtype}; expected real ones")
    if feature.kind == "state":
        array = array.astype(np.float32, copy=False)
    if feature.kind == "image" and array.dtype != np.uint8 and array.dtype.kind != "f":
        raise ObservationError(
            f"the image {key!r} is {array.dtype}, expected uint8 (…, height, width, channels), or floating point "
            "(…, channels, height, width) from 0 to 1"
        )
    return array if array.dtype == np.uint8 else np.asarray(array, dtype=np.float32)


def _step_shape(feature: Feature, value: np.ndarray) -> tuple[int, ...]:
    """Shape of one control step's value: images come as cameras give them, or as floats with the channels first."""
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
