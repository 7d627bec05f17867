"""Watchers, which show or log the control steps of a run; chosen by the setting ``watch``."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from parapolicy.control import Controller
from parapolicy.evaluate.run.watch import View
from parapolicy.evaluate.run.watch_mcap import McapWatcher


class Watcher(Protocol):
    """Gets every control step of a run."""

    def begin(self, label: str, seed: int) -> None:
        """Called when an episode of a sampler begins."""

    def step(
        self, env: Any, controller: Controller, row: Mapping[str, Any], reward: float | None, seen: Mapping[str, Any]
    ) -> None:
        """Called for each control step.

        Args:
            env: before the step.
            controller: after it chose the action.
            row: the controller's log of the action.
            reward: of the previous step; None at an episode's first.
            seen: {key: (To, …)}, the observation of the action's chunk.
        """

    def end(self, controller: Controller, reward: float) -> None:
        """Called when an episode has ended, with the reward of its last step."""

    def close(self) -> None:
        """Called when the run's episodes have ended."""


@contextmanager
def open_watcher(target: str | None, cameras: Sequence[str]) -> Iterator[Watcher | None]:
    """The watcher of ``web``, ``spawn``, FILE.rrd (rerun) or FILE.mcap; None for no target.

    Args:
        target: the setting.
        cameras: observation keys of the policy that are images.

    Raises:
        ValueError: an unknown target, or its library is not installed.
    """
    if not target:
        yield None
        return
    watcher: Watcher = McapWatcher(target) if target.endswith(".mcap") else View(target, cameras)
    try:
        yield watcher
    finally:
        watcher.close()
