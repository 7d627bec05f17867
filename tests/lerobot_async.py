"""LeRobot's own robot client at its asynchronous server for some seconds: run by LeRobot's own Python.

    python -m tests.lerobot_async FOLDER PORT ACTIONS

Prints JSON: the actions that a simulated arm with two cameras was given, until there were so many, or for four minutes.
"""

import dataclasses
import json
import sys
import threading
import time
from typing import Any, ClassVar

import numpy as np
from lerobot.async_inference import robot_client
from lerobot.async_inference.configs import RobotClientConfig
from lerobot.robots.config import RobotConfig
from lerobot.robots.robot import Robot

JOINTS = [f"joint_{i}.pos" for i in range(6)]
SIZE = 120, 160, 3
SECONDS = 240.0


@RobotConfig.register_subclass("simulated_arm")
@dataclasses.dataclass(kw_only=True)
class SimulatedArmConfig(RobotConfig):
    cameras: dict[str, Any] = dataclasses.field(default_factory=dict)


class SimulatedArm(Robot):
    """Goes where it is told."""

    config_class, name = SimulatedArmConfig, "simulated_arm"
    is_connected = is_calibrated = True
    action_features: ClassVar = dict.fromkeys(JOINTS, float)
    observation_features: ClassVar = {**action_features, "wrist": SIZE, "front": SIZE}

    def __init__(self, config: SimulatedArmConfig) -> None:
        super().__init__(config)
        self.at = np.zeros(6)
        self.actions: list[list[float]] = []

    def connect(self, calibrate: bool = True) -> None: ...
    def calibrate(self) -> None: ...
    def configure(self) -> None: ...
    def disconnect(self) -> None: ...

    def get_observation(self) -> dict[str, Any]:
        picture = np.random.default_rng(0).integers(0, 255, SIZE, dtype=np.uint8)
        return {**dict(zip(JOINTS, self.at.tolist(), strict=True)), "wrist": picture, "front": picture[::-1].copy()}

    def send_action(self, action: dict[str, float]) -> dict[str, float]:
        self.actions.append([action[joint] for joint in JOINTS])
        self.at = np.asarray(self.actions[-1])
        return action


def main(folder: str, port: str, count: str) -> None:
    robot_client.make_robot_from_config = SimulatedArm
    client = robot_client.RobotClient(
        RobotClientConfig(
            policy_type="diffusion",
            pretrained_name_or_path=folder,
            robot=SimulatedArmConfig(),
            actions_per_chunk=8,
            server_address=f"127.0.0.1:{port}",
            fps=10,
        )
    )
    if not client.start():
        raise SystemExit("no connection")
    receiver = threading.Thread(target=client.receive_actions, daemon=True)
    receiver.start()
    loop = threading.Thread(target=client.control_loop, args=("",), daemon=True)
    loop.start()
    end = time.monotonic() + SECONDS
    while len(client.robot.actions) < int(count) and time.monotonic() < end:
        time.sleep(0.05)
    client.stop()
    print(json.dumps(client.robot.actions))


if __name__ == "__main__":
    main(*sys.argv[1:])
