"""Actions made of parts, some of them rotations that are converted before the robot gets them.

The network predicts a rotation as six numbers, the first two rows of its matrix, because they are continuous (Zhou et
al., CVPR 2019). Robots take an axis times an angle, or three angles. The conversion follows robomimic, which resolves
ambiguous rotations by making the largest number of the quaternion positive.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

SIX = 6  # numbers of a rotation as sampled
MAX_KEY = 100  # characters of a part's name
CONVERSIONS = ("axis_angle", "euler")


def check_parts(parts: Any, action_dim: int) -> tuple[dict[str, Any], ...]:
    """Check the parts of an action, and return a copy of them.

    Args:
        parts: {"key": name, "size": count of numbers, "convert": one of ``CONVERSIONS`` or None} for each part.
        action_dim: the sum of the sizes, if there are parts.

    Raises:
        ValueError: a malformed part, or sizes that do not add up to ``action_dim``.
    """
    if not isinstance(parts, list | tuple):
        raise ValueError(f"action_parts is {parts!r}, expected a list")
    for part in parts:
        if not isinstance(part, Mapping) or set(part) != {"key", "size", "convert"} or not isinstance(part["key"], str):
            raise ValueError(f"a part of the action is {part!r}, expected its key, size and convert")
        size, convert = part["size"], part["convert"]
        if len(part["key"]) > MAX_KEY or type(size) is not int or size < 1 or convert not in (None, *CONVERSIONS):
            raise ValueError(f"a part of the action is {part!r}, expected numbers, converted by one of {CONVERSIONS}")
        if convert is not None and size != SIX:
            raise ValueError(f"the rotation {part['key']!r} of the action has {size} numbers, expected {SIX}")
    if parts and sum(part["size"] for part in parts) != action_dim:
        raise ValueError(f"the parts of the action do not add up to action_dim, {action_dim}: {list(parts)}")
    return tuple(dict(part) for part in parts)


def convert_actions(parts: Sequence[Mapping[str, Any]], actions: np.ndarray) -> np.ndarray:
    """Convert sampled actions (…, Da) to the robot's actions (…, Da'), float32; angles in radians.

    Args:
        parts: from :func:`check_parts`; empty: the actions are returned unchanged.
        actions: in the environment's units.
    """
    if all(part["convert"] is None for part in parts):
        return actions
    done, begin = [], 0
    for part in parts:
        values = actions[..., begin : begin + part["size"]].astype(np.float64)
        begin += part["size"]
        if part["convert"] == "axis_angle":
            values = to_axis_angle(to_matrix(values))
        elif part["convert"] == "euler":
            values = to_euler(to_matrix(values))
        done.append(values)
    return np.concatenate(done, axis=-1).astype(np.float32)


def to_matrix(six: np.ndarray) -> np.ndarray:
    """The first two rows (…, 6), made orthonormal starting with the first -> rotation matrices (…, 3, 3)."""
    first = _unit(six[..., :3])
    second = six[..., 3:]
    second = _unit(second - np.sum(first * second, axis=-1, keepdims=True) * first)
    return np.stack([first, second, np.cross(first, second)], axis=-2)


def to_axis_angle(matrix: np.ndarray) -> np.ndarray:
    """Rotation matrices (…, 3, 3) -> axis times angle (…, 3), rad.

    The angle is between pi and 2 pi where the quaternion's largest number is not its real part and has the opposite
    sign of it.
    """
    m = np.moveaxis(matrix, (-2, -1), (0, 1))
    trace = m[0, 0] + m[1, 1] + m[2, 2]
    # Four times the products of the quaternion's numbers (w, x, y, z), so every row is a multiple of the quaternion.
    off = {(0, 1): m[2, 1] - m[1, 2], (0, 2): m[0, 2] - m[2, 0], (0, 3): m[1, 0] - m[0, 1]}
    off |= {(1, 2): m[1, 0] + m[0, 1], (1, 3): m[0, 2] + m[2, 0], (2, 3): m[2, 1] + m[1, 2]}
    own = [1 + trace, *(1 + 2 * m[i, i] - trace for i in range(3))]
    products = np.stack(
        [np.stack([own[i] if i == j else off[min(i, j), max(i, j)] for j in range(4)], -1) for i in range(4)], -2
    )  # (…, 4, 4)
    largest = np.argmax(np.stack(own, -1), axis=-1)[..., None, None]
    quaternion = _unit(np.take_along_axis(products, largest, axis=-2)[..., 0, :])
    real, imaginary = quaternion[..., :1], quaternion[..., 1:]
    half = np.arctan2(np.linalg.norm(imaginary, axis=-1, keepdims=True), real)
    return 2 * imaginary / np.sinc(half / np.pi)  # sinc(half / pi) is sin(half) / half, also at 0


def to_euler(matrix: np.ndarray) -> np.ndarray:
    """Rotation matrices (…, 3, 3) -> intrinsic Euler angles (…, 3) about x, y and z, rad."""
    first = np.arctan2(-matrix[..., 1, 2], matrix[..., 2, 2])
    second = np.arcsin(matrix[..., 0, 2].clip(-1, 1))
    third = np.arctan2(-matrix[..., 0, 1], matrix[..., 0, 0])
    return np.stack([first, second, third], axis=-1)


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True).clip(1e-12)
