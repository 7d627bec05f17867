"""Receding-horizon control of one robot: one observation in, one action out per control step."""

import inspect
import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent import futures
from concurrent.futures import CancelledError, Executor, Future, ThreadPoolExecutor
from functools import partial
from typing import Any, Protocol

import numpy as np

from parapolicy.control.latency import ChunkRecord, ControlRecord
from parapolicy.control.seam import Execution, Seam, steps_of
from parapolicy.engine import Deadline
from parapolicy.episode import Episode, Request, checked_actions
from parapolicy.frame_features import FrameFeatures
from parapolicy.policy import Chunk
from parapolicy.spec import PolicySpec
from parapolicy.warm import WarmState

DROPPED = 60.0  # seconds that a chunk dropped by a reset may take to end
ROUNDING = 1e-9  # relative; a simulated clock's times are sums of periods


class ChunkPolicy(Protocol):
    """The part of :class:`parapolicy.Policy` that a controller needs. Seams that hold also need ``predict(hold=…)``."""

    @property
    def spec(self) -> PolicySpec: ...

    def predict(
        self,
        observation: Mapping[str, Any],
        *,
        seed: int,
        deadline: Callable[[], bool] | None,
        warm: WarmState | None,
        executed: int | None,
        features: Sequence[FrameFeatures] | None = None,  # given if the policy observes images
    ) -> Chunk: ...


def _takes_hold(policy: ChunkPolicy) -> bool:
    parameters = inspect.signature(policy.predict).parameters.values()
    return any(p.name == "hold" or p.kind is p.VAR_KEYWORD for p in parameters)


class Controller:
    """Executes each chunk's first ``n_action_steps`` actions, then those of the next chunk.

    *sync*: ``act`` computes the new chunk when it is due, and the robot waits. *async*: the new chunk is computed in a
    thread while the old one is executed, from the observation of the control step at which it begins. It begins early
    enough if it takes as long as the last one. When it is ready, actions whose time has passed are dropped.

    If a computation fails, is not ready, or does not give a finite chunk of the policy's shape, the robot still gets an
    action: the old chunk continues beyond its ``n_action_steps`` to its end, then its last action is held. ``record``
    counts both. Only an episode's first chunk has no fallback: its error is raised.

    Not thread-safe: call ``act`` and ``reset`` from one thread. Two chunks are never computed at the same time.

    Args:
        policy: for one robot.
        control_hz: control steps per second; None: the rate that the policy was trained at. Another rate, and a loop
            that calls late, are warned of once.
        asynchronous: see above.
        deadline_ms: time for a chunk. Sampling ends after the round in which it has passed, with the best estimate.
            None: no deadline.
        warm_start: start each chunk from the previous one, with its noise shifted along, so that the two agree where
            they overlap. Saves rounds if the window covers the whole schedule.
        blend_steps: control steps over which a new chunk's actions fade in linearly over the old chunk's for the same
            time: seam ``blend`` over a fixed number of steps.
        seam: how a new chunk's actions follow the old one's: ``none``, ``hold``, ``hold_soft``, ``blend`` or
            ``ensemble``; see :class:`parapolicy.control.seam.Seam` and docs/latency.md.
        log: called with one mapping per action, with its origin and enough to replay the episode. Exceptions from it
            are warned of once, and counted.
        clock: seconds, monotonic.
        executor: runs asynchronous computations; None: an own thread.

    Raises:
        ValueError: a rate, deadline, seam or ``blend_steps`` that is out of range or does not fit the policy.
    """

    def __init__(
        self,
        policy: ChunkPolicy,
        control_hz: float | None = None,
        asynchronous: bool = False,
        deadline_ms: float | None = None,
        warm_start: bool = False,
        blend_steps: int = 0,
        log: Callable[[Mapping[str, Any]], Any] | None = None,
        clock: Callable[[], float] = time.monotonic,
        executor: Executor | None = None,
        seam: str = "none",
    ) -> None:
        self.policy = policy
        self.control_hz = float(policy.spec.require_control_hz() if control_hz is None else control_hz)
        if not 0 < self.control_hz < float("inf"):
            raise ValueError(f"control_hz is {control_hz}, expected a positive number")
        if deadline_ms is not None and not deadline_ms > 0:
            raise ValueError(f"deadline_ms is {deadline_ms}, expected a positive number, or None for no deadline")
        self.deadline = None if deadline_ms is None else deadline_ms / 1e3
        self.asynchronous, self.warm_start, self.blend_steps, self.seam = asynchronous, warm_start, blend_steps, seam
        self._seam = Seam(seam, policy.spec, asynchronous, blend_steps)
        if self._seam.holds and not _takes_hold(policy):  # otherwise every chunk but the first would fail silently
            raise ValueError(f"seam is {seam!r}, expected a policy whose predict takes hold=…; take 'blend' or 'none'")
        self.log, self.clock = log, clock
        self._own_executor = ThreadPoolExecutor(1, "parapolicy") if asynchronous and executor is None else None
        if self._own_executor is not None:  # start its thread now, so that it inherits this thread's present priority
            self._own_executor.submit(lambda: None).result()
        self._executor = executor or self._own_executor
        self._dropped: list[Future[Execution]] = []  # dropped by resets, and still computing
        self._under_way: tuple[ChunkRecord, Future[Execution]] | None = None
        self._warned: set[str] = set()
        trained = policy.spec.control_hz
        if trained is not None and not math.isclose(self.control_hz, trained):
            self._warn(
                "rate",
                f"control_hz is {self.control_hz:g} but the policy was trained at {trained:g}: the robot moves at "
                "another speed than in the demonstrations",
            )
        self.reset()

    def reset(self, seed: int | tuple[int, ...] = 0) -> None:
        """Begin an episode, with noise of ``seed``.

        A running computation is dropped; the new episode's first ``act`` waits until it has ended.
        """
        if self._under_way is not None and not self._under_way[1].cancel():
            self._dropped.append(self._under_way[1])
        seeds = seed if isinstance(seed, tuple) else (seed,)
        self.episode = Episode(self.policy.spec, seeds, self.warm_start)
        self.record = ControlRecord()
        self._plan: Execution | None = None
        self._seam = Seam(self.seam, self.policy.spec, self.asynchronous, self.blend_steps)
        self._under_way = None
        self._last_begin: float | None = None
        self._due_at: float | None = None  # when the next call of ``act`` is expected

    def act(self, observation: Mapping[str, Any]) -> np.ndarray:
        """One control step: {key: (...)} in the environment's units -> action (Da,).

        Raises:
            ObservationError: the observation does not fit the policy; the controller is unchanged.
            Exception: any error of the episode's first computation.
        """
        begin = self.clock()
        self.episode.push(observation)
        self.record.add_time("observe", self.clock() - begin)
        self._collect()
        if self._plan is None:
            record, future = self._start(None, begin)
            if error := self._settle(record, future):
                raise error
            self._take(future.result())
        elif self._under_way is None and self.step - self._plan.record.begin >= self._due():
            self._under_way = self._start(self._plan, begin)
            self._collect()
        assert self._plan is not None  # otherwise the first computation has raised
        action, kind = self._next_action(self._plan)
        self._account(self._plan.record, kind, action, begin)
        return action

    def planned(self) -> np.ndarray:
        """The chunk's actions from the present control step on, (n, Da); at least one.

        Raises:
            RuntimeError: ``act`` was not called since the reset.
        """
        if self._plan is None:
            raise RuntimeError("no chunk is planned yet; call act first")
        index = min(self.step - self._plan.record.begin, len(self._plan.actions) - 1)
        return self._plan.actions[index:].copy()

    @property
    def step(self) -> int:
        """The present control step since the reset, from 0; -1 before the first."""
        return self.episode.step

    @property
    def latency(self) -> dict[str, Any]:
        """Times in ms and counts since the last reset; see :meth:`ControlRecord.summary`."""
        return self.record.summary()

    def close(self) -> None:
        """End the thread after a running computation."""
        if self._own_executor is not None:
            self._own_executor.shutdown()

    def __enter__(self) -> "Controller":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _due(self) -> int:
        """Control steps from a chunk's begin to the begin of the next one."""
        steps = self.policy.spec.n_action_steps
        if not self.asynchronous:
            return steps
        return max(1, steps - max(1, self._delay()))

    def _delay(self) -> int:
        """Control steps that a computation takes, estimated from the last chunk's time."""
        last = next((c.seconds for c in reversed(self.record.chunks) if math.isfinite(c.seconds)), 0.0)
        return steps_of(last, self.control_hz, ROUNDING)

    def _start(self, plan: Execution | None, now: float) -> tuple[ChunkRecord, "Future[Execution]"]:
        """Begin the chunk that follows ``plan``. Waits for it, except for later chunks of an asynchronous episode."""
        committed = self._delay() if self._seam.holds and self.asynchronous else 0
        request = self.episode.request(committed=committed, soft=self._seam.soft)
        record = ChunkRecord(request.number, request.seed, request.begin, now, request.warm_from, request.executed)
        record.held_from, record.committed = request.held_from, request.committed
        future: Future[Execution] = Future()
        try:
            if self.asynchronous and plan is not None and self._executor is not None:
                return record, self._executor.submit(self._compute, request, record)
            self._await_dropped()
            future.set_result(self._compute(request, record))
        except Exception as error:
            future.set_exception(error)
        return record, future

    def _await_dropped(self) -> None:
        """Wait for computations dropped by resets: two chunks are never computed at the same time."""
        while self._dropped:
            if futures.wait(self._dropped[:1], DROPPED).not_done:
                raise TimeoutError(f"a chunk that a reset has dropped is still running after {DROPPED:g} s")
            self._dropped.pop(0)

    def _compute(self, request: Request, record: ChunkRecord) -> Execution:
        """Compute a request's chunk; runs in the thread if asynchronous."""
        started = self.clock()
        stop: Callable[[], bool] | None = None
        if self.deadline is not None:
            end = started + self.deadline
            # With the standard clock, an engine can watch the deadline without Python.
            stop = Deadline(end) if self.clock is time.monotonic else lambda: self.clock() >= end
        predict: Callable[..., Chunk] = self.policy.predict
        # Only if given: not every policy has these arguments.
        if request.features is not None:
            predict = partial(predict, features=[request.features])
        if request.hold is not None:
            predict = partial(predict, hold=request.hold)
        chunk = predict(
            request.observation, seed=request.seed, deadline=stop, warm=request.warm, executed=request.executed
        )
        actions = checked_actions(chunk, self.policy.spec)
        record.finished_at = self.clock()
        record.seconds, record.stats = record.finished_at - started, chunk.stats
        return Execution(record, request, chunk, actions)

    def _collect(self) -> None:
        """Take the chunk of a computation that has ended; if it failed, the old chunk continues."""
        if self._under_way is None or not self._under_way[1].done():
            return
        (record, future), self._under_way = self._under_way, None
        if self._settle(record, future) is None:
            self._take(future.result())

    def _settle(self, record: ChunkRecord, future: "Future[Execution]") -> BaseException | None:
        """Record a computation that has ended; returns its error."""
        try:
            error = future.exception()
        except CancelledError as cancelled:  # by an executor that was shut down
            error = cancelled
        if error is not None:
            record.error = f"{type(error).__name__}: {error}"
        self.record.add_chunk(record, self.deadline)
        return error

    def _take(self, plan: Execution) -> None:
        """Execute ``plan`` from now on."""
        plan.taken_at = self.step
        self.episode.accept(plan.request, plan.chunk)
        self._seam.take(plan)
        self._plan = plan
        self.record.add_time("queue", self.clock() - plan.record.finished_at)
        self.record.stale += min(self.step - plan.record.begin, len(plan.actions))

    def _next_action(self, plan: Execution) -> tuple[np.ndarray, str]:
        """This step's action, and its kind: planned, continued or held."""
        index, kind = self.step - plan.record.begin, "planned"
        if index >= len(plan.actions):
            kind = "held"
            self.record.held += 1
        elif index >= self.policy.spec.n_action_steps:
            kind = "continued"
            self.record.continued += 1
        return self._seam.action(self.step), kind

    def _account(self, chunk: ChunkRecord, kind: str, action: np.ndarray, begin: float) -> None:
        """Record the step's times, and log where its action came from."""
        now, period, record = self.clock(), 1 / self.control_hz, self.record
        record.steps += 1
        record.add_time("act", now - begin)
        record.misses += now - begin > period * (1 + ROUNDING)
        if self._last_begin is not None:
            since = begin - self._last_begin
            record.add_time("jitter", abs(since - period) if since >= 0 else since)
        self._last_begin = begin
        self._expect(begin, now, period)
        if self.log is None:
            return
        try:
            self.log(self._row(chunk, kind, action, begin, now))
        except Exception as error:
            record.unlogged += 1
            self._warn(
                "log", f"the log of actions raised an error, and the loop continues: {type(error).__name__}: {error}"
            )

    def _expect(self, begin: float, now: float, period: float) -> None:
        """Count a call of ``act`` that came too late, unless the previous call caused it; expect the next one.

        A loop that is slightly slow in each step also loses whole control steps: its lateness adds up until it counts.
        """
        due = begin if self._due_at is None else self._due_at
        if period / 2 * (1 + ROUNDING) < begin - due < math.inf:
            self.record.misses += 1
            self._warn(
                "late",
                f"act was called {1e3 * (begin - due):.0f} ms late: the loop does not keep its {self.control_hz:g} Hz",
            )
            due = begin
        following = min(due, begin) + period
        if now > following:  # already counted as a miss
            following = now + period
        self._due_at = following if math.isfinite(following) else None

    def _warn(self, topic: str, text: str) -> None:
        """Warn once per topic."""
        if topic not in self._warned:
            self._warned.add(topic)
            warnings.warn(text, stacklevel=4)

    def _row(self, chunk: ChunkRecord, kind: str, action: np.ndarray, begin: float, now: float) -> dict[str, Any]:
        """The log's record of an action."""
        assert chunk.stats is not None  # a failed chunk has no actions
        return {
            "step": self.step,
            "time": now,
            "slack": 1 / self.control_hz - (now - begin),
            "kind": kind,
            "chunk": chunk.number,
            "index": self.step - chunk.begin,
            "begin": chunk.begin,
            "observed_at": chunk.observed_at,
            "seed": chunk.seed,
            "warm_from": chunk.warm_from,
            "executed": chunk.executed,
            "held_from": chunk.held_from,
            "committed": chunk.committed,
            "chunk_seconds": chunk.seconds,
            "computed_seconds": chunk.stats.seconds,
            "rounds": int(chunk.stats.rounds),
            "evaluations": int(chunk.stats.evaluations),
            "complete": bool(chunk.stats.complete),
            "residual": float(chunk.stats.residual),
            "stale": self.record.stale,
            "action": action.tolist(),
        }
