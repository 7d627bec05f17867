"""Meta-World: episodes by seed, held time, what does not fit, experts' demonstrations, the shipped policies."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from envs.inference_delay import InferenceDelay
from parapolicy.control import SimulatedClock
from parapolicy.evaluate.run.evaluation import evaluate
from parapolicy.evaluate.run.rollout import rollout
from parapolicy.train.data import read_hdf5
from tests.conftest import ROOT
from tests.helpers import configured, small_policy, small_spec

pytest.importorskip("metaworld", reason="metaworld is not installed: pip install 'parapolicy[tasks]'")

from envs import make_env
from tools import metaworld_experts as experts

OBSERVED = {"frame": (18,), "goal": (3,), "relative": (6,)}
SPEC = small_spec(observation=OBSERVED, action_dim=4, control_hz=80)
STATE_SPEC = small_spec(observation={"state": (39,)}, action_dim=4, control_hz=80)
TASKS = ("assembly", "peg_insert_side", "push_wall")


def play(env: Any, seed: int, steps: int = 12) -> list[np.ndarray]:
    """Observations of an episode with random actions."""
    rng = np.random.default_rng(seed)
    seen = [env.reset(seed=seed)[0]]
    seen += [env.step(rng.uniform(-1, 1, 4))[0] for _ in range(steps)]
    return [np.concatenate([step[key] for key in OBSERVED]) for step in seen]


@pytest.mark.parametrize("task", TASKS)
def test_a_seed_gives_the_episode(task: str) -> None:
    """Whatever was played before, in this environment or in another one."""
    env, other = make_env(f"metaworld_{task}", SPEC), make_env(f"metaworld_{task}", SPEC)
    first, second, again, elsewhere = play(env, 1), play(env, 2), play(env, 1), play(other, 1)
    np.testing.assert_array_equal(first, again)
    np.testing.assert_array_equal(first, elsewhere)
    assert np.abs(first[0] - second[0]).max() > 1e-3
    assert first[0][18:21].any()  # the goal is not hidden


def test_the_frame_before_and_the_goal_are_meta_worlds() -> None:
    env = make_env("metaworld", STATE_SPEC, task="push-wall-v3")
    before = env.reset(seed=3)[0]["state"]
    np.testing.assert_array_equal(before[:18], before[18:36])
    after = env.step(np.ones(4))[0]["state"]
    np.testing.assert_array_equal(env.unwrapped.hold(0.0)[0]["state"], after)  # no time, no frame
    np.testing.assert_array_equal(after[18:36], before[:18])
    np.testing.assert_array_equal(env.step(np.ones(4))[0]["state"][18:36], after[:18])
    np.testing.assert_array_equal(after[36:], before[36:])
    env = make_env("metaworld", SPEC, task="push-wall")
    given = env.reset(seed=3)[0]
    hand, puck = given["frame"][:3], given["frame"][4:7]
    np.testing.assert_allclose(given["relative"], [*(puck - hand), *(given["goal"] - puck)], atol=1e-6)


def test_results_do_not_depend_on_the_number_of_environments() -> None:
    policy = small_policy(observation=OBSERVED, action_dim=4, control_hz=80)

    def build() -> Any:
        return make_env("metaworld_push_wall", policy.spec, max_episode_steps=12)

    alone, together = (list(rollout(policy, build, [0, 1, 2], num_envs=number)) for number in (1, 3))
    assert [len(episode.rewards) for episode in alone] == [12, 12, 12]
    for one, other in zip(alone, together, strict=True):
        assert (one.seed, one.rewards, one.success) == (other.seed, other.rewards, other.success)


def test_holding_counts_and_keeps_the_target() -> None:
    env = make_env("metaworld_push_wall", SPEC, max_episode_steps=53)
    env.reset(seed=0)
    for _ in range(20):
        moving = env.step([1, 0, 0, -1])[0]["frame"]
    hold = env.unwrapped.hold
    still = hold(0.255)[0]["frame"]  # 20 steps; 0.005 s are carried on
    near = hold(0.15)[0]["frame"]  # 12
    assert still[0] > moving[0] + 0.005  # the hand reaches its target, and stays
    np.testing.assert_allclose(near[:3], still[:3], atol=2e-3)
    assert [hold(seconds)[3] for seconds in (0.005, 0.002, 0.001)] == [False, False, True]
    clock = SimulatedClock(lambda measured: 0.05)  # four control steps
    delayed = InferenceDelay(make_env("metaworld_push_wall", SPEC, max_episode_steps=10), clock, 80)
    delayed.reset(seed=0)
    ends = []
    for _ in range(2):
        clock.compute(lambda: None)
        ends.append(delayed.step(np.zeros(4))[3])
    assert ends == [False, True]


def test_what_does_not_fit_is_named() -> None:
    with pytest.raises(ValueError, match=r"task is 'juggling', expected one of \['assembly', 'basketball'"):
        make_env("metaworld", SPEC, task="juggling")
    with pytest.raises(ValueError, match=r"observes 'object' with shape \(14,\); assembly gives .*'frame': \(18,\)"):
        make_env("metaworld_assembly", small_spec(observation={"object": (14,)}, action_dim=4))
    with pytest.raises(ValueError, match="action_dim is 7; assembly takes 4: x, y, z, gripper"):
        make_env("metaworld_assembly", small_spec(observation=OBSERVED, action_dim=7))
    env = make_env("metaworld_assembly", SPEC)
    env.reset(seed=0)
    for action in (np.zeros(3), [0.0, 0.0, np.nan, 0.0]):
        with pytest.raises(ValueError, match="expected 4 finite numbers"):
            env.step(action)
    with pytest.raises(RuntimeError, match="has no renderer"):
        env.render()
    with pytest.raises(ValueError, match=r"task is 'hammer', expected one of \['assembly'"):
        experts.make_expert_env("hammer")


FRAMES = """
import numpy as np
from tests.helpers import small_spec
from envs import make_env
spec = small_spec(observation={"frame": (18,)}, action_dim=4)
envs = [make_env("metaworld_push_wall", spec, render_size=64) for _ in range(2)]
for seed, env in enumerate(envs):
    env.reset(seed=seed)
first, second, again = envs[0].render(), envs[1].render(), envs[0].render()
assert (first.shape, first.dtype) == ((64, 64, 3), np.uint8)
np.testing.assert_array_equal(first, again)
assert np.abs(first.astype(int) - second).max() > 50  # the puck stands elsewhere
assert first[:5].std() < first[-20:].std()  # the room above, the scene below
kitchen = make_env("kitchen", small_spec(observation={"positions": (30,)}, action_dim=9), render_size=64)
kitchen.reset(seed=0)
assert kitchen.render().std() > 10
for env in (*envs, kitchen):
    env.close()
"""


def test_frames_show_the_scene_of_their_own_environment() -> None:
    """Meta-World's and the kitchen's, in a process of their own: MuJoCo takes its GL library at its import."""
    pytest.importorskip("gymnasium_robotics", reason="not installed: pip install 'parapolicy[tasks]'")
    environment = {**os.environ, "MUJOCO_GL": "egl"}
    done = subprocess.run([sys.executable, "-c", FRAMES], cwd=ROOT, env=environment, capture_output=True, text=True)
    if "install EGL" in done.stderr:
        pytest.skip(done.stderr.strip().splitlines()[-1])
    assert (done.returncode, done.stderr) == (0, "")


def test_frames_without_a_renderer_name_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mujoco.Renderer", None)
    with pytest.raises(ValueError, match=r"render_size is 64, but there is no renderer .*packages libegl1 and"):
        make_env("metaworld_push_wall", SPEC, render_size=64)


@pytest.mark.parametrize("task", TASKS)
def test_demonstrations_are_trainable_and_succeed_again_open_loop(task: str, tmp_path: Path) -> None:
    path = tmp_path / "demonstrations.hdf5"
    attempts, lengths = experts.generate(task.replace("_", "-"), path, demonstrations=2)
    assert attempts <= 4
    assert all(50 < length < 300 for length in lengths)
    data = configured("train", f"data=metaworld_{task}").data
    read = read_hdf5(path, {key: value["array"] for key, value in {**data.observation, "action": data.action}.items()})
    assert read.episode_ends.tolist() == np.cumsum(lengths).tolist()
    assert {key: tuple(array.shape[1:]) for key, array in read.arrays.items()} == {**OBSERVED, "action": (4,)}
    env = make_env(data.env, SPEC)
    with h5py.File(path) as file:
        demo = file["data/demo_1"]
        assert np.abs(demo["actions"]).max() <= 1
        given = env.reset(seed=int(demo.attrs["seed"]))[0]
        for key in OBSERVED:
            np.testing.assert_array_equal(given[key], demo[f"obs/{key}"][0])
        results = [env.step(action) for action in demo["actions"][:]]
    ends = [result[2] for result in results]
    assert ends == [False] * (len(ends) - 1) + [True]
    assert [result[1] for result in results] == [float(end) for end in ends]
    assert results[-1][4] == {"is_success": True}


@pytest.mark.parametrize(("task", "along"), [("push-wall", 0.72), ("assembly", 0.68)])
def test_an_expert_has_several_ways(task: str, along: float) -> None:
    """From one initial state, the hand passes a line across the table far to the left or to the right."""
    env = experts.make_expert_env(task)
    passed: list[float] = []
    for draw in range(6):
        env.reset(seed=5)
        scene = experts.Scene(env)
        for target, gripper in experts.EXPERTS[task](scene, np.random.default_rng(draw)):
            env.step(np.append(np.clip(experts.GAIN * (target - scene.hand), -1, 1), gripper))
            if scene.hand[1] > along:
                passed.append(scene.hand[0])
                break
    assert len(passed) == 6
    assert max(passed) - min(passed) > 0.1


@pytest.mark.parametrize("task", [task for task in TASKS if (ROOT / "checkpoints" / f"metaworld_{task}").is_dir()])
def test_the_shipped_policy_succeeds(task: str, tmp_path: Path) -> None:
    config = configured("eval", f"env=metaworld_{task}", "episodes=4", "samplers=[collocation]", "latency_chunks=0")
    options = config.env.options
    results = evaluate(config, tmp_path, lambda spec, clock: make_env(config.env.name, spec, **options))
    assert results["samplers"]["collocation"]["success_rate"] >= 0.5
