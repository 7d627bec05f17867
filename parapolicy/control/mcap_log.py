"""A control loop's log as an MCAP file, for Foxglove. Needs mcap and Pillow."""

import base64
import json
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from parapolicy.control.controller import Controller
from parapolicy.observation import to_pixels

_NUMBER, _INTEGER, _TEXT = {"type": "number"}, {"type": "integer"}, {"type": "string"}


def _list(items: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": items}


def _record(**fields: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": fields}


_TIME = {"title": "time", **_record(sec=_INTEGER, nsec=_INTEGER)}
_POINT, _COLOR = _record(x=_NUMBER, y=_NUMBER), _record(r=_NUMBER, g=_NUMBER, b=_NUMBER, a=_NUMBER)
_LINE = _record(
    timestamp=_TIME,
    type=_INTEGER,
    points=_list(_POINT),
    outline_color=_COLOR,
    outline_colors=_list(_COLOR),
    fill_color=_COLOR,
    thickness=_NUMBER,
    metadata=_list(_record()),
)
# Foxglove recognises its own schemas by name and plots the numbers of others. It does not support nested arrays.
SCHEMAS = {
    "foxglove.CompressedImage": _record(
        timestamp=_TIME, frame_id=_TEXT, data={**_TEXT, "contentEncoding": "base64"}, format=_TEXT
    ),
    "foxglove.ImageAnnotations": _record(circles=_list(_record()), points=_list(_LINE), texts=_list(_record())),
    "parapolicy.Episode": _record(label=_TEXT, seed=_INTEGER),
    "parapolicy.State": _record(values=_list(_NUMBER)),
    "parapolicy.Action": _record(
        step=_INTEGER, kind=_TEXT, chunk=_INTEGER, index=_INTEGER, slack_ms=_NUMBER, values=_list(_NUMBER)
    ),
    "parapolicy.Chunk": _record(
        number=_INTEGER,
        begin=_INTEGER,
        latency_ms=_NUMBER,
        computed_ms=_NUMBER,
        rounds=_INTEGER,
        evaluations=_INTEGER,
        complete={"type": "boolean"},
        actions=_list(_record(step=_INTEGER, values=_list(_NUMBER))),
    ),
    "parapolicy.Reward": _record(reward=_NUMBER),
}
_LINE_STRIP = 3  # of foxglove.PointsAnnotation
_CHANNELS = (1, 3, 4)  # of a PNG


class McapLog:
    """Writes observations, actions, chunks and rewards of a control loop to an MCAP file, as JSON messages.

    | topic | schema | once per |
    | --- | --- | --- |
    | /episode | parapolicy.Episode | episode |
    | /observation/KEY | parapolicy.State, its numbers in one row; foxglove.CompressedImage, a PNG | control step |
    | /action | parapolicy.Action | control step |
    | /chunk | parapolicy.Chunk: its cost, and its actions from the first executed one on | chunk |
    | /reward | parapolicy.Reward | call of :meth:`reward` |

    An observation has the time of its call of ``act``; an action has the time at which that call ended. The first time
    is the wall clock's; the others follow the controller's clock. If that clock goes back, as a simulated one does with
    each episode, the log continues one control period later. Not thread-safe.

    Args:
        path: of the file; an existing file is replaced.

    Raises:
        ValueError: mcap or Pillow is not installed, or the file cannot be written.
    """

    def __init__(self, path: str | Path) -> None:
        try:
            from mcap.writer import Writer

            from parapolicy.image_file import encode_png
        except ImportError as error:
            raise ValueError("mcap or Pillow is not installed; pip install 'parapolicy[mcap]'") from error
        try:
            self._writer = Writer(str(path))
        except OSError as error:
            raise ValueError(f"cannot write the MCAP log {str(path)!r}: {error}") from error
        self._encode, self._closed = encode_png, False
        self._writer.start(library="parapolicy")
        self._schemas: dict[str, int] = {}
        self._channels: dict[str, int] = {}  # by topic
        self._offset: int | None = None  # ns, from the controller's clock to the log's time
        self._last = 0  # ns, time of the newest action
        self._episode: dict[str, Any] | None = None  # the new episode, until its first step
        self._chunk: int | None = None  # number of the newest chunk of the episode

    def begin(self, label: str, seed: int = 0) -> None:
        """Begin an episode."""
        self._episode, self._chunk = {"label": label, "seed": seed}, None

    def step(self, controller: Controller, action: Mapping[str, Any]) -> None:
        """Log one control step.

        Args:
            controller: after its ``act``.
            action: the mapping that the controller passed to its ``log`` for this step.
        """
        begin = self._advance(action, 1 / controller.control_hz)
        if self._episode is not None:
            self._write("/episode", "parapolicy.Episode", self._episode, begin)
            self._episode = None
        for key, value in controller.episode.history.newest.items():
            topic = f"/observation/{key}"
            if controller.policy.spec.observation[key].kind == "image":
                self._write_image(topic, to_pixels(value), begin)
            else:
                numbers = {"values": value.ravel().tolist()}
                self._write(topic, "parapolicy.State", numbers, begin, {"shape": json.dumps(value.shape)})
        if action["chunk"] != self._chunk:
            self._chunk = action["chunk"]
            self._write("/chunk", "parapolicy.Chunk", _chunk_message(controller, action), self._last)
        message = {name: action[name] for name in ("step", "kind", "chunk", "index")}
        message |= {"slack_ms": 1e3 * action["slack"], "values": action["action"]}
        self._write("/action", "parapolicy.Action", message, self._last)

    def reward(self, reward: float) -> None:
        """Log the reward of the newest action, at the action's time."""
        self._write("/reward", "parapolicy.Reward", {"reward": float(reward)}, self._last)

    def image(self, topic: str, pixels: np.ndarray) -> None:
        """Log an image (H, W, C) uint8 with 1, 3 or 4 channels, at the newest action's time."""
        self._write_image(topic, pixels, self._last)

    def line(self, topic: str, points: np.ndarray) -> None:
        """Log a line through points (n, 2), in pixels of an image, at the newest action's time."""
        red, clear = {"r": 0.9, "g": 0.25, "b": 0.15, "a": 1.0}, {"r": 0.0, "g": 0.0, "b": 0.0, "a": 0.0}
        strip = {
            "timestamp": _time(self._last),
            "type": _LINE_STRIP,
            "points": [{"x": float(x), "y": float(y)} for x, y in points],
            "outline_color": red,
            "outline_colors": [],
            "fill_color": clear,
            "thickness": 2.0,
            "metadata": [],
        }
        self._write(topic, "foxglove.ImageAnnotations", {"circles": [], "points": [strip], "texts": []}, self._last)

    def close(self) -> None:
        """Write the index and close the file. Without the index, most readers must recover the file first."""
        if not self._closed:
            self._writer.finish()
            self._closed = True

    def __enter__(self) -> "McapLog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _advance(self, action: Mapping[str, Any], period: float) -> int:
        """Set the time of the newest action; returns the time of its observation. Both always increase."""
        now = round(1e9 * action["time"])
        begin = now - round(1e9 * (period - action["slack"]))
        if self._offset is None:
            self._offset = time.time_ns() - begin
        elif begin + self._offset <= self._last:
            self._offset = self._last + round(1e9 * period) - begin
        self._last = now + self._offset
        return begin + self._offset

    def _write_image(self, topic: str, pixels: np.ndarray, at: int) -> None:
        if pixels.shape[-1] not in _CHANNELS:
            raise ValueError(f"the image of {topic} has {pixels.shape[-1]} channels, expected one of {_CHANNELS}")
        data = base64.b64encode(self._encode(pixels)).decode()
        message = {"timestamp": _time(at), "frame_id": topic.rpartition("/")[2], "data": data, "format": "png"}
        self._write(topic, "foxglove.CompressedImage", message, at)

    def _write(
        self, topic: str, schema: str, message: Mapping[str, Any], at: int, about: Mapping[str, str] | None = None
    ) -> None:
        if topic not in self._channels:
            if schema not in self._schemas:
                text = json.dumps({"title": schema, **SCHEMAS[schema]}).encode()
                self._schemas[schema] = self._writer.register_schema(schema, "jsonschema", text)
            self._channels[topic] = self._writer.register_channel(
                topic, "json", self._schemas[schema], dict(about or {})
            )
        self._writer.add_message(self._channels[topic], at, json.dumps(message).encode(), at)


def _chunk_message(controller: Controller, action: Mapping[str, Any]) -> dict[str, Any]:
    """A chunk's cost, and its actions from the present control step on."""
    message = {
        "number": action["chunk"],
        "latency_ms": 1e3 * action["chunk_seconds"],
        "computed_ms": 1e3 * action["computed_seconds"],
    }
    message |= {name: action[name] for name in ("begin", "rounds", "evaluations", "complete")}
    planned = enumerate(controller.planned().tolist(), action["step"])
    return message | {"actions": [{"step": step, "values": values} for step, values in planned]}


def _time(at: int) -> dict[str, int]:
    sec, nsec = divmod(at, 1_000_000_000)
    return {"sec": sec, "nsec": nsec}
