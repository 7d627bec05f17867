"""A live view of a run in rerun: scene, executed path, current chunk and its camera frames, latency and rounds."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from parapolicy.control import Controller
from parapolicy.observation import to_pixels


class WatchableEnv(Protocol):
    """An environment that can be watched."""

    def render(self) -> Any:
        """(H, W, 3) uint8."""

    def to_frame(self, actions: np.ndarray) -> np.ndarray:
        """Actions (n, Da) as positions (n, 2) in the rendered frame, in pixels."""


class View:
    """Shows control steps in rerun.

    Args:
        target: ``web`` serves a page for the browser during the run, ``spawn`` opens rerun's own window, and a name
            that ends in .rrd writes a file for ``rerun FILE``.
        cameras: observation keys of the policy that are images; each has a panel beside the scene.

    Raises:
        ValueError: an unknown target, or rerun is not installed.
    """

    def __init__(self, target: str, cameras: Sequence[str] = ()) -> None:
        if target not in ("web", "spawn") and not target.endswith(".rrd"):
            raise ValueError(f"watch is {target!r}, expected web, spawn or a file name that ends in .rrd or .mcap")
        try:
            import rerun as rr
            import rerun.blueprint as rrb
        except ImportError as error:
            raise ValueError("rerun is not installed; pip install 'parapolicy[watch]'") from error
        self._rr = rr
        panels = rrb.Vertical(
            rrb.TimeSeriesView(origin="latency", name="chunk latency, ms"),
            rrb.TimeSeriesView(origin="rounds", name="rounds per chunk"),
            rrb.TimeSeriesView(origin="reward", name="reward"),
        )
        self._cameras = {key: rr.new_entity_path(["cameras", key]) for key in cameras}
        scene = rrb.Spatial2DView(origin="scene", name="scene")
        columns = rrb.Horizontal(scene, panels, column_shares=[3, 2])
        if cameras:
            frames = [rrb.Spatial2DView(origin=path, name=f"{key}, oldest left") for key, path in self._cameras.items()]
            columns = rrb.Horizontal(scene, rrb.Vertical(*frames), panels, column_shares=[3, 2, 2])
        layout = rrb.Blueprint(columns, collapse_panels=True)
        rr.init("parapolicy", default_blueprint=layout)
        if target == "web":
            server = rr.serve_grpc(default_blueprint=layout)
            rr.serve_web_viewer(open_browser=False, connect_to=server)
            print(f"watch at http://localhost:9090/?url={server}", flush=True)
        elif target == "spawn":
            rr.spawn(default_blueprint=layout)
        else:
            rr.save(target, default_blueprint=layout)
        self._time = 0.0
        self._path: list[np.ndarray] = []
        self._chunk = -1  # number of the last chunk shown

    def begin(self, label: str, seed: int) -> None:
        """Start an episode, after the previous one on the time line."""
        self._path.clear()
        self._chunk = -1
        self._rr.set_time("time", duration=self._time)
        self._rr.log("scene/title", self._rr.TextLog(f"{label}, seed {seed}"))

    def step(
        self,
        env: WatchableEnv,
        controller: Controller,
        row: Mapping[str, Any],
        reward: float | None,
        seen: Mapping[str, Any],
    ) -> None:
        """Show one control step: the scene before it, the rest of the chunk and its observation, and the cost of the
        action; see :class:`parapolicy.evaluate.run.watchers.Watcher`.

        Raises:
            ValueError: the environment has no ``to_frame``.
        """
        if not hasattr(env, "to_frame"):
            raise ValueError(f"{type(env).__name__} has no to_frame(actions), which rerun needs; take watch=FILE.mcap")
        rr = self._rr
        self._time += 1 / controller.control_hz
        rr.set_time("time", duration=self._time)
        rr.log("scene", rr.Image(np.asarray(env.render())))
        planned = env.to_frame(controller.planned())
        self._path.append(env.to_frame(np.asarray(row["action"])[None])[0])
        rr.log("scene/executed", rr.LineStrips2D([self._path], colors=[90, 90, 90], radii=0.8))
        rr.log("scene/chunk", rr.LineStrips2D([planned], colors=[220, 60, 40], radii=1.2))
        rr.log("scene/action", rr.Points2D(planned[:1], colors=[220, 60, 40], radii=4))
        if row["chunk"] != self._chunk:
            self._chunk = row["chunk"]
            rr.log("latency/chunk", rr.Scalars(1e3 * row["computed_seconds"]))
            rr.log("rounds/chunk", rr.Scalars(row["rounds"]))
            for key, path in self._cameras.items():
                rr.log(path, rr.Image(_side_by_side(np.asarray(seen[key]))))
        if reward is not None:
            rr.log("reward/step", rr.Scalars(reward))

    def end(self, controller: Controller, reward: float) -> None:
        """Show the reward of an episode's last step."""
        self._time += 1 / controller.control_hz
        self._rr.set_time("time", duration=self._time)
        self._rr.log("reward/step", self._rr.Scalars(reward))

    def close(self) -> None:
        """Do nothing: rerun's view stays, and its file is complete, when the process ends."""


def _side_by_side(frames: np.ndarray) -> np.ndarray:
    """A policy's frames (To, …) as one image (H, To W, C) uint8, the oldest on the left."""
    return np.concatenate(list(to_pixels(frames)), axis=1)
