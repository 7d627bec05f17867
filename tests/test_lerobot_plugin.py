"""The plug-in that LeRobot's commands import by its name: packages/lerobot_policy_parapolicy."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from parapolicy.lerobot import VARIABLE, accelerate_by_environment
from tests.conftest import PATIENCE, ROOT
from tests.test_live_lerobot import FOLDER, PYTHON, environment, needs_lerobot

PLUGIN = ROOT / "packages" / "lerobot_policy_parapolicy"
SAMPLED_BY = """
import logging
logging.basicConfig(level=logging.INFO)
from lerobot.policies.diffusion.modeling_diffusion import DiffusionModel
from lerobot.utils.import_utils import register_third_party_plugins
register_third_party_plugins()
print(DiffusionModel.conditional_sample.__module__)
"""


def test_without_the_variable_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    """LeRobot is not installed here: anything else would be an error."""
    for value in ("", "0"):
        monkeypatch.setenv(VARIABLE, value)
        accelerate_by_environment()
    monkeypatch.delenv(VARIABLE)
    accelerate_by_environment()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("1", "pip install lerobot"),
        ("--sampler secant --tolerance 0.01", "pip install lerobot"),
        ("--sampler='secant", "PARAPOLICY_LEROBOT is"),
    ],
)
def test_the_variable_is_read(monkeypatch: pytest.MonkeyPatch, value: str, message: str) -> None:
    monkeypatch.setenv(VARIABLE, value)
    with pytest.raises(SystemExit, match=message):
        accelerate_by_environment()


@pytest.mark.parametrize("value", ["yes", "--sample secant", "--tolerance=much"])
def test_unknown_options_end_the_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], value: str
) -> None:
    monkeypatch.setenv(VARIABLE, value)
    with pytest.raises(SystemExit):
        accelerate_by_environment()
    assert "PARAPOLICY_LEROBOT=1" in capsys.readouterr().err


Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A command in LeRobot's environment with the plug-in installed beside it."""
    target = tmp_path_factory.mktemp("plugin")
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--target", str(target)]
    copied = tmp_path_factory.mktemp("source") / "plugin"  # a build leaves folders behind
    subprocess.run(["cp", "-r", str(PLUGIN), str(copied)], check=True)
    subprocess.run([*pip, str(copied)], check=True, timeout=PATIENCE)

    def call(*arguments: str, variable: str | None = None, check: bool = True) -> "subprocess.CompletedProcess[str]":
        settings = {**environment(), "PYTHONPATH": os.pathsep.join((str(target), str(ROOT)))}
        settings |= {} if variable is None else {VARIABLE: variable}
        command = [str(PYTHON), *arguments]
        done = subprocess.run(command, env=settings, capture_output=True, text=True, cwd=target, timeout=PATIENCE)
        assert not check or done.returncode == 0, done.stderr
        return done

    return call


@needs_lerobot
def test_lerobot_finds_the_plug_in(run: Run) -> None:
    done = run("-c", SAMPLED_BY)
    assert "Imported third-party plugin: lerobot_policy_parapolicy" in done.stderr
    assert done.stdout.split()[-1] == "lerobot.policies.diffusion.modeling_diffusion"
    assert run("-c", SAMPLED_BY, variable="1").stdout.split()[-1] == "parapolicy.adapters.live_lerobot"


@needs_lerobot
def test_a_wrong_variable_ends_lerobot_s_command(run: Run) -> None:
    done = run("-c", SAMPLED_BY, variable="--sampler nothing", check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: sampler is 'nothing'")


@needs_lerobot
def test_lerobot_eval_is_accelerated(run: Run, tmp_path: Path) -> None:
    command = [
        f"--policy.path={FOLDER}",
        *("--policy.device=cpu", "--env.type=pusht", "--env.obs_type=environment_state_agent_pos"),
        *("--env.episode_length=16", "--eval.n_episodes=1", "--eval.batch_size=1", f"--output_dir={tmp_path / 'out'}"),
    ]
    program = "import sys; from lerobot.scripts.lerobot_eval import main; main()"
    done = run("-c", program, *command, variable="--sampler=paradigms --tolerance=0 --engine=eager")
    assert "parapolicy: the last 2 chunks took" in done.stderr
    assert "sampled by paradigms" in done.stderr
    metrics = json.loads((tmp_path / "out" / "eval_info.json").read_text())["per_task"][0]["metrics"]
    assert len(metrics["sum_rewards"]) == 1
