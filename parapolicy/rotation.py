"""Rotations as six numbers, continuous where axis-angle is not (Zhou et al., CVPR 2019).

They are the first two rows of the rotation matrix, as Diffusion Policy's absolute actions have them.
"""

import numpy as np
from scipy.spatial.transform import Rotation

POSE_DIM, POSE_6D_DIM = 7, 10  # numbers per arm: position, rotation, gripper; with axis-angle, and with six numbers


def to_rotation_6d(actions: np.ndarray) -> np.ndarray:
    """Absolute actions (…, 7·arms) with axis-angle, rad, as (…, 10·arms) with six numbers.

    Raises:
        ValueError: the last axis is no multiple of 7.
    """
    arms = _by_arm(actions, POSE_DIM)
    matrices = Rotation.from_rotvec(arms[..., 3:6].reshape(-1, 3)).as_matrix()
    rows = matrices[:, :2].reshape(*arms.shape[:-1], 6)
    return np.concatenate([arms[..., :3], rows, arms[..., 6:]], axis=-1).reshape(*actions.shape[:-1], -1)


def to_axis_angle(actions: np.ndarray) -> np.ndarray:
    """The inverse of :func:`to_rotation_6d`; rows that a policy gave are made orthonormal, the first one first.

    Raises:
        ValueError: the last axis is no multiple of 10, or the two rows have no direction of their own.
    """
    arms = _by_arm(actions, POSE_6D_DIM)
    first, second = arms[..., 3:6], arms[..., 6:9]
    first = _unit(first)
    second = _unit(second - np.sum(first * second, axis=-1, keepdims=True) * first)
    matrices = np.stack([first, second, np.cross(first, second)], axis=-2)
    vectors = Rotation.from_matrix(matrices.reshape(-1, 3, 3)).as_rotvec().reshape(first.shape)
    return np.concatenate([arms[..., :3], vectors, arms[..., 9:]], axis=-1).reshape(*actions.shape[:-1], -1)


def _by_arm(actions: np.ndarray, width: int) -> np.ndarray:
    if actions.shape[-1] % width:
        raise ValueError(f"absolute actions have {actions.shape[-1]} numbers, expected {width} per arm")
    return actions.reshape(*actions.shape[:-1], -1, width)


def _unit(vectors: np.ndarray) -> np.ndarray:
    length = np.linalg.norm(vectors, axis=-1, keepdims=True)
    if (length < 1e-6).any():
        raise ValueError("a rotation of six numbers has rows of no or of the same direction, expected two directions")
    return np.asarray(vectors / length)
