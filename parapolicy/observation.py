"""From what the robot sees to the condition vector: checking, history, normalising, flattening."""

from collections import deque
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from parapolicy.checkpoint.spec import PolicySpec
from parapolicy.errors import ObservationError
from parapolicy.normalizer import Normalizer


class ObservationHistory:
    """The last ``n_obs_steps`` observations of one episode; before the first step it repeats the first."""

    def __init__(self, spec: PolicySpec) -> None:
        self.spec = spec
        self._steps: deque[dict[str, np.ndarray]] = deque(maxlen=spec.n_obs_steps)

    def reset(self) -> None:
        """Forget everything: a new episode begins."""
        self._steps.clear()

    def push(self, observation: Mapping[str, Any]) -> None:
        """Add one control step's observation, {key: (...)}.

        Raises:
            ObservationError: a missing or unknown key, a wrong shape, or a value that is not finite; the history
                stays as it was.
        """
        _check_keys(self.spec, observation)
        step = {}
        for key, shape in self.spec.observation.items():
            value = _as_array(key, observation[key])
            if value.shape != shape:
                raise ObservationError(f"observation {key!r} has shape {value.shape}, expected {shape} for one step")
            _check_finite(key, value)
            step[key] = value.copy()
        while len(self._steps) < self.spec.n_obs_steps - 1:
            self._steps.append(step)
        self._steps.append(step)

    def stacked(self) -> dict[str, np.ndarray]:
        """The history as ``predict`` takes it, {key: (To, ...)}.

        Raises:
            ObservationError: nothing was pushed yet.
        """
        if not self._steps:
            raise ObservationError("the observation history is empty; push an observation first")
        return {key: np.stack([step[key] for step in self._steps]) for key in self.spec.observation}


def encode(spec: PolicySpec, normalizer: Normalizer, observation: Mapping[str, Any]) -> tuple[Tensor, bool]:
    """The condition vectors (B, C) of {key: (To, ...)} or {key: (B, To, ...)}, and whether there was a batch axis.

    Raises:
        ObservationError: a missing or unknown key, a wrong shape, or a value that is not finite.
    """
    _check_keys(spec, observation)
    parts: list[Tensor] = []
    batched: bool | None = None
    for key, shape in spec.observation.items():
        value = _as_array(key, observation[key])
        expected = (spec.n_obs_steps, *shape)
        has_batch = value.ndim == len(expected) + 1
        if value.shape[has_batch:] != expected or value.size == 0:
            raise ObservationError(
                f"observation {key!r} has shape {value.shape}, expected {expected}, or that behind a batch axis"
            )
        if batched is not None and (has_batch != batched or (batched and len(value) != len(parts[0]))):
            raise ObservationError(
                f"observation {key!r} has shape {value.shape}, whose batch axis differs from that of the keys before it"
            )
        batched = has_batch
        _check_finite(key, value)
        scale = normalizer.maps[key].scale
        tensor = normalizer.normalize(key, torch.from_numpy(value).to(scale.device))
        parts.append(tensor if has_batch else tensor[None])
    steps = torch.cat(
        [part.flatten(2) if part.ndim > 2 else part[..., None] for part in parts], dim=2
    )  # (B, To, C / To)
    return steps.flatten(1), bool(batched)


def _check_keys(spec: PolicySpec, observation: Mapping[str, Any]) -> None:
    missing = [key for key in spec.observation if key not in observation]
    unknown = [key for key in observation if key not in spec.observation]
    if missing or unknown:
        raise ObservationError(
            f"the observation lacks {missing} and has unknown keys {unknown}; expected {list(spec.observation)}"
        )


def _as_array(key: str, value: Any) -> np.ndarray:
    if isinstance(value, Tensor):
        value = value.detach().cpu().numpy()
    try:
        return np.asarray(value, dtype=np.float32)
    except (TypeError, ValueError) as error:
        raise ObservationError(f"observation {key!r} is no array of numbers: {error}") from error


def _check_finite(key: str, value: np.ndarray) -> None:
    finite = np.isfinite(value)
    if not finite.all():
        where = tuple(int(i) for i in np.argwhere(~finite)[0])
        raise ObservationError(
            f"observation {key!r} holds {value[where]} at index {where}, expected finite numbers; drop or repair the "
            "sensor reading before it reaches the policy"
        )
