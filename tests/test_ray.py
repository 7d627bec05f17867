"""A sweep on a real Ray cluster on this machine: a worker killed in its middle changes nothing but the time."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600)]
pytest.importorskip("ray", reason="Ray is not installed (pip install -e '.[distributed]')")

EPISODES = 6
SWEEP = (
    "-m",
    f"episodes={EPISODES}",
    "num_envs=1",
    "threads=1",
    "videos=0",
    "latency_chunks=0",
    "env.options.max_episode_steps=40",
    "samplers=[{name: sequential, solver: ddim, steps: 10}],[{name: sequential, solver: ddim, steps: 4}]",
)


def processes(mark: str) -> dict[int, str]:
    """Pid -> title of the living processes whose environment has a value, which they inherit."""
    found = {}
    for place in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (place / "environ").read_bytes():
                found[int(place.name)] = (place / "cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
        except OSError:  # another user's, or gone meanwhile
            continue
    return found


def start(folder: Path, *overrides: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(ROOT / "eval.py"), *SWEEP, f"hydra.sweep.dir={folder}", *overrides]
    environment = {**os.environ, "PARAPOLICY_TEST_MARK": str(folder)}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT, env=environment
    )


def table(folder: Path) -> list[Any]:
    (row,) = json.loads((folder / "results.json").read_text())["samplers"].values()
    return [row["per_episode"], row["mean_max_reward"], row["rounds"]]


def test_a_killed_worker_s_job_goes_on_and_every_table_is_the_undisturbed_one(tmp_path: Path) -> None:
    alone = start(tmp_path / "alone")
    alone_output, _ = alone.communicate(timeout=200)

    folder = tmp_path / "ray"
    sweep = start(folder, "hydra/launcher=parapolicy_ray", "hydra.launcher.cpus=2", "hydra.launcher.max_retries=1")
    lines = folder / "0" / "episodes.jsonl"
    deadline = time.monotonic() + 120
    while not (lines.is_file() and "\n" in lines.read_text()) and time.monotonic() < deadline:
        time.sleep(0.01)
    (worker,) = [pid for pid, title in processes(str(folder)).items() if title.startswith("ray::job 0")]
    os.kill(worker, signal.SIGKILL)
    assert 1 <= lines.read_text().count("\n") < EPISODES
    assert not (folder / "0" / "results.json").exists()
    output, _ = sweep.communicate(timeout=200)

    assert sweep.returncode == 0, output
    for job in ("0", "1"):
        assert (folder / job / "results.json").is_file(), output
        assert not (folder / job / "error.txt").exists()
        assert table(folder / job) == table(tmp_path / "alone" / job), alone_output
        seeds = [json.loads(line)["seed"] for line in (folder / job / "episodes.jsonl").read_text().splitlines()]
        assert len(seeds) == len(set(seeds)) == EPISODES  # what had ended was not run again
    deadline = time.monotonic() + 20
    while (left := processes(str(folder))) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not left
