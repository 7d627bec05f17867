"""State and motion of the scripted experts for robomimic's tasks: a proportional controller follows target poses."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.spatial.transform import Rotation

from envs.robomimic import Robomimic
from envs.robosuite_simulator import CONTROLLER

OPEN, CLOSED = -1.0, 1.0
GAIN = 1.2  # of the pose error; 1 commands the whole error in one step
DOWN = np.array([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, -1.0]])  # the gripper's rotation at yaw 0


@dataclass(frozen=True)
class Target:
    """A target pose of the gripper, which points down.

    Attributes:
        position: (3,) of the point between the fingertips, metres.
        yaw: rad; at 0 the fingers close along the world's y axis.
        gripper: ``OPEN`` or ``CLOSED``.
    """

    position: np.ndarray
    yaw: float
    gripper: float


class Scene:
    """The poses of the gripper and of the objects."""

    def __init__(self, env: Robomimic) -> None:
        self.simulator: Any = env._simulator

    @property
    def position(self) -> np.ndarray:
        """(3,) of the gripper, metres."""
        return np.array(self.simulator.sim.data.site_xpos[self._site])

    @property
    def rotation(self) -> np.ndarray:
        """(3, 3) of the gripper."""
        return np.array(self.simulator.sim.data.site_xmat[self._site]).reshape(3, 3)

    @property
    def yaw(self) -> float:
        """Yaw of the gripper, rad, defined as in :class:`Target`."""
        return _yaw(self.rotation @ DOWN.T)

    def body(self, name: str) -> tuple[np.ndarray, float]:
        """A body's position (3,) and its yaw."""
        data, number = self.simulator.sim.data, self.simulator.sim.model.body_name2id(name)
        return np.array(data.body_xpos[number]), _yaw(np.array(data.body_xmat[number]).reshape(3, 3))

    @property
    def _site(self) -> int:
        return int(self.simulator.robots[0].eef_site_id["right"])


class Stuck(Exception):
    """An expert makes no progress, so its attempt has failed."""


Targets = Iterator[Target]
Pose = Callable[[], tuple[np.ndarray, float]]  # a position that may move, and a yaw


def reach(
    scene: Scene, position: np.ndarray, yaw: float, gripper: float, tolerance: float, funnel: float = 0.0
) -> Targets:
    """Go to a pose until the position is within ``tolerance``, metres."""
    return follow(scene, lambda: (position, yaw), gripper, tolerance, funnel)


def follow(
    scene: Scene, pose: Pose, gripper: float, tolerance: float, funnel: float = 0.0, limit: int = 100
) -> Targets:
    """Go to a pose that may move. The target is ``funnel`` metres higher per metre of horizontal error.

    Raises:
        Stuck: the pose is not reached within ``limit`` steps.
    """
    for _ in range(limit):
        position, yaw = pose()
        error = position - scene.position
        if np.linalg.norm(error) < tolerance and abs(wrap(yaw - scene.yaw)) < 0.1 + 2 * tolerance:
            return
        yield Target(position + up(funnel * float(np.linalg.norm(error[:2]))), yaw, gripper)
    raise Stuck


def wait(scene: Scene, steps: int, gripper: float) -> Targets:
    """Hold the pose while the fingers move."""
    position, yaw = scene.position, scene.yaw
    for _ in range(steps):
        yield Target(position, yaw, gripper)


def servo(scene: Scene, target: Target, speed: float) -> np.ndarray:
    """The action (7,) towards a target; ``speed`` is relative to the controller's maximum."""
    scale = np.array(CONTROLLER["output_max"])
    wanted = Rotation.from_euler("z", target.yaw) * Rotation.from_matrix(DOWN)
    turn = (wanted * Rotation.from_matrix(scene.rotation).inv()).as_rotvec()
    # The arm lags behind its target: with a gain much above 1, a folded arm oscillates.
    motion = GAIN * np.concatenate([target.position - scene.position, turn]) / scale
    for part in (
        motion[:2],
        motion[2:3],
        motion[3:],
    ):  # limited separately: a large vertical error must not slow the others
        part *= min(1.0, speed / max(float(np.linalg.norm(part)), 1e-9))
    return np.append(motion, target.gripper)


def _yaw(rotation: np.ndarray) -> float:
    """The angle of a frame's x axis about the vertical."""
    return float(np.arctan2(rotation[1, 0], rotation[0, 0]))


def until_stuck(targets: Targets) -> Targets:
    """The targets up to the point where the expert is stuck."""
    with contextlib.suppress(Stuck):
        yield from targets


def up(height: float) -> np.ndarray:
    """The vector (3,) of a height, metres."""
    return np.array([0.0, 0.0, height])


def wrap(angle: Any) -> Any:
    """Wrap an angle into [-pi, pi)."""
    return (angle + np.pi) % (2 * np.pi) - np.pi
