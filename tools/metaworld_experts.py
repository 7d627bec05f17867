"""Demonstrations by scripted experts for Meta-World: Assembly, Peg Insert Side, Push Wall; in robomimic's file format.

    python -m tools.metaworld_experts push-wall push_wall.hdf5 [--demonstrations 200 --seed 0]

The stages, grasps and clearances are those of Meta-World's own scripted experts. Those compute each action from the
observation, always in one way, and lose what they hold when they are slowed down or disturbed. Here each stage is a
target that a proportional controller follows, with a random speed per episode and temporally correlated noise on the
actions. Grasps and routes are drawn from several alternatives, so the demonstrations are multimodal. Failed attempts
are discarded.

Attempt n depends on the seed and n only. Finished attempts are in FILE.parts until the file is complete; the same
command continues an interrupted run.
"""

from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import version
from pathlib import Path

import numpy as np

from envs.metaworld import ACTION_DIM, CONTROL_HZ, OBSERVATIONS, MetaWorld
from parapolicy.spec import Feature, PolicySpec
from tools.demonstrations import Recording, check, collect, run_command

OPEN, CLOSED = -1.0, 0.8
GAIN = 20.0  # of the error in metres; 1 is 1 cm a step
NOISE = 0.06  # per step, in units of actions
NOISE_MEMORY = 0.8  # autocorrelation of the noise from step to step
MAX_STAGE = 150  # steps after which a stage has failed
WALL = (-0.02, 0.22)  # ends of the wall, x, metres
Targets = Iterator[tuple[np.ndarray, float]]  # of the hand (3,), metres, and of the gripper


def offset(x: float, y: float, z: float) -> np.ndarray:
    """(3,) metres."""
    return np.array([x, y, z])


class Scene:
    """Positions (3,) in the simulator, metres."""

    def __init__(self, env: MetaWorld) -> None:
        self._simulator = env._simulator

    @property
    def hand(self) -> np.ndarray:
        return np.array(self._simulator.get_endeff_pos())

    @property
    def object(self) -> np.ndarray:
        """Where Meta-World's observation says that the object is."""
        return np.array(self._simulator._get_pos_objects())

    @property
    def goal(self) -> np.ndarray:
        return np.array(self._simulator._target_pos)

    def site(self, name: str) -> np.ndarray:
        return np.array(self._simulator.data.site(name).xpos)


def follow(scene: Scene, target: Callable[[], np.ndarray], gripper: float, tolerance: float) -> Targets:
    """Targets until the hand is within ``tolerance`` of the target, metres.

    Raises:
        RuntimeError: it does not get there.
    """
    for _ in range(MAX_STAGE):
        wanted = target()
        if np.linalg.norm(scene.hand - wanted) < tolerance:
            return
        yield wanted, gripper
    raise RuntimeError("the hand does not reach its target")


def reach(scene: Scene, target: np.ndarray, gripper: float, tolerance: float) -> Targets:
    """:func:`follow` with a target that stays."""
    yield from follow(scene, lambda: target, gripper, tolerance)


def wait(scene: Scene, steps: int, gripper: float) -> Targets:
    """The hand stays where it is."""
    place = scene.hand
    for _ in range(steps):
        yield place, gripper


def carry(scene: Scene, held: Callable[[], np.ndarray], target: np.ndarray, tolerance: float) -> Targets:
    """:func:`follow`, closed, until what is held, at its current place in the hand, is at the target."""
    yield from follow(scene, lambda: scene.hand + target - held(), CLOSED, tolerance)


def grasp(scene: Scene, place: np.ndarray, rng: np.random.Generator) -> Targets:
    """From above; ``place`` is where the hand closes."""
    above = place + np.array([*rng.normal(0, 0.01, 2), rng.uniform(0.07, 0.12)])
    yield from reach(scene, above, OPEN, 0.03)
    yield from reach(scene, place + offset(0.0, 0.0, 0.03), OPEN, 0.012)
    yield from reach(scene, place, OPEN, 0.008)
    yield from wait(scene, int(rng.integers(14, 22)), CLOSED)


def assembly(scene: Scene, rng: np.random.Generator) -> Targets:
    """Put the wrench's ring over the peg: carry it there along a curve to one of two sides."""
    yield from grasp(scene, scene.object + offset(-0.02 + rng.uniform(-0.01, 0.01), 0.0, 0.045), rng)
    over = scene.goal + offset(0.0, 0.0, rng.uniform(0.06, 0.09))  # the ring, above the peg

    def ring() -> np.ndarray:
        return scene.site("RoundNut")

    yield from reach(scene, np.array([*scene.hand[:2], scene.hand[2] + over[2] - ring()[2]]), CLOSED, 0.03)
    aside = rng.choice([-1, 1]) * rng.uniform(0.07, 0.12)
    yield from carry(scene, ring, (ring() + over) / 2 + offset(aside, 0.0, 0.0), 0.04)
    yield from carry(scene, ring, over, 0.008)
    yield from carry(scene, ring, scene.goal - offset(0.0, 0.0, 0.05), 0.008)


def peg_insert_side(scene: Scene, rng: np.random.Generator) -> Targets:
    """Put the peg into the hole: grasp its head, middle or end, go along the table's one axis first or the other."""
    along = rng.choice([-0.035, 0.0, 0.035]) + rng.normal(0, 0.004)
    yield from grasp(scene, scene.object + offset(along, 0.0, 0.02), rng)

    def head() -> np.ndarray:
        return scene.site("pegHead")

    front = scene.goal + offset(rng.uniform(0.05, 0.08), 0.0, 0.0)
    height = front[2] - head()[2] + rng.uniform(0.0, 0.03)
    yield from reach(scene, scene.hand + offset(0.0, 0.0, height), CLOSED, 0.02)
    corner = [front[0] + 0.06, head()[1]] if rng.random() < 0.5 else [head()[0], front[1]]
    yield from carry(scene, head, np.array([*corner, head()[2]]), 0.03)
    yield from carry(scene, head, front, 0.01)
    yield from carry(scene, head, scene.goal - offset(0.05, 0.0, 0.0), 0.008)


def push_wall(scene: Scene, rng: np.random.Generator) -> Targets:
    """Push the puck to its goal behind the wall, around the wall's left end or its right."""
    yield from grasp(scene, scene.object + offset(-0.005, 0.0, 0.037), rng)
    side = WALL[0] - rng.uniform(0.06, 0.1) if rng.random() < 0.5 else WALL[1] + rng.uniform(0.06, 0.1)
    height = scene.object[2]

    def puck() -> np.ndarray:
        return scene.object

    for corner in ([side, rng.uniform(0.66, 0.69)], [side, rng.uniform(0.79, 0.83)]):
        yield from carry(scene, puck, np.array([*corner, height]), 0.03)
    yield from carry(scene, puck, np.array([*scene.goal[:2], height]), 0.008)


EXPERTS: Mapping[str, Callable[[Scene, np.random.Generator], Targets]] = {
    "assembly": assembly,
    "peg-insert-side": peg_insert_side,
    "push-wall": push_wall,
}


def attempt(env: MetaWorld, task: str, seed: int) -> tuple[bool, dict[str, np.ndarray]]:
    """Run one episode of an expert.

    Returns:
        Whether it succeeded, and arrays over its T steps: ``actions`` (T, 4), ``states`` (T, …), the simulator's time,
        positions and velocities before each action, ``rewards`` and ``dones`` (T,), and the observations before each
        action, ``obs/<name>`` (T, …).
    """
    rng = np.random.default_rng(seed)
    observation, _ = env.reset(seed=seed)
    scene = Scene(env)
    speed = rng.uniform(0.6, 0.95)
    noise = np.zeros(ACTION_DIM - 1)
    recording = Recording()
    try:
        for target, gripper in EXPERTS[task](scene, rng):
            noise = NOISE_MEMORY * noise + rng.normal(0, NOISE, ACTION_DIM - 1)
            motion = GAIN * (target - scene.hand)
            motion *= min(1.0, speed / max(float(np.linalg.norm(motion)), 1e-9))
            action = np.clip(np.append(motion + noise, gripper), -1, 1)
            data = env._simulator.data
            state = np.concatenate([[data.time], data.qpos, data.qvel])
            observation, over = recording.step(env, observation, action, state)
            if over:
                break
    except RuntimeError:
        return False, recording.arrays()
    return recording.success, recording.arrays()


def make_expert_env(task: str) -> MetaWorld:
    """The environment for the expert of ``task``, with all observations.

    Raises:
        ValueError: a task without an expert.
    """
    if task not in EXPERTS:
        raise ValueError(f"task is {task!r}, expected one of {list(EXPERTS)}, those that have an expert")
    observation = {key: Feature(shape) for key, shape in OBSERVATIONS.items()}
    return MetaWorld(PolicySpec(observation, 1, 1, 1, ACTION_DIM, {}, {}, control_hz=CONTROL_HZ), task)


def generate(task: str, output: str | Path, demonstrations: int = 200, seed: int = 0) -> tuple[int, list[int]]:
    """Write the first successful attempts of an expert as a robomimic HDF5 file; see :func:`tools.experts.generate`.

    A demonstration's attribute ``seed`` gives its initial state.
    """
    output = Path(output)
    check(output, demonstrations)
    env = make_expert_env(task)
    about = {"env_name": f"{task}-v3", "env_version": version("metaworld"), "type": 2, "env_kwargs": {}}  # 2: gymnasium
    doubt = "is Meta-World 3.0 used?"
    return collect(lambda own: attempt(env, task, own), task, output, demonstrations, seed, about, doubt)


if __name__ == "__main__":
    run_command("tools.metaworld_experts", EXPERTS, generate)
