"""The Push-T environment against gym-pusht and against the recorded demonstrations."""

from pathlib import Path

import gym_pusht  # noqa: F401  registers the reference environment
import gymnasium
import numpy as np
import pytest
import zarr

from envs import make_env
from envs.pusht import OBSERVATIONS, PushT
from tests.helpers import small_spec

EVERYTHING = small_spec(observation=dict(OBSERVATIONS))


def test_observations_have_the_policys_keys_and_shapes() -> None:
    env = make_env("pusht", EVERYTHING)
    observation, _ = env.reset(seed=0)
    assert {key: value.shape for key, value in observation.items()} == dict(OBSERVATIONS)
    assert env.observation_space.contains(observation)
    assert observation["image"].dtype == np.uint8
    assert observation["image"].max() > 200
    np.testing.assert_array_equal(observation["state"][:2], observation["agent_pos"])
    low = make_env("pusht", small_spec(observation={"state": (5,)}))
    assert set(low.reset(seed=0)[0]) == {"state"}


@pytest.mark.parametrize("seed", [0, 7, 100_000, 100_049])
def test_episodes_are_gym_pushts(seed: int) -> None:
    """Same initial state per seed, same physics and rewards, same 300-step limit."""
    ours = make_env("pusht", small_spec(observation={"state": (5,), "environment_state": (16,)}))
    theirs = gymnasium.make("gym_pusht/PushT-v0", obs_type="state")
    observation, _ = ours.reset(seed=seed)
    expected, _ = theirs.reset(seed=seed)
    np.testing.assert_allclose(observation["state"], expected, rtol=1e-6)
    rng = np.random.default_rng(seed)
    for _ in range(20):
        action = rng.uniform(0, 512, 2).astype(np.float32)
        observation, reward, terminated, truncated, info = ours.step(action)
        expected, reward_there, terminated_there, _, info_there = theirs.step(action)
        np.testing.assert_allclose(observation["state"], expected, rtol=1e-5)
        assert reward == pytest.approx(reward_there)
        assert (terminated, truncated) == (terminated_there, False)
        assert info["coverage"] == pytest.approx(info_there["coverage"])


def test_time_limit() -> None:
    env = make_env("pusht", EVERYTHING, max_episode_steps=3)
    env.reset(seed=1)
    assert [env.step([256, 256])[3] for _ in range(3)] == [False, False, True]
    env.reset(seed=1)
    assert env.step([256, 256])[3] is False


def test_success_is_coverage_above_95_percent() -> None:
    env = make_env("pusht", EVERYTHING)
    env.reset(options={"state": [50.0, 50.0, 256.0, 256.0, np.pi / 4]})
    _, reward, terminated, _, info = env.step([50.0, 50.0])
    assert info["coverage"] > 0.95
    assert (reward, terminated, info["is_success"]) == (1.0, True, True)


def test_recorded_states_and_observations(demonstrations: Path) -> None:
    """A recorded state, set here, looks as recorded: keypoints, and the camera image."""
    root = zarr.open_group(str(demonstrations), mode="r")
    states, keypoints, images = root["data/state"], root["data/keypoint"], root["data/img"]
    env = make_env("pusht", EVERYTHING)
    for step in range(500, 25_000, 3500):
        observation, _ = env.reset(options={"state": states[step]})
        np.testing.assert_allclose(observation["state"], states[step], atol=0.05)
        np.testing.assert_allclose(observation["keypoint"], keypoints[step], atol=0.05)
        # Where the block's edge falls between two pixels, it may be drawn on the other one.
        difference = np.abs(observation["image"] - images[step])
        assert difference.mean() < 0.2
        assert (difference.max(-1) > 40).mean() < 0.005
        assert np.abs(observation["image"][..., ::-1] - images[step]).mean() > 1  # red and blue are not exchanged


def test_a_state_set_does_not_depend_on_what_came_before() -> None:
    env = make_env("pusht", small_spec(observation={"state": (5,)}))
    touching = {"state": [250.0, 240.0, 256.0, 256.0, 0.5]}
    seen = []
    for seed in range(40):
        env.reset(seed=seed)
        env.step([256.0, 256.0])
        seen.append(env.reset(options=touching)[0]["state"])
        seen.append(env.step([300.0, 300.0])[0]["state"])
    np.testing.assert_array_equal(seen[0::2], np.broadcast_to(seen[0], (40, 5)))
    np.testing.assert_array_equal(seen[1::2], np.broadcast_to(seen[1], (40, 5)))


def test_replayed_demonstrations_score_as_published(demonstrations: Path) -> None:
    """Open loop, 40 episodes: a mean maximum reward of 0.93 or more; position before angle would spoil it."""
    root = zarr.open_group(str(demonstrations), mode="r")
    states, actions, ends = root["data/state"][:], root["data/action"][:], root["meta/episode_ends"][:40]
    env = make_env("pusht", small_spec(observation={"state": (5,)}))
    best = []
    for start, end in zip([0, *ends[:-1]], ends, strict=True):
        env.reset(options={"state": states[start]})
        best.append(max(env.step(action)[1] for action in actions[start:end]))
    assert 0.93 <= np.mean(best) <= 1.0


def test_render_is_a_frame() -> None:
    env = make_env("pusht", EVERYTHING, render_size=128)
    env.reset(seed=0)
    env.step([100, 100])
    frame = env.render()
    assert frame.shape == (128, 128, 3)
    assert frame.dtype == np.uint8


def test_bad_requests_are_named() -> None:
    with pytest.raises(ValueError, match="env is 'pushx', expected one of"):
        make_env("pushx", EVERYTHING)
    with pytest.raises(ValueError, match="observes 'joints' with shape"):
        PushT(small_spec(observation={"joints": (7,)}))
    with pytest.raises(ValueError, match=r"observes 'state' with shape \(6,\)"):
        PushT(small_spec(observation={"state": (6,)}))
    with pytest.raises(ValueError, match="action_dim is 7"):
        PushT(small_spec(observation={"state": (5,)}, action_dim=7))
    with pytest.raises(ValueError, match="render_size is 64"):
        PushT(EVERYTHING, render_size=64)
    env = PushT(EVERYTHING)
    env.reset(seed=0)
    for action in ([1, 2, 3], [np.nan, 0]):
        with pytest.raises(ValueError, match="expected two finite numbers"):
            env.step(action)
    with pytest.raises(ValueError, match="expected five finite numbers"):
        env.reset(options={"state": [1, 2]})
