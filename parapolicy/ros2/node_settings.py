"""Settings of the ROS 2 node, checked by themselves and against the policy before the node runs."""

import math
import re
from dataclasses import dataclass, field
from typing import Any, Literal

from parapolicy.spec import Feature, PolicySpec

JOINT_STATE, ARRAY = "sensor_msgs/msg/JointState", "std_msgs/msg/Float64MultiArray"
IMAGE, COMPRESSED, TRAJECTORY = (
    "sensor_msgs/msg/Image",
    "sensor_msgs/msg/CompressedImage",
    "trajectory_msgs/msg/JointTrajectory",
)
IMAGES = (IMAGE, COMPRESSED)
_TOPIC = re.compile(r"~?/?[A-Za-z_][A-Za-z0-9_]*(/[A-Za-z_][A-Za-z0-9_]*)*")

JointField = Literal["position", "velocity", "effort"]


@dataclass(frozen=True)
class PolicySettings:
    """Arguments of :func:`parapolicy.load_policy`; ``parameters`` are the sampler's own."""

    checkpoint: str
    sampler: str | None = None
    device: str = "auto"
    engine: str = "auto"
    parameters: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ControlSettings:
    """Arguments of :class:`parapolicy.Controller`, and the seed of an episode's noise."""

    control_hz: float | None = None
    asynchronous: bool = True
    deadline_ms: float | None = None
    warm_start: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        _positive(self, "control_hz", "deadline_ms")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed is {self.seed}, expected 0 to 2**63 - 1")


@dataclass(frozen=True)
class SourceSettings:
    """The source of one observation: ``value = number in the message × scale + offset``.

    Attributes:
        topic, type: of the message.
        field, names: for a JointState: which numbers, and of which joints, in the policy's order.
        indices: for a Float64MultiArray: which numbers; None: all of them.
        scale, offset: one number for all, or one for each.
        crop: for an image, before ``resize``: top, left, height, width, pixels.
        resize: how an image is scaled to the policy's size; None: it must have that size.
        stamp: ``header``: the time in the message's header. ``arrival``: the time of arrival, for messages without one.
        latency_ms: time from the sensor's measurement to the stamp.
        reliable: request lost messages again; connects only with publishers that are reliable too.
        shape: of a monitor's value; an observation has the policy's shape.
    """

    topic: str
    type: Literal[
        "sensor_msgs/msg/JointState",
        "std_msgs/msg/Float64MultiArray",
        "sensor_msgs/msg/Image",
        "sensor_msgs/msg/CompressedImage",
    ]
    field: JointField | None = None
    names: list[str] | None = None
    indices: list[int] | None = None
    scale: float | list[float] = 1.0
    offset: float | list[float] = 0.0
    crop: list[int] | None = None
    resize: Literal["bilinear", "box"] | None = None
    stamp: Literal["header", "arrival"] | None = None
    latency_ms: float = 0.0
    reliable: bool = False
    shape: list[int] | None = None

    def __post_init__(self) -> None:
        _check_topic(self.topic)
        joints, array, image = self.type == JOINT_STATE, self.type == ARRAY, self.type in IMAGES
        _belongs(self, "names", joints, required=True)
        _belongs(self, "field", joints, required=False)
        _belongs(self, "indices", array, required=False)
        _belongs(self, "crop", image, required=False)
        _belongs(self, "resize", image, required=False)
        _distinct(self, "names")
        if image and (self.scale != 1.0 or self.offset != 0.0):
            raise ValueError(f"scale or offset is given with type {self.type}, which has none; leave it out")
        if self.indices is not None and (not self.indices or min(self.indices) < 0):
            raise ValueError(f"indices is {self.indices}, expected numbers of at least 0")
        if self.crop is not None and not (len(self.crop) == 4 and min(self.crop[:2]) >= 0 and min(self.crop[2:]) > 0):
            raise ValueError(f"crop is {self.crop}, expected top, left, height, width in pixels")
        if array and self.stamp == "header":
            raise ValueError(f"stamp is 'header', but {self.type} has no header; leave it out")
        if not 0 <= self.latency_ms < math.inf:
            raise ValueError(f"latency_ms is {self.latency_ms}, expected 0 or more")
        if self.shape is not None and not (self.shape and min(self.shape) > 0):
            raise ValueError(f"shape is {self.shape}, expected positive sizes")

    @property
    def by_arrival(self) -> bool:
        """Whether messages are stamped with their time of arrival."""
        return self.type == ARRAY or self.stamp == "arrival"

    @property
    def feature(self) -> Feature:
        """The feature of a monitor's value."""
        assert self.shape is not None  # checked by NodeSettings
        return Feature(tuple(self.shape), "image" if self.type in IMAGES else "state")


@dataclass(frozen=True)
class ActionSettings:
    """The target of actions: ``number in the message = action × scale + offset``.

    Attributes:
        topic, type: of the message.
        names: joints of a JointState or JointTrajectory.
        field: for these, which numbers the actions are; ``position`` if left out.
        indices: numbers of the action that this message contains; None: all of them.
        scale, offset: one number for all, or one for each.
        points: for a JointTrajectory: most control steps ahead. The robot follows them to the end if the node stops.
    """

    topic: str
    type: Literal["std_msgs/msg/Float64MultiArray", "sensor_msgs/msg/JointState", "trajectory_msgs/msg/JointTrajectory"]
    names: list[str] | None = None
    field: JointField | None = None
    indices: list[int] | None = None
    scale: float | list[float] = 1.0
    offset: float | list[float] = 0.0
    points: int = 1

    def __post_init__(self) -> None:
        _check_topic(self.topic)
        _belongs(self, "names", self.type != ARRAY, required=True)
        _belongs(self, "field", self.type != ARRAY, required=False)
        _distinct(self, "names")
        if self.points < 1 or (self.points > 1 and self.type != TRAJECTORY):
            raise ValueError(f"points is {self.points}, expected 1 (or more with type {TRAJECTORY})")


@dataclass(frozen=True)
class TimingSettings:
    """When a control step is taken, and what happens if observations are missing.

    Attributes:
        tolerance_ms: longest time between the oldest and the newest value of one observation, and between the node's
            clock and a stamp ahead of it.
        timeout_ms: age of the newest whole observation at which the robot is held or stopped.
        on_fault: ``hold``: the last action is repeated until whole observations arrive again, which begin a new
            episode; right for position targets. ``stop``: nothing is sent until a reset, and no action is repeated.
        repeat: if no new observation has arrived half a period after a control step was due, take the step with the
            previous one: a lost message must not stretch the motion. False: for simulators that wait for actions.
        action_latency_ms: time from sending an action until the robot follows it. The action sent is then the one for
            the time at which it will act. None: each control step's own action is sent.
        stop_action: sent once when the node stops sending, such as zeros for velocities; None: nothing.
    """

    tolerance_ms: float = 20.0
    timeout_ms: float = 500.0
    on_fault: Literal["hold", "stop"] = "hold"
    repeat: bool = True
    action_latency_ms: float | None = None
    stop_action: list[float] | None = None

    def __post_init__(self) -> None:
        _positive(self, "tolerance_ms", "timeout_ms")
        if self.timeout_ms <= self.tolerance_ms:
            raise ValueError(
                f"timeout_ms is {self.timeout_ms:g}, expected more than tolerance_ms, {self.tolerance_ms:g}"
            )
        if self.action_latency_ms is not None and not 0 <= self.action_latency_ms < math.inf:
            raise ValueError(f"action_latency_ms is {self.action_latency_ms}, expected 0 or more, or null")
        if self.stop_action is not None and not all(map(math.isfinite, self.stop_action)):
            raise ValueError(f"stop_action is {self.stop_action}, expected finite numbers")


@dataclass(frozen=True)
class NodeSettings:
    """All settings of ``parapolicy ros2``.

    Attributes:
        policy, control, timing: see the classes.
        observations: source of each observation key of the policy.
        monitors: messages that must arrive and be valid like observations, but that the policy does not use.
        actions: one or several messages that together contain every number of an action once.
        name, namespace: of the node.
        autostart: configure and activate immediately; false: wait for a lifecycle manager.
    """

    policy: PolicySettings
    observations: dict[str, SourceSettings]
    actions: list[ActionSettings]
    control: ControlSettings = field(default_factory=ControlSettings)
    timing: TimingSettings = field(default_factory=TimingSettings)
    monitors: dict[str, SourceSettings] = field(default_factory=dict)
    name: str = "parapolicy"
    namespace: str = ""
    autostart: bool = True

    def __post_init__(self) -> None:
        if not self.actions:
            raise ValueError("actions is empty, expected at least one message")
        if both := sorted(self.observations.keys() & self.monitors.keys()):
            raise ValueError(f"{both} are in observations and in monitors; give them different names")
        for key, source in self.observations.items():
            if source.shape is not None:
                raise ValueError(f"observations.{key}.shape is given, but the policy determines it; leave it out")
        for key, source in self.monitors.items():
            if source.shape is None:
                raise ValueError(f"monitors.{key}.shape is missing, expected the shape of its value")
            _check_source(f"monitors.{key}", source, source.feature)
        kinds: dict[str, str] = {}
        for key, source in self.sources.items():
            if kinds.setdefault(source.topic, source.type) != source.type:
                raise ValueError(
                    f"{key!r}: topic {source.topic} has type {kinds[source.topic]} elsewhere, not {source.type}"
                )

    @property
    def sources(self) -> dict[str, SourceSettings]:
        """Observations and monitors."""
        return {**self.observations, **self.monitors}

    def check(self, spec: PolicySpec) -> None:
        """Raise ValueError if the settings do not fit a policy."""
        missing, unknown = (
            sorted(spec.observation.keys() - self.observations),
            sorted(self.observations.keys() - spec.observation),
        )
        if missing or unknown:
            raise ValueError(
                f"observations lacks {missing} and has unknown keys {unknown}; the policy observes "
                f"{list(spec.observation)}"
            )
        for key, feature in spec.observation.items():
            _check_source(f"observations.{key}", self.observations[key], feature)
        taken: list[int] = []
        for i, action in enumerate(self.actions):
            indices = range(spec.action_dim) if action.indices is None else action.indices
            taken += indices
            _check_length(f"actions[{i}].names", action.names, len(indices))
            _check_numbers(f"actions[{i}]", action, len(indices))
        if sorted(taken) != list(range(spec.action_dim)):
            raise ValueError(
                f"actions take the numbers {sorted(taken)}, expected each of 0 to {spec.action_dim - 1} once"
            )
        _check_length("timing.stop_action", self.timing.stop_action, spec.action_dim)
        spare = spec.horizon - spec.executed.stop
        hz = self.control.control_hz or spec.require_control_hz()
        latency = self.timing.action_latency_ms
        if latency is not None and latency * hz / 1e3 > spare:
            raise ValueError(
                f"action_latency_ms is {latency:g}, {latency * hz / 1e3:.1f} control steps, but a chunk has only "
                f"{spare} steps beyond those it executes; make the robot faster or n_action_steps smaller"
            )


def _check_source(where: str, source: SourceSettings, feature: Feature) -> None:
    """Raise ValueError unless messages can contain a value of this shape and kind."""
    if (source.type in IMAGES) != (feature.kind == "image"):
        raise ValueError(f"{where}.type is {source.type}, but the policy observes a {feature.kind} there")
    if feature.kind == "image":
        if feature.shape[-1] not in (1, 3):
            raise ValueError(f"{where} has {feature.shape[-1]} channels, expected 1 or 3")
        return
    size = math.prod(feature.shape)
    _check_length(f"{where}.names", source.names, size)
    _check_length(f"{where}.indices", source.indices, size)
    _check_numbers(where, source, size)


def _check_numbers(where: str, settings: SourceSettings | ActionSettings, size: int) -> None:
    for name in ("scale", "offset"):
        value = getattr(settings, name)
        _check_length(f"{where}.{name}", value if isinstance(value, list) else None, size)


def _check_length(where: str, value: list[Any] | None, size: int) -> None:
    if value is not None and len(value) != size:
        raise ValueError(f"{where} has {len(value)} entries, expected {size}")


def _check_topic(topic: str) -> None:
    if not _TOPIC.fullmatch(topic):
        raise ValueError(f"topic is {topic!r}, expected a ROS name such as /joint_states")


def _belongs(settings: Any, name: str, belongs: bool, required: bool) -> None:
    given = getattr(settings, name) is not None
    if given and not belongs:
        raise ValueError(f"{name} is given, but messages of type {settings.type} do not use it; leave it out")
    if required and belongs and not given:
        raise ValueError(f"{name} is missing, expected a list for type {settings.type}")


def _distinct(settings: Any, name: str) -> None:
    values = getattr(settings, name)
    if values is not None and (not values or len(set(values)) < len(values)):
        raise ValueError(f"{name} is {values}, expected at least one name, each once")


def _positive(settings: Any, *names: str) -> None:
    for name in names:
        value = getattr(settings, name)
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"{name} is {value}, expected a positive number")
