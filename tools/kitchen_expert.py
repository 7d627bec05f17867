"""Demonstrations by a scripted expert for Franka Kitchen, in robomimic's file format.

    python -m tools.kitchen_expert kitchen kitchen.hdf5 [--demonstrations 200 --seed 0]

The expert does the four subtasks in a random order. Each is a path of the hand, which keeps its direction: hook the
microwave's handle and pull it along the door's arc; push the kettle forward with both fingertips; press the light
switch and the cabinet's handle sideways. Damped least squares turn the hand's velocity into velocities of the joints,
with a random speed per episode and noise that persists from step to step. Failed attempts are discarded.

Attempt n depends on the seed and n only. Finished attempts are in FILE.parts until the file is complete; the same
command continues an interrupted run.
"""

from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import version
from pathlib import Path

import numpy as np
from scipy.spatial.transform import Rotation

from envs.kitchen import ACTIONS, CONTROL_HZ, OBSERVATIONS, SUBTASKS, Kitchen
from parapolicy.spec import Feature, PolicySpec
from tools.demonstrations import Recording, check, collect, run_command

OPEN, CLOSED = 1.0, -1.0
JOINTS = 7
MAX_SPEED = 2.0  # rad/s of a joint, at an action of 1
GAIN, TURN_GAIN, POSTURE_GAIN = 7.0, 1.75, 0.5  # 1/s
SUM_GAIN, SUM_LIMIT, SUM_RANGE = 0.4, 0.4, 0.12  # of the error's sum, against gravity: 1/s, m/s, and m where it is used
DAMPING = 0.01  # of the least squares
NOISE = 0.02  # per step, in units of actions
NOISE_MEMORY = 0.8  # autocorrelation of the noise from step to step
MAX_STAGE = 45  # steps after which a stage goes on to the next
Steps = Iterator[np.ndarray]  # of actions (9,)


class Arm:
    """The hand's place, and actions that move it.

    Args:
        env: just reset; the hand keeps its direction of now.
        speed: m/s of the hand at most.
    """

    def __init__(self, env: Kitchen, speed: float) -> None:
        import mujoco

        self.env, self.speed, self._mujoco = env, speed, mujoco
        self.model, self.data = env._simulator.model, env._simulator.data
        self._direction, self._posture = self.rotation, self.data.qpos[:JOINTS].copy()
        self._sum = np.zeros(3)

    @property
    def hand(self) -> np.ndarray:
        return np.array(self.data.site("end_effector").xpos)

    @property
    def rotation(self) -> np.ndarray:
        return np.array(self.data.site("end_effector").xmat).reshape(3, 3)

    def site(self, name: str) -> np.ndarray:
        return np.array(self.data.site(name).xpos)

    def action(self, target: np.ndarray, gripper: float, speed: float | None = None) -> np.ndarray:
        """The action (9,) that moves the hand towards a target (3,), metres."""
        error = target - self.hand
        if np.linalg.norm(error) < SUM_RANGE:
            self._sum = np.clip(self._sum + SUM_GAIN * error, -SUM_LIMIT, SUM_LIMIT)
        velocity = GAIN * error
        velocity *= min(1.0, (speed or self.speed) / max(float(np.linalg.norm(velocity)), 1e-9))
        turn = Rotation.from_matrix(self._direction @ self.rotation.T).as_rotvec()
        places, turns = np.zeros((2, 3, self.model.nv))
        self._mujoco.mj_jacSite(self.model, self.data, places, turns, self.data.site("end_effector").id)
        jacobian = np.vstack([places, turns / 2])[:, :JOINTS]
        wanted = np.concatenate([velocity + self._sum, TURN_GAIN * turn / 2])
        joints = jacobian.T @ np.linalg.solve(jacobian @ jacobian.T + DAMPING * np.eye(6), wanted)
        free = np.eye(JOINTS) - np.linalg.pinv(jacobian) @ jacobian
        joints += free @ (POSTURE_GAIN * (self._posture - self.data.qpos[:JOINTS]))
        return np.concatenate([joints / MAX_SPEED, [gripper, gripper]])

    def reach(
        self,
        target: Callable[[], np.ndarray] | np.ndarray,
        gripper: float = CLOSED,
        tolerance: float = 0.03,
        until: str | None = None,
        speed: float | None = None,
    ) -> Steps:
        """Actions until the hand is there, or the subtask ``until`` is done."""
        self._sum /= 2
        for _ in range(MAX_STAGE):
            place = target() if callable(target) else target
            if np.linalg.norm(self.hand - place) < tolerance or until in self.env.done:
                return
            yield self.action(place, gripper, speed)

    def retreat(self) -> Steps:
        yield from self.reach(self.hand - [0, 0.12, 0], tolerance=0.06)


def microwave(arm: Arm, rng: np.random.Generator) -> Steps:
    """Close the fingers around the handle, and pull it along the door's arc."""
    handle, hinge = arm.site("microhandle_site"), np.array(arm.data.body("microdoorroot").xpos)
    handle[2] += rng.uniform(0.0, 0.03)
    yield from arm.reach(handle - [0, 0.15, 0], OPEN, 0.05)
    yield from arm.reach(handle, OPEN, 0.045)
    for _ in range(6):
        yield arm.action(arm.hand, CLOSED)
    held, along = arm.hand - handle, handle - hinge
    enough = -rng.uniform(0.55, 0.7)
    for _ in range(MAX_STAGE):
        angle = float(arm.data.joint("microwave").qpos[0])
        if angle < enough:
            break
        yield arm.action(hinge + Rotation.from_euler("z", angle - 0.25).apply(along) + held, CLOSED)
    for _ in range(3):
        yield arm.action(arm.hand, OPEN)
    yield from arm.retreat()


def kettle(arm: Arm, rng: np.random.Generator) -> Steps:
    """Push it forward with open fingers, whose two points keep it from turning."""
    aside, height = rng.normal(0, 0.005), rng.uniform(1.69, 1.74)

    def ahead() -> np.ndarray:
        x = arm.data.body("kettle").xpos[0] + aside
        return np.array([2 * x - arm.hand[0], arm.hand[1] + 0.15, height])

    yield from arm.reach(np.array([arm.data.body("kettle").xpos[0] + aside, 0.13, height]), OPEN, 0.08)
    yield from arm.reach(ahead, OPEN, until="kettle")
    yield from arm.retreat()


def light_switch(arm: Arm, rng: np.random.Generator) -> Steps:
    """Press it to the left."""
    switch = arm.site("light_site") + np.array([0.08 + rng.uniform(-0.01, 0.01), 0.02, 0.03])
    yield from arm.reach(switch - [0, 0.15, 0], tolerance=0.06)
    yield from arm.reach(switch, tolerance=0.045)
    yield from arm.reach(switch - [0.2, 0.0, 0.0], until="light switch")
    yield from arm.retreat()


def slide_cabinet(arm: Arm, rng: np.random.Generator) -> Steps:
    """Press its handle to the right."""
    handle = arm.site("slide_site")
    handle += [-0.08 + rng.uniform(-0.01, 0.01), 0.0, rng.uniform(-0.03, 0.0)]
    yield from arm.reach(handle - [0, 0.15, 0], tolerance=0.06)
    yield from arm.reach(handle, tolerance=0.04)
    yield from arm.reach(handle + np.array([0.38, 0.0, 0.0]), until="slide cabinet")
    yield from arm.retreat()


PATHS: Mapping[str, Callable[[Arm, np.random.Generator], Steps]] = {
    "microwave": microwave,
    "kettle": kettle,
    "light switch": light_switch,
    "slide cabinet": slide_cabinet,
}


def attempt(env: Kitchen, seed: int) -> tuple[bool, dict[str, np.ndarray]]:
    """Run one episode of the expert.

    Returns:
        Whether all four subtasks were done, and arrays over its T steps: ``actions`` (T, 9), ``states`` (T, …), the
        simulator's time, positions and velocities before each action, ``rewards`` and ``dones`` (T,), and the
        observations before each action, ``obs/<name>`` (T, …).
    """
    rng = np.random.default_rng(seed)
    observation, _ = env.reset(seed=seed)
    arm = Arm(env, rng.uniform(1.2, 1.6))
    noise = np.zeros(JOINTS)
    recording = Recording()
    for subtask in rng.permutation(SUBTASKS):
        for action in PATHS[subtask](arm, rng):
            noise = NOISE_MEMORY * noise + rng.normal(0, NOISE, JOINTS)
            action = np.clip(action + np.append(noise, [0.0, 0.0]), -1, 1)
            state = np.concatenate([[arm.data.time], arm.data.qpos, arm.data.qvel])
            observation, over = recording.step(env, observation, action, state)
            if over:
                return recording.success, recording.arrays()
    return recording.success, recording.arrays()


def make_expert_env() -> Kitchen:
    """The environment for the expert, with all observations."""
    observation = {key: Feature(shape) for key, shape in OBSERVATIONS.items()}
    return Kitchen(PolicySpec(observation, 1, 1, 1, len(ACTIONS), {}, {}, control_hz=CONTROL_HZ))


def generate(task: str, output: str | Path, demonstrations: int = 200, seed: int = 0) -> tuple[int, list[int]]:
    """Write the first successful attempts as a robomimic HDF5 file; see :func:`tools.experts.generate`.

    A demonstration's attribute ``seed`` gives its initial state.
    """
    output = Path(output)
    check(output, demonstrations)
    env = make_expert_env()
    about = {
        "env_name": "FrankaKitchen-v1",
        "env_version": version("gymnasium-robotics"),
        "type": 2,  # robomimic's code for gymnasium
        "env_kwargs": {"tasks_to_complete": list(SUBTASKS)},
    }
    doubt = "is gymnasium-robotics 1.4 used?"
    return collect(lambda own: attempt(env, own), task, output, demonstrations, seed, about, doubt)


if __name__ == "__main__":
    run_command("tools.kitchen_expert", ["kitchen"], generate)
