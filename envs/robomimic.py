"""Robomimic's manipulation tasks (Mandlekar et al., CoRL 2021) over robosuite.

Observations have robomimic's names and order: ``object`` is robosuite's ``object-state``, the others have the same
names. The low-dimensional policies of real-stanford observe several of them as one vector, ``obs``. The image of a
camera is ``CAMERA_image``, (height, width, 3) uint8, top row first. The reward is 1 at success and 0 before. An episode
ends with success or after the task's horizon, at 20 control steps per second. A seed gives the initial state. Only
images and :meth:`Robomimic.render` need a GL library.

robosuite is used directly, because robomimic 0.3's wrapper imports mujoco_py, which robosuite no longer uses.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from envs.control_steps import ControlSteps
from envs.joined import JOINED, joined_shape, parts_of
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
from parapolicy.rotation import to_axis_angle
from parapolicy.spec import PolicySpec

# name -> robosuite's name, robots, control steps until an episode is cut off (robomimic's for proficient humans)
TASKS: Mapping[str, tuple[str, int, int]] = {
    "lift": ("Lift", 1, 400),
    "can": ("PickPlaceCan", 1, 400),
    "square": ("NutAssemblySquare", 1, 400),
    "tool_hang": ("ToolHang", 1, 700),
    "transport": ("TwoArmTransport", 2, 700),
}
DELTA = ["dx", "dy", "dz", "d(rx)", "d(ry)", "d(rz)", "gripper"]  # of an arm: rotations as axis times angle
POSE = ["x", "y", "z", *(f"rotation {i + 1}" for i in range(6)), "gripper"]
PICTURE = "_image"  # suffix of the key of a camera's image


class Robomimic(ControlSteps):
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
        deltas, poses = DELTA * robots, POSE * robots
        if spec.action_dim not in (len(deltas), len(poses)):
            raise ValueError(
                f"the policy's action_dim is {spec.action_dim}, {task} expects {len(deltas)} (deltas) or {len(poses)} "
                "(absolute)"
            )
        self._absolute = spec.action_dim == len(poses)
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
        self._raw = self._simulator._get_observations()
        self._joined: list[str] = []
        given = {key: value.shape for key, value in self._parts().items()}
        if JOINED in spec.observation:
            self._joined = parts_of(spec, [key for key, shape in given.items() if len(shape) == 1])
            given[JOINED] = joined_shape(self._joined, given)
        actions, limit = (poses, np.inf) if self._absolute else (deltas, 1.0)
        super().__init__(spec, task, given, actions, CONTROL_HZ, max_episode_steps or horizon, limit)

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
        self._raw = simulator._get_observations(force_update=True)
        return self._begin(self._rest(), bool(simulator._check_success()))

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

    def _advance(self, action: np.ndarray) -> tuple[float, bool]:
        use_renderer(self._simulator)
        self._raw, _, _, _ = self._simulator.step(to_axis_angle(action) if self._absolute else action)
        success = bool(self._simulator._check_success())
        return float(success), success

    def _still(self, action: np.ndarray) -> np.ndarray:
        """The action that keeps the target: the same pose, or no motion; the gripper as commanded."""
        still = action.copy()
        if not self._absolute:
            still.reshape(-1, len(DELTA))[:, :-1] = 0
        return still

    def _rest(self) -> np.ndarray:
        """The action that stays where the arms are, grippers open."""
        if not self._absolute:
            return self._still(np.full(len(self._actions), -1.0))
        data = self._simulator.sim.data
        sites = [robot.eef_site_id["right"] for robot in self._simulator.robots]
        rows = [[*data.site_xpos[site], *data.site_xmat[site].reshape(-1)[:6], -1.0] for site in sites]
        return np.concatenate(rows)

    def _parts(self) -> dict[str, np.ndarray]:
        """robosuite's observations under robomimic's names, pictures upright."""
        named = {"object" if key == "object-state" else key: value for key, value in self._raw.items()}
        parts = {
            key: np.ascontiguousarray(value[::-1]) if key in self._pictures else np.atleast_1d(value)
            for key, value in named.items()
        }
        if self._joined:
            parts[JOINED] = np.concatenate([parts[key] for key in self._joined])
        return parts
