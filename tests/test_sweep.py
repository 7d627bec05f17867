"""Sweeps: jobs that fail alone, and runs that go on."""

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import hydra
import numpy as np
import pytest
from omegaconf import DictConfig

from parapolicy.evaluate.run.progress import SweepBar, job_cost, list_jobs, sweep_cost
from parapolicy.evaluate.run.records import COMPARED, read_records
from parapolicy.evaluate.run.rollout import EpisodeRecord
from parapolicy.evaluate.run.run_folder import MAX_NAME, RunFolder, job_folder
from tests.conftest import PATIENCE, ROOT
from tests.holding import holding_env
from tools import measure_runs

DDIM = "[{name: sequential, solver: ddim, steps: 4, label: ddim}]"
SWEPT = ("[{name: sequential, solver: ddim, steps: 10}]", DDIM, "[fast]")
SETTINGS = ("episodes=3", "num_envs=3", "env.options.max_episode_steps=16")


def jobs_of(sweep: Path) -> list[Path]:
    """The folders of the fixture's three jobs, whose names are cut."""
    overrides = {path.parent.parent: path.read_text() for path in sweep.glob("*/.hydra/overrides.yaml")}
    assert len(overrides) == 3
    return [next(job for job, text in overrides.items() if mark in text) for mark in ("steps:10", "label:ddim", "fast")]


def start(*overrides: str, env: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
    command = [sys.executable, str(ROOT / "eval.py"), *overrides]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        env=env,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a script's background jobs ignore it
    )


def finish(process: subprocess.Popen[str]) -> str:
    output, _ = process.communicate(timeout=PATIENCE)
    return output


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two samplers in jobs of their own, and one that does not exist."""
    folder = tmp_path_factory.mktemp("sweep")
    process = start(
        "-m",
        "+experiment=pareto_pusht",
        *SETTINGS,
        f"samplers={','.join(SWEPT)}",
        f"hydra.sweep.dir={folder}",
        "hydra.callbacks.report.latency_chunks=3",
        "hydra.callbacks.report.fidelity_observations=0",
        "hydra.callbacks.report.engine=eager",
    )
    output = finish(process)
    assert (folder / "report" / "report.html").is_file(), output
    assert "all 3 jobs:" in output
    assert process.returncode == 1
    assert "1 jobs failed: " in output
    return folder


def test_a_failed_job_costs_only_itself_and_is_reported(sweep: Path) -> None:
    jobs = jobs_of(sweep)
    assert [(job / "results.json").is_file() for job in jobs] == [True, True, False]
    assert "sampler is 'fast'" in (jobs[2] / "error.txt").read_text()
    page = (sweep / "report" / "report.html").read_text()
    assert "Jobs that failed" in page
    assert "sampler is &#x27;fast&#x27;" in page


def test_a_sweep_times_its_samplers_side_by_side(sweep: Path) -> None:
    rows = read_records(sweep / "latency.json")
    engines = {row["sampler"]: row["engine"] for row in rows}
    assert engines == {"sequential": "eager", "ddim": "eager", "upstream sequential": "upstream"}
    assert all(row["chunk_ms"]["chunks"] == len(row["chunk_ms"]["each"]) == 3 for row in rows)
    for job in jobs_of(sweep)[:2]:  # and not in the jobs themselves
        (row,) = json.loads((job / "results.json").read_text())["samplers"].values()
        assert "chunk_ms" not in row


def test_a_sweep_that_is_run_again_does_nothing_twice(sweep: Path) -> None:
    before = {
        path: path.stat().st_mtime_ns for path in sweep.rglob("*") if path.name in ("episodes.jsonl", "latency.json")
    }
    assert len(before) == 3
    done = subprocess.run(
        [
            sys.executable,
            str(ROOT / "eval.py"),
            "-m",
            "+experiment=pareto_pusht",
            *SETTINGS,
            f"samplers={','.join(SWEPT)}",
            f"hydra.sweep.dir={sweep}",
            "hydra.callbacks.report.latency_chunks=3",
            "hydra.callbacks.report.fidelity_observations=0",
            "hydra.callbacks.report.engine=eager",
        ],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=PATIENCE,
    )
    assert f"{jobs_of(sweep)[0]} is finished" in done.stdout, done.stderr
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_an_interrupted_run_ends_with_the_same_table(tmp_path: Path) -> None:
    """SIGINT in the third episode, then the same command again."""
    hold = holding_env(tmp_path / "holding")
    settings = (
        "samplers=[{name: sequential, solver: ddim, steps: 4}]",
        "episodes=4",
        "num_envs=1",
        "env.name=holding",
        "checkpoint=checkpoints/pusht_lowdim",
        "env.options.max_episode_steps=24",
        "latency_chunks=0",
        "videos=0",
    )
    cut = start(*settings, f"hydra.run.dir={tmp_path / 'cut'}", env=hold)
    lines = tmp_path / "cut" / "episodes.jsonl"
    while not (lines.is_file() and lines.read_text().count("\n") == 2):
        assert cut.poll() is None, finish(cut)
        time.sleep(0.01)
    cut.send_signal(signal.SIGINT)
    assert "interrupted; to continue: hydra.run.dir=" in finish(cut)
    assert not (tmp_path / "cut" / "results.json").exists()
    assert lines.read_text().count("\n") == 2
    (tmp_path / "holding" / "go").touch()
    with lines.open("a") as file:
        file.write('{"sampler": "sequential", "seed": 1000')  # as if it had been killed while writing
    for name in ("whole", "cut"):
        finish(start(*settings, f"hydra.run.dir={tmp_path / name}", env=hold))
    results = [json.loads((tmp_path / name / "results.json").read_text()) for name in ("whole", "cut")]
    tables = [
        [(e["seed"], round(e["max_reward"], 9), e["steps"]) for e in r["samplers"]["sequential"]["per_episode"]]
        for r in results
    ]
    assert tables[0] == tables[1]
    about = json.loads((tmp_path / "cut" / "run.json").read_text())
    about["config"]["videos"] = 1
    with pytest.raises(ValueError, match="has a run with another videos"):
        RunFolder(tmp_path / "cut", about)


def sweep_config(*words: str) -> DictConfig:
    with hydra.initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = hydra.compose("eval", ["+experiment=pareto_pusht", *words], return_hydra_config=True)
    config.hydra.overrides.task = ["+experiment=pareto_pusht", *words]
    return config


def test_a_sweeps_jobs_are_known_before_they_begin() -> None:
    jobs = list(list_jobs(sweep_config()))
    assert len(jobs) == 9
    assert [job_cost(job) for job in jobs[::4]] == [100 * 100, 4 * 100 * 100, 5 * 100]
    with_blocks = sweep_config()
    with_blocks.hydra.overrides.task += ["episodes=10,20", "samplers=[secant],[sequential,paradigms]"]
    assert [job_cost(job) for job in list_jobs(with_blocks)] == [2000, 4000, 5000, 10000]


def test_the_bar_of_a_sweep_counts_what_is_on_disk(tmp_path: Path) -> None:
    config = sweep_config(f"hydra.sweep.dir={tmp_path}", "episodes=10")
    settings = {"samplers": ["sequential", {"name": "secant", "label": "ours"}], "episodes": 10}
    RunFolder(tmp_path / "0", {"config": settings}).finish({})
    half = RunFolder(tmp_path / "1", {"config": settings})
    assert sweep_cost(tmp_path) == 3000
    bar = SweepBar(config, interval=0.01)
    half.note_progress("sequential", 1.0)
    half.note_progress("ours", 0.25)
    bar.close()
    assert bar.bar.n == 3000 + 1000 + 500
    assert bar.bar.total == 10 * (100 + 30 + 200 + 200 + 400 + 200 + 16 + 10 + 5)
    (tmp_path / "1" / "progress.json").write_text('{"ours')
    assert sweep_cost(tmp_path) == 3000


def test_an_episode_comes_back_as_it_was(tmp_path: Path) -> None:
    kept = RunFolder(tmp_path, {"config": {"a": 1}})
    steps = [{"state": np.full((2, 5), k, np.float32)} for k in range(3)]
    episode = EpisodeRecord(7, [0.1, 0.5], True, [3, 4], [30, 40], steps, seams=[2.5], motion=[1.0, 0.5])
    kept.save_episode("ours", episode, {"seed": 7, "success": True, "max_reward": 0.5}, observations=True)
    assert kept.load_episodes("theirs") == []
    ((back, row),) = kept.load_episodes("ours")
    assert (back.rewards, back.success, back.rounds, back.evaluations) == ([0.1, 0.5], True, [3, 4], [30, 40])
    assert (back.seams, back.motion) == ([2.5], [1.0, 0.5])
    np.testing.assert_array_equal(back.observations[2]["state"], steps[2]["state"])
    assert row["max_reward"] == 0.5
    with pytest.raises(ValueError, match="has a run with another a"):
        RunFolder(tmp_path, {"config": {"a": 2}})


def test_a_job_keeps_its_folder_in_a_longer_sweep(sweep: Path, tmp_path: Path) -> None:
    shutil.copytree(sweep, tmp_path, ignore=shutil.ignore_patterns(jobs_of(sweep)[2].name), dirs_exist_ok=True)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/results.json")}
    assert len(before) == 2
    new = "[{name: sequential, solver: ddim, steps: 5, label: new}]"
    longer = start(
        "-m",
        "+experiment=pareto_pusht",
        *SETTINGS,
        f"samplers={new},{','.join(SWEPT[:2])}",
        f"hydra.sweep.dir={tmp_path}",
        "hydra.callbacks.report.latency_chunks=0",
        "hydra.callbacks.report.fidelity_observations=0",
    )
    output = finish(longer)
    assert (longer.returncode, output.count("is finished")) == (0, 2), output
    after = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/results.json")}
    assert before.items() <= after.items()
    assert [list(json.loads(path.read_text())["samplers"]) for path in after.keys() - before.keys()] == [["new"]]


def test_names_of_job_folders_are_file_names() -> None:
    assert job_folder("episodes=3,seed=1") == "episodes=3,seed=1"
    names = [
        job_folder(text) for text in ("", "a=/x/../y", "a=_x_.._y", "a=é", "seed=1," * 100, "samplers=[{name: a}]")
    ]
    assert len(set(names)) == len(names)
    for name in names:
        assert 0 < len(name) <= MAX_NAME + 9
        assert "/" not in name
        assert name.isascii()


def saved_run(folder: Path) -> RunFolder:
    kept = RunFolder(folder, {"config": {"a": 1, "checkpoint": "x"}, "checkpoint_digest": "0123"})
    for seed in (7, 8):
        steps = [{"state": np.full((2, 5), seed, np.float32)}]
        episode = EpisodeRecord(seed, [0.1, 0.5], True, [3], [30], steps)
        kept.save_episode("ours", episode, {"seed": seed, "success": True}, observations=True)
    return kept


def test_a_run_does_not_go_on_with_another_checkpoint(tmp_path: Path) -> None:
    saved_run(tmp_path)
    RunFolder(tmp_path, {"config": {"a": 1, "checkpoint": "x", "env_timeout_s": 5}, "checkpoint_digest": "0123"})
    with pytest.raises(ValueError, match="another checkpoint: the one at 'x' was replaced"):
        RunFolder(tmp_path, {"config": {"a": 1, "checkpoint": "x"}, "checkpoint_digest": "4567"})


def test_damage_of_a_run_folder_is_named_with_the_way_out(tmp_path: Path) -> None:
    kept = saved_run(tmp_path)
    kept.finish({"samplers": {"ours": {}}})
    assert kept.results() == {"samplers": {"ours": {}}}
    lines, results, about = (tmp_path / name for name in ("episodes.jsonl", "results.json", "run.json"))
    original = lines.read_text()
    lines.write_text(original.replace("0.5", "0.9", 1))
    with pytest.raises(ValueError, match=r"episodes.jsonl, line 1 is damaged.*; delete this line"):
        kept.load_episodes("ours")
    lines.write_text(original[:-20])  # an interruption
    assert [episode.seed for episode, _ in kept.load_episodes("ours")] == [7]
    lines.write_text(original)
    observations = tmp_path / "observations" / "8.npz"
    observations.write_bytes(observations.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"8.npz is damaged or missing; delete the line of seed 8 and sampler 'ours'"):
        kept.load_episodes("ours")
    results.write_text(results.read_text().replace("ours", "outs"))
    with pytest.raises(ValueError, match=r"results.json is damaged.*; delete it, and the same command writes it again"):
        kept.results()
    about.write_text(about.read_text()[:50])
    with pytest.raises(ValueError, match=r"run.json is damaged.*; choose another folder"):
        RunFolder(tmp_path, {"config": {}})
    about.unlink()
    with pytest.raises(ValueError, match=r"has results.json, but no run.json"):
        RunFolder(tmp_path, {"config": {}})


def test_the_samplers_of_runs_are_compared_in_distribution(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    samplers = "samplers=[sequential],[{name: sequential, solver: ddim, steps: 4, label: short}]"
    shared = ("episodes=1", "env.options.max_episode_steps=16", "latency_chunks=0", "videos=0", "engine=eager")
    finish(start("-m", samplers, *shared, f"hydra.sweep.dir={tmp_path}"))
    options = ["--output", str(tmp_path / "measured"), "--observations", "2", "--draws", "4", "--latency-chunks", "1"]
    monkeypatch.setattr(sys, "argv", ["measure_runs", str(tmp_path), *options])
    for _ in range(2):  # nothing is measured twice
        capsys.readouterr()
        measure_runs.main()
        rows = {row["sampler"]: row for row in read_records(tmp_path / "measured" / "fidelity.json", COMPARED)}
        assert (
            abs(rows["sequential"]["paired_energy_distance"]["mean"]) < 1e-6 < rows["short"]["energy_distance"]["max"]
        )
        timed = {row["sampler"] for row in read_records(tmp_path / "measured" / "latency.json")}
        assert timed == {"sequential", "short"}
    assert "fidelity" not in capsys.readouterr().err
