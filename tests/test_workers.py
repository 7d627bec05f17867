"""Environments in processes of their own: the same episodes, and a crash that costs only its own."""

import os
import signal
import time
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch

from envs import make_env
from parapolicy.evaluate.run.results import episode_row, summarize_episodes
from parapolicy.evaluate.run.rollout import EpisodeRecord, rollout
from parapolicy.evaluate.run.run_folder import RunFolder
from parapolicy.evaluate.run.simulated_latency import SimulatedLatency, run_with_latency
from parapolicy.evaluate.run.workers import ProcessEnv, reset
from tests.helpers import small_policy, small_spec

STEPS = 6


class Crashing(gymnasium.Env):
    """Push-T's observations made up; the episodes of some seeds kill their process in the second chunk."""

    def __init__(self, deaths: Path, seeds: dict[int, int]) -> None:
        self.deaths, self.seeds = deaths, seeds

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        self.seed, self.state, self.steps = seed, np.full(5, float(seed or 0)), 0
        return {"state": self.state.copy()}, {}

    def step(self, action: Any) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        self.steps += 1
        self.state[:2] += action
        marks = list(self.deaths.glob(f"{self.seed}-*"))
        if self.steps == 5 and len(marks) < self.seeds.get(self.seed or 0, 0):
            (self.deaths / f"{self.seed}-{len(marks)}").touch()
            if marks:
                os._exit(3)
            os.kill(os.getpid(), signal.SIGKILL)
        if self.seed == 13 and self.steps == 6:
            raise ValueError("the number is 13")
        if self.seed == 14 and self.steps == 2:
            self.state[1] = np.nan
        if self.seed == 15:
            time.sleep(1000)
        reward = np.inf if self.seed == 16 else float(self.state[0])
        return {"state": self.state.copy()}, reward, False, self.steps == STEPS, {"is_success": True}


def run(make: Any, seeds: list[int], **options: Any) -> dict[int, EpisodeRecord]:
    torch.manual_seed(0)  # the same weights every time
    policy = small_policy(observation={"state": (5,)})
    return {episode.seed: episode for episode in rollout(policy, make, seeds, **options)}


def test_a_crash_costs_only_its_own_episode(tmp_path: Path) -> None:
    """Seed 1's process dies once, seed 2's twice, seed 3's never."""
    steps: list[int] = []
    seeds = [1, 2, 3, 4]
    found = run(partial(Crashing, tmp_path, {1: 1, 2: 2}), seeds, num_envs=2, processes=True, progress=steps.append)
    calm = run(partial(Crashing, tmp_path, {}), seeds)
    for seed in (1, 3, 4):
        assert found[seed].rewards == pytest.approx(calm[seed].rewards, rel=1e-5)  # another batch rounds otherwise
        assert (found[seed].success, found[seed].error) == (True, None)
    assert found[2].rewards == pytest.approx(calm[2].rewards[:4], rel=1e-5)
    assert not found[2].success
    assert (
        found[2].error
        == "the process of its environment ended with exit code 3, twice; the last time, after 4 control steps"
    )
    assert sum(steps) == 3 * STEPS + 4


def test_processes_give_the_same_episodes() -> None:
    spec = small_spec(observation={"state": (5,)})
    make = partial(make_env, "pusht", spec, max_episode_steps=10, render_size=96)
    here, there = (run(make, [5, 6], record=[6], processes=processes) for processes in (False, True))
    for seed, episode in here.items():
        assert there[seed].rewards == episode.rewards
        assert len(there[seed].frames) == len(episode.frames) == (11 if seed == 6 else 0)
        for frame, other in zip(episode.frames, there[seed].frames, strict=True):
            np.testing.assert_array_equal(frame, other)


ERRORS = {
    13: "the environment failed with ValueError: the number is 13, after 4 control steps",
    14: "the environment failed with ValueError: its observation 'state' holds nan, expected finite numbers, after 0 "
    "control steps",
    16: "the environment failed with ValueError: its reward is inf, expected a finite number, after 0 control steps",
}


@pytest.mark.parametrize("processes", [False, True])
def test_an_environment_that_fails_costs_only_its_own_episode(tmp_path: Path, processes: bool) -> None:
    seeds = [13, 1, 14, 2, 16]
    found = run(partial(Crashing, tmp_path, {}), seeds, num_envs=2, processes=processes)
    calm = run(partial(Crashing, tmp_path, {}), [1, 2])
    for seed, error in ERRORS.items():
        assert (found[seed].error, found[seed].success) == (error, False)
    for seed, episode in calm.items():
        assert found[seed].rewards == pytest.approx(episode.rewards, rel=1e-5)


def test_an_environment_that_hangs_costs_only_its_own_episode(tmp_path: Path) -> None:
    found = run(partial(Crashing, tmp_path, {}), [15, 1], num_envs=2, processes=True, timeout=10)
    assert found[15].error == "the environment gave no answer within 10 s, after 0 control steps"
    assert (found[1].error, len(found[1].rewards)) == (None, STEPS)


def test_an_environment_that_fails_in_a_simulated_world_costs_only_its_own_episode(tmp_path: Path) -> None:
    torch.manual_seed(0)
    policy = small_policy(observation={"state": (5,)})
    latency = SimulatedLatency.parse("none")
    episodes = run_with_latency(policy, "ours", lambda clock: Crashing(tmp_path, {}), [13, 14, 16, 1], latency)
    found = {episode.seed: episode for episode, _ in episodes}
    assert found[13].error == ERRORS[13].replace("4 control", "5 control")  # step by step, not chunk by chunk
    assert found[14].error == ERRORS[14].replace("0 control", "1 control")
    assert found[16].error == ERRORS[16]
    assert (found[1].error, found[1].success, len(found[1].rewards)) == (None, True, STEPS)


def test_errors_of_a_worker_process_that_cannot_begin_are_raised() -> None:
    worker = ProcessEnv(partial(make_env, "pusht", small_spec()))
    worker.submit(reset, 0, False)
    with pytest.raises(ValueError, match="the policy observes"):
        worker.receive()
    worker.close()


def test_an_episode_that_was_given_up_is_reported(tmp_path: Path) -> None:
    given_up = EpisodeRecord(7, error="the process of its environment ended with exit code 3")
    summary = summarize_episodes([EpisodeRecord(6, [1.0], True, [5], [5]), given_up], 1.0, [])
    assert summary["success_rate"] == 0.5
    assert summary["per_episode"][1]["error"] == given_up.error
    assert "error" not in summary["per_episode"][0]
    folder = RunFolder(tmp_path, {"config": {}})
    folder.save_episode("ddim", given_up, episode_row(0, given_up), observations=True)
    assert folder.load_episodes("ddim")[0][0] == given_up
