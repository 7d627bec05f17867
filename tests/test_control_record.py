"""What a controller records and logs of its steps and chunks."""

import json
from typing import Any

import numpy as np
import pytest

from parapolicy import Controller, ObservationHistory
from parapolicy.control import Histogram
from parapolicy.noise import mix_seeds
from parapolicy.policy import Chunk
from tests.controlling import EXECUTED, Timed, act, start_async, step
from tests.helpers import small_policy


@pytest.fixture
def policy() -> Timed:
    return Timed(small_policy("semi_implicit"))


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
