"""Simulated latency: the clock, the environment that keeps moving during inference, and whole episodes."""

import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
from rich.console import Console

import parapolicy
from envs import make_env
from envs.inference_delay import InferenceDelay
from parapolicy.control import ControlRecord, SimulatedClock
from parapolicy.evaluate.report.terminal import print_tables
from parapolicy.evaluate.run.evaluation import evaluate
from parapolicy.evaluate.run.rollout import EpisodeRecord, rollout
from parapolicy.evaluate.run.simulated_latency import SimulatedLatency, run_with_latency
from tests.helpers import configured, small_spec

LOW_DIM = small_spec(observation={"state": (5,)})


def test_a_held_world_goes_on_towards_its_target() -> None:
    """Holding for 0.1 s is a step with the same target; what is less than 10 ms is carried on."""
    envs = [make_env("pusht", LOW_DIM) for _ in range(3)]
    for env in envs:
        env.reset(seed=4)
    target = np.array([300.0, 300.0])
    for env in envs:
        env.step(target)
    stepped = envs[0].step(target)
    held = envs[1].unwrapped.hold(0.1)
    np.testing.assert_array_equal(stepped[0]["state"], held[0]["state"])
    assert stepped[1:4] == held[1:4]
    parts = [envs[2].unwrapped.hold(0.004) for _ in range(25)]
    np.testing.assert_array_equal(parts[-1][0]["state"], held[0]["state"])
    np.testing.assert_array_equal(parts[0][0]["state"], parts[1][0]["state"])  # 8 ms: not yet a physics step


def test_a_world_that_is_held_before_the_first_action_stays() -> None:
    env = make_env("pusht", LOW_DIM)
    before, _ = env.reset(seed=4)
    after = env.unwrapped.hold(3.0)[0]
    np.testing.assert_allclose(after["state"][:2], before["state"][:2], atol=1e-3)


def test_held_time_counts_towards_the_limit() -> None:
    env = make_env("pusht", LOW_DIM, max_episode_steps=3)
    env.reset(seed=1)
    assert not env.step([256, 256])[3]
    assert not env.unwrapped.hold(0.19)[3]
    assert env.unwrapped.hold(5.0)[3]


def test_the_wrapper_simulates_the_time_on_the_clock() -> None:
    clock = SimulatedClock(lambda measured: 0.35)
    env, plain = InferenceDelay(make_env("pusht", LOW_DIM), clock, 10), make_env("pusht", LOW_DIM)
    env.reset(seed=4)
    plain.reset(seed=4)
    clock.compute(lambda: None)
    delayed = env.step([300, 300])[0]
    plain.unwrapped.hold(0.35)
    np.testing.assert_array_equal(delayed["state"], plain.step([300, 300])[0]["state"])
    assert clock() == pytest.approx(0.45)
    np.testing.assert_array_equal(env.step([200, 300])[0]["state"], plain.step([200, 300])[0]["state"])


def test_an_environment_that_cannot_be_held_is_refused() -> None:
    with pytest.raises(ValueError, match=r"has no hold\(seconds\)"):
        InferenceDelay(gymnasium.make("CartPole-v1"), SimulatedClock(lambda measured: 0.0), 10)


def run(policy: parapolicy.Policy, text: str, **options: Any) -> Iterator[tuple[EpisodeRecord, ControlRecord]]:
    def build(clock: SimulatedClock) -> gymnasium.Env:
        return InferenceDelay(make_env("pusht", policy.spec, max_episode_steps=40), clock, policy.spec.control_hz)

    return run_with_latency(policy, "ddim", build, [100_003, 100_004], SimulatedLatency.parse(text), **options)


@pytest.fixture(scope="module")
def quick(shipped: parapolicy.Policy) -> parapolicy.Policy:
    return shipped.with_schedule("ddim", 4).with_sampler("sequential")


def test_episodes_without_latency_equal_the_batched_rollout(quick: parapolicy.Policy) -> None:
    delayed = {episode.seed: episode for episode, _ in run(quick, "none")}
    batched = rollout(quick, lambda: make_env("pusht", quick.spec, max_episode_steps=40), [100_003, 100_004])
    for episode in batched:
        np.testing.assert_allclose(episode.rewards, delayed[episode.seed].rewards, atol=1e-4)


def test_latency_costs_control_steps(quick: parapolicy.Policy) -> None:
    """Of 4 s, with 0.8 s of actions per chunk: 5 chunks for nothing, 3 at 0.8 s each; async goes on meanwhile."""
    free, _ = next(run(quick, "none"))
    slow, record = next(run(quick, "fixed:0.8s"))
    assert (len(free.rounds), len(free.rewards)) == (5, 40)
    assert (len(slow.rounds), record.steps) == (3, 16 + 1)  # the third one's time ends with the episode
    assert record.misses == 3
    assert (record.stale, record.held) == (0, 0)
    overlapped, record = next(run(quick, "fixed:400ms", asynchronous=True))
    assert len(overlapped.rewards) == 36  # only the first chunk is waited for
    assert record.misses == 1
    assert record.stale == 4 * (len(overlapped.rounds) - 1)
    assert (record.continued, record.held) == (0, 0)


def test_too_slow_for_the_old_chunk_is_counted(quick: parapolicy.Policy) -> None:
    """2 s are 20 control steps, and a chunk has 15 actions from its own observation on."""
    _, record = next(run(quick, "fixed:2s", asynchronous=True))
    assert record.held > 0
    assert record.continued > 0


def test_a_chunk_that_the_end_of_an_episode_cuts_off_is_charged_again_as_it_was(
    quick: parapolicy.Policy, tmp_path: Path
) -> None:
    def outcome(lines: list[dict[str, Any]]) -> tuple[list[Any], list[EpisodeRecord]]:
        trace, rows = tmp_path / "chunks.jsonl", []
        trace.write_text("\n".join(map(json.dumps, lines)))
        episodes = list(run(quick, f"trace:{trace}", asynchronous=True, log=rows.append))
        return [row["action"] for row in rows], [episode for episode, _ in episodes]

    def lines(times: dict[int, list[float]]) -> list[dict[str, Any]]:
        return [
            {"sampler": "ddim", "seed": seed, "chunk": chunk, "seconds": seconds}
            for seed, each in times.items()
            for chunk, seconds in enumerate(each)
        ]

    actions, episodes = outcome(lines({100_003: [0.05, 0.05, 60.0], 100_004: [0.05, 60.0]}))
    times = {episode.seed: episode.charged for episode in episodes}
    assert times == {100_003: [0.05, 0.05, 60.0], 100_004: [0.05, 60.0]}
    assert [len(episode.rounds) for episode in episodes] == [2, 1]
    assert outcome(lines(times))[0] == actions


@pytest.mark.parametrize("asynchronous", [False, True])
def test_simulated_latency_repeats_exactly(quick: parapolicy.Policy, asynchronous: bool, tmp_path: Path) -> None:
    def outcome(text: str) -> tuple[list[dict[str, Any]], list[tuple[int, int, float]]]:
        rows: list[Any] = []
        episodes = list(run(quick, text, asynchronous=asynchronous, log=rows.append))
        for row in rows:
            del row["computed_seconds"]  # a wall time
        return rows, [(e.seed, chunk, seconds) for e, _ in episodes for chunk, seconds in enumerate(e.charged)]

    fixed = outcome("fixed:130ms")
    assert fixed == outcome("fixed:130ms")
    measured = outcome("measured")
    trace = tmp_path / "chunks.jsonl"
    lines = [{"sampler": "ddim", "seed": s, "chunk": k, "seconds": t} for s, k, t in measured[1]]
    trace.write_text("\n".join(map(json.dumps, lines)))
    replayed = outcome(f"trace:{trace}")
    assert [row["action"] for row in replayed[0]] == [row["action"] for row in measured[0]]
    assert {row["episode"] for row in measured[0]} == {100_003, 100_004}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("slow", "latency is 'slow', expected none, measured, fixed:80ms or trace:FILE"),
        ("fixed:80", "'fixed:80', expected a time"),
        ("fixed:-3ms", "'fixed:-3ms', expected a time"),
        ("fixed:xms", "'fixed:xms', expected a time"),
        ("trace:nowhere.jsonl", "no latency trace 'nowhere.jsonl'"),
    ],
)
def test_bad_latencies_are_named(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SimulatedLatency.parse(text)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty"),
        ("{}", "line 1: expected"),
        ('{"sampler": "a", "seed": 1, "chunk": 0, "seconds": -1}', "expected a number of at least 0"),
        ('{"sampler": "a", "seed": 1, "chunk": 0, "seconds": NaN}', "line 1"),
        ('{"seconds": 0.1}\n{"second": 0.1}', "line 2: .*unknown second"),
        ('{"seed": 1, "seconds": 0.1}', "line 1: .*no 'chunk'"),
        ("garbage", "line 1: expected"),
    ],
)
def test_bad_traces_are_named(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        SimulatedLatency.parse(f"trace:{path}")


def test_a_trace_of_another_sampler_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text('{"sampler": "a", "seed": 1, "chunk": 0, "seconds": 0.5}')
    latency = SimulatedLatency.parse(f"trace:{path}")
    assert latency.chunk_seconds("a", 9, 9, 0.0) == 0.5  # another episode takes what there is
    with pytest.raises(ValueError, match=r"no sampler 'b', only \['a'\]"):
        latency.chunk_seconds("b", 1, 0, 0.0)


def test_a_trace_needs_no_more_than_times(tmp_path: Path) -> None:
    """As another runtime would write them: drawn for every sampler without times of its own, the same each time."""
    path = tmp_path / "trace.jsonl"
    path.write_text('{"seconds": 0.1}\n{"seconds": 0.2}\n{"seconds": 0.4}\n{"sampler": "slow", "seconds": 3}')
    latency = SimulatedLatency.parse(f"trace:{path}")
    drawn = [[latency.chunk_seconds("any", seed, chunk, 9.0) for chunk in range(30)] for seed in (1, 2)]
    assert set(drawn[0]) == set(drawn[1]) == {0.1, 0.2, 0.4}
    assert drawn[0] != drawn[1]
    again = SimulatedLatency.parse(f"trace:{path}")
    assert [again.chunk_seconds("any", 1, chunk, 0.0) for chunk in range(30)] == drawn[0]
    assert latency.chunk_seconds("slow", 1, 0, 9.0) == 3


def test_an_evaluation_simulates_each_samplers_latency(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ddim = "name: sequential, solver: ddim, steps: 2"
    config = configured(
        "eval",
        f"samplers=[{{{ddim}, latency: none, label: free}}, {{{ddim}, control: async, seam: hold, label: late}}]",
        "env.latency=fixed:250ms",
        "env.options.max_episode_steps=16",
        "episodes=2",
        "latency_chunks=0",
        "videos=0",
    )

    def build(spec: parapolicy.PolicySpec, clock: SimulatedClock | None) -> gymnasium.Env:
        env = make_env("pusht", spec, **config.env.options)
        return env if clock is None else InferenceDelay(env, clock, spec.control_hz)

    results = evaluate(config, tmp_path, build)
    assert "control" not in results["samplers"]["free"]
    control = results["samplers"]["late"]["control"]
    assert (control["asynchronous"], control["latency"], control["failures"]) == (True, "fixed:250ms", 0)
    assert control["chunk_ms"]["p50"] == pytest.approx(250)
    assert control["seam"] == "hold"
    assert control["stale"] > 0
    actions = [json.loads(line) for line in (tmp_path / "actions.jsonl").read_text().splitlines()]
    assert len(actions) == control["steps"]
    assert {(row["sampler"], row["episode"]) for row in actions} == {("late", 100_000), ("late", 100_001)}
    trace = SimulatedLatency.parse(f"trace:{tmp_path / 'chunks.jsonl'}")
    assert trace.chunk_seconds("late", 100_001, 0, 0.0) == pytest.approx(0.25)
    rows = [json.loads(line) for line in (tmp_path / "episodes.jsonl").read_text().splitlines()]
    assert [row["sampler"] for row in rows] == ["free", "free", "late", "late"]
    for row in rows[2:]:
        mine = [action for action in actions if action["episode"] == row["seed"]]
        assert 3 in {action["committed"] for action in mine}  # 250 ms at 10 Hz
        pairs = itertools.pairwise(mine)
        jumps = [np.subtract(b["action"], a["action"]) for a, b in pairs if a["chunk"] != b["chunk"]]
        np.testing.assert_allclose(row["seams"], np.linalg.norm(jumps, axis=1), rtol=1e-6)
        assert len(row["jerk"]) == len(mine) - 3
    jumps = [np.mean(row["seams"]) for row in rows[2:]]
    assert results["samplers"]["late"]["motion"]["jump"]["mean"] == pytest.approx(np.mean(jumps))
    print_tables(results, Console(width=160))
    printed = capsys.readouterr().out
    assert re.search(r"^late +\d.*\nhold +\[", printed, re.MULTILINE)
    assert rows[3]["control"]["times"]["chunk"]["p99"] == pytest.approx(250, rel=0.01)
