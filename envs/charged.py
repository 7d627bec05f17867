"""A world that goes on while its policy thinks."""

from typing import Any

import gymnasium
import numpy as np

from parapolicy.control import SimulatedClock


class Charged(gymnasium.Wrapper):
    """Before each action, the world runs for as long as the policy thought, on the target it already had.

    The environment offers ``hold(seconds)``: what ``step`` gives, after that time without a new action. A policy whose
    times are on ``clock`` (:meth:`SimulatedClock.compute`) is charged for them; one that thinks in the clock's executor
    while its old actions go on is charged by their coming late instead.

    Args:
        env: with ``hold``, one control step per ``step``.
        clock: the policy's; set to zero by ``reset``.
        control_hz: control steps per second.
    """

    def __init__(self, env: gymnasium.Env, clock: SimulatedClock, control_hz: float) -> None:
        if not hasattr(env.unwrapped, "hold"):
            raise ValueError(f"{type(env.unwrapped).__name__} has no hold(seconds), which charging latency needs")
        super().__init__(env)
        self.clock, self.period = clock, 1 / control_hz
        self._time = 0.0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Begin an episode, at time zero."""
        self.clock.reset()
        self._time = 0.0
        return self.env.reset(seed=seed, options=options)

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Run the world to the clock's time, then for one control step with ``action``; the larger reward counts."""
        waited, held = self.clock() - self._time, -np.inf
        self._time = self.clock()
        if waited > 0:
            result = self.env.unwrapped.hold(waited)  # type: ignore[attr-defined]
            held = result[1]
            if result[2] or result[3]:
                return result
        observation, reward, terminated, truncated, info = self.env.step(action)
        self.clock.advance(self.period)
        self._time += self.period
        return observation, max(float(reward), held), terminated, truncated, info
