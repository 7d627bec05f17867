"""Every branch of the control loop, on a clock that only the test moves, and once on a real thread."""

import dataclasses
import json
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import Any

import numpy as np
import pytest

from parapolicy import Controller, ObservationError, ObservationHistory
from parapolicy.control import Histogram
from parapolicy.noise import mix_seeds
from parapolicy.policy import Chunk, Policy
from tests.conftest import PATIENCE, ROOT
from tests.helpers import Later, small_policy, some_observation

EXECUTED = 4  # n_action_steps of the small policy; its horizon is 8, of which 7 actions are from now on


class Timed:
    """A real policy on a made-up clock: every call takes ``seconds`` and every look at the clock ``tick``."""

    def __init__(self, policy: Policy) -> None:
        self.policy, self.spec = policy, policy.spec
        self.now, self.seconds, self.tick = 0.0, 0.01, 0.0
        self.calls: list[dict[str, Any]] = []
        self.failures: dict[int, Exception] = {}  # by number of the call

    def clock(self) -> float:
        self.now += self.tick
        return self.now

    def predict(self, observation: Any, **options: Any) -> Chunk:
        self.calls.append({"observation": observation, **options})
        if failure := self.failures.get(len(self.calls) - 1):
            raise failure
        self.now += self.seconds
        return self.policy.predict(observation, **options)


@pytest.fixture
def policy() -> Timed:
    return Timed(small_policy("semi_implicit"))


def step(policy: Timed, seed: int) -> dict[str, np.ndarray]:
    """One control step's observation."""
    return {key: value[0] for key, value in some_observation(policy.spec, seed=seed).items()}


def act(controller: Controller, policy: Timed, count: int) -> list[np.ndarray]:
    return [controller.act(step(policy, controller.step + 1)) for _ in range(count)]


def test_chunks_are_executed_one_after_the_other(policy: Timed) -> None:
    controller = Controller(policy, clock=policy.clock)
    controller.reset(seed=7)
    actions = act(controller, policy, 3 * EXECUTED)
    assert len(policy.calls) == 3
    for k, call in enumerate(policy.calls):
        assert call["seed"] == mix_seeds(7, k)
        chunk = policy.policy.predict(call["observation"], seed=call["seed"])
        np.testing.assert_array_equal(actions[k * EXECUTED : (k + 1) * EXECUTED], chunk.actions)
    first = policy.calls[0]["observation"]["position"]
    np.testing.assert_array_equal(first[0], first[1])  # the history before the first step is the first step
    latest = policy.calls[1]["observation"]["position"]
    np.testing.assert_array_equal(latest[1], step(policy, EXECUTED)["position"])
    record = controller.record
    assert record.times["chunk"].summary()["p50"] == pytest.approx(10.0, rel=0.01)
    assert (record.steps, record.continued, record.held, record.failures) == (12, 0, 0, 0)
    assert record.rounds.total() == 3


def test_the_same_seed_gives_the_same_actions(policy: Timed) -> None:
    controller = Controller(policy, clock=policy.clock)
    runs = []
    for seed in (1, 1, 2):
        controller.reset(seed)
        runs.append(np.stack(act(controller, policy, 10)))
    np.testing.assert_array_equal(runs[0], runs[1])
    assert not np.array_equal(runs[0], runs[2])


def test_warm_starts_know_how_many_steps_were_executed(policy: Timed) -> None:
    controller = Controller(policy, clock=policy.clock, warm_start=True)
    act(controller, policy, EXECUTED + 1)
    assert policy.calls[0]["warm"] is None
    assert policy.calls[1]["warm"] is not None
    assert policy.calls[1]["executed"] == EXECUTED


def test_what_is_planned_begins_with_the_last_action_and_is_never_empty(policy: Timed) -> None:
    controller = Controller(policy, clock=policy.clock)
    with pytest.raises(RuntimeError, match="call act first"):
        controller.planned()
    first = policy.spec.n_obs_steps - 1
    for k in range(EXECUTED):
        (action,) = act(controller, policy, 1)
        chunk = policy.policy.predict(**policy.calls[0]).trajectory[first:]
        np.testing.assert_array_equal(controller.planned(), chunk[k:])
        np.testing.assert_array_equal(controller.planned()[0], action)
    controller.planned()[:] = np.nan
    assert np.isfinite(controller.planned()).all()
    policy.failures = {number: ValueError("lost") for number in range(1, 20)}
    actions = act(controller, policy, 6)
    np.testing.assert_array_equal(controller.planned(), actions[-1:])


def start_async(policy: Timed, **options: Any) -> tuple[Controller, Later]:
    """A controller whose second chunk has just been asked for, at step 3."""
    executor = Later()
    controller = Controller(
        policy, 10, asynchronous=True, clock=policy.clock, executor=executor, warm_start=True, **options
    )
    act(controller, policy, EXECUTED - 1)
    assert not executor.waiting
    act(controller, policy, 1)
    assert len(executor.waiting) == 1
    return controller, executor


def test_async_in_time_drops_what_is_past(policy: Timed) -> None:
    controller, executor = start_async(policy)
    executor.run()
    (action,) = act(controller, policy, 1)
    chunk = policy.policy.predict(**policy.calls[1])
    first = policy.spec.n_obs_steps - 1
    np.testing.assert_array_equal(action, chunk.trajectory[first + 1])  # its own step 3 is past
    assert policy.calls[1]["executed"] == EXECUTED - 1
    record = controller.record
    assert (record.stale, record.continued, record.held) == (1, 0, 0)


def test_async_begins_earlier_when_chunks_take_longer(policy: Timed) -> None:
    policy.seconds = 0.25  # 3 control steps at 10 Hz
    executor = Later()
    controller = Controller(policy, 10, asynchronous=True, clock=policy.clock, executor=executor)
    act(controller, policy, 2)
    assert len(executor.waiting) == 1


def test_async_late_goes_on_with_the_old_chunk_then_holds(policy: Timed) -> None:
    controller, executor = start_async(policy)
    old = policy.policy.predict(**policy.calls[0])
    actions = act(controller, policy, 6)  # steps 4 to 9; the old chunk ends with step 6
    first = policy.spec.n_obs_steps - 1
    np.testing.assert_array_equal(actions[:3], old.trajectory[first + 4 :])
    np.testing.assert_array_equal(actions[3:], [old.trajectory[-1]] * 3)
    assert (controller.record.continued, controller.record.held) == (3, 3)
    executor.run()
    (action,) = act(controller, policy, 1)  # step 10; the new chunk began at 3 and ends with 9
    assert np.isfinite(action).all()
    assert controller.record.stale == 7
    assert len(executor.waiting) == 1  # and the next one is under way already


def test_async_that_never_comes_holds_for_ever(policy: Timed) -> None:
    controller, executor = start_async(policy)
    actions = act(controller, policy, 200)
    assert len(executor.waiting) == 1
    assert (np.asarray(actions[-150:]) == actions[-1]).all()
    assert controller.record.held == 197


@pytest.mark.parametrize(
    "failure", [FloatingPointError("the action chunk holds a value that is not finite"), OSError()]
)
@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_failed_chunk_is_recorded_and_the_next_one_taken(
    policy: Timed, failure: Exception, asynchronous: bool
) -> None:
    policy.failures[1] = failure
    executor = Later()
    controller = Controller(policy, 10, asynchronous, clock=policy.clock, executor=executor if asynchronous else None)
    actions = []
    for _ in range(12):
        actions += act(controller, policy, 1)
        executor.run()
    assert np.isfinite(actions).all()
    assert controller.record.failures == 1
    assert controller.record.chunks[1].error == f"{type(failure).__name__}: {failure}"
    assert len(policy.calls) > 2
    assert controller.record.held == 0


def test_the_first_chunk_has_nothing_to_fall_back_on(policy: Timed) -> None:
    policy.failures[0] = FloatingPointError("not finite")
    with pytest.raises(FloatingPointError):
        Controller(policy, clock=policy.clock).act(step(policy, 0))


def test_a_reset_drops_what_is_under_way(policy: Timed) -> None:
    controller, executor = start_async(policy)
    controller.reset(seed=3)
    executor.run()
    actions = act(controller, policy, 2)
    assert policy.calls[-1]["seed"] == mix_seeds(3, 0)
    assert policy.calls[-1]["warm"] is None
    np.testing.assert_array_equal(actions, policy.policy.predict(**policy.calls[-1]).actions[:2])
    assert controller.record.stale == 0
    assert len(controller.record.chunks) == 1


def test_a_bad_observation_changes_nothing(policy: Timed) -> None:
    controller, twin = (Controller(policy, clock=policy.clock) for _ in range(2))
    act(controller, policy, 2)
    with pytest.raises(ObservationError, match="points"):
        controller.act({**step(policy, 0), "points": np.full((3, 2), np.nan)})
    np.testing.assert_array_equal(act(controller, policy, 6), act(twin, policy, 8)[2:])


def test_blending_takes_over_in_equal_parts(policy: Timed) -> None:
    controller = Controller(policy, clock=policy.clock, blend_steps=3)
    actions = act(controller, policy, 2 * EXECUTED)
    first = policy.spec.n_obs_steps - 1
    old, new = (policy.policy.predict(**call).trajectory[first:] for call in policy.calls)
    np.testing.assert_array_equal(actions[:EXECUTED], old[:EXECUTED])
    for k in range(3):  # the old chunk has an action for control steps 4 to 6
        share = (k + 1) / 4
        np.testing.assert_allclose(actions[4 + k], share * new[k] + (1 - share) * old[4 + k], rtol=1e-5)
    np.testing.assert_array_equal(actions[7], new[3])


def test_steps_that_take_longer_than_the_period_are_misses(policy: Timed) -> None:
    policy.seconds = 0.25
    controller = Controller(policy, 10, clock=policy.clock)
    act(controller, policy, EXECUTED + 1)
    record = controller.record
    assert (record.steps, record.misses) == (EXECUTED + 1, 2)
    assert record.times["act"].summary()["max"] == pytest.approx(250.0)
    assert record.times["jitter"].summary()["max"] == pytest.approx(
        150.0
    )  # the second step begins 250 ms after the first


@pytest.mark.parametrize(("seconds", "misses"), [(0.05, 0), (0.1, 0), (0.101, 2)])
def test_a_step_within_the_period_is_no_miss(policy: Timed, seconds: float, misses: int) -> None:
    policy.seconds = seconds
    controller = Controller(policy, 10, clock=policy.clock)
    act(controller, policy, EXECUTED + 1)
    assert controller.record.misses == controller.latency["misses"] == misses


def test_every_action_says_where_it_came_from(policy: Timed) -> None:
    """From the log alone, with the observations, each chunk is computed again, and with it each action."""
    rows: list[Any] = []
    observations = [step(policy, k) for k in range(10)]
    controller = Controller(policy, 10, clock=policy.clock, log=rows.append, warm_start=True)
    controller.reset(seed=5)
    taken = [controller.act(observation) for observation in observations]
    assert [row["step"] for row in rows] == list(range(10))
    assert [row["chunk"] for row in rows] == [0] * 4 + [1] * 4 + [2] * 2
    assert [row["slack"] > 0.099 for row in rows] == [k % 4 != 0 for k in range(10)]
    assert rows[4] == {**rows[4], "begin": 4, "index": 0, "warm_from": 0, "executed": 4, "kind": "planned", "stale": 0}
    chunks: dict[int, Chunk] = {}
    history = ObservationHistory(policy.spec)
    for row, observation, action in zip(json.loads(json.dumps(rows)), observations, taken, strict=True):
        history.push(observation)
        if row["begin"] == row["step"]:
            warm = None if row["warm_from"] is None else chunks[row["warm_from"]].warm_state
            chunks[row["chunk"]] = policy.policy.predict(
                history.stacked(), seed=row["seed"], warm=warm, executed=row["executed"]
            )
            assert chunks[row["chunk"]].stats.rounds == row["rounds"]
        expected = chunks[row["chunk"]].trajectory[policy.spec.n_obs_steps - 1 + row["index"]]
        np.testing.assert_array_equal(action, expected)
        np.testing.assert_array_equal(np.float32(row["action"]), expected)


def test_a_row_of_the_log_holds_times_and_costs(policy: Timed) -> None:
    rows: list[Any] = []
    policy.now, policy.seconds = 5.0, 0.02
    controller = Controller(policy, 10, clock=policy.clock, log=rows.append, warm_start=True)
    actions = act(controller, policy, EXECUTED + 1)
    stats = controller.record.chunks[1].stats
    assert stats is not None
    times = {"time": 5.04, "slack": 0.08, "observed_at": 5.02, "chunk_seconds": 0.02}
    assert {name: rows[-1].pop(name) for name in times} == pytest.approx(times)
    assert rows[-1] == {
        "step": EXECUTED,
        "kind": "planned",
        "chunk": 1,
        "index": 0,
        "begin": EXECUTED,
        "seed": mix_seeds(0, 1),
        "warm_from": 0,
        "executed": EXECUTED,
        "held_from": None,
        "committed": 0,
        "computed_seconds": stats.seconds,
        "rounds": stats.rounds,
        "evaluations": stats.evaluations,
        "complete": True,
        "residual": stats.residual,
        "stale": 0,
        "action": actions[-1].tolist(),
    }


def test_waiting_for_the_loop_and_taking_the_observation_in_are_timed(policy: Timed) -> None:
    controller, executor = start_async(policy)
    executor.run()
    policy.now += 0.03
    act(controller, policy, 1)
    assert controller.record.times["queue"].max == pytest.approx(0.03)
    policy.tick = 0.004
    act(controller, policy, 1)
    assert controller.record.times["observe"].max == pytest.approx(0.004)


def test_histograms_give_percentiles_to_one_percent() -> None:
    times = np.random.default_rng(0).lognormal(-3, 1, 20_000)
    histogram = Histogram()
    assert histogram.summary() == {}
    for seconds in times:
        histogram.add(seconds)
    for percent in (1, 50, 95, 99, 100):
        assert histogram.percentile(percent) == pytest.approx(np.percentile(times, percent), rel=0.012)
    assert histogram.max == times.max()
    histogram.add(0.0)
    histogram.add(1e9)
    assert histogram.percentile(0) == pytest.approx(1e-6, rel=0.02)


def test_a_summary_is_in_milliseconds() -> None:
    histogram = Histogram()
    assert np.isnan(histogram.percentile(50))
    histogram.add(0.05)
    assert histogram.summary() == {"count": 1, "p50": 50.0, "p95": 50.0, "p99": 50.0, "max": 50.0}
    histogram = Histogram()
    for k in range(1, 1001):
        histogram.add(k / 1e3)
    summary = histogram.summary()
    for name, exact in (("p50", 500), ("p95", 950), ("p99", 990)):
        assert exact <= summary[name] <= 1.0101 * exact
    assert (summary["count"], summary["max"]) == (1000, 1000.0)


def test_a_record_is_summarised_as_json_has_it(policy: Timed) -> None:
    controller = Controller(policy, 10, clock=policy.clock)
    act(controller, policy, EXECUTED + 1)
    summary = controller.latency
    assert json.loads(json.dumps(summary)) == summary
    assert summary["steps"] == EXECUTED + 1
    assert summary["rounds"] == {str(rounds): chunks for rounds, chunks in controller.record.rounds.items()}
    counts = {stage: times["count"] for stage, times in summary["times"].items()}
    per_chunk = dict.fromkeys(("encode", "sample", "post", "queue", "chunk"), 2)
    assert counts == {"observe": EXECUTED + 1, **per_chunk, "act": EXECUTED + 1, "jitter": EXECUTED}


def test_records_stay_small() -> None:
    policy = Timed(small_policy(n_action_steps=1).with_schedule("ddim", 1).with_sampler("sequential"))
    controller = Controller(policy.policy, clock=policy.clock)
    observation = step(policy, 0)
    for _ in range(1100):
        controller.act(observation)
    assert len(controller.record.chunks) == 1000
    assert controller.record.chunks[0].number == 100


def test_a_deadline_ends_sampling_and_is_counted(policy: Timed) -> None:
    policy.seconds, policy.tick = 0.0, 0.004
    controller = Controller(policy, deadline_ms=10, clock=policy.clock)
    (action,) = act(controller, policy, 1)
    assert controller.record.rounds == {3: 1}  # looked at after 4, 8 and 12 ms
    assert controller.record.late == 1
    assert np.isfinite(action).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"control_hz": 0}, "control_hz is 0"),
        ({"deadline_ms": -5}, "deadline_ms is -5"),
        ({"blend_steps": -1}, "blend_steps is -1"),
    ],
)
def test_bad_options_are_named(policy: Timed, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Controller(policy, **options)


def test_the_thread_is_there_before_the_loop_begins(shipped: Policy) -> None:
    """With the priority of the thread that makes the controller, whatever the loop's own becomes."""

    def names() -> set[str]:
        return {thread.name for thread in threading.enumerate() if thread.name.startswith("parapolicy")}

    assert not names()
    with Controller(shipped, asynchronous=True):
        assert names() == {"parapolicy_0"}
    with Controller(shipped):
        assert not names()


def test_a_real_thread(shipped: Policy) -> None:
    rng = np.random.default_rng(0)
    keys = shipped.spec.observation.items()
    observation = {key: rng.uniform(150, 350, feature.shape).astype(np.float32) for key, feature in keys}
    with Controller(shipped, asynchronous=True) as controller:
        actions = [controller.act(observation) for _ in range(200)]
    assert np.isfinite(actions).all()
    assert controller.record.failures == 0
    assert controller.record.times["act"].summary()["count"] == 200


@pytest.mark.parametrize(
    ("example", "printed"),
    [("control_loop seconds=1", "100 ticks:"), ("gym_agent episodes=1", "seed 100000: reward")],
)
def test_the_examples_run(example: str, printed: str) -> None:
    name, argument = example.split()
    command = [sys.executable, "-m", f"examples.{name}", argument]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=PATIENCE)
    assert printed in done.stdout, done.stderr


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
    with pytest.warns(UserWarning, match="control_hz is 50 and the policy was trained at 10"):
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
        with pytest.raises(TimeoutError, match="still computed"):
            act(controller, counting, 1)
        counting.go.set()
