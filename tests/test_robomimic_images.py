"""Robomimic from pixels: the pictures that robomimic itself observes, and policies that see in closed loop."""

import gc
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import gymnasium
import numpy as np
import pytest

import parapolicy
from envs import make_env
from envs.robosuite_simulator import default_arguments, placement_samplers, use_renderer
from parapolicy.digest import digest
from parapolicy.evaluate.run.evaluation import evaluate
from parapolicy.evaluate.run.rollout import EpisodeRecord, rollout
from parapolicy.spec import Feature
from tests.helpers import configured, small_policy, small_spec
from tests.test_robomimic_pth import low_dim, random_weights, save

CAMERAS = ["agentview", "robot0_eye_in_hand"]
PICTURES = [f"{camera}_image" for camera in CAMERAS]
# In robomimic's order of a checkpoint, which is the alphabet's.
OBSERVATION = {
    PICTURES[0]: Feature((84, 84, 3), "image"),
    "robot0_eef_pos": Feature((3,)),
    "robot0_eef_quat": Feature((4,)),
    PICTURES[1]: Feature((84, 84, 3), "image"),
    "robot0_gripper_qpos": Feature((2,)),
}
CAMERA = {"width": 16, "levels": 2, "keypoints": 8, "features": 6}
NETWORK = {"name": "unet1d", "down_dims": [16], "encoder": {"cameras": dict.fromkeys(PICTURES, CAMERA)}}
SETTINGS = {"observation": OBSERVATION, "action_dim": 7, "control_hz": 20, "network": NETWORK}


class Kept(gymnasium.Wrapper):
    """An environment that stays open for the next test: making one takes seconds."""

    def close(self) -> None:
        pass


@pytest.fixture(scope="module")
def envs() -> Iterator[list[gymnasium.Env]]:
    """Two of Lift in this process, each with a renderer of its own."""
    pytest.importorskip("robosuite", reason="robosuite is not installed: pip install 'parapolicy[robomimic]'")
    try:
        made = [make_env("lift_image", small_spec(**SETTINGS), max_episode_steps=5, render_size=64) for _ in range(2)]
    except ValueError as error:
        if "install EGL" not in str(error):
            raise
        pytest.skip(f"no offscreen renderer here: {error}")
    yield [Kept(env) for env in made]
    for env in made:
        env.close()


def test_the_cube_is_in_the_pictures_where_the_cameras_see_it(envs: list[gymnasium.Env]) -> None:
    """Which camera, which way up, red, green, blue, and of which moment: by the cameras' geometry alone."""
    from robosuite.utils.camera_utils import get_camera_transform_matrix, project_points_from_world_to_camera

    for env, seed in zip(envs, (1, 2), strict=True):
        observation, _ = env.reset(seed=seed)
        simulator = env.unwrapped._simulator
        cube = simulator.sim.data.body_xpos[simulator.cube_body_id]
        for camera in CAMERAS:
            picture = observation[f"{camera}_image"]
            assert (picture.dtype, picture.shape) == (np.uint8, (84, 84, 3))
            seen = get_camera_transform_matrix(simulator.sim, camera, 84, 84)
            expected = project_points_from_world_to_camera(cube[None], seen, 84, 84)[0]
            red, green, blue = picture.astype(int).transpose(2, 0, 1)
            found = np.argwhere(red > 2 * np.maximum(green, blue)).mean(0)
            assert np.abs(found - expected).max() < 3, (camera, found, expected)


def test_pictures_do_not_change_when_another_renderer_is_freed(envs: list[gymnasium.Env]) -> None:
    first, other = envs

    def shoot(env: gymnasium.Env, seed: int) -> list[np.ndarray]:
        observation, _ = env.reset(seed=seed)
        return [*(observation[key] for key in PICTURES), env.render()]

    frames = shoot(first, 1), shoot(other, 2)
    assert all((one != two).any() and one.std() > 20 for one, two in zip(*frames, strict=True))
    shoot(first, 3)  # frees the renderer of the episode before
    gc.collect()
    np.testing.assert_array_equal(other.render(), frames[1][2])
    for again, before in zip(shoot(first, 1), frames[0], strict=True):
        np.testing.assert_array_equal(again, before)


def test_episodes_do_not_depend_on_the_number_of_environments_or_on_processes(envs: list[gymnasium.Env]) -> None:
    policy = small_policy(**SETTINGS)

    def run(build: object, num_envs: int, processes: bool) -> dict[int, EpisodeRecord]:
        episodes = rollout(policy, build, [1, 2], num_envs=num_envs, processes=processes)
        return {episode.seed: episode for episode in episodes}

    both = run(iter(envs).__next__, 2, False)
    one = run(partial(make_env, "lift_image", policy.spec, max_episode_steps=5), 1, True)
    for seed, episode in both.items():
        assert len(episode.observations) == 2
        assert digest(episode.observations) == digest(one[seed].observations)
    assert digest(both[1].observations) != digest(both[2].observations)


def robomimic_checkpoint(path: Path) -> Path:
    """A robomimic checkpoint of random weights that observes what Lift gives."""
    cameras = {"norm": "group", "crop": [33, 36], "keypoints": 4, "features": 6}
    encoder = {"cameras": dict.fromkeys(PICTURES, cameras)}
    payload = low_dim()
    weights = random_weights(OBSERVATION, encoder, 7)
    for short, key in zip(("front", "hand"), PICTURES, strict=True):
        weights = {name.replace(f"obs_nets.{short}.", f"obs_nets.{key}."): value for name, value in weights.items()}
    payload["model"] |= {"nets": {}, "ema": weights}
    shapes = {key: [84, 84, 3][::-1] if key in PICTURES else [*value.shape] for key, value in OBSERVATION.items()}
    payload["shape_metadata"] = {"ac_dim": 7, "all_shapes": shapes}
    payload["env_metadata"]["env_kwargs"]["control_freq"] = 20
    payload["action_normalization_stats"] = {"actions": {"scale": [[1.0] * 7], "offset": [[0.0] * 7]}}
    observation = payload["config"]["observation"]
    observation["modalities"]["obs"] |= {"low_dim": [key for key in shapes if key not in PICTURES], "rgb": PICTURES}
    return save(payload, path)


@pytest.mark.parametrize("kind", ["own", "robomimic"])
def test_a_policy_that_sees_is_evaluated(envs: list[gymnasium.Env], tmp_path: Path, kind: str) -> None:
    checkpoint = tmp_path / "policy"
    if kind == "own":
        parapolicy.save_policy(small_policy(**SETTINGS), checkpoint)
    else:
        checkpoint = robomimic_checkpoint(tmp_path / "model.pth")
    config = configured(
        "eval", "env=lift_image", f"checkpoint={checkpoint}", "episodes=1", "samplers=[sequential]", "latency_chunks=1"
    )
    assert (config.env.name, config.env.options.max_episode_steps) == ("lift_image", 400)
    results = evaluate(config, tmp_path / "run", lambda spec, clock: envs[0])
    assert results["samplers"]["sequential"]["success_rate"] == 0.0
    assert results["episodes"] == 1


def test_cameras_that_are_not_there_are_named(envs: list[gymnasium.Env]) -> None:
    for key, message in {
        "agentview": r"observes the images \['agentview'\], expected CAMERA_image for lift",
        "hand_image": r"observes the cameras \['hand'\], expected some of \['frontview', .*\] for Lift",
    }.items():
        with pytest.raises(ValueError, match=message):
            make_env("lift", small_spec(observation={key: Feature((84, 84, 3), "image")}, action_dim=7))


def test_observations_are_those_of_robomimic(envs: list[gymnasium.Env]) -> None:
    """robomimic's own environment from the same random numbers: equal pictures and numbers, at rest and in motion."""
    reason = "robomimic 0.5 is not installed (see docs/robomimic.md)"
    wrapper = pytest.importorskip("robomimic.envs.env_robosuite", reason=reason, exc_type=ImportError)
    pytest.importorskip("egl_probe", reason=reason)
    from robomimic.utils.obs_utils import initialize_obs_utils_with_obs_specs

    initialize_obs_utils_with_obs_specs({"obs": {"rgb": PICTURES, "low_dim": [*OBSERVATION.keys() - set(PICTURES)]}})
    theirs = wrapper.EnvRobosuite(
        "Lift",
        use_image_obs=True,
        camera_names=CAMERAS,
        camera_heights=84,
        camera_widths=84,
        reward_shaping=False,
        **default_arguments(1),
    )
    ours = envs[0]
    observation, _ = ours.reset(seed=3)
    theirs.env.rng = np.random.default_rng(3)
    for sampler in placement_samplers(theirs.env.placement_initializer):
        sampler.rng = theirs.env.rng
    theirs.reset()
    # robosuite draws once per control step, sooner in the step with each forced update before: ours makes two more.
    theirs.get_observation()
    pairs = [(observation, theirs.get_observation())]
    for action in np.random.default_rng(0).uniform(-1, 1, (4, 7)):
        observation = ours.step(action)[0]
        use_renderer(theirs.env)
        pairs.append((observation, theirs.step(action)[0]))
    for found, expected in pairs:
        for key in OBSERVATION:
            np.testing.assert_array_equal(found[key], expected[key].astype(found[key].dtype), err_msg=key)
