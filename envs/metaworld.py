"""Meta-World's manipulation tasks (Yu et al., CoRL 2019; McLean et al., 2025), version 3, with the goal observed.

The simulator runs at 80 control steps per second. The reward is 1 at success and 0 before, as in
:mod:`envs.robomimic`, not Meta-World's own dense reward; an episode ends with success or after 500 steps. A seed gives
the places of object and goal. Nothing needs a GL library but :meth:`MetaWorld.render`.
"""

import os
from collections.abc import Mapping
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

from envs.robosuite_simulator import RENDERERS
from parapolicy.spec import PolicySpec

CONTROL_HZ = 80  # five steps of 2.5 ms each
MAX_STEPS = 500  # the benchmark's
ACTION_DIM = 4
VERSION = "-v3"  # ends the names of the tasks
CAMERA, CAMERA_PLACE = "corner2", (0.75, 0.075, 0.7)  # nearer than Meta-World's, which shows mostly floor
# key -> shape. "state" is Meta-World's own observation: the current frame, the frame before, the goal.
OBSERVATIONS: Mapping[str, tuple[int, ...]] = {"frame": (18,), "goal": (3,), "state": (39,)}
Result = tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]


class MetaWorld(gymnasium.Env):
    """One of Meta-World's tasks.

    ``frame`` (18,) is the gripper's position, metres, its opening, and position and quaternion of the task's one or two
    objects, zeros for the second where there is one; ``goal`` (3,) is where it has to go, metres. A policy with two
    observation steps needs no more. ``state`` (39,) is both and the frame before, as in Meta-World's own observation.
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
    render_mode = "rgb_array"

    def __init__(
        self, spec: PolicySpec, task: str = "assembly", max_episode_steps: int = MAX_STEPS, render_size: int = 0
    ) -> None:
        for key, (shape, *_) in spec.observation.items():
            if OBSERVATIONS.get(key) != shape:
                raise ValueError(f"the policy observes {key!r} with shape {shape}; {task} gives {dict(OBSERVATIONS)}")
        if spec.action_dim != ACTION_DIM:
            raise ValueError(f"the policy's action_dim is {spec.action_dim}; {task} takes 4: x, y, z, gripper")
        self._keys = list(spec.observation)
        self._max_steps = max_episode_steps
        simulator = _make_simulator(task.removesuffix(VERSION), render_size)
        # As Meta-World's own classes with an observed goal do it; but every reset draws anew, from its own generator.
        simulator._partially_observable = False
        del simulator.sawyer_observation_space  # which is cached, and clips the goal to zero
        simulator._set_task_called = True
        simulator._freeze_rand_vec, simulator.seeded_rand_vec = False, True
        simulator.max_path_length = np.inf  # this class counts
        self._simulator = simulator
        self._renderer = self._make_renderer(render_size) if render_size else None
        self.action_space = spaces.Box(-1, 1, (ACTION_DIM,), np.float32)
        self.observation_space = spaces.Dict(
            {key: spaces.Box(-np.inf, np.inf, OBSERVATIONS[key], np.float32) for key in self._keys}
        )

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Begin an episode at the places of object and goal that ``seed`` gives."""
        super().reset(seed=seed)
        self._simulator.np_random = np.random.default_rng(seed) if seed is not None else self.np_random
        self._state, _ = self._simulator.reset()
        self._steps, self._owed, self._success = 0, 0.0, False
        self._last = np.array([0.0, 0.0, 0.0, -1.0])  # stays, fingers open
        return self._observe(), {"is_success": False}

    def step(self, action: Any) -> Result:
        """One control step with ``action`` (4,)."""
        given = np.asarray(action, dtype=np.float64)
        if given.shape != (ACTION_DIM,) or not np.isfinite(given).all():
            raise ValueError(f"action is {action!r}, expected {ACTION_DIM} finite numbers: x, y, z, gripper")
        self._last = np.array([0.0, 0.0, 0.0, given[3]])
        return self._run(given)

    def hold(self, seconds: float) -> Result:
        """Let the world run while the hand keeps its target: in whole control steps; a rest is carried on."""
        self._owed += seconds * CONTROL_HZ
        count = int(self._owed + 1e-6)
        self._owed -= count
        result = self._result()
        for _ in range(count):
            if result[2] or result[3]:
                break
            result = self._run(self._last)
        return result

    def render(self) -> np.ndarray:
        """The scene from a corner as (render_size, render_size, 3) uint8.

        Raises:
            RuntimeError: the environment was made without a renderer.
        """
        if self._renderer is None:
            raise RuntimeError("this environment has no renderer; set render_size (env.options.render_size=256)")
        self._renderer.update_scene(self._simulator.data, camera=CAMERA)
        return np.ascontiguousarray(self._renderer.render()[::-1])  # the camera hangs upside down

    def close(self) -> None:
        if self._renderer is not None:
            self._renderer.close()
        self._simulator.close()

    def _make_renderer(self, size: int) -> Any:
        """MuJoCo's own: gymnasium's does not keep several environments' GL contexts apart."""
        self._simulator.model.camera(CAMERA).pos = CAMERA_PLACE
        try:
            import mujoco

            return mujoco.Renderer(self._simulator.model, size, size)
        except Exception as error:  # GL's are of many kinds
            raise ValueError(f"render_size is {size}, but there is no renderer ({error!r}); {RENDERERS}") from error

    def _run(self, action: np.ndarray) -> Result:
        self._state, _, _, _, info = self._simulator.step(np.clip(action, -1, 1))
        self._steps += 1
        self._success = bool(info["success"])
        return self._result()

    def _result(self) -> Result:
        success = self._success
        return self._observe(), float(success), success, self._steps >= self._max_steps, {"is_success": success}

    def _observe(self) -> dict[str, np.ndarray]:
        state = self._state.astype(np.float32)
        parts = {"frame": state[:18], "goal": state[-3:], "state": state}
        return {key: parts[key].copy() for key in self._keys}


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
