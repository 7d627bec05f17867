"""Poses as UMI's policies see them: against their definition by matrices."""

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from parapolicy.pose import make_actions, make_observation, pose_matrices, relative_to
from tests.oracles import oracle_folder


def some_readings(robots: int = 1, batch: tuple[int, ...] = (3,), steps: int = 2) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(robots)
    readings = {"robot0_gripper_width": rng.uniform(size=(*batch, steps, 1))}
    for i in range(robots):
        readings[f"robot{i}_eef_pos"] = rng.normal(size=(*batch, steps, 3))
        readings[f"robot{i}_eef_rot_axis_angle"] = rng.normal(size=(*batch, steps, 3))
    return readings


def as_matrix(pose: np.ndarray) -> np.ndarray:
    matrix = np.eye(4)
    matrix[:3, :3], matrix[:3, 3] = Rotation.from_rotvec(pose[3:]).as_matrix(), pose[:3]
    return matrix


def poses_of(readings: dict[str, np.ndarray], robot: int, element: int) -> list[np.ndarray]:
    parts = [readings[f"robot{robot}_eef_{part}"][element] for part in ("pos", "rot_axis_angle")]
    return [as_matrix(pose) for pose in np.concatenate(parts, -1)]


def test_observed_poses_are_relative_to_the_last_one() -> None:
    readings, start = some_readings(), np.random.default_rng(5).normal(size=(3, 1, 6))
    found = make_observation(readings, start=start)
    np.testing.assert_array_equal(found["robot0_gripper_width"], readings["robot0_gripper_width"])
    for element in range(3):
        poses = poses_of(readings, 0, element)
        for step, pose in enumerate(poses):
            relative = np.linalg.inv(poses[-1]) @ pose
            np.testing.assert_allclose(found["robot0_eef_pos"][element, step], relative[:3, 3], atol=1e-12)
            rows = found["robot0_eef_rot_axis_angle"][element, step]
            np.testing.assert_allclose(rows, relative[:2, :3].ravel(), atol=1e-12)
            since = np.linalg.inv(as_matrix(start[element, 0])) @ pose
            rows = found["robot0_eef_rot_axis_angle_wrt_start"][element, step]
            np.testing.assert_allclose(rows, since[:2, :3].ravel(), atol=1e-12)
    np.testing.assert_allclose(found["robot0_eef_pos"][:, -1], 0, atol=1e-12)  # it is where it is


def test_two_robots_see_each_other() -> None:
    readings, between = some_readings(2), as_matrix(np.random.default_rng(7).normal(size=6))
    found = make_observation(readings, robot1_from_robot0=between)
    for robot, there in enumerate((np.linalg.inv(between), between)):
        own, other = poses_of(readings, robot, 1), poses_of(readings, 1 - robot, 1)
        for step, pose in enumerate(own):
            relative = np.linalg.inv(there @ other[-1]) @ pose
            name = f"robot{robot}_eef_{{}}_wrt{1 - robot}"
            np.testing.assert_allclose(found[name.format("pos")][1, step], relative[:3, 3], atol=1e-12)
            rows = found[name.format("rot_axis_angle")][1, step]
            np.testing.assert_allclose(rows, relative[:2, :3].ravel(), atol=1e-12)


@pytest.mark.parametrize("representation", ["relative", "abs"])
def test_actions_undo_observations(representation: str) -> None:
    """Actions that are the observed poses themselves lead to the poses that were read."""
    readings = some_readings(2)
    found = make_observation(readings, representation)
    parts = [found[f"robot{i}_eef_{part}"] for i in range(2) for part in ("pos", "rot_axis_angle")]
    gripper = np.full((3, 2, 1), 0.25)
    actions = np.concatenate([*parts[:2], gripper, *parts[2:], gripper], -1)
    back = make_actions(actions, readings, representation)
    for i in range(2):
        own = back[..., 7 * i : 7 * i + 7]
        np.testing.assert_allclose(own[..., :3], readings[f"robot{i}_eef_pos"], atol=1e-12)
        turned = Rotation.from_rotvec(own[..., 3:6].reshape(-1, 3)).as_matrix()
        read = Rotation.from_rotvec(readings[f"robot{i}_eef_rot_axis_angle"].reshape(-1, 3)).as_matrix()
        np.testing.assert_allclose(turned, read, atol=1e-12)
        np.testing.assert_array_equal(own[..., 6:], gripper)


def test_one_observation_without_a_batch() -> None:
    readings = some_readings(batch=())
    assert make_observation(readings)["robot0_eef_rot_axis_angle"].shape == (2, 6)
    actions = np.zeros((16, 10))
    actions[:, [3, 7]] = 1  # no rotation
    poses = make_actions(actions, readings)
    np.testing.assert_allclose(poses[0, :3], readings["robot0_eef_pos"][-1])
    assert poses.shape == (16, 7)


def test_what_does_not_fit_is_refused() -> None:
    readings = some_readings()
    with pytest.raises(ValueError, match="'rel', expected one of"):
        make_observation(readings, "rel")
    with pytest.raises(ValueError, match="have 20 numbers, expected 10 for each of 1 robots"):
        make_actions(np.zeros((2, 20)), readings)
    with pytest.raises(ValueError, match="no robot0_eef_pos"):
        make_observation({"camera0_rgb": np.zeros(1)})
    with pytest.raises(ValueError, match=r"expected \(…, 3\)"):
        pose_matrices(np.zeros((2, 3)), np.zeros((2, 6)))


def test_a_pose_relative_to_itself_is_none() -> None:
    poses = pose_matrices(*np.random.default_rng(0).normal(size=(2, 4, 3)))
    np.testing.assert_allclose(relative_to(poses, poses), np.broadcast_to(np.eye(4), (4, 4, 4)), atol=1e-12)


def test_published_poses() -> None:
    """What the published code made of the same readings, and of its policy's action."""
    with np.load(oracle_folder("real-stanford") / "unet_timm_umi_vit.npz") as oracle:
        readings = {name[5:]: oracle[name] for name in oracle.files if name.startswith("pose.robot")}
        found = make_observation(readings, start=oracle["pose.start"])
        assert len(found) == 4
        for key, value in found.items():
            np.testing.assert_allclose(value, oracle[f"obs.{key}"], atol=1e-7)
        np.testing.assert_allclose(make_actions(oracle["action"], readings), oracle["pose.action"], atol=1e-7)
