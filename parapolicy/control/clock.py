"""A pacer for loops in real time, and the clock of a simulated world in which computations take time."""

import math
import time
from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import Any


class Pacer:
    """Ticks at ``k / hz`` after the first one. A late step delays only its own tick.

    Args:
        hz: ticks per second.
        clock: seconds, monotonic. If it goes back or gives no finite time, the next tick is one period later.
        sleep: waits for a number of seconds.

    Attributes:
        missed: ticks that had already passed when the loop waited for them.
        clock_faults: times that the clock went back or gave no finite time.
    """

    def __init__(
        self, hz: float, clock: Callable[[], float] = time.monotonic, sleep: Callable[[float], Any] = time.sleep
    ) -> None:
        if not 0 < hz < float("inf"):
            raise ValueError(f"hz is {hz}, expected a positive number")
        self.period, self.clock, self.sleep = 1 / hz, clock, sleep
        self.missed = self.clock_faults = 0
        self._before = -math.inf
        self._start: float | None = None
        self._tick = 0

    def wait(self) -> float:
        """Wait for the next tick; the first call is the first tick.

        Returns:
            Seconds that were left; negative if the tick had passed. Ticks that have passed entirely are skipped and
            counted in ``missed``.
        """
        now = self.clock()
        if self._start is None:
            self._start = self._before = now
            return 0.0
        self._tick += 1
        slack = self._start + self._tick * self.period - now
        if not (now >= self._before and math.isfinite(slack)):
            self.clock_faults += 1
            self._start, self._tick, slack = now, 1, self.period
        self._before = now
        if slack < 0:
            self.missed += 1
            behind = int(-slack / self.period)
            self.missed += behind
            self._tick += behind
            return slack
        self.sleep(slack)
        return slack


class SimulatedClock(Executor):
    """The time of a simulated world in which computations take time.

    Calling it gives the time. As an executor it runs a function immediately; the future is done when the world reaches
    the time at which the function would have ended.

    Args:
        charge: a computation's measured wall time -> its time in the world, both in seconds.
        live: True: time passes during a computation, so that deadlines take effect. False: time stands still until
            the computation ends, so that a run can be repeated exactly.
    """

    def __init__(self, charge: Callable[[float], float], live: bool = False) -> None:
        self.charge, self.live = charge, live
        self.reset()

    def reset(self) -> None:
        """Set the time to zero and drop all computations."""
        self.now = 0.0
        self._computing_since: float | None = None
        self._pending: list[tuple[float, Future, Callable[[], None]]] = []

    def __call__(self) -> float:
        if self.live and self._computing_since is not None:
            return self.now + time.perf_counter() - self._computing_since
        return self.now

    def compute(self, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """Call ``function``, and add its charged time to the world's time."""
        self._computing_since = time.perf_counter()
        try:
            return function(*arguments, **options)
        finally:
            seconds = time.perf_counter() - self._computing_since
            self._computing_since = None
            self.now += self.charge(seconds)

    def submit(self, function: Callable[..., Any], /, *arguments: Any, **options: Any) -> Future:
        begin, future = self.now, Future[Any]()
        try:
            result = function(*arguments, **options)
        except Exception as error:
            outcome = _raises(future, error)
        else:
            outcome = _returns(future, result)
        self._pending.append((self.now, future, outcome))
        self.now = begin
        self.advance(0.0)
        return future

    def advance(self, seconds: float) -> None:
        """Advance the world's time."""
        self.now += seconds
        due = [entry for entry in self._pending if entry[0] <= self.now + 1e-9]
        self._pending = [entry for entry in self._pending if entry not in due]
        for _, _, finish in due:
            finish()


def _returns(future: Future, result: Any) -> Callable[[], None]:
    return lambda: future.set_result(result) if future.set_running_or_notify_cancel() else None


def _raises(future: Future, error: Exception) -> Callable[[], None]:
    return lambda: future.set_exception(error) if future.set_running_or_notify_cancel() else None
