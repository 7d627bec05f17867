"""Push-T as a robot on ROS 2 topics, for ``parapolicy ros2 examples/ros2_pusht.yaml``.

    python -m examples.ros2_robot [episodes=1] [hz=10] [steps=300] [wait=true] [seed=100000]

With ``wait`` the simulated time stands still until an observation is answered, so the reward equals that of
:class:`parapolicy.Controller` in one process; without it the robot follows the newest action, like a real one.
"""

import os
import sys
import time

os.environ.setdefault("ROS_AUTOMATIC_DISCOVERY_RANGE", "LOCALHOST")

import numpy as np
import rclpy
from rclpy.node import Node
from rclpy.qos import QoSProfile, QoSReliabilityPolicy
from sensor_msgs.msg import Image, JointState
from std_msgs.msg import Float64MultiArray, String
from std_srvs.srv import Trigger

import parapolicy
from envs import make_env

SPEC = parapolicy.PolicySpec(
    observation={
        "agent_pos": parapolicy.Feature((2,)),
        "keypoint": parapolicy.Feature((9, 2)),
        "image": parapolicy.Feature((96, 96, 3), "image"),
    },
    n_obs_steps=1,
    horizon=1,
    n_action_steps=1,
    action_dim=2,
    network={},
    scheduler={},
    control_hz=10,
)
PATIENCE = 60.0  # seconds


class Robot(Node):
    """Publishes joint states, the block's keypoints and a camera's images; receives targets."""

    def __init__(self, steps: int = 300) -> None:
        super().__init__("pusht")
        self.env = make_env("pusht", SPEC, max_episode_steps=steps)
        profile = QoSProfile(depth=10, reliability=QoSReliabilityPolicy.RELIABLE)
        self.joints = self.create_publisher(JointState, "/joint_states", profile)
        self.block = self.create_publisher(JointState, "/block", profile)
        self.camera = self.create_publisher(Image, "/camera/image_raw", profile)
        self.targets: list[np.ndarray] = []
        self.state = ""
        self.create_subscription(Float64MultiArray, "/target", self._take, 10)
        self.create_subscription(String, "/parapolicy/heartbeat", self._beat, 1)
        self.again = self.create_client(Trigger, "/parapolicy/reset")

    def _take(self, message: Float64MultiArray) -> None:
        self.targets.append(np.asarray(message.data, np.float32))

    def _beat(self, message: String) -> None:
        self.state = message.data

    def reset(self, seed: int) -> dict[str, np.ndarray]:
        """Begin an episode here and in the policy's node."""
        observation, _ = self.env.reset(seed=seed)
        self._wait_for(
            lambda: self.again.service_is_ready() and self.state not in ("", "inactive"), "the policy's node"
        )
        publishers = (self.joints, self.block, self.camera)
        self._wait_for(lambda: all(each.get_subscription_count() for each in publishers), "its subscriptions")
        answer = self.again.call_async(Trigger.Request())
        self._wait_for(answer.done, "the reset")
        assert answer.result().success, answer.result().message
        self.targets.clear()
        return observation

    def publish(self, observation: dict[str, np.ndarray]) -> None:
        """Publish an observation, all messages with the same stamp."""
        stamp = self.get_clock().now().to_msg()
        joints, block, image = JointState(), JointState(), Image()
        joints.name, joints.position = ["agent_x", "agent_y"], observation["agent_pos"].astype(float).tolist()
        block.name = [f"{axis}{i}" for i in range(9) for axis in "xy"]
        block.position = observation["keypoint"].astype(float).ravel().tolist()
        image.height, image.width, image.step, image.encoding = 96, 96, 96 * 3, "rgb8"
        image.data = observation["image"].astype(np.uint8).tobytes()
        for message, publisher in ((joints, self.joints), (image, self.camera), (block, self.block)):
            message.header.stamp = stamp
            publisher.publish(message)

    def play(self, seed: int, hz: float, wait: bool = True) -> float:
        """The largest reward of an episode."""
        observation, best, over = self.reset(seed), 0.0, False
        tick = time.monotonic()
        while not over:
            self.publish(observation)
            if wait or not self.targets:
                self._wait_for(lambda: bool(self.targets), "an action")
            tick = max(tick + 1 / hz, time.monotonic() if wait else -np.inf)
            while (left := tick - time.monotonic()) > 0:
                rclpy.spin_once(self, timeout_sec=left)
            target = self.targets[-1]
            if wait:
                assert len(self.targets) == 1, f"{len(self.targets)} actions for one observation"
                self.targets.clear()
            observation, reward, terminated, truncated, _ = self.env.step(target)
            best, over = max(best, float(reward)), terminated or truncated
        return best

    def _wait_for(self, condition, what: str) -> None:
        end = time.monotonic() + PATIENCE
        while not condition():
            if time.monotonic() > end:
                raise TimeoutError(f"waited {PATIENCE:g} s for {what}")
            rclpy.spin_once(self, timeout_sec=0.02)


def main(episodes: str = "1", hz: str = "10", steps: str = "300", wait: str = "true", seed: str = "100000") -> None:
    rclpy.init()
    robot = Robot(int(steps))
    for each in range(int(seed), int(seed) + int(episodes)):
        begin = time.monotonic()
        best = robot.play(each, float(hz), wait == "true")
        print(f"seed {each}: reward {best!r}, {time.monotonic() - begin:.1f} s", flush=True)
    rclpy.shutdown()


if __name__ == "__main__":
    main(**dict(argument.split("=", 1) for argument in sys.argv[1:]))
