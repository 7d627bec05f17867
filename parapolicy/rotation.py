"""Rotations as six numbers, continuous where axis-angle is not (Zhou et al., CVPR 2019).

They are the first two rows of the rotation matrix, as in Diffusion Policy's absolute actions.
"""

import numpy as np
from scipy.spatial.transform import Rotation

POSE_DIM, POSE_6D_DIM = 7, 10  # numbers per arm: position, rotation, gripper; with axis-angle, and with six numbers


def to_rotation_6d(actions: np.ndarray) -> np.ndarray:
    """Absolute actions (…, 7·arms) with axis-angle, rad, converted to (…, 10·arms) with six numbers per rotation.

    Raises:
        ValueError: the last axis is no multiple of 7.
    """
    arms = _by_arm(actions, POSE_DIM)
    rows = rows_of(vectors_to_matrices(arms[..., 3:6]))
    return np.concatenate([arms[..., :3], rows, arms[..., 6:]], axis=-1).reshape(*actions.shape[:-1], -1)


def to_axis_angle(actions: np.ndarray) -> np.ndarray:
    """The inverse of :func:`to_rotation_6d`. A policy's rows are made orthonormal, starting with the first.

    Raises:
        ValueError: the last axis is no multiple of 10, or a rotation's two rows are parallel or zero.
    """
    arms = _by_arm(actions, POSE_6D_DIM)
    vectors = matrices_to_vectors(rows_to_matrices(arms[..., 3:9]))
    return np.concatenate([arms[..., :3], vectors, arms[..., 9:]], axis=-1).reshape(*actions.shape[:-1], -1)


def vectors_to_matrices(vectors: np.ndarray) -> np.ndarray:
    """Axis-angle, rad (…, 3) -> rotation matrices (…, 3, 3)."""
    return np.asarray(Rotation.from_rotvec(vectors.reshape(-1, 3)).as_matrix()).reshape(*vectors.shape, 3)


def matrices_to_vectors(matrices: np.ndarray) -> np.ndarray:
    """Rotation matrices (…, 3, 3) -> axis-angle, rad (…, 3)."""
    return np.asarray(Rotation.from_matrix(matrices.reshape(-1, 3, 3)).as_rotvec()).reshape(matrices.shape[:-1])


def rows_of(matrices: np.ndarray) -> np.ndarray:
    """Rotation matrices (…, 3, 3) -> their first two rows (…, 6)."""
    return matrices[..., :2, :].reshape(*matrices.shape[:-2], 6)


def rows_to_matrices(rows: np.ndarray) -> np.ndarray:
    """The first two rows (…, 6) -> rotation matrices (…, 3, 3). Rows are made orthonormal, starting with the first.

    Raises:
        ValueError: the two rows are parallel or zero.
    """
    first = _unit(rows[..., :3])
    second = rows[..., 3:]
    second = _unit(second - np.sum(first * second, axis=-1, keepdims=True) * first)
    return np.stack([first, second, np.cross(first, second)], axis=-2)


def _by_arm(actions: np.ndarray, width: int) -> np.ndarray:
    if actions.shape[-1] % width:
        raise ValueError(f"absolute actions have {actions.shape[-1]} numbers, expected {width} per arm")
    return actions.reshape(*actions.shape[:-1], -1, width)


def _unit(vectors: np.ndarray) -> np.ndarray:
    length = np.linalg.norm(vectors, axis=-1, keepdims=True)
    if (length < 1e-6).any():
        raise ValueError("a rotation's two rows are parallel or zero, expected different directions")
    return np.asarray(vectors / length)
