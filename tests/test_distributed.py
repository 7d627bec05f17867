"""Sweeps whose jobs run in processes of Ray or submitit: every table is that of a sweep in one process."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import PATIENCE, ROOT
from tests.holding import holding_env

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(2400)]
EPISODES = 6
SWEEP = (
    "-m",
    f"episodes={EPISODES}",
    "num_envs=1",
    "threads=1",
    "videos=0",
    "latency_chunks=0",
    "env.name=holding",
    "checkpoint=checkpoints/pusht_lowdim",
    "env.options.max_episode_steps=40",
    "samplers=[{name: sequential, solver: ddim, steps: 10}],[{name: sequential, solver: ddim, steps: 4}]",
)


def start(folder: Path, *overrides: str, hold: bool = False) -> subprocess.Popen[str]:
    """The sweep; to be held, each job stands still after two episodes until there is a file ``holding/go``."""
    command = [sys.executable, str(ROOT / "eval.py"), *SWEEP, f"hydra.sweep.dir={folder}", *overrides]
    environment = {**holding_env(folder / "holding"), "PARAPOLICY_TEST_MARK": str(folder)}
    if not hold:
        (folder / "holding" / "go").touch()
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT, env=environment
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


def assert_none_is_left(mark: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while (left := processes(mark)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not left


def tables(folder: Path) -> list[Any]:
    """Of both jobs."""
    rows = []
    for job in sorted(path.parent for path in folder.glob("*/results.json")):
        # The simulator's areas of overlap differ in the last bit from process to process.
        text = (job / "results.json").read_text()
        (row,) = json.loads(text, parse_float=lambda number: round(float(number), 10))["samplers"].values()
        rows.append([row["per_episode"], row["mean_max_reward"], row["rounds"]])
    return rows


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """The tables of a sweep in one process."""
    folder = tmp_path_factory.mktemp("alone")
    output, _ = start(folder).communicate(timeout=PATIENCE)
    found = tables(folder)
    assert len(found) == 2, output
    return found


def test_a_job_whose_worker_is_killed_goes_on_in_another(tmp_path: Path, alone: list[Any]) -> None:
    pytest.importorskip("ray", reason="Ray is not installed (pip install -e '.[distributed]')")
    sweep = start(
        tmp_path, "hydra/launcher=parapolicy_ray", "hydra.launcher.cpus=2", "hydra.launcher.max_retries=1", hold=True
    )

    def of_job_0() -> list[Path]:
        """Its episodes.jsonl, once it has the two lines after which it is held."""
        found = [path for path in tmp_path.glob("*/episodes.jsonl") if path.read_text().count("\n") == 2]
        return [path for path in found if "steps:10" in (path.parent / ".hydra" / "overrides.yaml").read_text()]

    while not of_job_0():
        assert sweep.poll() is None, sweep.communicate()[0]
        time.sleep(0.01)
    (lines,) = of_job_0()
    (worker,) = [pid for pid, title in processes(str(tmp_path)).items() if title.startswith("ray::job 0")]
    os.kill(worker, signal.SIGKILL)
    assert lines.read_text().count("\n") == 2
    assert not (lines.parent / "results.json").exists()
    (tmp_path / "holding" / "go").touch()
    output, _ = sweep.communicate(timeout=PATIENCE)

    assert sweep.returncode == 0, output
    assert tables(tmp_path) == alone
    for job in [path.parent for path in tmp_path.glob("*/results.json")]:
        assert not (job / "error.txt").exists()
        seeds = [json.loads(line)["seed"] for line in (job / "episodes.jsonl").read_text().splitlines()]
        assert len(seeds) == len(set(seeds)) == EPISODES  # what had ended was not run again
    assert_none_is_left(str(tmp_path))


def test_submitit_runs_a_sweep_as_slurm_would(tmp_path: Path, alone: list[Any]) -> None:
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher", reason="hydra-submitit-launcher is not installed")
    sweep = start(tmp_path, "hydra/launcher=submitit_local", "hydra.launcher.timeout_min=9")
    output, _ = sweep.communicate(timeout=PATIENCE)
    assert sweep.returncode == 0, output
    assert tables(tmp_path) == alone
    assert_none_is_left(str(tmp_path))
