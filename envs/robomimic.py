"""Robomimic's manipulation tasks (Mandlekar et al., CoRL 2021) over robosuite.

Observations have robomimic's names and order: ``object`` is robosuite's ``object-state``, the others have the same
names. The image of a camera is ``CAMERA_image``, (height, width, 3) uint8, top row first. The reward is 1 at success
and 0 before. An episode ends with success or after the task's horizon, at 20 control steps per second. A seed gives the
initial state. Only images and :meth:`Robomimic.render` need a GL library.

robosuite is used directly, because robomimic 0.3's wrapper imports mujoco_py, which robosuite no longer uses.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

from envs.robosuite_simulator import (
    CONTROL_HZ,
    absolute_controllers,
    default_arguments,
    free_renderer,
    make_simulator,
    placement_samplers,
    read_arguments,
    use_renderer,
)
from parapolicy.rotation import POSE_6D_DIM, to_axis_angle
from parapolicy.spec import PolicySpec

# name -> robosuite's name, robots, control steps until an episode is cut off (robomimic's for proficient humans)
TASKS: Mapping[str, tuple[str, int, int]] = {
    "lift": ("Lift", 1, 400),
    "can": ("PickPlaceCan", 1, 400),
    "square": ("NutAssemblySquare", 1, 400),
    "tool_hang": ("ToolHang", 1, 700),
    "transport": ("TwoArmTransport", 2, 700),
}
Result = tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]
ARM_DIM = 7  # numbers of an action per arm
PICTURE = "_image"  # suffix of the key of a camera's image


class Robomimic(gymnasium.Env):
    """One of robomimic's tasks.

    A policy's ``action_dim`` determines the kind of actions. With 7 numbers per arm they are those of the data sets:
    position and axis-angle deltas in [-1, 1], and the gripper. With 10 they are absolute, as in Diffusion Policy: the
    gripper's position, metres, and rotation (:mod:`parapolicy.rotation`) in the world's frame, and the gripper.

    Args:
        spec: its ``observation`` has robomimic's keys. Its images determine the drawn cameras and their sizes.
        task: a name of ``TASKS``.
        max_episode_steps: control steps until an episode is cut off; None: the task's.
        dataset: a robomimic HDF5 file whose ``env_args`` build the environment; None: the task's defaults.
        render_size: width and height of :meth:`render`'s frames, pixels; 0: no frames.

    Raises:
        ValueError: an unknown task, an observation that the task does not have, an action that does not fit, or images
            without a GL library.
        DataError: the data set is not robomimic's.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": CONTROL_HZ}  # noqa: RUF012 gymnasium's own form
    render_mode = "rgb_array"

    def __init__(
        self,
        spec: PolicySpec,
        task: str = "lift",
        max_episode_steps: int | None = None,
        dataset: str | None = None,
        render_size: int = 0,
    ) -> None:
        if task not in TASKS:
            raise ValueError(f"task is {task!r}, expected one of {list(TASKS)}")
        name, robots, horizon = TASKS[task]
        self._max_steps = max_episode_steps or horizon
        deltas, poses = ARM_DIM * robots, POSE_6D_DIM * robots
        if spec.action_dim not in (deltas, poses):
            raise ValueError(
                f"the policy's action_dim is {spec.action_dim}, {task} expects {deltas} (deltas) or {poses} (absolute)"
            )
        self._absolute, self._action_dim = spec.action_dim == poses, spec.action_dim
        arguments = default_arguments(robots) if dataset is None else read_arguments(Path(dataset), name)
        if self._absolute:
            arguments = arguments | {"controller_configs": absolute_controllers(arguments["controller_configs"])}
        self._pictures = [key for key, feature in spec.observation.items() if feature.kind == "image"]
        if odd := [key for key in self._pictures if not key.endswith(PICTURE)]:
            raise ValueError(
                f"the policy observes the images {odd}, expected CAMERA_image for {task}, such as agentview_image"
            )
        cameras: dict[str, tuple[int, int]] = {}
        for key in self._pictures:
            height, width, _ = spec.observation[key].shape
            cameras[key.removesuffix(PICTURE)] = height, width
        self._simulator = make_simulator(name, arguments, render_size, cameras)
        self._render_size = render_size
        self._keys = list(spec.observation)
        given = {key: value.shape for key, value in self._read(self._simulator._get_observations()).items()}
        for key, (shape, *_) in spec.observation.items():
            if given.get(key) != shape:
                raise ValueError(f"the policy observes {key!r} with shape {shape}, expected one of {given} for {task}")
        self.action_space = spaces.Box(-np.inf, np.inf, (spec.action_dim,), np.float32)
        self.observation_space = spaces.Dict(
            {
                key: spaces.Box(0, 255, given[key], np.uint8)
                if key in self._pictures
                else spaces.Box(-np.inf, np.inf, given[key], np.float32)
                for key in self._keys
            }
        )
        self._steps, self._owed = 0, 0.0
        self._last = self._rest()

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Begin an episode.

        Args:
            seed: of the initial state.
            options: ``{"state": (n,)}`` starts from a simulator state recorded in a data set instead.
        """
        super().reset(seed=seed)
        simulator = self._simulator
        if seed is not None:
            simulator.rng = np.random.default_rng(seed)
            for sampler in placement_samplers(simulator.placement_initializer):
                sampler.rng = simulator.rng
        free_renderer(simulator)
        simulator.reset()  # makes a new simulator and a new renderer
        if options is not None and "state" in options:
            state = np.asarray(options["state"], dtype=np.float64)
            expected = simulator.sim.get_state().flatten().shape
            if state.shape != expected or not np.isfinite(state).all():
                raise ValueError(f"state has shape {state.shape}, expected {expected}, finite numbers")
            simulator.sim.set_state_from_flattened(state)
            simulator.sim.forward()
            for robot in simulator.robots:  # set the arms' rest posture, drawn by the reset, to that of the state
                arm = robot.composite_controller.part_controllers["right"]
                arm.update_initial_joints(simulator.sim.data.qpos[arm.qpos_index])
        # Poses relative to the gripper use those of the previous update, which must also be of this state.
        simulator._get_observations(force_update=True)
        raw = simulator._get_observations(force_update=True)
        self._steps, self._owed = 0, 0.0
        self._last = self._rest()
        return self._observe(raw), {"is_success": self._success()}

    def step(self, action: Any) -> Result:
        """One control step with ``action`` (Da,)."""
        given = np.asarray(action, dtype=np.float64)
        if given.shape != (self._action_dim,) or not np.isfinite(given).all():
            raise ValueError(f"action is {action!r}, expected {self._action_dim} finite numbers")
        self._last = self._still(given)
        return self._run(given)

    def hold(self, seconds: float) -> Result:
        """Run the simulation for ``seconds`` while the arm keeps its target.

        Only whole control steps are run; a remainder is added to the next call.
        """
        self._owed += seconds * CONTROL_HZ
        count = int(self._owed + 1e-6)
        self._owed -= count
        success = self._success()
        observation = self._observe(self._simulator._get_observations())
        result: Result = (observation, float(success), success, self._steps >= self._max_steps, {"is_success": success})
        for _ in range(count):
            if result[2] or result[3]:
                break
            result = self._run(self._last)
        return result

    def render(self) -> np.ndarray:
        """The scene from the front as (render_size, render_size, 3) uint8.

        Raises:
            RuntimeError: the environment was made without a renderer.
        """
        if not self._render_size:
            raise RuntimeError("this environment has no renderer; set render_size (env.options.render_size=256)")
        use_renderer(self._simulator)
        frame = self._simulator.sim.render(camera_name="agentview", width=self._render_size, height=self._render_size)
        return np.asarray(frame[::-1])

    def close(self) -> None:
        free_renderer(self._simulator)
        self._simulator.close()

    def _run(self, action: np.ndarray) -> Result:
        use_renderer(self._simulator)
        raw, _, _, _ = self._simulator.step(to_axis_angle(action) if self._absolute else np.clip(action, -1, 1))
        self._steps += 1
        success = self._success()
        return self._observe(raw), float(success), success, self._steps >= self._max_steps, {"is_success": success}

    def _success(self) -> bool:
        return bool(self._simulator._check_success())

    def _still(self, action: np.ndarray) -> np.ndarray:
        """The action that keeps the target: the same pose, or no motion; the gripper as commanded."""
        still = action.copy()
        if not self._absolute:
            still.reshape(-1, ARM_DIM)[:, :-1] = 0
        return still

    def _rest(self) -> np.ndarray:
        """The action that stays where the arms are, grippers open."""
        if not self._absolute:
            return self._still(np.full(self._action_dim, -1.0))
        data = self._simulator.sim.data
        sites = [robot.eef_site_id["right"] for robot in self._simulator.robots]
        rows = [[*data.site_xpos[site], *data.site_xmat[site].reshape(-1)[:6], -1.0] for site in sites]
        return np.concatenate(rows)

    def _read(self, raw: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """robosuite's observations under robomimic's names, pictures upright."""
        named = {"object" if key == "object-state" else key: value for key, value in raw.items()}
        return {
            key: np.ascontiguousarray(value[::-1])
            if key in self._pictures
            else np.atleast_1d(np.asarray(value, dtype=np.float32))
            for key, value in named.items()
        }

    def _observe(self, raw: Mapping[str, Any]) -> dict[str, np.ndarray]:
        read = self._read(raw)
        return {key: read[key] for key in self._keys}
