"""Fault schedules of the control loop: policies, observations, clocks, executors and logs that misbehave at random.

Every action of the made-up policy says for which episode and control step it is, so that an action alone shows whether
it is the right one. What must hold: once an episode has had a good chunk, each good observation is answered with a
finite action of this episode, for this control step or, where the chunk has ended, the last one before; the counters
add up; and no two chunks are computed at once.
"""

import threading
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import torch

from parapolicy import Controller, ObservationError
from parapolicy.policy import Chunk, ChunkStats
from parapolicy.warm import WarmState
from tests.fuzzing import Case
from tests.helpers import Later, small_spec

SPEC = small_spec()
HORIZON, WIDTH = SPEC.sample_shape
STATS = ChunkStats(3, 30, 0.01, True, None, None, {"encode": 1e-3, "sample": 1e-2, "post": 1e-3}, 0.012)
ERRORS = (
    FloatingPointError("not finite"),
    OSError("lost"),
    RuntimeError("out of memory"),
    KeyError("x"),
    MemoryError(),
)
BAD_CHUNKS: Mapping[str, Callable[[np.ndarray], Any]] = {
    "one nan": lambda a: np.where(np.arange(a.size).reshape(a.shape) == a.size - 1, np.nan, a),
    "infinite": lambda a: a + np.float32(np.inf),
    "too wide": lambda a: np.concatenate([a, a], axis=1),
    "flat": lambda a: a.ravel(),
    "a batch": lambda a: a[None],
    "empty": lambda a: a[:0],
    "complex": lambda a: a.astype(np.complex64),
    "text": lambda a: a.astype("U8"),
    "objects": lambda a: a.astype(object),
    "nothing": lambda a: None,
}
BAD_OBSERVATIONS: Mapping[str, Callable[[dict[str, Any]], Any]] = {
    "nan": lambda o: {**o, "points": o["points"] * np.nan},
    "infinite": lambda o: {**o, "position": o["position"] + np.inf},
    "shape": lambda o: {**o, "points": o["points"][:2]},
    "missing": lambda o: {"points": o["points"]},
    "unknown": lambda o: {**o, "camera": 1.0},
    "text": lambda o: {**o, "position": "far"},
    "none": lambda o: {**o, "position": None},
    "ragged": lambda o: {**o, "points": [[1.0], [1.0, 2.0]]},
}


class Clock:
    """Goes on by a little at every look; now and then it jumps, or gives no time at all."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.broken: list[float] = []  # what it gives next instead

    def __call__(self) -> float:
        self.now += 1e-5
        return self.broken.pop() if self.broken else self.now


class Policy:
    """Gives chunks whose actions are (episode, control step), or fails as it is told.

    Attributes:
        fault: an exception to raise, or a function that spoils the actions (H, 2); None: a good chunk.
        seconds: that a chunk takes on the clock.
        lingers: wait a moment for a second call, which must not come.
        faults: episode -> chunks that failed.
    """

    spec = SPEC

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.fault: Exception | Callable[[np.ndarray], Any] | None = None
        self.seconds, self.lingers = 0.0, False
        self.faults: Counter[int] = Counter()
        self.overlapped = threading.Event()
        self._busy = threading.Lock()

    def predict(self, observation: Mapping[str, Any], *, deadline: Callable[[], bool] | None, **options: Any) -> Chunk:
        if not self._busy.acquire(blocking=False):
            self.overlapped.set()
            raise AssertionError("two chunks at once")
        try:
            fault = self.fault
            if self.lingers:
                self.overlapped.wait(0.005)
            self.clock.now += self.seconds
            if deadline is not None:
                deadline()
            episode, begin = map(int, observation["position"][-1])
            self.faults[episode] += fault is not None
            if isinstance(fault, Exception):
                raise fault
            steps = begin + np.arange(HORIZON) - (SPEC.n_obs_steps - 1)
            actions = np.stack([np.full(HORIZON, episode), steps], axis=1).astype(np.float32)
            actions = fault(actions) if fault else actions
            state = WarmState(torch.zeros(20, 1, HORIZON, WIDTH), torch.zeros(21, 1, HORIZON, WIDTH))
            return Chunk(actions if actions is None else actions[1 : 1 + SPEC.n_action_steps], actions, STATS, state)
        finally:
            self._busy.release()


class Closable(Later):
    """An executor that can be shut down.

    Attributes:
        lost: computations that were refused or cancelled.
    """

    def __init__(self) -> None:
        super().__init__()
        self.lost, self._gone = 0, False

    def submit(self, function: Callable[..., Any], /, *arguments: Any, **options: Any) -> Future[Any]:
        if self._gone:
            self.lost += 1
            raise RuntimeError("cannot schedule new futures after shutdown")
        return super().submit(function, *arguments, **options)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        self._gone = True
        if cancel_futures:
            self.lost += sum(future.cancel() for future, _ in self.waiting)
            self.waiting = []


class Loop:
    """A controller in a world with some kinds of faults, and what must hold for each of its actions."""

    def __init__(self, rng: np.random.Generator, faults: set[str]) -> None:
        self.rng, self.faults, self.clock = rng, faults, Clock()
        self.policy, self.later, self.rows = Policy(self.clock), Closable(), list[Any]()
        self.own_thread = "thread" in faults
        self.blend_steps = int(rng.choice([0, 0, 3]))
        self.controller = Controller(
            self.policy,
            control_hz=10,
            asynchronous=self.own_thread or bool(rng.integers(2)),
            deadline_ms=rng.choice([None, 50.0]),
            warm_start=bool(rng.integers(2)),
            blend_steps=self.blend_steps,
            log=self._log,
            clock=self.clock,
            executor=None if self.own_thread else self.later,
        )
        self.episode, self.refused = 0, 0
        self._begin()

    def happens(self, kind: str, chance: float) -> bool:
        return kind in self.faults and self.rng.random() < chance

    def _log(self, row: Mapping[str, Any]) -> None:
        self.rows.append(row)
        if self.happens("log", 0.5):
            raise OSError("no space left on device")

    def _begin(self) -> None:
        self.answered, self.held, self.last = 0, 0, -np.inf
        self.rows.clear()

    def play(self) -> str:
        for _ in range(int(self.rng.integers(5, 40))):
            self.trouble()
            if self.rng.random() < 0.5:
                self.later.run()
            self.act()
        self.policy.fault, self.policy.lingers = None, False
        self.later.run()
        self.act()
        self.check_counters()
        return "refused" if self.refused else "equal"

    def trouble(self) -> None:
        """What goes wrong before the next control step."""
        rng, policy = self.rng, self.policy
        kinds = (*ERRORS, *BAD_CHUNKS.values())
        policy.fault = kinds[rng.integers(len(kinds))] if self.happens("chunks", 0.4) else None
        policy.seconds = float(rng.choice([0.0, 0.03, 0.25, 4.0])) if self.happens("slow", 0.5) else 0.0
        policy.lingers = self.own_thread and rng.random() < 0.3
        self.clock.now += float(rng.choice([0.1, 0.13, 1.0]))
        if self.happens("clock", 0.2):
            self.clock.now += float(rng.choice([-3600.0, 3600.0, 1e9]))
        if self.happens("clock", 0.2):
            self.clock.broken = [float(rng.choice([np.nan, np.inf, -np.inf]))] * int(rng.integers(1, 8))
        if self.happens("executor", 0.05):
            self.controller.close()
            self.later.shutdown(cancel_futures=bool(rng.integers(2)))
        if self.happens("resets", 0.15):
            self.check_counters()
            self.controller.reset(int(rng.integers(100)))
            self.episode += 1
            self._begin()
        if self.happens("observations", 0.3):
            self.act_badly()

    def observe(self) -> dict[str, Any]:
        """A good one, which tells the policy its episode and control step."""
        step = np.array([self.episode, self.controller.step + 1], np.float32)
        return {"position": step, "points": np.zeros((3, 2), np.float32)}

    def act_badly(self) -> None:
        spoil = list(BAD_OBSERVATIONS.values())[self.rng.integers(len(BAD_OBSERVATIONS))]
        before = self.controller.step
        try:
            action = self.controller.act(spoil(self.observe()))
        except ObservationError:
            self.refused += 1
        else:
            raise AssertionError(f"a bad observation was answered with {action}")
        assert self.controller.step == before, "a bad observation counts as a step"

    def act(self) -> None:
        faults, step = self.policy.faults[self.episode], self.controller.step + 1
        try:
            action = self.controller.act(self.observe())
        except Exception:
            if self.answered or self.policy.faults[self.episode] == faults:
                raise
            self.refused += 1  # the first chunk has nothing to fall back on
            return
        self.answered += 1
        assert not self.policy.overlapped.is_set(), "two chunks were computed at once"
        assert isinstance(action, np.ndarray), f"the action is a {type(action).__name__}"
        assert (action.shape, action.dtype.kind) == ((WIDTH,), "f"), f"the action is {action.dtype} {action.shape}"
        assert np.isfinite(action).all(), f"the action is {action}"
        assert abs(action[0] - self.episode) < 1e-3, f"an action of episode {action[0]} in episode {self.episode}"
        assert action[1] < step + 1e-3, f"the action of control step {action[1]} at {step}"
        if not self.blend_steps:
            assert action[1] >= self.last, f"the action of control step {action[1]} after that of {self.last}"
            np.testing.assert_array_equal(self.controller.planned()[0], action)
            self.held += action[1] < step
            self.last = float(action[1])
        action[:] = np.nan  # the caller's own: what it does with it changes nothing

    def check_counters(self) -> None:
        record, faults = self.controller.record, self.policy.faults[self.episode]
        assert record.steps == self.answered, f"{record.steps} steps are counted, {self.answered} were answered"
        if not self.blend_steps:
            assert record.held == self.held, f"{record.held} held actions are counted, {self.held} came"
        if len(self.rows) == record.steps:
            kinds = Counter(row["kind"] for row in self.rows)
            counted = (record.continued, record.held)
            assert counted == (kinds["continued"], kinds["held"]), f"counted {counted}, logged {dict(kinds)}"
        assert record.continued + record.held <= record.steps
        # A fault is counted at the control step after it; what the executor lost may be counted as a failure.
        slack = 1 if self.controller.asynchronous else 0
        assert faults - slack <= record.failures, f"{record.failures} failures are counted, {faults} chunks failed"
        lost = record.steps if self.own_thread else self.later.lost
        assert record.failures <= faults + lost, f"{record.failures} failures are counted, {faults} chunks failed"
        self.controller.latency  # noqa: B018  # whatever the clock gave


def schedule(*faults: str) -> Case:
    """A case with these kinds of faults."""

    def case(rng: np.random.Generator, folder: Path) -> str:
        loop = Loop(rng, set(faults))
        try:
            return loop.play()
        finally:
            loop.controller.close()

    return case


CASES: dict[str, Case] = {
    "slow": schedule("slow", "resets"),
    "chunks": schedule("slow", "resets", "chunks"),
    "observations": schedule("slow", "resets", "observations"),
    "clock": schedule("slow", "resets", "clock"),
    "executor": schedule("slow", "resets", "executor"),
    "log": schedule("slow", "resets", "log"),
    "thread": schedule("slow", "resets", "thread"),
    "all": schedule("slow", "resets", "chunks", "observations", "clock", "executor", "log"),
    "all_in_a_thread": schedule("slow", "resets", "chunks", "observations", "clock", "executor", "log", "thread"),
}
