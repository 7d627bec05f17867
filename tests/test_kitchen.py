"""Franka Kitchen: episodes by seed, rewards by subtask, what does not fit, the expert's demonstrations."""

from pathlib import Path

import h5py
import numpy as np
import pytest

from envs import make_env
from parapolicy.train.data import read_hdf5
from tests.helpers import configured, small_spec

pytest.importorskip("gymnasium_robotics", reason="not installed: pip install 'parapolicy[tasks]'")

from envs.kitchen import SUBTASKS
from tools import kitchen_expert as expert

SPEC = small_spec(observation={"positions": (30,), "state": (59,)}, action_dim=9, control_hz=12.5)


def play(env, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    seen = [env.reset(seed=seed)[0]["state"]]
    return np.array(seen + [env.step(rng.uniform(-1, 1, 9))[0]["state"] for _ in range(6)])


def test_a_seed_gives_the_episode() -> None:
    env, other = make_env("kitchen", SPEC), make_env("kitchen", SPEC)
    first, second, again, elsewhere = play(env, 1), play(env, 2), play(env, 1), play(other, 1)
    np.testing.assert_array_equal(first, again)
    np.testing.assert_array_equal(first, elsewhere)
    assert 1e-5 < np.abs(first[0] - second[0]).max() < 0.1  # noise of the sensors
    unseeded = [env.reset()[0]["state"] for _ in range(2)]
    assert np.abs(unseeded[0] - unseeded[1]).max() > 1e-5


def test_positions_are_those_of_the_state_and_holding_counts() -> None:
    env = make_env("kitchen", SPEC, max_episode_steps=20)
    given = env.reset(seed=0)[0]
    np.testing.assert_array_equal(given["positions"], np.concatenate([given["state"][:9], given["state"][18:39]]))
    env.step([1.0, *[0.0] * 8])
    hold = env.unwrapped.hold
    begin = hold(0.8)[0]["positions"][:7]  # ten control steps
    np.testing.assert_allclose(hold(0.4)[0]["positions"][:7], begin, atol=0.1)  # but for gravity
    assert [hold(seconds)[3] for seconds in (0.2, 0.05, 0.075)] == [False, False, True]  # 2.5, 0.6 and 0.9 steps


def test_the_expert_s_demonstrations_are_trainable_and_succeed_again_open_loop(tmp_path: Path) -> None:
    path = tmp_path / "kitchen.hdf5"
    attempts, lengths = expert.generate("kitchen", path, demonstrations=2)
    assert attempts <= 8
    assert all(150 < length <= 280 for length in lengths)
    data = configured("train", "data=kitchen").data
    sources = {key: value["array"] for key, value in {**data.observation, "action": data.action}.items()}
    assert read_hdf5(path, sources).episode_ends.tolist() == np.cumsum(lengths).tolist()
    env = make_env(data.env, small_spec(observation={"positions": (30,)}, action_dim=9))
    orders = []
    with h5py.File(path) as file:
        for demo in file["data"].values():
            given = env.reset(seed=int(demo.attrs["seed"]))[0]
            np.testing.assert_array_equal(given["positions"], demo["obs/positions"][0])
            results = [env.step(action) for action in demo["actions"][:]]
            rewards = [result[1] for result in results]
            assert sorted(set(rewards)) == [0.0, 0.25, 0.5, 0.75, 1.0]
            assert rewards == sorted(rewards)
            assert [result[2] for result in results] == [False] * (len(results) - 1) + [True]
            assert results[-1][4] == {"is_success": True}
            orders.append(env.unwrapped.done)
    assert all(sorted(order) == sorted(SUBTASKS) for order in orders)
    assert orders[0] != orders[1]


def test_what_does_not_fit_is_named() -> None:
    with pytest.raises(ValueError, match=r"observes 'object' with shape \(14,\); kitchen gives .*'state': \(59,\)"):
        make_env("kitchen", small_spec(observation={"object": (14,)}, action_dim=9))
    with pytest.raises(ValueError, match="action_dim is 7; kitchen takes 9: joint 1"):
        make_env("kitchen", small_spec(observation={"state": (59,)}, action_dim=7))
    env = make_env("kitchen", SPEC)
    env.reset(seed=0)
    with pytest.raises(ValueError, match="expected 9 finite numbers"):
        env.step(np.full(9, np.inf))
    with pytest.raises(RuntimeError, match="has no renderer"):
        env.render()
