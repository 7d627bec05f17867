"""The tables of README and docs, made from finished runs; a page keeps its prose."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import parapolicy
from tests.conftest import ROOT
from tools import fill_docs, fill_speed, fill_tasks
from tools.observation_history import play

PAGE = "# Title\n\nProse.\n\n<!-- closed loop -->\nold\n<!-- end -->\n\nMore.\n\n<!-- errors -->\n<!-- end -->\n"


def write(folder: Path, name: str, content: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(content))
    return folder


def some_results(**changes: Any) -> dict[str, Any]:
    quantiles = {"median": 1e-3, "p95": 2e-3, "p99": 3e-3, "p99.9": 4e-3, "max": 5e-3}
    row = {
        "mean_max_reward": 0.9,
        "mean_max_reward_ci95": [0.8, 0.95],
        "success_rate": 0.5,
        "success_rate_ci95": [0.4, 0.6],
        "rounds": {"mean": 6.9, "p95": 8.0},
        "evaluations": {"mean": 193.0, "p95": 240.0},
        "chunk_error": quantiles,
        "chunk_ms": {"p50": 150.0, "p95": 190.0, "p99": 200.0},
        "speedup_p50": 4.5,
        "paired_reward_difference": {"to": "sequential", "mean": -0.01, "ci95": [-0.03, 0.02]},
        "control": {"latency": "measured", "chunk_ms": {"p50": 33.0, "p99": 44.0}},
        "motion": {name: {"mean": 1.5, "ci95": [1.4, 1.6]} for name in ("relative_jump", "jerk")},
    }
    errors = {
        "chunks": 5000,
        "rounds": {"mean": 6.9, "p95": 8.0},
        "evaluations": {"mean": 193.0},
        "error": quantiles,
        "action_error": {key: 250 * value for key, value in quantiles.items()},
        "exceeding_10_tolerances": 3,
    }
    return {"episodes": 100, "samplers": {"secant": row}, "errors": {"secant": errors}} | changes


def some_bench() -> dict[str, Any]:
    ways = {"sequential": 20.0, "collocation (24 nodes)": 4.0, "DDIM-16": 3.0, "DDIM-10": 2.0}
    cost = {"rounds": 100.0, "evaluations": 100.0, "floor": 9.0}
    chunks = [{"chunk": "upstream, DDPM-100", "p50": 500.0, "p99": 600.0}]
    for engine, factor in (("eager", 10), ("fused", 1)):
        chunks += [{"chunk": f"{way}, {engine}", "p50": factor * ms, "p99": 99.0} | cost for way, ms in ways.items()]
    robots = {"robots": 16, "sampler": "secant", "rounds": 8.0, "evaluations": 3000.0, "fused": 0.5}
    return {
        "parameters": 4.5e6,
        "machine": {"flops_per_second": 5e11, "bytes_per_second": 2e11},
        "peak_memory": {"process": 500.0},
        "network": [{"batch": 1, "floor": 1e-4, "eager": 2e-3, "fused": 4e-4}],
        "chunks": chunks,
        "robots": [robots],
        "scaling": {
            "windows": [{"window": 5, "seconds": 0.1, "rounds": 22.8}, {"window": 9, "seconds": 0.2, "rounds": 9}]
        },
    }


def test_blocks_are_filled_and_all_else_is_kept() -> None:
    page = fill_docs.fill_page(PAGE, {"closed loop": "new"})
    assert page == PAGE.replace("old", "new")
    assert fill_docs.block_names(page) == ["closed loop", "errors"]


def test_tables_of_a_run(tmp_path: Path) -> None:
    folder = [write(tmp_path, "results.json", some_results())]
    assert "| secant | 0.900 [0.800, 0.950] | 0.50 [0.40, 0.60] | -0.010 [-0.030, +0.020] | 6.9 (8) | 193 |" in (
        fill_docs.closed_loop_table(folder)
    )
    assert "| 150.0 / 190.0 / 200.0 | 4.50× | 6.9 | 193 | 2e-03 |" in fill_docs.shipped_table(folder)
    assert "| 0.25 / 0.50 | 3 of 5000 |" in fill_docs.errors_table([*folder, *folder])
    assert "| secant | 33.0 / 44.0 | 0.900" in fill_docs.simulated_latency_table(folder)
    assert "| 1.50 [1.40, 1.60] | 1.5 [1.4, 1.6] |" in fill_docs.seams_table(folder)


def test_tables_of_the_benchmarks(tmp_path: Path) -> None:
    bench = [write(tmp_path, "bench.json", some_bench())]
    assert "25 times as fast as the published code to the same chunk, and 125 times" in fill_docs.speedups(bench)
    chunks = fill_speed.chunks_table(bench)
    assert "| sequential | 200.0 / 99.0 | 20.0 / 99.0 | 25.0× | 100.0 | 100 | 9.0 (2.2×) |" in chunks
    assert "| upstream, DDPM-100 (eager) | 500.0 / 600.0 |" in chunks
    assert "| 1 | 0.10 | 2.00 (20.0×) | 0.40 (4.0×) |" in chunks
    scaling = fill_speed.scaling_tables(bench)
    assert "| window | 5 | 9 |" in scaling
    assert "| `secant`, ms | 100 | 200 |" in scaling
    assert "| 16 | `secant` | 3000 | 8.0 | 500.0 |" in scaling
    calls = {"rows": [1, 3], "threads": 2, "ms": {"fused": [0.44, 0.97]}}
    table = fill_speed.calls_table([write(tmp_path / "a", "calls.json", calls)])
    assert "| rows | fused, 2 threads |" in table
    assert "| 3 | 0.97 |" in table
    soak = {"percentiles": [50, 99], "rows": [{"chunks": "all", "ms": [5.0, 6.0], "resident_mib": 446.0}]}
    assert "| all | 5.00 | 6.00 | 446 |" in fill_speed.soak_table([write(tmp_path, "soak.json", soak)])
    chunk = {"count": 900, "p50": 4.1, "p99": 6.0}
    soak["rows"][0] |= {"missed": 3, "own": 0, "waited_s": 1.5, "chunk_ms": chunk}
    found = fill_speed.soak_table([write(tmp_path, "soak.json", soak)])
    assert "| all | 5.00 | 6.00 | 3 | 0 | 1.5 | 446 |" in found
    assert found.endswith("900 chunks: p50 4.1 ms, p99 6.0.")
    frames = [{"encoder": "e", "two": 4.0, "one": 2.0}]
    assert "| e | 4.0 ms | 2.0 ms | 2.0× |" in fill_speed.frames_table([write(tmp_path, "frames.json", frames)])
    load = {"kB per message": 461, "per second": 40.0, "p50 ms": 30, "p99 ms": 60, "max ms": 90}
    load |= {"answers": 9, "ticks": 10, "memory, first quarter and end, MiB": [400, 401], "errors": []}
    cameras = fill_speed.cameras_table([write(tmp_path, "cameras.json", {"arrays": load})])
    assert "| arrays | 9 of 10 | 461 | 40.0 | 30 | 60 | 90 | 400 to 401 | 0 |" in cameras
    lerobot = [
        {"way": w, "ms": ms, "evaluations": 9.0, "median": 0.0, "p95": 1e-3} for w, ms in (("a", 9.0), ("b", 3.0))
    ]
    assert "| b | 3.0 | 3.0 | 9 |" in fill_speed.lerobot_table([write(tmp_path, "lerobot.json", lerobot)])


def test_tables_of_programs_that_are_run(tmp_path: Path) -> None:
    rows = [{"way": "stacked", "reward": 0.97, "success": 0.45}, {"way": "single", "reward": 0.95, "success": 0.25}]
    history = write(tmp_path / "history", "history.json", {"episodes": 20, "rows": rows})
    assert "| the present step | 0.950 | 0.25 |" in fill_speed.history_table([history])
    differences = {"sequential": {"unet": 1e-6, "transformer": 2e-6}, "secant": {"unet": 3e-5, "transformer": 1e-5}}
    live = write(tmp_path / "live_stanford", "live.json", differences)
    assert fill_speed.live_table([live]).endswith("| real-stanford | 2 | at most 2.0e-06 | at most 3.0e-05 |")
    (tmp_path / "printed.txt").write_text("10 ticks\n\n")
    assert fill_speed.printed([tmp_path]) == "```\n10 ticks\n```"


class Witness:
    """A policy, with what it was given to see."""

    def __init__(self, policy: parapolicy.Policy) -> None:
        self.policy, self.spec, self.seen = policy, policy.spec, list[np.ndarray]()

    def predict(self, observation: Any, **options: Any) -> parapolicy.Chunk:
        self.seen.append(observation["agent_pos"])
        return self.policy.predict(observation, **options)


def test_a_single_observation_stands_for_the_steps_before_it(shipped: parapolicy.Policy) -> None:
    quick: Any = shipped.with_schedule("ddim", 2).with_sampler("sequential")
    for single in (False, True):
        play(witness := Witness(quick), 100_000, single, steps=20)
        still = [np.array_equal(before, now) for before, now in witness.seen]
        assert still == ([True] * 3 if single else [True, False, False])


def test_the_calibrations_are_read_from_their_files(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "checkpoints" / "lift_lowdim", tmp_path / "calibration_lift")
    lines = fill_docs.calibrations_table([tmp_path / "calibration_lift"]).splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| Lift"] * (len(lines) - 2)
    assert any("| 24 nodes |" in line for line in lines)


def test_runs_of_two_tasks_are_no_sweep_of_one(tmp_path: Path) -> None:
    for env in ("pusht", "lift"):
        results = {"env": env, "checkpoint": env, "samplers": {"sequential": {"per_episode": [an_episode()]}}}
        write(tmp_path / env, "results.json", results)
    with pytest.raises(ValueError, match="runs of 2 tasks, expected 1"):
        fill_docs.sweep_table([tmp_path])


def an_episode(seed: int = 0) -> dict[str, Any]:
    costs = {"steps": 10, "rounds_mean": 100.0, "evaluations_mean": 100.0}
    return {"seed": seed, "max_reward": 0.5 + 0.1 * (seed % 3), "success": seed % 2 == 0} | costs


def test_the_headline_joins_times_and_scores(tmp_path: Path) -> None:
    labels = {"sequential": 6, "collocation-24": 6, "ddim-16": 4, "ddim-10": 4}
    samplers = {label: {"per_episode": [an_episode(i) for i in range(n)]} for label, n in labels.items()}
    runs = write(tmp_path / "runs", "results.json", {"env": "pusht", "checkpoint": "c", "samplers": samplers})
    text = fill_docs.headline([write(tmp_path, "bench.json", some_bench()), runs])
    assert "| published code's way, 100 steps | 500 | 1× |" in text
    assert "| collocation (24 nodes) | 4.0 | 125× | 0.600 | +0.000 [+0.000, +0.000] | 0.500 |" in text
    assert "6 and 4 episodes" in text
    assert fill_docs.equivalence_tables([runs]).splitlines()[2].startswith("| Push-T | collocation-24 | 6 |")


def test_other_programs_policies_are_named_by_their_folders(tmp_path: Path) -> None:
    row = {"rounds": 100.0, "evaluations": 100.0, "error_median": 0.0, "error_max": 0.0}
    fast = {"rounds": 7.25, "evaluations": 197.4, "error_median": 8e-4, "error_max": 2e-3}
    samplers = [{"sampler": "sequential", **row}, *({"sampler": s, **fast} for s in ("secant", "collocation"))]
    names = ("checkpoints/pusht_lowdim", "/data/lerobot/v06/pretrained_model", "/data/real-stanford/unet.ckpt")
    lines = [json.dumps({"checkpoint": name, "samplers": samplers}) for name in names]
    (tmp_path / "checks.jsonl").write_text("\n".join(lines))
    rows = fill_speed.check_table([tmp_path]).splitlines()[2:]
    assert [row.split(" | ")[0] for row in rows] == [
        "| checkpoints/pusht_lowdim",
        "| lerobot/v06",
        "| real-stanford/unet",
    ]
    assert rows[0].endswith("| 100 | 8e-04 / 2e-03 | 7.2 | 197 | 8e-04 / 2e-03 | 7.2 | 197 |")


def test_the_tables_of_tasks(tmp_path: Path) -> None:
    rewards = {"lift": [1.0, 0.0, 1.0, 1.0], "kitchen": [1.0, 0.75, 0.5, 0.0]}
    for env, values in rewards.items():
        rows = [{**an_episode(i), "max_reward": value, "success": value == 1} for i, value in enumerate(values)]
        samplers = {"sequential": {"per_episode": rows}, "ddim-16": {"per_episode": rows[:2]}}
        write(tmp_path / f"env={env}", "results.json", {"env": env, "checkpoint": env, "samplers": samplers})
    scores = fill_tasks.task_scores_table([tmp_path]).splitlines()
    assert scores[0] == "| mean max reward | episodes | sequential | ddim-16 |"
    assert scores[2].startswith("| Kitchen | 4 | 0.56 [")
    assert scores[3].startswith("| Lift | 4 | 0.75 [")
    assert "| sequential | 2 | 8 | 0.656 [" in fill_tasks.tasks_together_table([tmp_path])


def test_two_engines_scores_are_paired_by_seed(tmp_path: Path) -> None:
    def scores(name: str, successes: dict[int, float]) -> Path:
        episodes = [{"seed": seed, "max_reward": 0.9, "success": success} for seed, success in successes.items()]
        return write(tmp_path / name, "results.json", {"samplers": {"sequential": {"per_episode": episodes}}})

    folders = [
        scores("a", dict.fromkeys(range(25), 1.0)),
        scores("b", {seed: float(seed > 4) for seed in range(20)}),
    ]
    row = fill_docs.rounding_scores_table(folders).splitlines()[-1]
    assert row.startswith("| 20 | +0.000 [+0.000, +0.000] | 0 | -0.250 [-0.500, ")
    assert row.endswith("| 1 |")
