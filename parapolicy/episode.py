"""One episode of one robot: its observations, its chunks' noise, and the warm state between two chunks."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from parapolicy.frame_features import FrameFeatures
from parapolicy.hold import Hold, hold_weights
from parapolicy.noise import mix_seeds
from parapolicy.observation import ObservationHistory, stack_observations
from parapolicy.policy import Chunk, ChunkStats, Policy
from parapolicy.spec import PolicySpec
from parapolicy.warm import WarmState


@dataclass(frozen=True)
class Request:
    """The inputs of one chunk.

    Attributes:
        observation: {key: (To, ...)}.
        number: number of the chunk in its episode.
        seed: seed of its noise.
        begin: control step of its observation.
        warm: warm state that it starts from; None: cold.
        warm_from: number of the chunk that left the warm state.
        executed: control steps between the two chunks' observations; None: cold.
        hold: actions of the previous chunk that it is sampled with; None: none.
        held_from: number of that chunk.
        committed: number of actions, from the present step on, that are held with weight 1.
        features: features of frames that the episode's chunks have seen; None: the policy observes no images.
    """

    observation: dict[str, np.ndarray]
    number: int
    seed: int
    begin: int
    warm: WarmState | None = None
    warm_from: int | None = None
    executed: int | None = None
    hold: Hold | None = None
    held_from: int | None = None
    committed: int = 0
    features: FrameFeatures | None = field(default=None, compare=False)


class Episode:
    """History, chunk numbers, seeds and warm state of one episode, for the controller, the server and the rollout.

    The noise of chunk k is seeded by (*seed, k): the same for every sampler, different for every chunk and episode.

    Args:
        spec: the policy's.
        seed: of the episode's noise.
        warm_start: start each chunk from the previous one's warm state.
    """

    def __init__(self, spec: PolicySpec, seed: tuple[int, ...] = (0,), warm_start: bool = False) -> None:
        self.spec, self.seed, self.warm_start = spec, seed, warm_start
        self.history = ObservationHistory(spec)
        self.step, self.chunks = -1, 0
        images = any(feature.kind == "image" for feature in spec.observation.values())
        self.features = FrameFeatures() if images else None
        self._last: tuple[Request, WarmState] | None = None
        self._running: tuple[Request, np.ndarray] | None = None  # the accepted chunk's request and trajectory

    def push(self, observation: Mapping[str, Any]) -> None:
        """Add one control step's observation, {key: (...)}.

        Raises:
            ObservationError: it does not fit the policy; the episode is unchanged.
        """
        self.history.push(observation)
        self.step += 1

    def request(self, executed: int | None = None, committed: int = 0, soft: bool = False) -> Request:
        """The inputs of the next chunk.

        Args:
            executed: control steps since the accepted chunk's observation, for a caller that does not push at every
                step; None: the number of pushes since then.
            committed: control steps, from the present one on, for which the accepted chunk's actions will be executed
                in any case: the new chunk is held to them.
            soft: also draw the new chunk towards the accepted chunk's later actions; see
                :func:`parapolicy.hold.hold_weights`.
        """
        number, self.chunks = self.chunks, self.chunks + 1
        cold = Request(self.history.stacked(), number, mix_seeds(*self.seed, number), self.step, features=self.features)
        if committed or soft:
            cold = self._with_hold(cold, executed, committed, soft)
        if self._last is None:
            return cold
        before, warm = self._last
        executed = self.step - before.begin if executed is None else executed
        if executed >= self.spec.horizon:  # the two chunks do not overlap
            return cold
        return dataclasses.replace(cold, warm=warm, warm_from=before.number, executed=executed)

    def _with_hold(self, request: Request, executed: int | None, committed: int, soft: bool) -> Request:
        """The request, held to the accepted chunk's actions where the two chunks overlap."""
        if self._running is None:
            return request
        before, trajectory = self._running
        executed = self.step - before.begin if executed is None else executed
        first, late = self.spec.executed.start, trajectory[executed:]  # the present step's index; later actions
        overlap = len(late) - first
        if overlap <= 0:
            return request
        committed = min(committed, overlap)
        weights = hold_weights(len(trajectory), first, committed, overlap, soft)
        actions = np.zeros_like(trajectory)
        actions[: len(late)] = late
        return dataclasses.replace(request, hold=Hold(actions, weights), held_from=before.number, committed=committed)

    def accept(self, request: Request, chunk: Chunk) -> None:
        """Take a request's chunk as the one that is executed from now on; the next one may start from it."""
        self._running = request, chunk.trajectory
        if self.warm_start:
            self._last = request, chunk.warm_state


def group_requests(requests: Sequence[Request]) -> list[list[int]]:
    """Group the indices of requests that one ``predict`` can answer. The requests of a group are all cold, or all warm
    after the same number of control steps; and all have held actions, or none has."""
    groups: dict[tuple[int | None, bool], list[int]] = {}
    for i, request in enumerate(requests):
        groups.setdefault((request.executed, request.hold is None), []).append(i)
    return list(groups.values())


def predict_together(policy: Policy, requests: Sequence[Request], deadline: float | None = None) -> list[Chunk]:
    """The chunks of one group of requests, in one batch; see :meth:`parapolicy.Policy.predict`."""
    observation = stack_observations([request.observation for request in requests])
    states = [request.warm for request in requests if request.warm is not None]
    holds = [request.hold for request in requests if request.hold is not None]
    features = [request.features for request in requests if request.features is not None]
    chunk = policy.predict(
        observation,
        seed=[request.seed for request in requests],
        deadline=deadline,
        warm=WarmState.stack(states) if states else None,
        executed=requests[0].executed,
        hold=Hold.stack(holds) if holds else None,
        features=features or None,
    )
    return [chunk[i] for i in range(len(requests))]


def checked_actions(chunk: Any, spec: PolicySpec) -> np.ndarray:
    """Check any policy's chunk, and copy its actions from the newest observation on, (n, Da).

    Raises:
        TypeError: not a chunk with a float trajectory and stats.
        ValueError: its shape does not fit the policy.
        FloatingPointError: a value is not finite.
    """
    if not isinstance(chunk, Chunk) or not isinstance(chunk.stats, ChunkStats):
        raise TypeError(f"the policy gave a {type(chunk).__name__}, expected a parapolicy.Chunk with its stats")
    if not isinstance(chunk.stats.rounds, int | np.integer):
        raise TypeError(f"the chunk's rounds are {chunk.stats.rounds!r}, expected one whole number")
    trajectory = chunk.trajectory
    if not isinstance(trajectory, np.ndarray) or trajectory.dtype.kind != "f":
        kind = getattr(trajectory, "dtype", type(trajectory).__name__)
        raise TypeError(f"the chunk's trajectory is of {kind}, expected a numpy array of floats")
    expected = spec.horizon, spec.action_dim
    if trajectory.shape != expected:
        raise ValueError(f"the chunk's trajectory has shape {trajectory.shape}, expected {expected}")
    if not np.isfinite(trajectory).all():
        raise FloatingPointError("the chunk's trajectory holds a value that is not finite")
    return trajectory[spec.executed.start :].copy()
