"""The node's topics: subscriptions, publishers and diagnostics."""

import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus, KeyValue
from rclpy.duration import Duration
from rclpy.node import Node
from rclpy.publisher import Publisher
from rclpy.qos import QoSHistoryPolicy, QoSProfile, QoSReliabilityPolicy
from rclpy.subscription import Subscription
from trajectory_msgs.msg import JointTrajectoryPoint

from parapolicy.errors import ObservationError
from parapolicy.ros2.loop import ControlLoop
from parapolicy.ros2.messages import action_numbers, observed_value, stamp_seconds
from parapolicy.ros2.node_settings import ARRAY, JOINT_STATE, ActionSettings, NodeSettings, SourceSettings
from parapolicy.spec import Feature

QUEUE = 10  # messages of a topic that may wait
_JOINT_FIELDS = {"position": "positions", "velocity": "velocities", "effort": "effort"}  # of a trajectory's points


def message_type(name: str) -> Any:
    """The class of ``package/msg/Type``."""
    package, kind, type_name = name.split("/")
    return getattr(importlib.import_module(f"{package}.{kind}"), type_name)


def subscribe(
    node: Node, settings: NodeSettings, features: Mapping[str, Feature], loop: ControlLoop
) -> list[Subscription]:
    """Subscribe to every source's topic; values and faulty messages are passed to the loop."""
    topics: dict[str, list[str]] = {}
    for key, source in settings.sources.items():
        topics.setdefault(source.topic, []).append(key)

    def subscribe_to(topic: str, keys: Sequence[str]) -> Subscription:
        sources: Sequence[SourceSettings] = [settings.sources[key] for key in keys]

        def receive(message: Any, info: Mapping[str, Any]) -> None:
            gid = info.get("publisher_gid")
            publisher = gid["data"] if isinstance(gid, Mapping) else b""
            for key, source in zip(keys, sources, strict=True):
                try:
                    stamp = None if source.by_arrival else stamp_seconds(message.header.stamp)
                    value = observed_value(message, source, features[key])
                except ObservationError as error:
                    loop.refuse(key, str(error))
                else:
                    loop.receive(key, stamp, value, publisher)

        reliable = any(source.reliable for source in sources)
        reliability = QoSReliabilityPolicy.RELIABLE if reliable else QoSReliabilityPolicy.BEST_EFFORT
        profile = QoSProfile(history=QoSHistoryPolicy.KEEP_LAST, depth=QUEUE, reliability=reliability)
        return node.create_subscription(message_type(sources[0].type), topic, receive, profile)

    return [subscribe_to(topic, keys) for topic, keys in topics.items()]


def action_sender(
    node: Node, settings: NodeSettings, period: float
) -> tuple[Callable[[np.ndarray], None], list[Publisher]]:
    """A function that sends actions (n, Da), and its publishers.

    A slow subscriber gets only the newest action. An action that was not delivered within ``timeout_ms`` is not sent
    again; one that was received but not read expires only if the subscriber sets a lifespan itself.
    """
    profile = QoSProfile(
        history=QoSHistoryPolicy.KEEP_LAST,
        depth=1,
        reliability=QoSReliabilityPolicy.RELIABLE,
        lifespan=Duration(nanoseconds=round(settings.timing.timeout_ms * 1e6)),
    )
    publishers = [
        node.create_publisher(message_type(action.type), action.topic, profile) for action in settings.actions
    ]

    def send(actions: np.ndarray) -> None:
        stamp = node.get_clock().now().to_msg()
        for action, publisher in zip(settings.actions, publishers, strict=True):
            publisher.publish(action_message(action, actions, period, stamp))

    return send, publishers


def action_message(target: ActionSettings, actions: np.ndarray, period: float, stamp: Any) -> Any:
    """A message of actions (n, Da), with as many of them as its type and settings allow."""
    numbers = action_numbers(actions, target)
    message = message_type(target.type)()
    if target.type == ARRAY:
        message.data = numbers[0].tolist()
        return message
    field = target.field or "position"
    message.header.stamp = stamp
    if target.type == JOINT_STATE:
        message.name = list(target.names or [])
        setattr(message, field, numbers[0].tolist())
        return message
    message.joint_names = list(target.names or [])
    for i, row in enumerate(numbers[: target.points]):
        point = JointTrajectoryPoint(time_from_start=Duration(seconds=(i + 1) * period).to_msg())
        setattr(point, _JOINT_FIELDS[field], row.tolist())
        message.points.append(point)
    return message


class Diagnostics:
    """Publishes the loop's state on ``/diagnostics``."""

    def __init__(self, node: Node, settings: NodeSettings) -> None:
        self._node, self._settings = node, settings
        self._publisher = node.create_publisher(DiagnosticArray, "/diagnostics", 10)
        self._before: dict[str, int] = {}

    def publish(self, snapshot: Mapping[str, Any], period: float) -> None:
        """Publish what has changed since the last message."""
        level, text = self._judge(snapshot)
        values = {"state": snapshot["state"], "period_ms": 1e3 * period, "latency_ms": snapshot["latency_ms"]}
        values |= snapshot["counts"] | _controller_values(snapshot["controller"])
        values |= {f"age_ms.{key}": age for key, age in snapshot["ages_ms"].items()}
        name = self._node.get_fully_qualified_name()
        pairs = [KeyValue(key=key, value=_text(value)) for key, value in values.items()]
        status = DiagnosticStatus(level=level, name=f"{name}: control", message=text, hardware_id="", values=pairs)
        message = DiagnosticArray(status=[status])
        message.header.stamp = self._node.get_clock().now().to_msg()
        self._publisher.publish(message)

    def _judge(self, snapshot: Mapping[str, Any]) -> tuple[bytes, str]:
        """Level and message."""
        counts, before = snapshot["counts"], self._before
        self._before = dict(counts)
        state, reason = snapshot["state"], snapshot["reason"]
        if state in ("holding", "stopped"):
            return DiagnosticStatus.ERROR, f"{state}: {reason}"
        if state != "running":
            return DiagnosticStatus.WARN, f"{state}: {reason}" if reason else state
        topics = {source.topic for source in self._settings.sources.values()}
        topics |= {action.topic for action in self._settings.actions}
        if several := sorted(topic for topic in topics if self._node.count_publishers(topic) > 1):
            return DiagnosticStatus.WARN, f"several publishers of {several}"
        names = ("late", "repeated", "refused", "beyond", "failed", "breaks")
        grown = {
            name: counts[name] - before.get(name, 0) for name in names if counts.get(name, 0) > before.get(name, 0)
        }
        if grown:
            return DiagnosticStatus.WARN, ", ".join(f"{count} {name}" for name, count in grown.items())
        return DiagnosticStatus.OK, "running"


def _controller_values(summary: Mapping[str, Any]) -> dict[str, Any]:
    """Rounds, latency, misses and other values of the present episode."""
    chunk = summary["times"].get("chunk", {})
    values = {f"controller.{name}": value for name, value in summary.items() if isinstance(value, int)}
    values |= {f"chunk_ms.{name}": value for name, value in chunk.items()}
    return values | {"rounds": summary["rounds"]}


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3f}" if math.isfinite(value) else "unknown"
    return "unknown" if value is None else str(value)
