import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from parapolicy.rotation import to_axis_angle, to_rotation_6d


def test_six_numbers_are_the_first_two_rows_of_the_matrix() -> None:
    """Two arms, the second turned by a quarter about the vertical."""
    actions = np.array([[1, 2, 3, 0, 0, 0, -1, 4, 5, 6, 0, 0, np.pi / 2, 1]])
    expected = [[1, 2, 3, 1, 0, 0, 0, 1, 0, -1, 4, 5, 6, 0, -1, 0, 1, 0, 0, 1]]
    np.testing.assert_allclose(to_rotation_6d(actions), expected, atol=1e-12)


def test_axis_angle_comes_back() -> None:
    rng = np.random.default_rng(0)
    actions = rng.uniform(-1, 1, (5, 4, 14))
    rotation = actions.reshape(5, 4, 2, 7)[..., 3:6]
    rotation *= rng.uniform(0, 3.1, (5, 4, 2, 1)) / np.linalg.norm(rotation, axis=-1, keepdims=True)
    np.testing.assert_allclose(to_axis_angle(to_rotation_6d(actions)), actions, atol=1e-9)


def test_rows_of_a_policy_are_made_a_rotation() -> None:
    """Longer rows, the second one leaning towards the first: the rotation they come from."""
    matrix = Rotation.from_rotvec([0.3, -1.2, 0.5]).as_matrix()
    rows = np.concatenate([2 * matrix[0], 0.5 * matrix[1] + 0.3 * matrix[0]])
    given = np.concatenate([np.zeros(3), rows, [1.0]])
    np.testing.assert_allclose(to_axis_angle(given)[3:6], [0.3, -1.2, 0.5], atol=1e-12)


def test_what_is_no_rotation_is_said() -> None:
    with pytest.raises(ValueError, match="absolute actions have 8 numbers, expected 7 per arm"):
        to_rotation_6d(np.zeros((3, 8)))
    with pytest.raises(ValueError, match="absolute actions have 7 numbers, expected 10 per arm"):
        to_axis_angle(np.zeros(7))
    with pytest.raises(ValueError, match="two rows are parallel or zero"):
        to_axis_angle(np.zeros(10))
    with pytest.raises(ValueError, match="two rows are parallel or zero"):
        to_axis_angle(np.array([0, 0, 0, 1, 0, 0, 2, 0, 0, 1.0]))
