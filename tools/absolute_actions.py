"""Absolute actions for a robomimic data set of delta actions, like Diffusion Policy's conversion.

    python -m tools.absolute_actions low_dim.hdf5 low_dim_abs.hdf5

The output is a copy with ``data/demo_i/actions_abs`` (T, 7 per arm): the controller's target pose as position and
axis-angle in the world frame, and the gripper. Deltas are relative to the reached pose, which comes from the recorded
simulator states.
"""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from scipy.spatial.transform import Rotation
from tqdm import tqdm

from envs.robomimic import DELTA, TASKS, Robomimic
from envs.robosuite_simulator import CONTROL_HZ
from parapolicy.errors import DataError
from parapolicy.spec import Feature, PolicySpec


def absolute_actions(env: Robomimic, states: np.ndarray, actions: np.ndarray) -> np.ndarray:
    """Target poses (T, 7·arms) of delta actions (T, 7·arms) at simulator states (T, n)."""
    simulator: Any = env._simulator
    goals = np.array(actions, dtype=np.float64)
    for state, goal in zip(states, goals, strict=True):
        simulator.sim.set_state_from_flattened(state)
        simulator.sim.forward()
        for robot, part in zip(simulator.robots, goal.reshape(-1, len(DELTA)), strict=True):
            robot.composite_controller.update_state()
            controller = robot.composite_controller.part_controllers["right"]
            controller.update(force=True)
            controller.set_goal(np.clip(part[:6], -1, 1))
            # The controller's goal is in the frame of its robot.
            part[:3] = controller.origin_pos + controller.origin_ori @ controller.goal_pos
            part[3:6] = Rotation.from_matrix(controller.origin_ori @ controller.goal_ori).as_rotvec()
    return goals


def convert(path: Path, output: Path) -> int:
    """Write a copy of a data set with absolute actions; returns the number of demonstrations.

    Raises:
        ValueError: the output exists.
        DataError: the file is not a robomimic data set, has no simulator states, or its task is unknown.
    """
    import h5py

    if output.exists():
        raise ValueError(f"{output} exists; give another name, or delete it")
    try:
        with h5py.File(path, "r") as file:
            name = json.loads(file["data"].attrs["env_args"])["env_name"]
            demos = list(file["data"])
            if not all("states" in file[f"data/{demo}"] for demo in demos):
                raise DataError(f"{path} has no simulator states, which give the poses that deltas are relative to")
    except (OSError, KeyError, TypeError) as error:
        raise DataError(f"{path} is not a robomimic data set with env_args: {error}") from error
    tasks = {simulated: (task, robots) for task, (simulated, robots, _) in TASKS.items()}
    if name not in tasks:
        raise DataError(f"{path} has the task {name!r}, expected one of {list(tasks)}")
    task, robots = tasks[name]
    spec = PolicySpec({"robot0_eef_pos": Feature((3,))}, 1, 1, 1, len(DELTA) * robots, {}, {}, CONTROL_HZ)
    env = Robomimic(spec, task, dataset=str(path))
    partial = output.with_name(f".{output.name}.partial")
    shutil.copyfile(path, partial)
    with h5py.File(partial, "a") as file:
        for demo in tqdm(demos, desc="absolute", unit="demo"):
            group = file[f"data/{demo}"]
            group.pop("actions_abs", None)
            group["actions_abs"] = absolute_actions(env, group["states"][:], group["actions"][:])
    env.close()
    partial.replace(output)
    return len(demos)


def main() -> None:
    parser = argparse.ArgumentParser("python -m tools.absolute_actions", description="Absolute actions for a data set.")
    parser.add_argument("path", type=Path, metavar="FILE.hdf5")
    parser.add_argument("output", type=Path, metavar="OUTPUT.hdf5")
    parsed = parser.parse_args()
    try:
        count = convert(parsed.path, parsed.output)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error
    print(f"wrote {parsed.output}: {count} demonstrations with actions_abs")


if __name__ == "__main__":
    main()
