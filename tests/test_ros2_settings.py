"""Settings of the ROS 2 node: what is wrong in a file is named before anything runs."""

import copy
import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from parapolicy.cli import main
from parapolicy.ros2.node_settings import (
    ActionSettings,
    ControlSettings,
    NodeSettings,
    PolicySettings,
    SourceSettings,
    TimingSettings,
)
from parapolicy.ros2.yaml_file import read_yaml
from parapolicy.spec import Feature
from tests.conftest import ROOT
from tests.helpers import small_spec

GOOD: dict[str, Any] = {
    "policy": {"checkpoint": "here"},
    "observations": {
        "position": {"topic": "/joints", "type": "sensor_msgs/msg/JointState", "names": ["a", "b"], "scale": 2},
        "points": {"topic": "points", "type": "std_msgs/msg/Float64MultiArray", "offset": [0, 1, 2, 3, 4, 5]},
    },
    "monitors": {"camera": {"topic": "~/camera", "type": "sensor_msgs/msg/Image", "shape": [4, 5, 3]}},
    "actions": [
        {"topic": "/a", "type": "std_msgs/msg/Float64MultiArray", "indices": [1]},
        {"topic": "/b", "type": "trajectory_msgs/msg/JointTrajectory", "indices": [0], "names": ["a"], "points": 3},
    ],
    "control": {"deadline_ms": None, "control_hz": 20},
    "timing": {"action_latency_ms": 100, "stop_action": [0, 0]},
}


def changed(path: str, value: Any) -> dict[str, Any]:
    """GOOD with another value at a place such as ``timing.repeat``; ``...`` takes it away."""
    settings: Any = copy.deepcopy(GOOD)
    *parents, name = (int(part) if part.isdigit() else part for part in path.split("."))
    inner = settings
    for parent in parents:
        inner = inner[parent]
    if value is ...:
        del inner[name]
    else:
        inner[name] = value
    return dict(settings)


def read(settings: Any, tmp_path: Path) -> NodeSettings:
    file = tmp_path / "node.yaml"
    file.write_text(settings if isinstance(settings, str) else yaml.safe_dump(settings))
    return read_yaml(file, NodeSettings)


def test_a_file_is_read(tmp_path: Path) -> None:
    settings = read(GOOD, tmp_path)
    settings.check(small_spec())
    assert settings.observations["position"].scale == 2.0
    assert settings.observations["points"].offset == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    assert (settings.control.control_hz, settings.control.asynchronous) == (20.0, True)
    assert settings.actions[1].points == 3
    assert [key for key, source in settings.sources.items() if source.by_arrival] == ["points"]


def test_the_example_fits_the_shipped_policy(shipped: Any) -> None:
    read_yaml(ROOT / "examples" / "ros2_pusht.yaml", NodeSettings).check(shipped.spec)


def test_the_documented_settings_are_those_there_are(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "ros2.md").read_text()
    (block,) = re.findall(r"^```yaml\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    settings = read(block, tmp_path)
    features = {"joints": (3,), "gripper": (1,), "camera": Feature((96, 96, 3), "image")}
    settings.check(small_spec(observation=features, action_dim=4))
    for kind in (NodeSettings, ControlSettings, TimingSettings, SourceSettings, ActionSettings, PolicySettings):
        for field in dataclasses.fields(kind):
            assert re.search(rf"\b{field.name}:", text), f"docs/ros2.md does not name {field.name}"


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("timming", {}, r"unknown settings \['timming'\]"),
        ("policy", ..., r"lacks \['policy'\]"),
        ("policy.checkpoint", 3, "policy.checkpoint is 3, expected str"),
        ("control.control_hz", "fast", "control.control_hz is 'fast', expected float"),
        ("control.control_hz", float("nan"), "control.control_hz is nan"),
        ("control.asynchronous", 1, "control.asynchronous is 1, expected bool"),
        ("control.deadline_ms", 0, "control: deadline_ms is 0.0"),
        ("control.seed", -1, "control: seed is -1"),
        ("observations.position.type", "sensor_msgs/JointState", "observations.position.type is"),
        ("observations.position.topic", "joint states", "topic is 'joint states'"),
        ("observations.position.names", ..., "observations.position: names is missing"),
        ("observations.position.names", ["a", "a"], "each once"),
        ("observations.position.indices", [0], "indices is given"),
        ("observations.position.shape", [2], "the policy determines it"),
        ("observations.points.stamp", "header", "has no header"),
        ("observations.points.indices", [-1], "of at least 0"),
        ("observations.points.latency_ms", -5, "latency_ms is -5"),
        ("observations.points.scale", ["x"], r"scale\[0\] is 'x'"),
        (
            "observations.camera",
            GOOD["monitors"]["camera"] | {"shape": None},
            r"\['camera'\] are in observations and",
        ),
        ("monitors.camera.shape", ..., "monitors.camera.shape is missing"),
        ("monitors.camera.shape", [4, 5, 2], "2 channels"),
        ("monitors.camera.scale", 2, "which has none; leave it out"),
        ("monitors.camera.crop", [0, 0, 0, 5], "crop is"),
        ("monitors.camera.topic", "/joints", "has type sensor_msgs/msg/JointState elsewhere"),
        ("actions", [], "actions is empty"),
        ("actions.0.points", 2, "points is 2"),
        ("actions.1.names", ..., r"actions\[1\]: names is missing"),
        ("timing.on_fault", "panic", "expected one of"),
        ("timing.timeout_ms", 10, "more than tolerance_ms"),
        ("timing.action_latency_ms", -1, "action_latency_ms is -1"),
        ("timing.stop_action", [float("inf"), 0], "stop_action"),
    ],
)
def test_what_is_wrong_is_named(path: str, value: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        read(changed(path, value), tmp_path)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("observations.points", ..., r"lacks \['points'\]"),
        ("observations.other", GOOD["observations"]["points"], r"unknown keys \['other'\]"),
        ("observations.position.names", ["a"], "observations.position.names has 1 entries, expected 2"),
        ("observations.points.offset", [1.0], "observations.points.offset has 1 entries, expected 6"),
        ("observations.points.indices", [0, 1], "observations.points.indices has 2 entries, expected 6"),
        ("observations.points", {"topic": "/c", "type": "sensor_msgs/msg/Image"}, "observes a state there"),
        ("actions.0.indices", [0], r"numbers \[0, 0\], expected each of 0 to 1 once"),
        ("actions.0.indices", [2], r"numbers \[0, 2\]"),
        ("actions.1.names", ["a", "b"], r"actions\[1\].names has 2 entries, expected 1"),
        ("timing.stop_action", [0.0], "stop_action has 1 entries, expected 2"),
        ("timing.action_latency_ms", 160, "3.2 control steps, but a chunk has only 3"),
    ],
)
def test_what_does_not_fit_the_policy_is_named(path: str, value: Any, message: str, tmp_path: Path) -> None:
    settings = read(changed(path, value), tmp_path)
    with pytest.raises(ValueError, match=message):
        settings.check(small_spec())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\na: 2", r"\['a'\] occur twice, near line 1"),
        ("policy: !!python/object/apply:os.system [exit]", "not YAML"),
        ("[" * 3000, "not YAML"),
        ("- 1", r"the file is \[1\], expected a map"),
        ("1: 2", "keys"),
        ("", "the file is None"),
    ],
)
def test_files_that_are_no_settings(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        read(text, tmp_path)


def test_the_command_asks_for_a_file() -> None:
    with pytest.raises(SystemExit, match="no settings file is given"):
        main(["ros2"])
