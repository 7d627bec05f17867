"""One client's episode: what a message asks for, what the policy is given for it, and what is answered."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from parapolicy.episode import Episode, Request
from parapolicy.errors import ObservationError
from parapolicy.observation import ObservationHistory
from parapolicy.policy import Chunk
from parapolicy.spec import PolicySpec

OPTIONS = ("reset", "seed", "executed")


@dataclass
class Session:
    """A connection's episode.

    A message is a map of the policy's observation keys, each for one control step (...), or for the last
    ``n_obs_steps`` of them (To, ...), oldest first, as a client must send it that does not ask at every control step.
    Three more keys may stand in it: ``reset`` (true: a new episode begins with this observation), ``seed`` (of the
    episode's noise, with ``reset`` or in the first message) and ``executed`` (control steps since the last message,
    where it is not ``n_action_steps``; warm starts need it).

    Args:
        spec: the policy's.
        warm_start: start each chunk from the one before.
    """

    spec: PolicySpec
    warm_start: bool
    episode: Episode = field(init=False)

    def __post_init__(self) -> None:
        clash = [key for key in OPTIONS if key in self.spec.observation]
        if clash:
            raise ValueError(f"the policy observes {clash}, which are options of a message to the server")
        self.episode = Episode(self.spec, warm_start=self.warm_start)

    def request(self, message: Any) -> Request:
        """What a message asks for.

        Raises:
            ObservationError: not a map, a missing or unknown key, a wrong shape or option, or a value not finite.
        """
        if not isinstance(message, Mapping):
            raise ObservationError(f"the message is a {type(message).__name__}, expected a map of observations")
        options = {key: message[key] for key in OPTIONS if key in message}
        observation = {key: value for key, value in message.items() if key not in OPTIONS}
        seed = _integer(options, "seed", self.episode.seed[0], 2**63 - 1)
        executed = _integer(options, "executed", self.spec.n_action_steps, 2**31)
        reset = options.get("reset", False)
        if not isinstance(reset, bool | np.bool_):
            raise ObservationError(f"reset is {reset!r}, expected true or false")
        begins = bool(reset) or self.episode.chunks == 0
        if "seed" in options and not begins:
            raise ObservationError("a seed came in the middle of an episode; it goes with reset, or into the first one")
        steps = self._steps(observation)
        if begins:
            self.episode = Episode(self.spec, (seed,), self.warm_start)
        for step in steps:
            self.episode.push(step)
        self.last = self.episode.request(executed)
        return self.last

    def answer(self, chunk: Chunk) -> dict[str, Any]:
        """The reply to the last request: actions (n, Da), the first one for its observation. The episode goes on."""
        self.episode.accept(self.last, chunk)
        return {
            "actions": chunk.trajectory[self.spec.n_obs_steps - 1 :],
            "rounds": int(chunk.stats.rounds),
            "residual": float(chunk.stats.residual),
            "complete": bool(chunk.stats.complete),
        }

    def _steps(self, observation: dict[str, Any]) -> list[dict[str, Any]]:
        """The control steps of a message; all are checked before the first is used."""
        count = self.spec.n_obs_steps
        stacked = {
            key
            for key, feature in self.spec.observation.items()
            if key in observation
            and _shape(observation[key]) in ((count, *feature.shape), (count, *feature.tensor_shape))
        }
        steps = [observation]
        if stacked:  # a key that is not is left as it came, for the history to name
            steps = [{k: v[i] if k in stacked else v for k, v in observation.items()} for i in range(count)]
        check = ObservationHistory(self.spec)
        for step in steps:
            check.push(step)
        return steps


def _shape(value: Any) -> tuple[int, ...] | None:
    try:
        return np.shape(value)
    except ValueError:  # rows of different lengths; the history names it
        return None


def _integer(options: Mapping[str, Any], key: str, default: int, largest: int) -> int:
    value = options.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or not 0 <= value <= largest:
        raise ObservationError(f"{key} is {value!r}, expected a whole number from 0 to {largest}")
    return int(value)
