"""Receding-horizon control of one robot: an observation in, an action out, once per control step."""

import time
from collections.abc import Callable, Mapping
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from parapolicy.noise import mix_seeds
from parapolicy.observation import ObservationHistory
from parapolicy.policy import Chunk, Policy
from parapolicy.warm import WarmState


@dataclass
class ControlRecord:
    """What has happened since the last reset. Counts are of control steps but for the first three.

    Attributes:
        chunk_seconds: time from the observation to the finished chunk, one per chunk.
        rounds: of the sampler, one per chunk.
        errors: what went wrong in a computation, as text; the robot went on by the actions it had.
        late: chunks that took longer than the deadline.
        stale: actions of new chunks that were dropped because their time had passed.
        continued: steps that took an action beyond the old chunk's ``n_action_steps``.
        held: steps that repeated the last action because the old chunk had ended.
    """

    chunk_seconds: list[float] = field(default_factory=list)
    rounds: list[int] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    late: int = 0
    stale: int = 0
    continued: int = 0
    held: int = 0

    def percentiles(self) -> dict[str, float]:
        """p50, p95, p99 and max of ``chunk_seconds``, in ms; empty before the first chunk."""
        if not self.chunk_seconds:
            return {}
        milliseconds = np.asarray(self.chunk_seconds) * 1e3
        p50, p95, p99 = np.percentile(milliseconds, [50, 95, 99])
        return {"p50": float(p50), "p95": float(p95), "p99": float(p99), "max": float(milliseconds.max())}


@dataclass
class _Plan:
    """A chunk on the clock of control steps."""

    begin: int  # the control step of its observation
    actions: np.ndarray  # (n, Da), the first one for ``begin``
    state: WarmState


class Controller:
    """Executes each chunk's first ``n_action_steps`` actions, then those of a new one.

    *sync*: ``act`` computes the new chunk when it is due, and the robot waits. *async*: the new chunk is computed in a
    thread while the old one is executed, from the observation of the control step at which it was begun, early enough
    by what the last one took; when it is ready, the actions whose time has passed are dropped.

    A computation that fails, or is not ready, never leaves the robot without an action: the old chunk goes on beyond
    its ``n_action_steps`` to its end, then the last action is held. ``record`` counts both. Only the first chunk of an
    episode has nothing to fall back on: its error is raised.

    Args:
        policy: for one robot.
        control_hz: control steps per second; None: those that the policy was trained at.
        asynchronous: see above.
        deadline_ms: time that a chunk may take; sampling ends after the round in which it has passed, with the best
            estimate. None: none.
        warm_start: start each chunk from the one before.
        clock: seconds, monotonic.
        executor: runs asynchronous computations; None: a thread of its own.
    """

    def __init__(
        self,
        policy: Policy,
        control_hz: float | None = None,
        asynchronous: bool = False,
        deadline_ms: float | None = None,
        warm_start: bool = True,
        clock: Callable[[], float] = time.monotonic,
        executor: Executor | None = None,
    ) -> None:
        self.policy = policy
        self.control_hz = float(policy.spec.control_hz if control_hz is None else control_hz)
        if not 0 < self.control_hz < float("inf"):
            raise ValueError(f"control_hz is {control_hz}, expected a positive number")
        if deadline_ms is not None and not deadline_ms > 0:
            raise ValueError(f"deadline_ms is {deadline_ms}, expected a positive number, or None for no deadline")
        self.asynchronous, self.deadline_ms, self.warm_start = asynchronous, deadline_ms, warm_start
        self.clock = clock
        self._own_executor = ThreadPoolExecutor(1, "parapolicy") if asynchronous and executor is None else None
        self._executor = executor or self._own_executor
        self.history = ObservationHistory(policy.spec)
        self.reset()

    def reset(self, seed: int = 0) -> None:
        """Begin an episode; a computation that is under way is dropped when it ends. ``seed`` is of the noise."""
        self.seed, self.step, self.chunks = seed, -1, 0
        self.history.reset()
        self.record = ControlRecord()
        self._plan: _Plan | None = None
        self._future: Future[_Plan] | None = None

    def act(self, observation: Mapping[str, Any]) -> np.ndarray:
        """One control step: {key: (...)} in the environment's units -> action (Da,).

        Raises:
            ObservationError: the observation does not fit; the controller stays as it was.
            Exception: what the episode's first computation raised.
        """
        self.history.push(observation)
        self.step += 1
        self._collect()
        if self._plan is None:
            self._plan = self._compute(self.history.stacked(), self.step, None, self.chunks, self.record)
            self.chunks += 1
        elif self._future is None and self.step - self._plan.begin >= self._due():
            self._start(self._plan)
        return self._next_action(self._plan)

    def close(self) -> None:
        """End the thread, after a computation that is under way."""
        if self._own_executor is not None:
            self._own_executor.shutdown()

    def __enter__(self) -> "Controller":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _due(self) -> int:
        """Control steps after a chunk's begin at which the next one is begun."""
        if not self.asynchronous:
            return self.policy.spec.n_action_steps
        lead = int(np.ceil(self.record.chunk_seconds[-1] * self.control_hz)) if self.record.chunk_seconds else 1
        return max(1, self.policy.spec.n_action_steps - max(1, lead))

    def _start(self, plan: _Plan) -> None:
        arguments = (self.history.stacked(), self.step, plan, self.chunks, self.record)
        self.chunks += 1
        if self._executor is not None and self.asynchronous:
            self._future = self._executor.submit(self._compute, *arguments)
            self._collect()
            return
        try:
            self._plan = self._compute(*arguments)
        except Exception as error:
            self.record.errors.append(f"{type(error).__name__}: {error}")

    def _collect(self) -> None:
        """Take over a finished computation."""
        if self._future is None or not self._future.done():
            return
        future, self._future = self._future, None
        error = future.exception()
        if error is not None:
            self.record.errors.append(f"{type(error).__name__}: {error}")
            return
        self._plan = future.result()
        self.record.stale += min(self.step - self._plan.begin, len(self._plan.actions))

    def _compute(
        self, observation: Mapping[str, Any], begin: int, plan: _Plan | None, chunk: int, record: ControlRecord
    ) -> _Plan:
        """A chunk for the observation of control step ``begin``; runs in the thread when asynchronous."""
        started = self.clock()
        stop = None
        if self.deadline_ms is not None:
            end = started + self.deadline_ms / 1e3

            def stop() -> bool:
                return self.clock() >= end

        warm, executed = None, None
        if self.warm_start and plan is not None and begin - plan.begin < self.policy.spec.horizon:
            warm, executed = plan.state, begin - plan.begin
        seed = mix_seeds(self.seed, chunk)
        result: Chunk = self.policy.predict(observation, seed=seed, deadline=stop, warm=warm, executed=executed)
        seconds = self.clock() - started
        record.chunk_seconds.append(seconds)
        record.rounds.append(result.stats.rounds)
        record.late += self.deadline_ms is not None and seconds > self.deadline_ms / 1e3
        return _Plan(begin, result.trajectory[self.policy.spec.n_obs_steps - 1 :], result.warm_state)

    def _next_action(self, plan: _Plan) -> np.ndarray:
        index = self.step - plan.begin
        if index >= len(plan.actions):
            self.record.held += 1
        elif index >= self.policy.spec.n_action_steps:
            self.record.continued += 1
        return plan.actions[min(index, len(plan.actions) - 1)].copy()
