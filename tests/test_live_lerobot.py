"""A policy in real LeRobot, in LeRobot's own environment (``make lerobot``), with and without acceleration."""

import json
import os
import socket
import subprocess
import tarfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import parapolicy
from parapolicy.lerobot import main
from tests.conftest import PATIENCE, ROOT

PYTHON = Path(os.environ.get("PARAPOLICY_LEROBOT_PYTHON", ROOT / ".venv-lerobot" / "bin" / "python"))
DATA = Path(os.environ.get("PARAPOLICY_DEMONSTRATIONS", ROOT.parent / "shared" / "data"))
FOLDER = DATA / "checkpoints" / "lerobot" / "pusht_keypoints" / "pretrained_model"
needs_lerobot = pytest.mark.skipif(
    not (PYTHON.exists() and FOLDER.exists()), reason=f"no LeRobot at {PYTHON}, or no checkpoint; see make lerobot"
)


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def run(*arguments: str, check: bool = True, cwd: Path = ROOT) -> "subprocess.CompletedProcess[str]":
    command = [str(PYTHON), *arguments]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, cwd=cwd, timeout=PATIENCE)
    assert not check or done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    values: dict[str, Any] = json.loads(run("tests/lerobot_live.py", str(FOLDER)).stdout.splitlines()[-1])
    return values


@needs_lerobot
def test_chunks_are_those_of_lerobot_with_the_same_seeds(found: dict[str, Any]) -> None:
    """Actions of three chunks in the network's units, and the random number that LeRobot would draw next."""
    assert found["sequential"] < 5e-6
    assert found["batch"] < 5e-6
    assert found["paradigms"] < 5e-6
    assert found["secant"] < 1e-3  # asked for 1e-4, which is an estimate
    assert found["auto"] < 0.05  # in bfloat16, where the processor has it


@needs_lerobot
def test_settings_weights_and_copies_are_those_of_the_moment(found: dict[str, Any]) -> None:
    assert found["state_dict_kept"]
    assert found["copy_changed"] > 0.1
    assert found["copy_equals_its_original"] < 0.05
    assert found["original_kept"] == found["auto"]
    assert found["overridden"] < 0.05


@needs_lerobot
def test_a_chunk_needs_no_queues(found: dict[str, Any]) -> None:
    assert found["chunk_of_empty_queues"] == 0.0
    assert found["second_chunk_of_empty_queues"] == 0.0


@needs_lerobot
def test_what_does_not_agree_steps_aside(found: dict[str, Any]) -> None:
    assert found["verified"] < 5e-6
    assert found["verified_warnings"] == []
    assert found["stepped_aside"] == 0.0
    assert len(found["stepped_aside_warnings"]) == 1


@needs_lerobot
def test_it_can_be_undone(found: dict[str, Any]) -> None:
    assert found["restored"]
    assert found["instance_clean"]
    assert "Linear" in found["refused"]


@needs_lerobot
def test_lerobot_s_own_commands_are_accelerated(tmp_path: Path) -> None:
    command = [
        "lerobot-eval",
        f"--policy.path={FOLDER}",
        *("--policy.device=cpu", "--env.type=pusht", "--env.obs_type=environment_state_agent_pos"),
        *("--env.episode_length=16", "--eval.n_episodes=1", "--eval.batch_size=1", f"--output_dir={tmp_path / 'own'}"),
    ]
    program = "import sys; from lerobot.scripts.lerobot_eval import main; sys.argv = sys.argv[1:]; main()"
    run("-c", program, *command)
    command[-1] = f"--output_dir={tmp_path / 'accelerated'}"
    done = run("-m", "parapolicy.lerobot", "--sampler=paradigms", "--tolerance=0", "--engine=eager", *command)
    assert "parapolicy: the last 2 chunks took" in done.stderr
    own, accelerated = (
        json.loads((tmp_path / name / "eval_info.json").read_text())["per_task"][0]["metrics"]["sum_rewards"]
        for name in ("own", "accelerated")
    )
    assert accelerated == pytest.approx(own, abs=1e-3)


@needs_lerobot
def test_the_asynchronous_server_moves_a_robot(tmp_path: Path) -> None:
    """LeRobot 0.4.4's own server fails on each observation of a diffusion policy."""
    with tarfile.open(FOLDER.parents[1] / "two_cameras_ddim10.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    module = "lerobot.async_inference.policy_server"
    arguments = ["--sampler=sequential", "--engine=eager", module, "--host=127.0.0.1", f"--port={port}"]
    log = tmp_path / "server.log"
    with log.open("w") as stream:
        command = [str(PYTHON), "-m", "parapolicy.lerobot", *arguments]
        server = subprocess.Popen(command, env=environment(), stdout=stream, stderr=stream, cwd=tmp_path)
    try:
        begin = time.monotonic()
        while "PolicyServer started" not in log.read_text() and time.monotonic() < begin + PATIENCE:
            assert server.poll() is None, log.read_text()
            time.sleep(0.1)
        folder = tmp_path / "two_cameras_ddim10" / "pretrained_model"
        # LeRobot writes its logs into the folder it runs in.
        done = run("-m", "tests.lerobot_async", str(folder), str(port), "20", cwd=tmp_path)
    finally:
        server.kill()
        server.wait()
    actions = np.asarray(json.loads(done.stdout.splitlines()[-1]))
    assert len(actions) >= 20, log.read_text()[-2000:]
    assert np.isfinite(actions).all()
    assert np.ptp(actions, axis=0).min() > 0


@needs_lerobot
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sampler=nothing", "lerobot-eval"], "nothing"),
        (["--sampler=sequential", "--tolerance=0.1", "lerobot-eval"], "tolerance"),
        (["--engine=sharded", "lerobot-eval"], "engine is 'sharded', expected one of"),
        (["lerobot-nothing"], "'lerobot-nothing' is neither an installed command nor a module with main()"),
    ],
)
def test_wrong_arguments_are_errors(arguments: list[str], message: str) -> None:
    done = run("-m", "parapolicy.lerobot", *arguments, check=False)
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_without_lerobot_the_command_says_so() -> None:
    with pytest.raises(SystemExit, match="pip install lerobot"):
        main(["lerobot-eval"])


def test_only_diffusion_policies_are_taken() -> None:
    with pytest.raises(TypeError, match="policy is of type object, expected a diffusion policy of LeRobot"):
        parapolicy.accelerate(object())
