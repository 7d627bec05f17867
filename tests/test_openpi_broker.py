"""examples/openpi_broker.py, with the published openpi-client in an environment of its own, drives Push-T."""

import dataclasses
import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from envs import make_env
from parapolicy.control import Controller
from parapolicy.noise import mix_seeds
from parapolicy.policy import Policy
from tests.conftest import PATIENCE, ROOT
from tests.serving import running

PYTHON = Path(os.environ.get("PARAPOLICY_CLIENT_PYTHON", ROOT / ".venv-client" / "bin" / "python"))


def rewards(
    policy: Policy, seeds: list[int], steps: int, act: Callable[[dict[str, Any], int], np.ndarray]
) -> list[float]:
    """The largest reward of each episode; ``act`` is given an observation and its control step."""
    env, found = make_env("pusht", policy.spec, max_episode_steps=steps), []
    for seed in seeds:
        observation, best, step, over = env.reset(seed=seed)[0], 0.0, 0, False
        while not over:
            observation, reward, terminated, truncated, _ = env.step(act(observation, step))
            best, step, over = max(best, float(reward)), step + 1, terminated or truncated
        found.append(best)
    return found


def play_broker(policy: Policy, seeds: list[int], steps: int, history: bool) -> list[float]:
    """Rewards of Push-T with the example as it is, its robot at the other end of a pipe."""
    if not PYTHON.is_file() or subprocess.run([PYTHON, "-c", "import openpi_client"]).returncode:
        pytest.skip(f"no openpi-client at {PYTHON}; make test installs it where its own pins can be had")
    with running(policy) as server:
        command = [PYTHON, ROOT / "tests" / "broker_robot.py", str(server.port), str(steps), str(history).lower()]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert process.stdin is not None
        assert process.stdout is not None
        begun: list[int] = []

        def act(observation: dict[str, Any], step: int) -> np.ndarray:
            if step == 0 and begun:
                print(file=process.stdin)  # the episode before is over
            begun.append(step)
            print(json.dumps({k: v.tolist() for k, v in observation.items()}), file=process.stdin, flush=True)
            return np.asarray(json.loads(process.stdout.readline()), np.float32)

        try:
            return rewards(policy, seeds, steps, act)
        finally:
            process.stdin.close()
            process.wait(PATIENCE)


@pytest.mark.parametrize("history", [True, False])
def test_the_example_has_the_reward_of_one_process(shipped: Policy, history: bool) -> None:
    """With its history, as a controller; without, as a policy that takes each chunk's observation for the past, too."""
    policy = dataclasses.replace(shipped.with_schedule("ddim", steps=5), reproducible=True)
    controller, chunk = Controller(policy), np.empty(0)

    def act(observation: dict[str, Any], step: int) -> np.ndarray:
        nonlocal chunk
        if history:
            if step == 0:
                controller.reset()
            return controller.act(observation)
        index, steps = step % policy.spec.n_action_steps, policy.spec.n_action_steps
        if index == 0:
            standing = {key: np.stack([value, value]) for key, value in observation.items()}
            chunk = policy.predict(standing, seed=mix_seeds(0, step // steps)).actions
        return chunk[index]

    seeds, steps = [100_000, 100_003], 32
    played = play_broker(policy, seeds, steps, history)
    assert played == pytest.approx(rewards(policy, seeds, steps, act), abs=1e-3)
    assert min(played) > 0
