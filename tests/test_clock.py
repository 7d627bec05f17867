"""The pacer of a loop, and the clock of a simulated world."""

import time

import numpy as np
import pytest

from parapolicy.control import Pacer, SimulatedClock


class FakeTime:
    """A clock on which sleeping is exact and steps take what the test says."""

    def __init__(self) -> None:
        self.now = 100.0

    def sleep(self, seconds: float) -> None:
        assert seconds >= 0
        self.now += seconds


def test_the_pacer_does_not_drift() -> None:
    fake = FakeTime()
    pacer = Pacer(50, lambda: fake.now, fake.sleep)
    rng = np.random.default_rng(0)
    for k in range(1000):
        slack = pacer.wait()
        assert fake.now == pytest.approx(100 + k / 50)
        assert 0 <= slack <= 1 / 50
        fake.now += rng.uniform(0, 0.0199)
    assert pacer.missed == 0


def test_the_pacer_skips_ticks_that_are_past() -> None:
    fake = FakeTime()
    pacer = Pacer(10, lambda: fake.now, fake.sleep)
    pacer.wait()
    fake.now += 0.27  # past ticks 1 and 2
    assert pacer.wait() == pytest.approx(-0.17)
    assert pacer.missed == 2
    pacer.wait()
    assert fake.now == pytest.approx(100.3)
    fake.now += 0.15
    pacer.wait()
    assert pacer.missed == 3


def test_a_step_that_takes_the_whole_period_is_in_time() -> None:
    fake = FakeTime()
    pacer = Pacer(0.5, lambda: fake.now, fake.sleep)
    pacer.wait()
    fake.now += 2.0
    assert pacer.wait() == pacer.missed == 0


@pytest.mark.parametrize("hz", [0, float("inf")])
def test_a_pacer_needs_a_period(hz: float) -> None:
    with pytest.raises(ValueError, match=f"hz is {hz}"):
        Pacer(hz)


@pytest.mark.parametrize("fault", [-3600.0, float("nan"), float("inf"), float("-inf")])
def test_the_pacer_never_sleeps_for_a_clock_that_goes_back(fault: float) -> None:
    fake, slept = FakeTime(), []
    faults = {4}

    def clock() -> float:
        if len(slept) in faults:
            fake.now += fault if abs(fault) == 3600 else 0.0
            faults.clear()
            return fake.now if abs(fault) == 3600 else fault
        return fake.now

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        fake.sleep(seconds)

    pacer = Pacer(10, clock, sleep)
    for _ in range(10):
        pacer.wait()
    assert slept == pytest.approx([0.1] * 9)
    assert pacer.clock_faults >= 1


def test_every_fault_of_the_clock_is_counted() -> None:
    times = iter([100.0, 99.0, 98.0, float("nan"), 98.0])
    pacer = Pacer(10, lambda: next(times), lambda seconds: None)
    for _ in range(4):
        pacer.wait()
    assert pacer.clock_faults == 3


def test_a_computation_takes_its_simulated_time() -> None:
    clock = SimulatedClock(lambda measured: 0.25)
    assert clock.compute(lambda: clock()) == 0.0  # it stands still meanwhile
    assert clock() == 0.25
    clock.reset()
    assert clock() == 0.0


def test_the_time_that_a_computation_took_is_charged() -> None:
    measured: list[float] = []
    clock = SimulatedClock(lambda seconds: measured.append(seconds) or 0.25)
    begin = time.perf_counter()
    clock.compute(time.sleep, 0.01)
    assert 0.01 <= measured[0] <= time.perf_counter() - begin


def test_a_computation_receives_its_arguments() -> None:
    clock = SimulatedClock(lambda measured: 0.0)
    assert clock.compute(int, "11", base=2) == clock.submit(int, "11", base=2).result(0) == 3


def test_a_live_clock_stands_still_between_computations() -> None:
    clock = SimulatedClock(lambda measured: measured, live=True)
    clock.advance(0.5)
    assert clock() == 0.5


def test_a_live_clock_runs_during_a_computation() -> None:
    clock = SimulatedClock(lambda measured: measured, live=True)

    def look() -> list[float]:
        times = [clock()]
        while clock() == times[0]:
            pass
        return [*times, clock()]

    first, last = clock.compute(look)
    assert 0 <= first < last <= clock()


def test_a_future_is_done_when_the_world_has_come_to_its_end() -> None:
    clock = SimulatedClock(lambda measured: 0.25)
    future = clock.submit(clock.compute, lambda: "chunk")
    assert clock() == 0.0
    for _ in range(2):
        clock.advance(0.1)
        assert not future.done()
    clock.advance(0.1)
    assert future.result(0) == "chunk"

    def fail() -> None:
        raise OSError("lost")

    failing = clock.submit(clock.compute, fail)
    assert not failing.done()
    clock.advance(0.25)
    with pytest.raises(OSError, match="lost"):
        failing.result(0)


@pytest.mark.parametrize("fails", [False, True])
def test_a_cancelled_future_is_left_as_it_is(fails: bool) -> None:
    clock = SimulatedClock(lambda measured: 0.25)
    future = clock.submit(clock.compute, lambda: 1 / (not fails))
    assert future.cancel()
    clock.advance(1.0)
    assert future.cancelled()
