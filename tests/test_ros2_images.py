"""A policy that observes a camera, from the fields of ROS messages through the node's loop, in one process."""

import numpy as np
import pytest

import parapolicy
from envs import make_env
from parapolicy.ros2.loop import ControlLoop
from parapolicy.ros2.messages import observed_value
from parapolicy.ros2.node_settings import (
    ARRAY,
    COMPRESSED,
    IMAGE,
    JOINT_STATE,
    ActionSettings,
    ControlSettings,
    NodeSettings,
    PolicySettings,
    SourceSettings,
    TimingSettings,
)
from tests.conftest import ROOT
from tests.test_ros2_messages import Compressed, Joints, Picture, encoded

SIZE, PADDING = 96, 5  # pixels; bytes at the end of each row, as drivers align them
STEPS = 10  # of two chunks


@pytest.fixture(scope="module")
def policy() -> parapolicy.Policy:
    """The shipped one that sees Push-T by a camera, with a short schedule."""
    loaded = parapolicy.load_policy(ROOT / "checkpoints" / "pusht_image", device="cpu", engine="eager")
    return loaded.with_schedule("ddim", 2).with_sampler("sequential")


def picture(pixels: np.ndarray, kind: str) -> Picture | Compressed:
    """A message of one frame (H, W, 3): raw in blue, green, red with padded rows, or a PNG."""
    if kind == COMPRESSED:
        return encoded(pixels)
    rows = np.pad(pixels[..., ::-1].reshape(SIZE, -1), ((0, 0), (0, PADDING)), constant_values=255)
    return Picture(SIZE, SIZE, rows.shape[1], "bgr8", rows.tobytes())


@pytest.mark.parametrize("kind", [IMAGE, COMPRESSED])
def test_push_t_from_pixels_over_messages_is_as_in_one_process(kind: str, policy: parapolicy.Policy) -> None:
    settings = NodeSettings(
        PolicySettings("here"),
        {"image": SourceSettings("/camera", kind), "agent_pos": SourceSettings("/q", JOINT_STATE, names=["x", "y"])},
        [ActionSettings("/target", ARRAY)],
        ControlSettings(asynchronous=False),
        TimingSettings(tolerance_ms=20.0, timeout_ms=400.0),
    )
    settings.check(policy.spec)
    now, sent = 1_000.0, []
    controller = parapolicy.Controller(policy, clock=lambda: now)
    loop = ControlLoop(controller, settings, sent.append, lambda: now, lambda: now)
    loop.activate()
    alone = parapolicy.Controller(policy, clock=lambda: now)
    env = make_env("pusht", policy.spec)
    observation, _ = env.reset(seed=100_000)
    for step in range(STEPS):
        messages = {
            "image": picture(observation["image"], kind),
            "agent_pos": Joints(["y", "x"], observation["agent_pos"][::-1].tolist()),
        }
        for key, message in messages.items():
            value = observed_value(message, settings.sources[key], policy.spec.observation[key])
            assert value.dtype == observation[key].dtype  # frames stay uint8
            np.testing.assert_array_equal(value, observation[key])
            loop.receive(key, now, value)
        while loop.step() == 0.0:
            pass
        assert len(sent) == step + 1
        np.testing.assert_array_equal(sent[-1][0], alone.act(observation))
        observation, *_ = env.step(sent[-1][0])
        now += 0.1
    assert controller.record.rounds == alone.record.rounds
    assert sum(controller.record.rounds.values()) == 2
    mirrored = {**observation, "image": observation["image"][:, ::-1]}
    alone.reset()
    turned = alone.act(mirrored)
    alone.reset()
    assert abs(turned - alone.act(observation)).max() > 1.0  # pixel: the frame matters
