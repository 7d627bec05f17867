"""Poses for policies of the Universal Manipulation Interface (Chi et al., RSS 2024).

The policy's inputs and actions are poses relative to the robot's present pose: ``relative = inverse(base) @ pose``. The
policy then needs no calibrated world frame. A pose is a position, in metres, and a rotation: outside of the policy an
axis-angle vector, in radians, inside of it the first two rows of the rotation matrix. Needs scipy.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from parapolicy.rotation import matrices_to_vectors, rows_of, rows_to_matrices, vectors_to_matrices

REPRESENTATIONS = ("relative", "abs")
ACTION_DIM = 10  # numbers of one robot's action in the policy: position, rotation and gripper


def pose_matrices(positions: Any, vectors: Any) -> np.ndarray:
    """Positions (…, 3) and axis-angle rotations (…, 3), rad -> homogeneous matrices (…, 4, 4), float64."""
    positions, vectors = np.asarray(positions, np.float64), np.asarray(vectors, np.float64)
    if positions.shape != vectors.shape or positions.shape[-1:] != (3,):
        raise ValueError(f"positions and rotations have shapes {positions.shape} and {vectors.shape}, expected (…, 3)")
    return _assemble(positions, vectors_to_matrices(vectors))


def relative_to(base: np.ndarray, poses: np.ndarray) -> np.ndarray:
    """Poses (…, 4, 4) in the frame of ``base``, which is broadcast: ``inverse(base) @ pose``."""
    turned = base[..., :3, :3].swapaxes(-1, -2)  # the inverse of a rotation
    positions = (turned @ (poses[..., :3, 3] - base[..., :3, 3])[..., None])[..., 0]
    return _assemble(positions, turned @ poses[..., :3, :3])


def make_observation(
    readings: Mapping[str, Any],
    representation: str = "relative",
    start: Any = None,
    robot1_from_robot0: Any = None,
) -> dict[str, np.ndarray]:
    """A UMI policy's observation from the readings of cameras and robots.

    Args:
        readings: for each of n robots ``robot{i}_eef_pos`` (…, To, 3) and ``robot{i}_eef_rot_axis_angle`` (…, To, 3),
            in the frame of the robot's base; all other keys are passed through.
        representation: ``task.pose_repr.obs_pose_repr`` of the checkpoint.
        start: pose of each robot at the beginning of the episode, (…, n, 6), position and axis-angle; adds
            ``robot{i}_eef_rot_axis_angle_wrt_start``.
        robot1_from_robot0: (…, 4, 4), the base of robot 0 in the frame of the base of robot 1; adds
            ``robot{i}_eef_pos_wrt{j}`` and ``robot{i}_eef_rot_axis_angle_wrt{j}`` for two robots.

    Returns:
        For each robot its position (…, To, 3) and rotation (…, To, 6) in the given representation, and the other
        readings. These may be more than the policy observes: select the keys of ``policy.spec.observation``.

    Raises:
        ValueError: an unknown representation, or shapes that do not fit.
    """
    _check(representation)
    result = {key: np.asarray(value) for key, value in readings.items()}
    poses = _robots(readings)
    for i, pose in enumerate(poses):
        own = relative_to(pose[..., -1:, :, :], pose) if representation == "relative" else pose
        result |= _numbers(f"robot{i}_eef", own)
        if start is not None:
            begin = np.asarray(start, np.float64)[..., i, None, :]
            since = relative_to(pose_matrices(begin[..., :3], begin[..., 3:]), pose)
            result[f"robot{i}_eef_rot_axis_angle_wrt_start"] = rows_of(since[..., :3, :3])
    if robot1_from_robot0 is not None and len(poses) == 2:
        one_from_zero = np.asarray(robot1_from_robot0, np.float64)
        for i, there in enumerate((np.linalg.inv(one_from_zero), one_from_zero)):
            other = there @ poses[1 - i][..., -1, :, :]
            result |= _numbers(f"robot{i}_eef", relative_to(other[..., None, :, :], poses[i]), f"_wrt{1 - i}")
    return result


def make_actions(actions: Any, readings: Mapping[str, Any], representation: str = "relative") -> np.ndarray:
    """Convert a UMI policy's actions to target poses of the robots.

    Args:
        actions: (…, H, 10 n): position, rotation and gripper of n robots.
        readings: as given to :func:`make_observation` for the same observation; only the last step is used.
        representation: ``task.pose_repr.action_pose_repr`` of the checkpoint.

    Returns:
        (…, H, 7 n), float64: position, axis-angle (rad) and gripper of each robot, in the frame of its base.

    Raises:
        ValueError: an unknown representation, shapes that do not fit, or a degenerate rotation.
    """
    _check(representation)
    actions, poses = np.asarray(actions, np.float64), _robots(readings)
    if actions.shape[-1] != ACTION_DIM * len(poses):
        raise ValueError(
            f"actions have {actions.shape[-1]} numbers, expected {ACTION_DIM} for each of {len(poses)} robots"
        )
    parts = []
    for i, pose in enumerate(poses):
        own = actions[..., ACTION_DIM * i : ACTION_DIM * (i + 1)]
        target = _assemble(own[..., :3], rows_to_matrices(own[..., 3:9]))
        if representation == "relative":
            target = pose[..., -1:, :, :] @ target
        parts += [target[..., :3, 3], matrices_to_vectors(target[..., :3, :3]), own[..., 9:]]
    return np.concatenate(parts, axis=-1)


def _robots(readings: Mapping[str, Any]) -> list[np.ndarray]:
    """Poses (…, To, 4, 4) of robot 0, 1, …"""
    poses: list[np.ndarray] = []
    while f"robot{len(poses)}_eef_pos" in readings:
        names = (f"robot{len(poses)}_eef_{part}" for part in ("pos", "rot_axis_angle"))
        poses.append(pose_matrices(*(readings[name] for name in names)))
    if not poses:
        raise ValueError(f"the readings {list(readings)} have no robot0_eef_pos")
    return poses


def _numbers(name: str, poses: np.ndarray, suffix: str = "") -> dict[str, np.ndarray]:
    rows = rows_of(poses[..., :3, :3])
    return {f"{name}_pos{suffix}": poses[..., :3, 3], f"{name}_rot_axis_angle{suffix}": rows}


def _assemble(positions: np.ndarray, rotations: np.ndarray) -> np.ndarray:
    poses = np.zeros((*rotations.shape[:-2], 4, 4))
    poses[..., :3, :3], poses[..., :3, 3], poses[..., 3, 3] = rotations, positions, 1
    return poses


def _check(representation: str) -> None:
    if representation not in REPRESENTATIONS:
        raise ValueError(
            f"the representation of poses is {representation!r}, expected one of {REPRESENTATIONS}; train with one of "
            "them, as the published configuration does"
        )
