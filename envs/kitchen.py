"""Franka Kitchen (Gupta et al., CoRL 2019; D4RL), as gymnasium-robotics has it: four subtasks, in any order.

The reward is the share of the four subtasks that are done, so that the share of episodes whose largest reward is at
least k / 4 is the literature's p_k; an episode ends in success with the fourth, or after 280 steps at 12.5 Hz. The
initial state is always the same; a seed gives the noise of the sensors, which the simulator's controller acts on, too.
Nothing needs a GL library but :meth:`Kitchen.render`.
"""

import contextlib
import io
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from envs.control_steps import ControlSteps, Renderer
from envs.robosuite_simulator import RENDERERS
from parapolicy.spec import PolicySpec

CONTROL_HZ = 12.5
MAX_STEPS = 280  # of FrankaKitchen-v1
SUBTASKS = ("microwave", "kettle", "light switch", "slide cabinet")
ACTIONS = [*(f"joint {number}" for number in range(1, 8)), "finger 1", "finger 2"]
# key -> shape. "state" is the benchmark's own observation; "positions" is it without velocities.
OBSERVATIONS: Mapping[str, tuple[int, ...]] = {"positions": (30,), "state": (59,)}
VIEW = {"distance": 2.2, "azimuth": 70.0, "elevation": -35.0, "lookat": (-0.2, 0.5, 2.0)}


class Kitchen(ControlSteps):
    """Open the microwave, push the kettle onto a burner at the back, switch the light on, open the sliding cabinet.

    ``state`` (59,) is the arm's joints and fingers, 9 positions and 9 velocities, then 21 positions and 20 velocities
    of the objects, rad and metres; ``positions`` (30,) are those of both, all that a policy with two observation steps
    needs. An action is 9 velocities in [-1, 1], of which 1 is 2 rad/s for joints and 2 m/s for fingers, before the
    robot's limits.

    Args:
        spec: whose ``observation`` names keys of ``OBSERVATIONS``.
        max_episode_steps: control steps until an episode is cut off.
        render_size: width and height of :meth:`render`'s frames, pixels; 0: no frames.

    Raises:
        ValueError: an observation that it does not give, an action that is not nine numbers, frames are asked for and
            no GL library is there, or gymnasium-robotics is not installed.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": CONTROL_HZ}  # noqa: RUF012 gymnasium's own form

    def __init__(self, spec: PolicySpec, max_episode_steps: int = MAX_STEPS, render_size: int = 0) -> None:
        super().__init__(spec, "kitchen", dict(OBSERVATIONS), ACTIONS, CONTROL_HZ, max_episode_steps)
        self._simulator = _make_simulator(render_size)
        self._renderer = Renderer(self._simulator.model, render_size)

    @property
    def done(self) -> list[str]:
        """The subtasks done so far, in their order."""
        return list(self._simulator.episode_task_completions)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Begin an episode; ``seed`` is of the sensors' noise."""
        super().reset(seed=seed)
        if seed is None:
            seed = int(self.np_random.integers(2**31))
        observation, _ = self._simulator.reset(seed=seed)
        self._state = observation["observation"]
        return self._begin(np.zeros(len(ACTIONS)))

    def render(self) -> np.ndarray:
        """The scene from behind the robot as (render_size, render_size, 3) uint8.

        Raises:
            RuntimeError: the environment was made without a renderer.
        """
        import mujoco

        camera: Any = mujoco.MjvCamera()
        for name, value in VIEW.items():
            setattr(camera, name, value)
        return self._renderer.draw(self._simulator.data, camera)

    def close(self) -> None:
        self._renderer.close()
        self._simulator.close()

    def _advance(self, action: np.ndarray) -> tuple[float, bool]:
        observation, *_ = self._simulator.step(action)
        self._state = observation["observation"]
        return len(self.done) / len(SUBTASKS), len(self.done) == len(SUBTASKS)

    def _still(self, action: np.ndarray) -> np.ndarray:
        return np.array([*np.zeros(7), *action[7:]])

    def _parts(self) -> dict[str, np.ndarray]:
        return {"positions": np.concatenate([self._state[:9], self._state[18:39]]), "state": self._state}


def _make_simulator(render_size: int) -> Any:
    if render_size:
        os.environ.setdefault("MUJOCO_GL", "egl")  # which MuJoCo reads at its import; its default looks for a screen
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # what it says about other environments
            from gymnasium_robotics.envs.franka_kitchen import KitchenEnv
    except ModuleNotFoundError as error:
        raise ValueError(f"{error.name} is not installed; pip install 'parapolicy[eval,tasks]'") from error
    except Exception as error:  # mujoco loads the library that MUJOCO_GL names
        chosen = os.environ.get("MUJOCO_GL")
        raise ValueError(f"MuJoCo does not load with MUJOCO_GL={chosen} ({error}); {RENDERERS}") from error
    return KitchenEnv(tasks_to_complete=list(SUBTASKS))
