"""Policies of other programs in the simulators: their names of observations, vectors of several, unknown rates."""

from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

import parapolicy
from envs import ENVS, make_env
from envs.pusht import LEROBOT, OBSERVATIONS
from parapolicy.evaluate.run.evaluation import evaluate
from parapolicy.spec import PolicySpec
from tests.conftest import ROOT
from tests.helpers import configured, needs, small_policy, small_spec
from tests.oracles import oracle_folder

REAL = "real-stanford/diffusion_policy"


def joined(length: int, parts: Any, **changes: Any) -> PolicySpec:
    return small_spec(observation={"obs": (length,)}, provenance={"format": REAL, "obs": parts}, **changes)


def test_lerobot_s_names_are_push_ts_observations() -> None:
    shapes = {name: OBSERVATIONS[name] for name in LEROBOT.values()}
    ours = make_env("pusht", small_spec(observation=shapes))
    theirs = make_env("pusht", small_spec(observation={key: OBSERVATIONS[name] for key, name in LEROBOT.items()}))
    for env in (ours, theirs):
        env.reset(seed=3)
    for action in ([100.0, 200.0], [300.0, 250.0]):
        observed, expected = theirs.step(action)[0], ours.step(action)[0]
        assert theirs.observation_space.contains(observed)
        for key, name in LEROBOT.items():
            np.testing.assert_array_equal(observed[key], expected[name])


def test_real_stanford_s_vector_is_what_its_file_says() -> None:
    parts = make_env("pusht", small_spec(observation={"keypoint": (9, 2), "agent_pos": (2,)}))
    whole = make_env("pusht", joined(20, ["keypoint", "agent_pos"]))
    expected, observed = parts.reset(seed=3)[0], whole.reset(seed=3)[0]
    assert whole.observation_space.contains(observed)
    np.testing.assert_array_equal(observed["obs"], np.append(expected["keypoint"], expected["agent_pos"]))
    turned = make_env("pusht", joined(20, ["agent_pos", "keypoint"])).reset(seed=3)[0]
    np.testing.assert_array_equal(turned["obs"], np.append(expected["agent_pos"], expected["keypoint"]))


@pytest.mark.parametrize(
    ("length", "parts", "message"),
    [
        (20, None, "its checkpoint does not say of what it consists"),
        (20, ["keypoint", "speed"], r"of which \['speed'\] are not among"),
        (19, ["keypoint", "agent_pos"], r"observes 'obs' with shape \(19,\), expected one of .*'obs': \(20,\)"),
    ],
)
def test_a_vector_that_cannot_be_trusted_is_refused(length: int, parts: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_env("pusht", joined(length, parts))


@needs("robosuite")
def test_robomimic_s_observations_are_joined_in_the_file_s_order() -> None:
    shapes = {"object": (10,), "robot0_eef_pos": (3,), "robot0_eef_quat": (4,), "robot0_gripper_qpos": (2,)}
    parts = make_env("lift", small_spec(observation=shapes, action_dim=7))
    whole = make_env("lift", joined(19, [*shapes], action_dim=7))
    expected, observed = parts.reset(seed=3)[0], whole.reset(seed=3)[0]
    np.testing.assert_array_equal(observed["obs"], np.concatenate([expected[key] for key in shapes]))
    with pytest.raises(ValueError, match=r"\['obj'\] are not among"):
        make_env("lift", joined(19, ["obj"], action_dim=7))


def test_every_environment_s_rate_is_in_its_configuration() -> None:
    for path in (ROOT / "conf" / "env").glob("*.yaml"):
        module, name, _ = ENVS[path.stem]
        rate = getattr(import_module(module, "envs"), name).metadata["render_fps"]
        assert yaml.safe_load(path.read_text())["control_hz"] == rate, path.stem


@pytest.mark.parametrize("file", ["unet_lowdim_pusht.ckpt", "transformer_lowdim_pusht.ckpt"])
def test_a_published_file_runs_in_push_t(file: str, tmp_path: Path) -> None:
    checkpoint = oracle_folder("real-stanford") / file
    results = evaluated(checkpoint, tmp_path)
    assert len(results["samplers"]["sequential"]["per_episode"]) == 1
    assert parapolicy.load_policy(checkpoint, engine="eager").spec.provenance["obs"] == ["keypoint", "agent_pos"]


def test_a_policy_of_unknown_rate_has_the_environment_s(tmp_path: Path) -> None:
    """Videos and simulated latency need a rate."""
    policy = small_policy(observation={"state": (5,)}, control_hz=None)
    parapolicy.save_policy(policy, tmp_path / "policy")
    evaluated(tmp_path / "policy", tmp_path / "run", videos=1)
    assert [path.name for path in (tmp_path / "run" / "videos").iterdir()] == ["sequential_100000.mp4"]


def evaluated(checkpoint: Path, folder: Path, videos: int = 0) -> dict[str, Any]:
    run = ["samplers=[sequential]", "episodes=1", "latency_chunks=0", f"videos={videos}", "engine=eager"]
    config = configured("eval", f"checkpoint={checkpoint}", *run, "env.options.max_episode_steps=10")
    return evaluate(config, folder, lambda spec, clock: make_env("pusht", spec, max_episode_steps=10))
