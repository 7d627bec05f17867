"""Rotations of six numbers as robots take them."""

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from parapolicy.action_parts import convert_actions, to_axis_angle, to_euler, to_matrix
from tests.helpers import small_policy, small_spec, some_observation

PARTS = [
    {"key": "position", "size": 3, "convert": None},
    {"key": "rotation", "size": 6, "convert": "axis_angle"},
    {"key": "gripper", "size": 1, "convert": None},
]


def rotations() -> Rotation:
    turns = Rotation.from_rotvec([[0, 0, 0], [np.pi, 0, 0], [0, 0, 1e-9], [0, 3.1, 0], [1e-4, 0, 0]])
    return Rotation.concatenate([turns, Rotation.random(500, rng=np.random.default_rng(0))])


def test_the_converted_rotation_is_the_same() -> None:
    matrices = rotations().as_matrix()
    six = matrices[:, :2].reshape(-1, 6)
    np.testing.assert_allclose(to_matrix(3 * six), matrices, atol=1e-12)
    np.testing.assert_allclose(Rotation.from_rotvec(to_axis_angle(matrices)).as_matrix(), matrices, atol=1e-7)
    np.testing.assert_allclose(Rotation.from_euler("XYZ", to_euler(matrices)).as_matrix(), matrices, atol=1e-7)


def test_the_largest_number_of_the_quaternion_is_positive() -> None:
    """Which of its two forms a rotation gets; those beyond pi are one turn less the other way round."""
    quaternions = rotations().as_quat()
    largest = np.take_along_axis(quaternions, np.abs(quaternions).argmax(-1)[:, None], -1)
    half = np.arccos((quaternions * np.sign(largest))[:, 3].clip(-1, 1))
    angles = np.linalg.norm(to_axis_angle(rotations().as_matrix()), axis=-1)
    np.testing.assert_allclose(angles, 2 * half, atol=1e-6)
    assert angles.max() > np.pi


def test_parts_keep_their_places() -> None:
    actions = np.arange(20, dtype=np.float32).reshape(2, 10)
    actions[:, 3:9] = [1, 0, 0, 0, 0, 1]  # z to y
    converted = convert_actions(PARTS, actions)
    np.testing.assert_allclose(converted[0], [0, 1, 2, -np.pi / 2, 0, 0, 9], atol=1e-6)
    assert converted.dtype == np.float32
    assert convert_actions([], actions) is actions


def test_a_policy_gives_converted_actions_and_its_trajectory_as_sampled() -> None:
    policy = small_policy(action_dim=10, action_parts=PARTS)
    chunk = policy.predict(some_observation(policy.spec))
    assert chunk.trajectory.shape == (8, 10)
    assert chunk.actions.shape == (4, 7)
    np.testing.assert_array_equal(chunk.actions, convert_actions(PARTS, chunk.trajectory[1:5]))
    assert type(policy.spec).from_dict(policy.spec.to_dict()) == policy.spec
    assert "action_parts" not in small_spec().to_dict()


@pytest.mark.parametrize(
    "parts",
    [
        3,
        [{"key": "a", "size": 10}],
        [{"key": "a", "size": 9, "convert": None}],
        [{"key": "a", "size": 10, "convert": "axis_angle"}],
        [{"key": "a", "size": 10, "convert": "quaternion"}],
        [{"key": "a", "size": 0, "convert": None}, {"key": "b", "size": 10, "convert": None}],
    ],
)
def test_other_parts_are_refused(parts: object) -> None:
    with pytest.raises(ValueError, match="action"):
        small_spec(action_dim=10, action_parts=parts)
