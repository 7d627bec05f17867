"""A wrapper for environments that keep moving during inference."""

from typing import Any

import gymnasium
import numpy as np

from parapolicy.control import SimulatedClock


class InferenceDelay(gymnasium.Wrapper):
    """Before each action, the simulation runs for the time that inference took, with the previous action's target.

    The environment must have ``hold(seconds)``, which simulates that time without a new action and returns what
    ``step`` returns. A blocking policy spends its time on ``clock`` by :meth:`SimulatedClock.compute`. An asynchronous
    policy computes in the clock's executor: its actions do not wait, they arrive late.

    Args:
        env: with ``hold``, one control step per ``step``.
        clock: of the policy; ``reset`` sets it to zero.
        control_hz: control steps per second.

    Raises:
        ValueError: the environment has no ``hold``.
    """

    def __init__(self, env: gymnasium.Env, clock: SimulatedClock, control_hz: float) -> None:
        if not hasattr(env.unwrapped, "hold"):
            raise ValueError(
                f"{type(env.unwrapped).__name__} has no hold(seconds), needed for latency; set env.latency=none"
            )
        super().__init__(env)
        self.clock, self.period = clock, 1 / control_hz
        self._time = 0.0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Start an episode at time zero."""
        self.clock.reset()
        self._time = 0.0
        return self.env.reset(seed=seed, options=options)

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Simulate up to the clock's time, then one control step with ``action``; return the larger reward of both."""
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
