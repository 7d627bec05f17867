"""Push-T (Florence et al., 2021; Chi et al., 2023) over gym-pusht, with the observations of a policy.

Reward is clip(coverage / 0.95, 0, 1), an episode ends in success when coverage exceeds 0.95, and there are 300 control
steps at 10 Hz over a 100 Hz simulation. A seed gives gym-pusht's initial state for that seed.
"""

from collections.abc import Mapping
from typing import Any

import gymnasium
import numpy as np
from gym_pusht.envs.pusht import PushTEnv
from gymnasium import spaces

from envs.joined import JOINED, joined_shape, parts_of
from parapolicy.spec import PolicySpec

# The nine block keypoints of the published data set in the block's own frame (pixels), found from its recorded
# keypoints and block poses; every one of the 25,650 steps agrees to 0.03 pixels (standard deviation).
BLOCK_KEYPOINTS = np.array(
    [
        [9.269, 90.023],
        [-60.992, -1.187],
        [60.907, -1.393],
        [-0.270, 25.544],
        [-14.064, 122.811],
        [39.000, 32.861],
        [-39.955, 32.734],
        [-16.822, 62.872],
        [23.541, -1.700],
    ]
)
SUBSTEPS = 10  # physics steps of 10 ms per control step
# key -> shape of one control step's observation
OBSERVATIONS: Mapping[str, tuple[int, ...]] = {
    "state": (5,),  # agent x, y, block x, y (pixels), block angle (rad, 0 to 2 pi)
    "agent_pos": (2,),
    "keypoint": (9, 2),  # the published data set's
    "environment_state": (16,),  # gym-pusht's eight corners of the block
    "image": (96, 96, 3),  # the scene as in the published data set: RGB, uint8
}
# the names of LeRobot's policies -> ours
LEROBOT = {
    "observation.state": "agent_pos",
    "observation.environment_state": "environment_state",
    "observation.image": "image",
}


class PushT(gymnasium.Env):
    """Push-T with a dictionary of observations.

    Args:
        spec: its ``observation`` has keys of ``OBSERVATIONS``, of ``LEROBOT``, or real-stanford's ``obs``
            (:func:`envs.joined.parts_of`).
        max_episode_steps: control steps until an episode is cut off.
        render_size: width and height of :meth:`render`'s frames, pixels; at least 96.

    Raises:
        ValueError: an observation key or shape that Push-T does not give, or an action that is not two numbers.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}  # noqa: RUF012 gymnasium's own form
    render_mode = "rgb_array"

    def __init__(self, spec: PolicySpec, max_episode_steps: int = 300, render_size: int = 256) -> None:
        self._parts = {key: [LEROBOT.get(key, key)] for key in spec.observation}  # of each key, what it consists of
        given = {**OBSERVATIONS, **{key: OBSERVATIONS[name] for key, name in LEROBOT.items()}}
        if JOINED in spec.observation:
            self._parts[JOINED] = parts_of(spec, OBSERVATIONS)
            given[JOINED] = joined_shape(self._parts[JOINED], OBSERVATIONS)
        for key, (shape, *_) in spec.observation.items():
            if given.get(key) != shape:
                raise ValueError(f"the policy observes {key!r} with shape {shape}, expected one of Push-T's {given}")
        if spec.action_dim != 2:
            raise ValueError(f"the policy's action_dim is {spec.action_dim}, expected 2 for Push-T: x, y")
        if render_size < 96:
            raise ValueError(f"render_size is {render_size}, expected at least 96, the least for drawing markers")
        self._kinds = {key: np.uint8 if parts == ["image"] else np.float32 for key, parts in self._parts.items()}
        self._max_steps = max_episode_steps
        self._simulator = PushTEnv(visualization_width=render_size, visualization_height=render_size)
        self.action_space = spaces.Box(0, 512, (2,), np.float32)
        self.observation_space = spaces.Dict(
            {
                key: spaces.Box(0, 255, given[key], kind)
                if kind is np.uint8
                else spaces.Box(-np.inf, np.inf, given[key], kind)
                for key, kind in self._kinds.items()
            }
        )

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Begin an episode.

        Args:
            seed: of the initial state, as gym-pusht's.
            options: ``{"state": (5,)}`` starts from a recorded state instead: agent x, y, block x, y, angle.
        """
        super().reset(seed=seed)
        self._simulator.reset(seed=seed)
        self._substeps, self._owed = 0, 0.0
        if options is not None and "state" in options:
            self._set_state(np.asarray(options["state"], dtype=np.float64))
        self._target = np.array(self._simulator.agent.position)
        return self._observe(), {**self._simulator._get_info(), "is_success": False}

    def step(self, action: Any) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        """Move the agent's target to ``action`` (2,), in pixels, for a tenth of a second."""
        target = np.asarray(action, dtype=np.float64)
        if target.shape != (2,) or not np.isfinite(target).all():
            raise ValueError(f"action is {action!r}, expected two finite numbers: x, y in pixels")
        self._target = target
        return self._run(SUBSTEPS)

    def hold(self, seconds: float) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        """Run the simulation for ``seconds`` while the agent keeps its target.

        Only whole steps of 10 ms are run; a remainder is added to the next call.
        Before the first action the agent stays in place.
        """
        self._owed += seconds / self._simulator.dt
        substeps = int(self._owed + 1e-6)
        self._owed -= substeps
        return self._run(substeps)

    def _run(self, substeps: int) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        simulator = self._simulator
        left = min(substeps, self._max_steps * SUBSTEPS - self._substeps)
        # gym-pusht's step runs int(1 / (dt * control_hz)) physics steps.
        simulator.control_hz = 1 / (simulator.dt * (left + 0.5))
        _, reward, terminated, _, info = simulator.step(self._target)
        self._substeps += left
        over = self._substeps >= self._max_steps * SUBSTEPS
        return self._observe(), float(reward), bool(terminated), over, info

    def render(self) -> np.ndarray:
        """The scene as (render_size, render_size, 3) uint8, with the current target marked."""
        return self._simulator.render()

    def to_frame(self, actions: np.ndarray) -> np.ndarray:
        """Actions (n, 2) as positions in :meth:`render`'s frame, (n, 2), pixels."""
        return np.asarray(actions) * (self._simulator.visualization_width / 512)

    def close(self) -> None:
        self._simulator.close()

    def _set_state(self, state: np.ndarray) -> None:
        if state.shape != (5,) or not np.isfinite(state).all():
            raise ValueError(f"state is {state!r}, expected five finite numbers: agent x, y, block x, y, angle")
        simulator = self._simulator
        simulator._setup()  # a new space: the old one would keep velocities and contacts of the previous state
        simulator.agent.position = state[:2].tolist()
        # Set the angle first: the block turns about its centre of mass, which moves its position.
        simulator.block.angle = float(state[4])
        simulator.block.position = state[2:4].tolist()
        simulator.space.step(simulator.dt)

    def _observe(self) -> dict[str, np.ndarray]:
        observed = {}
        for key, names in self._parts.items():
            arrays = [np.asarray(getattr(self, f"_{name}")(), dtype=self._kinds[key]) for name in names]
            observed[key] = arrays[0] if key != JOINED else np.concatenate([array.ravel() for array in arrays])
        return observed

    def _state(self) -> np.ndarray:
        return self._simulator.get_obs()

    def _agent_pos(self) -> np.ndarray:
        return np.array(self._simulator.agent.position)

    def _keypoint(self) -> np.ndarray:
        block = self._simulator.block
        cos, sin = np.cos(block.angle), np.sin(block.angle)
        return BLOCK_KEYPOINTS @ np.array([[cos, sin], [-sin, cos]]) + np.array(block.position)

    def _environment_state(self) -> np.ndarray:
        return self._simulator.get_keypoints(self._simulator._block_shapes).flatten()

    def _image(self) -> np.ndarray:
        return self._simulator._render(visualize=False)
