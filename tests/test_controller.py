"""Every branch of the control loop, on a clock that only the test moves, and once on a real thread."""

import subprocess
import sys
import threading

import numpy as np
import pytest

from parapolicy import Controller, ObservationError
from parapolicy.noise import mix_seeds
from parapolicy.policy import Policy
from tests.conftest import PATIENCE, ROOT
from tests.controlling import EXECUTED, Timed, act, start_async, step
from tests.helpers import Later, small_policy


@pytest.fixture
def policy() -> Timed:
    return Timed(small_policy("semi_implicit"))


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
