"""One client's episode: the request in each message, and its reply."""

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from parapolicy.episode import Episode, Request
from parapolicy.errors import ObservationError
from parapolicy.observation import ObservationHistory
from parapolicy.policy import Chunk
from parapolicy.serve.encoded_images import decode_images
from parapolicy.spec import PolicySpec

OPTIONS = ("reset", "seed", "executed")


@dataclass
class Session:
    """A connection's episode.

    A message is a map of the policy's observation keys. Each value is stacked (To, ...), oldest first, for its key's
    last ``obs_steps`` control steps, or (...) for the present step. An image may be the bytes of a JPEG or PNG file, or
    a list of files if stacked. A single step is joined to the steps of earlier messages only if ``executed`` is 1;
    otherwise it is repeated for the whole history, because the steps between are unknown.

    A message may have three more keys. ``executed``: control steps since the last answered message, by default
    ``n_action_steps``; warm starts use it too. ``reset``: whether a new episode begins with this observation; by
    default, one begins after a pause. ``seed``: of the episode's noise, in the first message of an episode.

    Args:
        spec: the policy's.
        warm_start: start each chunk from the previous one's warm state.
        pause_s: seconds of silence after which a message without ``reset`` begins a new episode.

    Raises:
        ValueError: an observation key is also an option of messages.
    """

    spec: PolicySpec
    warm_start: bool
    pause_s: float = math.inf
    episode: Episode = field(init=False)  # up to the last answer
    _asked: tuple[Episode, Request] = field(init=False)

    def __post_init__(self) -> None:
        clash = [key for key in OPTIONS if key in self.spec.observation]
        if clash:
            raise ValueError(f"the policy observes {clash}, which are reserved for options of messages")
        self.episode = Episode(self.spec, warm_start=self.warm_start)

    def request(self, message: Any, silence_s: float = 0.0) -> Request:
        """The request in a message. The episode is unchanged until :meth:`answer`.

        Args:
            message: unpacked.
            silence_s: seconds from the last reply to the message's arrival.

        Raises:
            ObservationError: not a map, a missing or unknown key, a wrong shape or option, or a value not finite.
        """
        if not isinstance(message, Mapping):
            raise ObservationError(f"the message is a {type(message).__name__}, expected a map of observations")
        options = {key: message[key] for key in OPTIONS if key in message}
        observation = decode_images(self.spec, {key: value for key, value in message.items() if key not in OPTIONS})
        seed = _integer(options, "seed", self.episode.seed[0], 2**63 - 1)
        executed = _integer(options, "executed", self.spec.n_action_steps, 2**31)
        reset = options.get("reset", silence_s > self.pause_s)
        if not isinstance(reset, bool | np.bool_):
            raise ObservationError(f"reset is {reset!r}, expected true or false")
        begins = bool(reset) or self.episode.chunks == 0
        if "seed" in options and not begins:
            raise ObservationError(
                "the message has a seed in the middle of an episode; send it with reset, or in the first message"
            )
        steps = self._steps(observation)
        episode = Episode(self.spec, (seed,), self.warm_start)
        if not begins:
            episode = copy.copy(self.episode)
            joins = len(steps) == executed == 1
            episode.history = copy.copy(self.episode.history) if joins else ObservationHistory(self.spec)
        for step in steps:
            episode.push(step)
        request = episode.request(executed)
        self._asked = episode, request
        return request

    def answer(self, chunk: Chunk) -> dict[str, Any]:
        """The reply to the last request: actions (n, Da), the first for its observation. Advances the episode."""
        self.episode, request = self._asked
        self.episode.accept(request, chunk)
        return {
            "actions": chunk.trajectory[self.spec.executed.start :],
            "rounds": int(chunk.stats.rounds),
            "residual": float(chunk.stats.residual),
            "complete": bool(chunk.stats.complete),
            "new_episode": request.number == 0,
        }

    def _steps(self, observation: dict[str, Any]) -> list[dict[str, Any]]:
        """The control steps in a message, not checked yet."""
        counts = {key: self.spec.obs_steps(key) for key in self.spec.observation}
        stacked = {
            key
            for key, feature in self.spec.observation.items()
            if key in observation
            and _shape(observation[key]) in ((counts[key], *feature.shape), (counts[key], *feature.tensor_shape))
        }
        steps = [observation]
        if stacked:  # a key of another shape stays unchanged; the history's check names it
            for key in self.spec.observation.keys() & observation.keys() - stacked:
                feature, shape = self.spec.observation[key], _shape(observation[key])
                if shape in (feature.shape, feature.tensor_shape):
                    raise ObservationError(
                        f"observation {key!r} has shape {shape}, for one step, but {sorted(stacked)} are stacked for "
                        f"{max(counts.values())} steps; send all keys stacked, or none"
                    )
            steps = [
                # A shorter history is padded with its oldest step; the padding is not used.
                {k: v[max(0, counts[k] + i)] if k in stacked else v for k, v in observation.items()}
                for i in range(-max(counts[key] for key in stacked), 0)
            ]
        return steps


def _shape(value: Any) -> tuple[int, ...] | None:
    try:
        return np.shape(value)
    except ValueError:  # nested lists of different lengths; the history's check names the key
        return None


def _integer(options: Mapping[str, Any], key: str, default: int, largest: int) -> int:
    value = options.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or not 0 <= value <= largest:
        raise ObservationError(f"{key} is {value!r}, expected a whole number from 0 to {largest}")
    return int(value)
