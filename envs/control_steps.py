"""What environments of arms have in common whose world moves in whole control steps."""

from abc import abstractmethod
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

from envs.robosuite_simulator import RENDERERS
from parapolicy.spec import PolicySpec

Result = tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]


class ControlSteps(gymnasium.Env):
    """Counts control steps, refuses bad actions, and lets the world run without an action.

    Args:
        spec: of the policy, which observes some of ``observations``; its images are uint8, all else is float32.
        name: of the task, for errors.
        observations: key -> shape of what there is.
        actions: what the numbers of an action are.
        control_hz: control steps per second.
        max_episode_steps: control steps until an episode is cut off.
        limit: an action's numbers are clipped to [-limit, limit].

    Raises:
        ValueError: an observation that is not there, or an action that does not fit.
    """

    render_mode = "rgb_array"

    def __init__(
        self,
        spec: PolicySpec,
        name: str,
        observations: dict[str, tuple[int, ...]],
        actions: list[str],
        control_hz: float,
        max_episode_steps: int,
        limit: float = 1.0,
    ) -> None:
        for key, (shape, *_) in spec.observation.items():
            if observations.get(key) != shape:
                raise ValueError(f"the policy observes {key!r} with shape {shape}; {name} gives {observations}")
        if spec.action_dim != len(actions):
            raise ValueError(
                f"the policy's action_dim is {spec.action_dim}; {name} takes {len(actions)}: {', '.join(actions)}"
            )
        self._actions, self._control_hz, self._max_steps, self._limit = actions, control_hz, max_episode_steps, limit
        self._kinds: dict[str, type] = {
            key: np.uint8 if feature.kind == "image" else np.float32 for key, feature in spec.observation.items()
        }
        self.action_space = spaces.Box(-limit, limit, (len(actions),), np.float32)
        self.observation_space = spaces.Dict(
            {
                key: spaces.Box(0, 255, observations[key], kind)
                if kind is np.uint8
                else spaces.Box(-np.inf, np.inf, observations[key], kind)
                for key, kind in self._kinds.items()
            }
        )

    @abstractmethod
    def _advance(self, action: np.ndarray) -> tuple[float, bool]:
        """One control step with an action within the limit; returns the reward and whether the task is done."""

    @abstractmethod
    def _still(self, action: np.ndarray) -> np.ndarray:
        """The action after ``action`` that moves nothing further."""

    @abstractmethod
    def _parts(self) -> dict[str, np.ndarray]:
        """All observations by key."""

    def _begin(self, still: np.ndarray, success: bool = False) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """What ``reset`` returns; ``still`` is the action that moves nothing."""
        self._steps, self._owed = 0, 0.0
        self._reward, self._success = float(success), success
        self._last = still
        return self._observe(), {"is_success": success}

    def step(self, action: Any) -> Result:
        """One control step with ``action`` (Da,)."""
        given = np.asarray(action, dtype=np.float64)
        if given.shape != (len(self._actions),) or not np.isfinite(given).all():
            expected = f"{len(self._actions)} finite numbers: {', '.join(self._actions)}"
            raise ValueError(f"action is {action!r}, expected {expected}")
        self._last = self._still(given)
        return self._run(given)

    def hold(self, seconds: float) -> Result:
        """Let the world run while nothing new is commanded: in whole control steps; a rest is carried on."""
        self._owed += seconds * self._control_hz
        count = int(self._owed + 1e-6)
        self._owed -= count
        result = self._result()
        for _ in range(count):
            if result[2] or result[3]:
                break
            result = self._run(self._last)
        return result

    def _run(self, action: np.ndarray) -> Result:
        self._reward, self._success = self._advance(np.clip(action, -self._limit, self._limit))
        self._steps += 1
        return self._result()

    def _result(self) -> Result:
        over = self._steps >= self._max_steps
        return self._observe(), self._reward, self._success, over, {"is_success": self._success}

    def _observe(self) -> dict[str, np.ndarray]:
        parts = self._parts()
        return {key: parts[key].astype(kind, copy=False) for key, kind in self._kinds.items()}


class Renderer:
    """MuJoCo's own: gymnasium's does not keep several environments' GL contexts apart.

    Args:
        model: of MuJoCo.
        size: width and height, pixels; 0: no frames.

    Raises:
        ValueError: there is no GL library.
    """

    def __init__(self, model: Any, size: int) -> None:
        self._renderer: Any = None
        if size:
            try:
                import mujoco

                self._renderer = mujoco.Renderer(model, size, size)
            except Exception as error:  # GL's are of many kinds
                raise ValueError(f"render_size is {size}, but there is no renderer ({error!r}); {RENDERERS}") from error

    def draw(self, data: Any, camera: Any) -> np.ndarray:
        """(size, size, 3) uint8.

        Raises:
            RuntimeError: the size is 0.
        """
        if self._renderer is None:
            raise RuntimeError("this environment has no renderer; set render_size (env.options.render_size=256)")
        self._renderer.update_scene(data, camera=camera)
        return np.asarray(self._renderer.render())

    def close(self) -> None:
        if self._renderer is not None:
            self._renderer.close()
