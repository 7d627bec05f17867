"""Demonstrations by scripted experts for robomimic's Can and Square, in robomimic's file format.

    python -m tools.experts can can.hdf5 [--demonstrations 200 --seed 0]

An expert sees the simulator's state and generates target poses of the gripper. A proportional controller follows them,
with a random speed per episode and temporally correlated noise on the actions. Grasps, routes and placements are drawn
from several alternatives, so the demonstrations are multimodal. Failed attempts are discarded.

Attempt n depends on the seed and n only. Finished attempts are in FILE.parts until the file is complete; the same
command continues an interrupted run.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from envs.robomimic import DELTA, TASKS, Robomimic
from envs.robosuite_simulator import CONTROL_HZ, default_arguments
from parapolicy.spec import Feature, PolicySpec
from tools.demonstrations import Recording, check, collect, run_command
from tools.scene import CLOSED, OPEN, Pose, Scene, Targets, follow, reach, servo, until_stuck, up, wait, wrap

OBSERVATIONS: Mapping[str, tuple[int, ...]] = {
    "object": (14,),
    "robot0_eef_pos": (3,),
    "robot0_eef_quat": (4,),
    "robot0_gripper_qpos": (2,),
    "robot0_gripper_qvel": (2,),
    "robot0_joint_pos": (7,),
    "robot0_joint_vel": (7,),
}
NOISE = np.array([0.05, 0.05, 0.05, 0.012, 0.012, 0.012])  # per step, in units of actions
NOISE_MEMORY = 0.8  # autocorrelation of the noise from step to step
MAX_TURN = np.deg2rad(105)  # of the gripper about the vertical; the last joint's limit


def can(scene: Scene, rng: np.random.Generator) -> Targets:
    """PickPlaceCan: grasp the can from above at one of three angles and drop it into its bin."""
    yaw = rng.choice([-1, 0, 1]) * np.deg2rad(60) + rng.normal(0, 0.08)
    grasp = scene.body("Can_main")[0] + np.array([*rng.normal(0, 0.004, 2), rng.uniform(0.0, 0.02)])
    above = grasp + np.array([*rng.normal(0, 0.02, 2), rng.uniform(0.08, 0.13)])
    yield from reach(scene, above, yaw, OPEN, 0.03)
    yield from reach(scene, grasp, yaw, OPEN, 0.008, funnel=2.0)
    yield from wait(scene, int(rng.integers(6, 10)), CLOSED)
    lift = scene.position + up(rng.uniform(0.17, 0.22))
    yield from reach(scene, lift, yaw, CLOSED, 0.03)
    corner = scene.simulator.target_bin_placements[scene.simulator.object_id][:2] - 0.05  # the middle is out of reach
    over = np.array([*corner + rng.uniform(-0.02, 0.02, 2), lift[2]])
    yaw = rng.normal(0, 0.15)
    yield from reach(scene, over, yaw, CLOSED, 0.02)
    yield from reach(scene, over - up(lift[2] - rng.uniform(0.93, 0.96)), yaw, CLOSED, 0.015)
    yield from wait(scene, int(rng.integers(4, 7)), OPEN)
    yield from reach(scene, over, yaw, OPEN, 0.02)


def square(scene: Scene, rng: np.random.Generator) -> Targets:
    """NutAssemblySquare: grasp the nut's handle from one of its two sides, turn it by one of two angles, lower it."""
    yield from wait(scene, 4, OPEN)  # the nut falls onto the table
    nut = "SquareNut_main"
    _, nut_yaw = scene.body(nut)
    # The nut fits the peg at every quarter turn; with the handle away from the robot the peg is out of reach.
    turns = [wrap(final - nut_yaw) for final in (np.pi / 2, np.pi, -np.pi / 2)]
    plans = [
        (yaw, turn)
        for yaw in (wrap(nut_yaw), wrap(nut_yaw + np.pi))
        for turn in sorted(turns, key=abs)[:2]
        if max(abs(yaw), abs(yaw + turn)) < MAX_TURN
    ]
    # As in human demonstrations, plans with less turning are more likely.
    ordered = sorted(plans, key=lambda plan: abs(plan[0]) + abs(plan[0] + plan[1]))
    weights = 0.4 ** np.arange(len(ordered))
    grasp_yaw, turn = ordered[rng.choice(len(ordered), p=weights / weights.sum())]

    position, nut_yaw = scene.body(nut)
    handle = rng.uniform(0.055, 0.065) * np.array([np.cos(nut_yaw), np.sin(nut_yaw), 0])
    grasp = position + handle + up(rng.uniform(-0.004, 0.0))
    above = grasp + np.array([*rng.normal(0, 0.02, 2), rng.uniform(0.07, 0.12)])
    yield from reach(scene, above, grasp_yaw, OPEN, 0.03)
    yield from reach(scene, grasp, grasp_yaw, OPEN, 0.009, funnel=1.5)
    yield from wait(scene, int(rng.integers(9, 13)), CLOSED)
    lift = scene.position + up(rng.uniform(0.17, 0.21))
    yield from reach(scene, lift, grasp_yaw, CLOSED, 0.04)

    peg = scene.simulator.sim.data.body_xpos[scene.simulator.peg1_body_id].copy()
    final = nut_yaw + turn

    def nut_to(height: float) -> Pose:
        """The gripper pose that puts the nut, at its current place in the hand, above the peg at a height."""

        def pose() -> tuple[np.ndarray, float]:
            place, angle = scene.body(nut)
            return scene.position + np.array([*peg[:2], height]) - place, scene.yaw + wrap(final - angle)

        return pose

    yield from follow(scene, nut_to(peg[2] + rng.uniform(0.13, 0.16)), CLOSED, 0.006)
    yield from follow(scene, nut_to(peg[2]), CLOSED, 0.004, funnel=2.0)


EXPERTS: Mapping[str, Callable[[Scene, np.random.Generator], Targets]] = {"can": can, "square": square}


def attempt(env: Robomimic, task: str, seed: int) -> tuple[bool, dict[str, np.ndarray]]:
    """Run one episode of an expert.

    Returns:
        Whether it succeeded, and arrays over its T steps: ``actions`` (T, 7), ``states`` (T, …) before each action,
        ``rewards`` and ``dones`` (T,), and the observations before each action, ``obs/<name>`` (T, …).
    """
    rng = np.random.default_rng(seed)
    observation, _ = env.reset(seed=seed)
    scene = Scene(env)
    speed = rng.uniform(0.75, 1.0)
    noise = np.zeros(len(DELTA) - 1)
    recording = Recording()
    for target in until_stuck(EXPERTS[task](scene, rng)):
        noise = NOISE_MEMORY * noise + rng.normal(0, NOISE)
        action = np.clip(servo(scene, target, speed) + np.append(noise, 0.0), -1, 1)
        observation, over = recording.step(env, observation, action, scene.simulator.sim.get_state().flatten())
        if over:
            break
    return recording.success, recording.arrays()


def make_expert_env(task: str) -> Robomimic:
    """The environment for the expert of ``task``, with all observations of a robomimic file.

    Raises:
        ValueError: a task without an expert.
    """
    if task not in EXPERTS:
        raise ValueError(f"task is {task!r}, expected one of {list(EXPERTS)}, those that have an expert")
    spec = PolicySpec(
        {key: Feature(shape) for key, shape in OBSERVATIONS.items()},
        1,
        1,
        1,
        len(DELTA),
        network={},
        scheduler={},
        control_hz=CONTROL_HZ,
    )
    return Robomimic(spec, task)


def generate(task: str, output: str | Path, demonstrations: int = 200, seed: int = 0) -> tuple[int, list[int]]:
    """Write the first successful attempts of an expert as a robomimic HDF5 file.

    Args:
        task: one of ``EXPERTS``.
        output: the file; ``output.parts`` has the attempts until it is complete.
        demonstrations: number of demonstrations, at least 2.
        seed: of the attempts.

    Returns:
        The number of attempts, and the demonstrations' lengths.

    Raises:
        ValueError: a task without an expert, or the file exists.
        RuntimeError: more than half of the attempts failed.
    """
    import robosuite

    output = Path(output)
    check(output, demonstrations)
    env = make_expert_env(task)
    name, robots, _ = TASKS[task]
    about = {
        "env_name": name,
        "env_version": robosuite.__version__,
        "type": 1,  # robomimic's code for robosuite
        "env_kwargs": default_arguments(robots),
    }
    doubt = "is robosuite 1.5 used?"
    return collect(lambda own: attempt(env, task, own), task, output, demonstrations, seed, about, doubt)


if __name__ == "__main__":
    run_command("tools.experts", EXPERTS, generate)
