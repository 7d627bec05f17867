"""The live view: what it keeps, and where it draws."""

from pathlib import Path

import gymnasium
import numpy as np
import pytest

import parapolicy
from envs import make_env
from envs.inference_delay import InferenceDelay
from parapolicy.control import SimulatedClock
from parapolicy.evaluate.run.simulated_latency import SimulatedLatency, run_with_latency
from parapolicy.evaluate.run.watch import View
from parapolicy.spec import Feature
from tests.helpers import DDPM_CONFIG, small_policy, small_spec

rerun = pytest.importorskip("rerun", reason="rerun-sdk is not installed")


def test_a_run_is_kept_with_scene_chunk_and_costs(shipped: parapolicy.Policy, tmp_path: Path) -> None:
    path = tmp_path / "run.rrd"
    policy = shipped.with_schedule("ddim", 2).with_sampler("sequential")

    def build(clock: SimulatedClock) -> gymnasium.Env:
        env = make_env("pusht", policy.spec, max_episode_steps=10, render_size=96)
        return InferenceDelay(env, clock, policy.spec.control_hz)

    view = View(str(path))
    list(run_with_latency(policy, "ddim", build, [100_000], SimulatedLatency.parse("none"), view=view))
    rerun.disconnect()
    data = path.read_bytes()
    assert len(data) > 10_000
    for entity in (b"/scene/chunk", b"/scene/executed", b"/latency/chunk", b"/rounds/chunk", b"/reward/step"):
        assert entity in data
    assert b"/cameras" not in data  # the policy observes no images


def recorded_pictures(path: Path, camera: str) -> list[np.ndarray]:
    """The images (H, W, 3) that a recording has of a camera, in the order of their times."""
    from rerun.chunk import RrdReader

    pictures = []
    for chunk in RrdReader(path).stream().filter(content=rerun.new_entity_path(["cameras", camera])):
        for row in chunk.to_record_batch().to_pylist():
            (shape,), (pixels,) = row["Image:format"], row["Image:buffer"]
            assert shape["color_model"] == rerun.ColorModel.RGB.value
            picture = np.array(pixels, np.uint8).reshape(shape["height"], shape["width"], 3)
            pictures.append((row["time"], picture))
    return [picture for _, picture in sorted(pictures, key=lambda pair: pair[0])]


def test_the_frames_of_each_chunk_are_shown(tmp_path: Path) -> None:
    """Of the chunk that is executed, not of the next one, which is computed meanwhile."""
    camera = {"width": 16, "levels": 1, "keypoints": 4, "features": 4}
    policy = small_policy(
        observation={"image": Feature((96, 96, 3), "image"), "agent_pos": (2,)},
        network={"name": "unet1d", "down_dims": [16], "n_groups": 4, "encoder": {"cameras": {"image": camera}}},
        scheduler={**DDPM_CONFIG, "num_train_timesteps": 3},
    )

    def build(clock: SimulatedClock) -> gymnasium.Env:
        env = make_env("pusht", policy.spec, max_episode_steps=10)
        return InferenceDelay(env, clock, policy.spec.control_hz)

    path, rows = tmp_path / "run.rrd", []
    view, latency = View(str(path), ["image"]), SimulatedLatency.parse("fixed:150ms")
    runs = run_with_latency(policy, "ddpm", build, [3], latency, asynchronous=True, log=rows.append, view=view)
    ((episode, _),) = runs
    rerun.disconnect()
    executed = list(dict.fromkeys(row["chunk"] for row in rows))
    assert 2 < len(executed) < len(episode.observations)
    expected = [np.hstack(list(episode.observations[chunk]["image"])) for chunk in executed]
    np.testing.assert_array_equal(recorded_pictures(path, "image"), expected)


def test_frames_of_floats_and_cameras_of_any_name_are_shown(tmp_path: Path) -> None:
    env = make_env("pusht", small_spec(observation={"state": (5,)}), render_size=96)
    env.reset(seed=3)
    controller = parapolicy.Controller(small_policy())
    features = controller.policy.spec.observation
    controller.act({key: np.zeros(feature.shape, np.float32) for key, feature in features.items()})
    path, key = tmp_path / "run.rrd", "wrist/left camera"
    frames = np.random.default_rng(0).integers(0, 256, (2, 4, 6, 3), np.uint8)
    view = View(str(path), [key])
    row = {"chunk": 0, "action": [1.0, 2.0], "computed_seconds": 0.1, "rounds": 7}
    view.step(env.unwrapped, controller, row, None, {key: np.moveaxis(frames, -1, 1).astype(np.float32) / 255})
    rerun.disconnect()
    np.testing.assert_array_equal(recorded_pictures(path, key), [np.hstack(list(frames))])


def test_every_chunk_is_shown_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also those whose first actions were dropped because their time had passed."""
    env = make_env("pusht", small_spec(observation={"state": (5,)}), render_size=96)
    env.reset(seed=3)
    view, shown = View(str(tmp_path / "run.rrd")), []
    monkeypatch.setattr(view._rr, "log", lambda path, value: shown.append(path))
    controller = parapolicy.Controller(small_policy())
    features = controller.policy.spec.observation
    controller.act({key: np.zeros(feature.shape, np.float32) for key, feature in features.items()})
    for _ in range(2):
        view.begin("secant", 0)
        for chunk, index in ((0, 0), (0, 1), (1, 2), (1, 3), (2, 2)):
            row = {"chunk": chunk, "index": index, "action": [1.0, 2.0], "computed_seconds": 0.1, "rounds": 7}
            view.step(env.unwrapped, controller, row, 0.5, {})
    assert shown.count("latency/chunk") == shown.count("rounds/chunk") == 6


def test_plans_are_shown_where_the_robot_will_be() -> None:
    env = make_env("pusht", small_spec(observation={"state": (5,)}), render_size=256)
    env.reset(seed=3)
    place = env.unwrapped.to_frame(np.array([[512.0, 128.0]]))
    np.testing.assert_array_equal(place, [[256.0, 64.0]])
    target = np.array([100.0, 400.0])
    for _ in range(30):
        env.step(target)
    x, y = env.unwrapped.to_frame(target[None])[0].astype(int)
    frame = env.render()
    assert (frame[y, x] != frame[5, 128]).any()  # the agent, not the background


def test_what_is_planned_runs_out() -> None:
    policy = small_policy()
    controller = parapolicy.Controller(policy)
    with pytest.raises(RuntimeError, match="call act first"):
        controller.planned()
    observation = {key: np.zeros(feature.shape, np.float32) for key, feature in policy.spec.observation.items()}
    lengths = []
    for _ in range(5):
        action = controller.act(observation)
        np.testing.assert_array_equal(controller.planned()[0], action)
        lengths.append(len(controller.planned()))
    assert lengths == [7, 6, 5, 4, 7]


def test_bad_targets_are_named() -> None:
    with pytest.raises(ValueError, match=r"watch is 'tv', expected web, spawn or a file name that ends in \.rrd"):
        View("tv")
