"""Meta-World's manipulation tasks (Yu et al., CoRL 2019; McLean et al., 2025), version 3, with the goal observed.

The simulator runs at 80 control steps per second. The reward is 1 at success and 0 before, as in
:mod:`envs.robomimic`, not Meta-World's own dense reward; an episode ends with success or after 500 steps. A seed gives
the places of object and goal. Nothing needs a GL library but :meth:`MetaWorld.render`.
"""

import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from envs.control_steps import ControlSteps, Renderer
from envs.robosuite_simulator import RENDERERS
from parapolicy.spec import PolicySpec

CONTROL_HZ = 80  # five steps of 2.5 ms each
MAX_STEPS = 500  # the benchmark's
ACTIONS = ["x", "y", "z", "gripper"]
ACTION_DIM = len(ACTIONS)
VERSION = "-v3"  # ends the names of the tasks
CAMERA, CAMERA_PLACE = "corner2", (0.75, 0.075, 0.7)  # nearer than Meta-World's, which shows mostly floor
# key -> shape. "state" is Meta-World's own observation: the current frame, the frame before, the goal.
OBSERVATIONS: Mapping[str, tuple[int, ...]] = {"frame": (18,), "goal": (3,), "relative": (6,), "state": (39,)}


class MetaWorld(ControlSteps):
    """One of Meta-World's tasks.

    ``frame`` (18,) is the gripper's position, metres, its opening, and position and quaternion of the task's one or two
    objects, zeros for the second where there is one; ``goal`` (3,) is where it has to go, metres. A policy with two
    observation steps needs no more, but learns faster with ``relative`` (6,): object from gripper, goal from object,
    metres. ``state`` (39,) is frame, frame before and goal, as in Meta-World's own observation.
    An action is the motion of the gripper's target, (3,) in [-1, 1] for ±1 cm, and how hard the fingers press, in
    [-1, 1]; -1 opens them.

    Args:
        spec: whose ``observation`` names keys of ``OBSERVATIONS``.
        task: Meta-World's name, with or without ``-v3``.
        max_episode_steps: control steps until an episode is cut off.
        render_size: width and height of :meth:`render`'s frames, pixels; 0: no frames.

    Raises:
        ValueError: an unknown task, an observation that it does not give, an action that is not four numbers, frames
            are asked for and no GL library is there, or Meta-World is not installed.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": CONTROL_HZ}  # noqa: RUF012 gymnasium's own form

    def __init__(
        self, spec: PolicySpec, task: str = "assembly", max_episode_steps: int = MAX_STEPS, render_size: int = 0
    ) -> None:
        super().__init__(spec, task, dict(OBSERVATIONS), ACTIONS, CONTROL_HZ, max_episode_steps)
        simulator = _make_simulator(task.removesuffix(VERSION), render_size)
        # As Meta-World's own classes with an observed goal do it; but every reset draws anew, from its own generator.
        simulator._partially_observable = False
        del simulator.sawyer_observation_space  # which is cached, and clips the goal to zero
        simulator._set_task_called = True
        simulator._freeze_rand_vec, simulator.seeded_rand_vec = False, True
        simulator.max_path_length = np.inf  # this class counts
        simulator.model.camera(CAMERA).pos = CAMERA_PLACE
        self._simulator = simulator
        self._renderer = Renderer(simulator.model, render_size)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Begin an episode at the places of object and goal that ``seed`` gives."""
        super().reset(seed=seed)
        self._simulator.np_random = np.random.default_rng(seed) if seed is not None else self.np_random
        self._state, _ = self._simulator.reset()
        return self._begin(np.array([0.0, 0.0, 0.0, -1.0]))  # fingers open

    def render(self) -> np.ndarray:
        """The scene from a corner as (render_size, render_size, 3) uint8.

        Raises:
            RuntimeError: the environment was made without a renderer.
        """
        frame = self._renderer.draw(self._simulator.data, CAMERA)
        return np.ascontiguousarray(frame[::-1])  # the camera hangs upside down

    def close(self) -> None:
        self._renderer.close()
        self._simulator.close()

    def _advance(self, action: np.ndarray) -> tuple[float, bool]:
        self._state, _, _, _, info = self._simulator.step(action)
        return float(info["success"]), bool(info["success"])

    def _still(self, action: np.ndarray) -> np.ndarray:
        return np.array([0.0, 0.0, 0.0, action[3]])

    def _parts(self) -> dict[str, np.ndarray]:
        state = self._state
        hand, thing, goal = state[:3], state[4:7], state[-3:]
        relative = np.concatenate([thing - hand, goal - thing])
        return {"frame": state[:18], "goal": goal, "relative": relative, "state": state}


def _make_simulator(task: str, render_size: int) -> Any:
    if render_size:
        os.environ.setdefault("MUJOCO_GL", "egl")  # which MuJoCo reads at its import; its default looks for a screen
    try:
        from metaworld.env_dict import ALL_V3_ENVIRONMENTS
    except ModuleNotFoundError as error:
        raise ValueError(f"{error.name} is not installed; pip install 'parapolicy[eval,tasks]'") from error
    except Exception as error:  # mujoco loads the library that MUJOCO_GL names
        chosen = os.environ.get("MUJOCO_GL")
        raise ValueError(f"MuJoCo does not load with MUJOCO_GL={chosen} ({error}); {RENDERERS}") from error
    known = {name.removesuffix(VERSION): build for name, build in ALL_V3_ENVIRONMENTS.items()}
    if task not in known:
        raise ValueError(f"task is {task!r}, expected one of {list(known)}")
    return known[task]()
