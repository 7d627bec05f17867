"""Robomimic: the reader on files of its layout, the environments on robosuite where it is installed."""

import json
import os
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest

from envs import make_env
from envs.inference_delay import InferenceDelay
from parapolicy.control import SimulatedClock
from parapolicy.errors import DataError
from parapolicy.evaluate.run.evaluation import evaluate
from parapolicy.evaluate.run.rollout import rollout
from parapolicy.train.data import read_hdf5
from tests.conftest import ROOT
from tests.helpers import configured, small_policy, small_spec
from tools.absolute_actions import convert

LIFT = {"object": (10,), "robot0_eef_pos": (3,), "robot0_eef_quat": (4,), "robot0_gripper_qpos": (2,)}
SOURCES = {"action": {"array": "actions"}, "object": {"array": "obs/object", "columns": [0, 2]}}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Three demonstrations of 4, 5 and 11 steps; the first two are for training."""
    path = tmp_path / "demo.hdf5"
    rng = np.random.default_rng(0)
    with h5py.File(path, "w") as root:
        for number, steps in ((0, 4), (2, 5), (10, 11)):
            root[f"data/demo_{number}/actions"] = rng.uniform(-1, 1, (steps, 7))
            root[f"data/demo_{number}/obs/object"] = np.full((steps, 3), number) + np.arange(3)
        root["mask/train"] = np.array([b"demo_0", b"demo_2"])
    return path


def test_demonstrations_are_read_in_order(file: Path) -> None:
    read = read_hdf5(file, SOURCES)
    assert read.episode_ends.tolist() == [4, 9, 20]
    assert read.arrays["action"].shape == (20, 7)
    assert read.arrays["object"][[0, 4, 9]].tolist() == [[0, 2], [2, 4], [10, 12]]
    assert read_hdf5(file, SOURCES, mask="train").episode_ends.tolist() == [4, 9]


def test_bad_files_are_named(file: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no data set at"):
        read_hdf5(tmp_path / "nowhere.hdf5", SOURCES)
    with pytest.raises(DataError, match="lacks a requested array"):
        read_hdf5(file, {"action": "actions", "camera": "obs/camera"})
    with pytest.raises(DataError, match="lacks a requested array"):
        read_hdf5(file, SOURCES, mask="valid")
    garbage = tmp_path / "garbage.hdf5"
    garbage.write_bytes(b"not HDF5 at all")
    with pytest.raises(DataError, match="lacks a requested array"):
        read_hdf5(garbage, SOURCES)
    with h5py.File(file, "a") as root:
        short = root["data/demo_10/obs/object"][:-1]
        del root["data/demo_10/obs/object"]
        root["data/demo_10/obs/object"] = short
    with pytest.raises(DataError, match="demo_10/obs/object has 10 steps for 11 actions"):
        read_hdf5(file, SOURCES)
    with h5py.File(file, "a") as root:
        root["data/demo_2/actions"][3, 1] = np.nan
    with pytest.raises(DataError, match="demo_2/actions"):
        read_hdf5(file, SOURCES)


@pytest.fixture(scope="module")
def demonstrations() -> Path:
    folder = Path(os.environ.get("PARAPOLICY_DEMONSTRATIONS", ROOT.parent / "shared" / "data"))
    path = (folder if folder.is_absolute() else ROOT / folder) / "robomimic" / "lift" / "ph" / "low_dim.hdf5"
    if not path.is_file():
        pytest.skip(f"no Lift demonstrations at {path}; set PARAPOLICY_DEMONSTRATIONS to the folder of robomimic/")
    return path


def test_the_published_lift_data_set_is_read(demonstrations: Path) -> None:
    data = configured("train", "data=lift").data
    sources = {key: {"array": value["array"]} for key, value in {**data.observation, "action": data.action}.items()}
    read = read_hdf5(demonstrations, sources)
    assert (len(read.episode_ends), int(read.episode_ends[-1])) == (200, 9666)
    assert {key: tuple(array.shape[1:]) for key, array in read.arrays.items()} == {**LIFT, "action": (7,)}
    assert len(read_hdf5(demonstrations, sources, "train").episode_ends) == 180


@pytest.fixture(scope="module")
def robosuite() -> None:
    pytest.importorskip("robosuite", reason="robosuite is not installed: pip install 'parapolicy[robomimic]'")


LIFT_SPEC = small_spec(observation=LIFT, action_dim=7, control_hz=20)
ABSOLUTE_SPEC = small_spec(observation=LIFT, action_dim=10, control_hz=20)


@pytest.mark.usefixtures("robosuite")
def test_demonstrations_replayed_open_loop_succeed(demonstrations: Path) -> None:
    """Ten of them, in an environment of the file's own arguments: 90 % or more; and the observations are theirs."""
    env = make_env("lift", LIFT_SPEC, dataset=str(demonstrations))
    successes = 0
    with h5py.File(demonstrations, "r") as root:
        for number in range(10):
            demo = root[f"data/demo_{number}"]
            observation, info = env.reset(options={"state": demo["states"][0]})
            assert not info["is_success"]
            for key in LIFT:
                np.testing.assert_allclose(observation[key], demo[f"obs/{key}"][0], atol=1e-5)
            terminated = False
            for action in demo["actions"][:]:
                if not terminated:
                    observation, reward, terminated, _, info = env.step(action)
                    assert reward == float(terminated) == float(info["is_success"])
            successes += terminated
    assert successes >= 9


@pytest.mark.usefixtures("robosuite")
def test_absolute_actions_replayed_open_loop_succeed(demonstrations: Path, tmp_path: Path) -> None:
    """Ten demonstrations, converted as a file, read as train.py reads it: 90 % or more."""
    part = tmp_path / "part.hdf5"
    with h5py.File(demonstrations, "r") as whole, h5py.File(part, "w") as few:
        few.create_group("data").attrs["env_args"] = whole["data"].attrs["env_args"]
        for number in range(10):
            whole.copy(whole[f"data/demo_{number}"], few["data"])
    assert convert(part, tmp_path / "absolute.hdf5") == 10
    data = configured("train", "data=lift_absolute").data
    read = read_hdf5(tmp_path / "absolute.hdf5", {"action": dict(data.action)})
    assert tuple(read.arrays["action"].shape[1:]) == tuple(data.action.shape)
    env = make_env("lift", ABSOLUTE_SPEC, dataset=str(part))
    successes, start = 0, 0
    with h5py.File(part, "r") as root:
        for number, end in enumerate(read.episode_ends):
            env.reset(options={"state": root[f"data/demo_{number}/states"][0]})
            successes += any(env.step(action)[2] for action in read.arrays["action"][start:end].numpy())
            start = end
    assert successes >= 9
    with pytest.raises(ValueError, match=r"absolute\.hdf5 exists"):
        convert(part, tmp_path / "absolute.hdf5")
    with h5py.File(part, "a") as root:
        del root["data/demo_4/states"]
    with pytest.raises(DataError, match="has no simulator states"):
        convert(part, tmp_path / "other.hdf5")
    with h5py.File(part, "a") as root:
        del root["data/demo_4"]
        root["data"].attrs["env_args"] = json.dumps({"env_name": "Door", "env_kwargs": {}})
    with pytest.raises(DataError, match="has the task 'Door', expected one of"):
        convert(part, tmp_path / "other.hdf5")
    (tmp_path / "garbage.hdf5").write_bytes(b"not HDF5 at all")
    with pytest.raises(DataError, match="is not a robomimic data set"):
        convert(tmp_path / "garbage.hdf5", tmp_path / "other.hdf5")


@pytest.mark.usefixtures("robosuite")
def test_an_absolute_target_is_kept() -> None:
    """The gripper stays after a reset, goes to a target 5 cm away while time passes, and takes no other width."""
    env = make_env("lift", ABSOLUTE_SPEC)
    begin = env.reset(seed=0)[0]["robot0_eef_pos"]
    robomimic = env.unwrapped
    np.testing.assert_allclose(robomimic.hold(0.5)[0]["robot0_eef_pos"], begin, atol=5e-3)
    target = robomimic._rest() + np.array([0, 0.05, *[0] * 8])
    near = env.step(target)[0]["robot0_eef_pos"]
    there = robomimic.hold(1.0)[0]["robot0_eef_pos"]
    assert np.linalg.norm(near - target[:3]) > 0.03
    np.testing.assert_allclose(there, target[:3], atol=5e-3)
    with pytest.raises(ValueError, match="expected 10 finite numbers"):
        env.step(np.zeros(7))


@pytest.mark.usefixtures("robosuite")
def test_a_seed_gives_the_initial_state() -> None:
    env, other = make_env("lift", LIFT_SPEC), make_env("lift", LIFT_SPEC)
    states = [env.reset(seed=seed)[0] for seed in (1, 2, 1)] + [other.reset(seed=1)[0]]
    for key in LIFT:
        np.testing.assert_array_equal(states[0][key], states[2][key])
        np.testing.assert_array_equal(states[0][key], states[3][key])
    assert np.abs(states[0]["object"][:2] - states[1]["object"][:2]).max() > 1e-3


@pytest.mark.usefixtures("robosuite")
def test_an_episode_ends_after_its_steps_and_holding_counts() -> None:
    env = make_env("lift", LIFT_SPEC, max_episode_steps=6)
    env.reset(seed=0)
    assert [env.step(np.zeros(7))[3] for _ in range(2)] == [False, False]
    assert not env.unwrapped.hold(0.12)[3]  # two control steps; 0.02 s are carried on
    assert env.unwrapped.hold(0.08)[3]
    clock = SimulatedClock(lambda measured: 0.1)
    delayed = InferenceDelay(make_env("lift", LIFT_SPEC, max_episode_steps=6), clock, 20)
    delayed.reset(seed=0)
    ends = []
    for _ in range(2):
        clock.compute(lambda: None)
        ends.append(delayed.step(np.zeros(7))[3])
    assert ends == [False, True]


@pytest.mark.usefixtures("robosuite")
def test_a_policy_runs_in_closed_loop() -> None:
    policy = small_policy(observation=LIFT, action_dim=7, control_hz=20)
    episodes = list(rollout(policy, lambda: make_env("lift", policy.spec, max_episode_steps=10), [0, 1], num_envs=2))
    assert [len(episode.rewards) for episode in episodes] == [10, 10]
    assert {episode.max_reward for episode in episodes} == {0.0}


@pytest.mark.usefixtures("robosuite")
def test_the_shipped_policy_is_evaluated_without_gl(tmp_path: Path) -> None:
    config = configured("eval", "env=lift", "episodes=1", "samplers=[secant]", "latency_chunks=1")
    options = config.env.options
    results = evaluate(config, tmp_path, lambda spec, clock: make_env("lift", spec, **options))
    assert results["samplers"]["secant"]["success_rate"] == 1.0


@pytest.mark.usefixtures("robosuite")
def test_what_does_not_fit_is_named(file: Path, demonstrations: Path) -> None:
    with pytest.raises(ValueError, match="observes 'object' with shape"):
        make_env("lift", small_spec(observation={"object": (9,)}, action_dim=7))
    env = make_env("lift", LIFT_SPEC)
    env.reset(seed=0)
    with pytest.raises(ValueError, match="expected 7 finite numbers"):
        env.step([0.0] * 6)
    with pytest.raises(ValueError, match="state has shape"):
        env.reset(options={"state": np.zeros(3)})
    with pytest.raises(RuntimeError, match="has no renderer"):
        env.render()
    with pytest.raises(DataError, match="is not a robomimic data set with env_args"):
        make_env("lift", LIFT_SPEC, dataset=str(file))
    square = small_spec(observation={"object": (14,)}, action_dim=7)
    with pytest.raises(DataError, match="has the task 'Lift', expected 'NutAssemblySquare'"):
        make_env("square", square, dataset=str(demonstrations))


@pytest.mark.usefixtures("robosuite")
@pytest.mark.parametrize(("task", "width"), [("can", 14), ("square", 14)])
def test_the_other_single_arm_tasks(task: str, width: int) -> None:
    spec = small_spec(observation={**LIFT, "object": (width,)}, action_dim=7)
    env = make_env(task, spec)
    first, second = (env.reset(seed=5)[0]["object"] for _ in range(2))
    np.testing.assert_array_equal(first, second)
    assert np.linalg.norm(first[:3]) > 0.1  # the object from the gripper: known from the first step on
    assert env.step(np.zeros(7))[1] == 0.0


@pytest.mark.usefixtures("robosuite")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # robosuite's half-made renderer
def test_frames_without_a_gl_library_name_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    for context in ("egl", "glfw", "osmesa"):
        monkeypatch.setitem(sys.modules, f"robosuite.renderers.context.{context}_context", None)
    with pytest.raises(ValueError, match=r"render_size is 96, but Lift could not .*packages libegl1 and"):
        make_env("lift", LIFT_SPEC, render_size=96)


def test_actions_of_another_width_are_refused() -> None:
    with pytest.raises(ValueError, match=r"action_dim is 2, lift expects 7 \(deltas\) or 10 \(absolute\)"):
        make_env("lift", small_spec(observation=LIFT))
    with pytest.raises(ValueError, match="env is 'door', expected one of"):
        make_env("door", small_spec())
