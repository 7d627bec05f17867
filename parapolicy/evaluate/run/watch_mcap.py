"""A run's control steps as an MCAP file for Foxglove."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from parapolicy.control import Controller
from parapolicy.control.mcap_log import McapLog


class McapWatcher:
    """Logs control steps and, if the environment has ``to_frame``, the scene with the chunk in it.

    Args:
        path: of the file; an existing file is replaced.

    Raises:
        ValueError: mcap is not installed, or the file cannot be written.
    """

    def __init__(self, path: str) -> None:
        self._log = McapLog(path)

    def begin(self, label: str, seed: int) -> None:
        """Begin an episode, after the previous one on the time line."""
        self._log.begin(label, seed)

    def step(
        self, env: Any, controller: Controller, row: Mapping[str, Any], reward: float | None, seen: Mapping[str, Any]
    ) -> None:
        """Log one control step; see :class:`parapolicy.evaluate.run.watchers.Watcher`."""
        if reward is not None:
            self._log.reward(reward)
        self._log.step(controller, row)
        if hasattr(env, "to_frame"):
            self._log.image("/scene", np.asarray(env.render()))
            self._log.line("/scene/chunk", env.to_frame(controller.planned()))

    def end(self, controller: Controller, reward: float) -> None:
        """Log the reward of an episode's last step."""
        self._log.reward(reward)

    def close(self) -> None:
        self._log.close()
