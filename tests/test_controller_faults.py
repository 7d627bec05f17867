"""Policies, executors, logs and clocks that fail: an action comes out, and it is counted."""

import dataclasses
import re
import threading
from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import Any

import numpy as np
import pytest

from parapolicy import Controller
from parapolicy.noise import mix_seeds
from parapolicy.policy import Chunk, Policy
from tests.controlling import EXECUTED, Timed, act, step
from tests.helpers import Later, small_policy


@pytest.fixture
def policy() -> Timed:
    return Timed(small_policy("semi_implicit"))


class SpoilingPolicy(Timed):
    """Spoils every chunk but the first."""

    def __init__(self, policy: Policy, spoil: Callable[[Chunk], Any]) -> None:
        super().__init__(policy)
        self.spoil = spoil

    def predict(self, observation: Any, **options: Any) -> Any:
        chunk = super().predict(observation, **options)
        return chunk if len(self.calls) == 1 else self.spoil(chunk)


def with_trajectory(change: Callable[[np.ndarray], Any]) -> Callable[[Chunk], Chunk]:
    return lambda chunk: dataclasses.replace(chunk, trajectory=change(chunk.trajectory))


@pytest.mark.parametrize(
    ("spoil", "error"),
    [
        (with_trajectory(lambda t: np.where(t == t[5, 1], np.nan, t)), "FloatingPointError"),
        (with_trajectory(lambda t: t / np.float32(1e-45)), "FloatingPointError"),
        (with_trajectory(lambda t: t[:5]), r"ValueError: .* shape \(5, 2\), expected \(8, 2\)"),
        (with_trajectory(lambda t: t[None]), r"ValueError: .* shape \(1, 8, 2\)"),
        (with_trajectory(lambda t: t.astype(object)), "TypeError: .* object, expected a numpy array of floats"),
        (with_trajectory(lambda t: t.tolist()), "TypeError: .* list, expected a numpy array of floats"),
        (lambda chunk: None, "TypeError: the policy gave a NoneType"),
        (lambda chunk: dataclasses.replace(chunk, stats=None), "TypeError: the policy gave a Chunk"),
    ],
)
@pytest.mark.filterwarnings("ignore:divide by zero", "ignore:overflow")
@pytest.mark.parametrize("asynchronous", [False, True])
def test_no_policy_s_bad_chunk_replaces_a_good_plan(
    policy: Timed, spoil: Callable[[Chunk], Any], error: str, asynchronous: bool
) -> None:
    spoiling = SpoilingPolicy(policy.policy, spoil)
    executor = Later()
    controller = Controller(spoiling, asynchronous=asynchronous, clock=spoiling.clock, executor=executor)
    actions = []
    for _ in range(9):
        actions += act(controller, spoiling, 1)
        executor.run()
    good = spoiling.policy.predict(**spoiling.calls[0]).trajectory[spoiling.spec.n_obs_steps - 1 :]
    np.testing.assert_array_equal(actions, [*good, good[-1], good[-1]])
    waiting = int(asynchronous)  # the last one, which no step has taken yet
    assert controller.record.failures == len(spoiling.calls) - 1 - waiting > 0
    assert re.match(error, str(controller.record.chunks[-1].error))


def test_a_policy_may_use_its_memory_again(policy: Timed) -> None:
    controller = Controller(SpoilingPolicy(policy.policy, lambda chunk: chunk), clock=policy.clock)
    first = controller.act(step(policy, 0))
    plan = controller._plan
    assert plan is not None
    plan.chunk.trajectory[:] = 0
    expected = policy.policy.predict(plan.request.observation, seed=plan.request.seed).actions
    np.testing.assert_array_equal([first, *act(controller, policy, 3)], expected)


class Gone(Executor):
    """Has shut down, or gives up what it was given."""

    def __init__(self, cancels: bool) -> None:
        self.cancels = cancels

    def submit(self, function: Callable, /, *arguments: Any, **options: Any) -> Future:
        if not self.cancels:
            raise RuntimeError("cannot schedule new futures after shutdown")
        future: Future = Future()
        future.cancel()
        return future


@pytest.mark.parametrize("cancels", [False, True])
def test_an_executor_that_is_gone_counts_as_failures(policy: Timed, cancels: bool) -> None:
    controller = Controller(policy, asynchronous=True, clock=policy.clock, executor=Gone(cancels))
    actions = act(controller, policy, 12)
    assert np.isfinite(actions).all()
    assert controller.record.failures == 9  # from step 3 on
    assert (controller.record.continued, controller.record.held) == (3, 5)


def test_act_after_close_gives_an_action_and_counts(policy: Timed) -> None:
    controller = Controller(policy, asynchronous=True, clock=policy.clock)
    act(controller, policy, 1)
    controller.close()
    assert np.isfinite(act(controller, policy, 12)).all()
    assert controller.record.failures > 0


def test_a_log_that_raises_costs_no_action(policy: Timed) -> None:
    def log(row: Any) -> None:
        raise OSError("no space left on device")

    controller, twin = (Controller(policy, clock=policy.clock, log=log) for log in (log, None))
    with pytest.warns(UserWarning, match="no space left on device") as caught:
        actions = act(controller, policy, 6)
    assert len(caught) == 1
    np.testing.assert_array_equal(actions, act(twin, policy, 6))
    assert controller.latency["unlogged"] == 6


@pytest.mark.parametrize("fault", [lambda now: now - 3600, lambda now: float("nan"), lambda now: float("inf")])
@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_clock_that_cannot_be_right_costs_no_action(
    policy: Timed, fault: Callable[[float], float], asynchronous: bool
) -> None:
    """At any one of its readings, and for good."""
    policy, looks = Timed(policy.policy.with_schedule("ddim", 2)), 0
    for at in (*range(30), "ever"):
        looks, policy.now = 0, 5000.0

        def clock(at: Any = at) -> float:
            nonlocal looks
            looks += 1
            policy.now += 0.001
            if (at == "ever" and looks > 5) or looks - 1 == at:
                return fault(policy.now)
            return policy.now

        executor = Later()
        controller = Controller(policy, asynchronous=asynchronous, deadline_ms=1e6, clock=clock, executor=executor)
        actions = []
        for _ in range(9):
            actions += act(controller, policy, 1)
            executor.run()
        assert np.isfinite(actions).all()
        assert controller.record.failures == 0
        if at in (0, "ever"):  # an hour forward after an hour back looks like a slow step
            assert controller.record.clock_faults + controller.record.misses > 0


def test_another_rate_than_the_trained_one_is_warned_of(policy: Timed, recwarn: pytest.WarningsRecorder) -> None:
    Controller(policy, 10)
    assert not recwarn
    with pytest.warns(UserWarning, match="control_hz is 50 but the policy was trained at 10"):
        Controller(policy, 50)


@pytest.mark.parametrize(("seconds", "late"), [(0.1, 0), (0.05, 0), (0.11, 3), (0.25, 19)])
def test_a_loop_that_calls_late_is_warned_of_once_and_counted(
    policy: Timed, seconds: float, late: int, recwarn: pytest.WarningsRecorder
) -> None:
    policy.seconds = 0.0
    controller = Controller(policy, clock=policy.clock)
    for _ in range(20):
        act(controller, policy, 1)
        policy.now += seconds
    assert controller.record.misses == late
    assert len([w for w in recwarn if "late" in str(w.message)]) == (late > 0)


class Counting(Timed):
    """Counts how many computations run at once; each waits until it is let go."""

    def __init__(self, policy: Policy) -> None:
        super().__init__(policy)
        self.running = self.most = 0
        self.begun, self.go = threading.Event(), threading.Event()

    def predict(self, observation: Any, **options: Any) -> Chunk:
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            if len(self.calls) == 1:  # the second
                self.begun.set()
                assert self.go.wait(60)
            return super().predict(observation, **options)
        finally:
            self.running -= 1


def test_a_reset_never_leaves_two_chunks_at_once(policy: Timed) -> None:
    counting = Counting(policy.policy)
    with Controller(counting, asynchronous=True, clock=counting.clock) as controller:
        act(controller, counting, EXECUTED)
        assert counting.begun.wait(60)
        controller.reset(seed=3)
        threading.Timer(0.2, counting.go.set).start()
        actions = act(controller, counting, 2)
    assert counting.most == 1
    call = next(call for call in counting.calls if call["seed"] == mix_seeds(3, 0))
    np.testing.assert_array_equal(actions, policy.policy.predict(**call).actions[:2])
    assert len(controller.record.chunks) == 1


def test_a_dropped_chunk_that_never_ends_is_an_error(policy: Timed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("parapolicy.control.controller.DROPPED", 0.1)
    counting = Counting(policy.policy)
    with Controller(counting, asynchronous=True, clock=counting.clock) as controller:
        act(controller, counting, EXECUTED)
        assert counting.begun.wait(60)
        controller.reset()
        with pytest.raises(TimeoutError, match="still running"):
            act(controller, counting, 1)
        counting.go.set()
