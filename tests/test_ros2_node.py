"""The node as a process, over DDS on this machine, with a simulated robot: make ros2-test runs it in an environment of
its own."""

import dataclasses
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

pytest.importorskip("rclpy", reason="no ROS 2 here; make ros2-test runs this where its wheels can be had")

import rclpy
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus
from lifecycle_msgs.msg import Transition
from lifecycle_msgs.srv import ChangeState
from rcl_interfaces.srv import SetParametersAtomically
from rclpy.duration import Duration
from rclpy.parameter import Parameter
from rclpy.qos import QoSProfile
from sensor_msgs.msg import CompressedImage, Image, JointState
from std_msgs.msg import Float64MultiArray

import parapolicy
from envs import make_env
from examples.ros2_robot import Robot
from parapolicy.cli import main
from parapolicy.networks import build_network
from parapolicy.ros2.messages import observed_value
from parapolicy.ros2.node_settings import ActionSettings, SourceSettings
from parapolicy.ros2.topics import action_message
from tests.conftest import PATIENCE, ROOT

EXAMPLE = yaml.safe_load((ROOT / "examples" / "ros2_pusht.yaml").read_text())
SEED = 100_000


class Running:
    """``parapolicy ros2`` as a process."""

    def __init__(self, folder: Path, **sections: Any) -> None:
        settings = {**EXAMPLE, **sections}
        file, self._log = folder / "node.yaml", folder / f"node{time.monotonic_ns()}.log"
        file.write_text(yaml.safe_dump(settings))
        command = [sys.executable, "-m", "parapolicy.cli", "ros2", str(file)]
        with self._log.open("w") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT)

    @property
    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def end(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(PATIENCE)


class Streaming(Robot):
    """A robot that stands at its first observation and streams it, with faults that the tests switch on."""

    def __init__(self, seed: int = SEED) -> None:
        super().__init__()
        self.observation, _ = self.env.reset(seed=seed)
        self.diagnostics: list[DiagnosticArray] = []
        self.create_subscription(DiagnosticArray, "/diagnostics", self.diagnostics.append, 10)
        self.streaming = self.create_timer(0.1, self._stream)
        self.silent: set[Any] = set()  # publishers
        self.offset = 0.0  # seconds, of the stamps
        self.damage: Callable[[Any], None] = lambda message: None

    def _stream(self) -> None:
        self.publish(self.observation)

    def publish(self, observation: dict[str, np.ndarray]) -> None:
        for publisher in (self.joints, self.block, self.camera):
            if not hasattr(publisher, "send"):
                publisher.send = publisher.publish

                def publish(message: Any, publisher: Any = publisher) -> None:
                    stamp = message.header.stamp
                    seconds = stamp.sec + self.offset
                    stamp.sec = int(seconds)
                    self.damage(message)
                    if publisher not in self.silent:
                        publisher.send(message)

                publisher.publish = publish
        super().publish(observation)

    def spin_until(self, condition: Callable[[], bool], what: str) -> None:
        self._wait_for(condition, what)

    def spin(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            rclpy.spin_once(self, timeout_sec=0.02)

    def call(self, kind: Any, name: str, request: Any) -> Any:
        client = self.create_client(kind, f"/parapolicy/{name}")
        self.spin_until(client.service_is_ready, name)
        self.spin(0.5)  # until the node knows this client, too: an answer that it sends earlier is lost
        answer = client.call_async(request)
        self.spin_until(answer.done, name)
        self.destroy_client(client)
        return answer.result()

    def fresh(self, count: int = 3) -> list[np.ndarray]:
        """The next targets."""
        self.targets.clear()
        self.spin_until(lambda: len(self.targets) >= count, f"{count} targets")
        return self.targets[:count]

    def told(self) -> tuple[DiagnosticStatus, dict[str, str]]:
        """The next diagnostics."""
        self.diagnostics.clear()
        self.spin_until(lambda: bool(self.diagnostics), "diagnostics")
        (status,) = self.diagnostics[-1].status
        return status, {pair.key: pair.value for pair in status.values}


@pytest.fixture(scope="module", autouse=True)
def _network(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """This machine only, a domain of this process's own, and logs out of the user's home."""
    patch = pytest.MonkeyPatch()
    patch.setenv("ROS_AUTOMATIC_DISCOVERY_RANGE", "LOCALHOST")
    patch.setenv("ROS_DOMAIN_ID", str(1 + os.getpid() % 100))
    patch.setenv("ROS_LOG_DIR", str(tmp_path_factory.mktemp("ros")))
    rclpy.init()
    yield
    rclpy.shutdown()
    patch.undo()


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A policy of Push-T's shapes with a small network of random weights, which answers at once."""
    folder = tmp_path_factory.mktemp("policy")
    shipped = parapolicy.load_policy(ROOT / EXAMPLE["policy"]["checkpoint"], device="cpu")
    network = {"name": "unet1d", "diffusion_step_embed_dim": 16, "down_dims": [16, 32], "n_groups": 4}
    spec = dataclasses.replace(shipped.spec, network=network)
    weights = build_network(spec).requires_grad_(False).eval()
    parapolicy.save_policy(dataclasses.replace(shipped, spec=spec, network=weights), folder)
    return str(folder)


@pytest.fixture
def start(tmp_path: Path, quick: str) -> Iterator[Callable[..., Running]]:
    started: list[Running] = []

    def begin(**sections: Any) -> Running:
        started.append(Running(tmp_path, **{"policy": {"checkpoint": quick}, **sections}))
        return started[-1]

    yield begin
    for running in started:
        print(running.log)
        if running.process.poll() is None:
            running.process.kill()
            running.process.wait()


@pytest.fixture
def robot() -> Iterator[Streaming]:
    streaming = Streaming()
    yield streaming
    streaming.destroy_node()


def timing(**changes: Any) -> dict[str, Any]:
    return {**EXAMPLE["timing"], "repeat": True, **changes}


def first_action(checkpoint: str, observation: dict[str, np.ndarray]) -> np.ndarray:
    controller = parapolicy.Controller(parapolicy.load_policy(checkpoint, device="cpu"))
    return controller.act({key: observation[key] for key in EXAMPLE["observations"]})


def test_the_reward_is_that_of_one_process(start: Callable[..., Running]) -> None:
    """Push-T over topics, in step: the same actions, so the same reward but for the simulator's rounding."""
    running = start(policy=EXAMPLE["policy"], timing={**EXAMPLE["timing"], "timeout_ms": 1e3 * PATIENCE})
    robot = Robot(steps=40)
    played = robot.play(SEED, hz=1000)
    robot.destroy_node()
    policy = parapolicy.load_policy(ROOT / EXAMPLE["policy"]["checkpoint"], device="cpu")
    controller, env = parapolicy.Controller(policy), make_env("pusht", policy.spec, max_episode_steps=40)
    observation, best, over = env.reset(seed=SEED)[0], 0.0, False
    while not over:
        observation, reward, terminated, truncated, _ = env.step(controller.act(observation))
        best, over = max(best, float(reward)), terminated or truncated
    assert best > 0
    assert played == pytest.approx(best, rel=1e-12)
    assert running.end() == 0
    assert "closing" in running.log


def test_faults_end_in_a_hold_and_a_new_episode(start: Callable[..., Running], robot: Streaming) -> None:
    running = start(timing=timing(timeout_ms=1500))
    robot.spin_until(lambda: robot.state == "running", "a first observation")
    robot.fresh()

    def expect_hold(name: str) -> None:
        robot.spin_until(lambda: robot.state == "holding", f"a hold: {name}")
        first, *rest = robot.fresh(5)
        assert all(np.array_equal(target, first) for target in rest)
        status, values = robot.told()
        assert status.level == DiagnosticStatus.ERROR
        assert values["state"] == "holding"
        assert name in status.message or name in running.log

    def recover() -> None:
        robot.silent, robot.offset, robot.damage = set(), 0.0, lambda message: None
        robot.spin_until(lambda: robot.state == "running", "a recovery")
        robot.fresh()

    for publisher, name in ((robot.camera, "camera"), (robot.block, "keypoint")):
        robot.silent = {publisher}
        expect_hold(f"{name!r} is furthest behind")
        recover()

    def not_a_number(message: Any) -> None:
        if isinstance(message, JointState):
            message.position[1] = math.nan

    def short_image(message: Any) -> None:
        if isinstance(message, Image):
            message.data = message.data[:-1]

    for damage, text in ((not_a_number, "is nan, expected a finite number"), (short_image, "has 27647 bytes")):
        robot.damage = damage
        expect_hold(text)
        recover()
    for offset, text in ((-5.0, "went back by"), (5.0, "ahead of this node's clock")):
        robot.offset = offset
        expect_hold(text)
        recover()
    _, values = robot.told()
    assert int(values["episodes"]) >= 6
    assert values["controller.failures"] == "0"
    assert running.process.poll() is None


def test_either_node_restarts(start: Callable[..., Running], robot: Streaming, quick: str) -> None:
    settings = {"timing": timing(timeout_ms=3000), "control": {"asynchronous": False, "seed": 0}}
    running = start(**settings)
    robot.spin_until(lambda: robot.state == "running", "a first observation")
    robot.destroy_node()
    again = Streaming(seed=SEED + 1)
    again.spin_until(lambda: "has changed: it restarted" in running.log, "the restart to be seen")
    again.spin_until(lambda: again.state == "running", "the new robot's observation")
    assert running.end(signal.SIGKILL) == -signal.SIGKILL
    again.spin(0.5)
    again.targets.clear()
    again.spin(0.5)
    assert again.targets == []
    start(**settings)
    (target,) = again.fresh(1)
    np.testing.assert_array_equal(target, first_action(quick, again.observation))
    again.destroy_node()


def test_a_slow_subscriber_gets_the_newest_action_and_no_old_one(
    start: Callable[..., Running], robot: Streaming
) -> None:
    running = start(timing=timing(timeout_ms=1500))
    robot.spin_until(lambda: robot.state == "running", "a first observation")
    slow, got = rclpy.create_node("slow"), []
    profile = QoSProfile(depth=1, lifespan=Duration(seconds=1))  # what docs/ros2.md advises
    slow.create_subscription(Float64MultiArray, "/target", got.append, profile)
    while not got:
        rclpy.spin_once(slow, timeout_sec=0.1)
        robot.spin(0.1)
    got.clear()
    robot.spin(1.0)  # some ten actions, of which it takes none
    rclpy.spin_once(slow, timeout_sec=1.0)
    assert len(got) == 1
    np.testing.assert_array_equal(np.float32(got[0].data), robot.targets[-1])
    robot.spin(0.5)
    assert running.end() == 0
    got.clear()
    robot.spin(1.7)
    rclpy.spin_once(slow, timeout_sec=0.5)
    assert got == []  # the last one has expired
    slow.destroy_node()


def test_lifecycle_parameters_and_stopping(start: Callable[..., Running], robot: Streaming) -> None:
    running = start(autostart=False, timing=timing(timeout_ms=1000, on_fault="stop", stop_action=[1.0, 2.0]))

    def change(transition: int) -> bool:
        return bool(
            robot.call(ChangeState, "change_state", ChangeState.Request(transition=Transition(id=transition))).success
        )

    def set_parameters(**values: Any) -> Any:
        request = SetParametersAtomically.Request()
        request.parameters = [Parameter(name, value=value).to_parameter_msg() for name, value in values.items()]
        return robot.call(SetParametersAtomically, "set_parameters_atomically", request).result

    assert change(Transition.TRANSITION_CONFIGURE)
    robot.spin_until(lambda: robot.state == "inactive", "configuring")
    robot.spin(0.3)
    assert robot.targets == []
    assert change(Transition.TRANSITION_ACTIVATE)
    robot.spin_until(lambda: robot.state == "running", "activation")
    robot.fresh()
    for values, reason in (
        ({"timeout_ms": 1.0}, "timeout_ms is 1"),
        ({"on_fault": "panic"}, "on_fault is 'panic'"),
        ({"latency_ms.agent_pos": -1.0}, "latency_ms is -1"),
        ({"action_latency_ms": 5000.0}, "a chunk has only 7 steps"),
        ({"seed": -3}, "seed is -3"),
    ):
        result = set_parameters(**values)
        assert not result.successful
        assert reason in result.reason
    assert set_parameters(timeout_ms=800.0, seed=5, deadline_ms=90.0, action_latency_ms=200.0).successful
    robot.fresh()
    robot.silent = {robot.joints}
    robot.spin_until(lambda: robot.state == "stopped", "the stop")
    np.testing.assert_array_equal(robot.targets[-1], [1.0, 2.0])
    robot.silent = set()
    robot.targets.clear()
    robot.spin(0.5)
    assert robot.targets == []
    assert robot.told()[0].level == DiagnosticStatus.ERROR
    robot.reset(SEED)
    robot.spin_until(lambda: robot.state == "running", "the reset")
    robot.fresh()
    assert change(Transition.TRANSITION_DEACTIVATE)
    np.testing.assert_array_equal(robot.targets[-1], [1.0, 2.0])
    robot.targets.clear()
    robot.spin(0.3)
    assert robot.targets == []
    assert change(Transition.TRANSITION_CLEANUP)
    assert change(Transition.TRANSITION_CONFIGURE)
    assert change(Transition.TRANSITION_ACTIVATE)
    robot.fresh()
    assert running.end() == 0
    robot.spin(0.3)
    np.testing.assert_array_equal(robot.targets[-1], [1.0, 2.0])


def test_what_is_wrong_with_the_settings_ends_the_command(start: Callable[..., Running], tmp_path: Path) -> None:
    running = start(observations={})
    assert running.process.wait(PATIENCE) == 1
    assert "error: observations lacks ['agent_pos', 'keypoint']" in running.log
    file = tmp_path / "wrong.yaml"
    file.write_text(yaml.safe_dump({**EXAMPLE, "timing": {"tolerance": 1}}))
    with pytest.raises(SystemExit, match=r"error: timing has unknown settings \['tolerance'\]"):
        main(["ros2", str(file)])
    with pytest.raises(SystemExit, match=r"the arguments \['--fast'\] are unknown"):
        main(["ros2", str(ROOT / "examples" / "ros2_pusht.yaml"), "--fast"])


def test_real_messages_are_mapped() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (96, 96, 3), dtype=np.uint8)
    joints = JointState(name=["b", "a"], position=[1.0, 2.0])
    source = SourceSettings("/q", "sensor_msgs/msg/JointState", names=["a", "b"])
    np.testing.assert_array_equal(observed_value(joints, source, parapolicy.Feature((2,))), [2, 1])
    array = Float64MultiArray(data=[1.0, 2.0])
    source = SourceSettings("/x", "std_msgs/msg/Float64MultiArray", scale=2.0)
    np.testing.assert_array_equal(observed_value(array, source, parapolicy.Feature((2,))), [2, 4])
    image = Image(height=96, width=96, step=288, encoding="rgb8", data=pixels.tobytes())
    feature = parapolicy.Feature((96, 96, 3), "image")
    np.testing.assert_array_equal(observed_value(image, SourceSettings("/c", "sensor_msgs/msg/Image"), feature), pixels)
    import io

    from PIL import Image as Pillow

    file = io.BytesIO()
    Pillow.fromarray(pixels).save(file, "PNG")
    message = CompressedImage(format="png", data=file.getvalue())
    source = SourceSettings("/c", "sensor_msgs/msg/CompressedImage")
    np.testing.assert_array_equal(observed_value(message, source, feature), pixels)


def test_actions_become_messages() -> None:
    actions = np.float32([[1, 2], [3, 4], [5, 6]])
    stamp = rclpy.time.Time(seconds=3).to_msg()
    state = ActionSettings("/a", "sensor_msgs/msg/JointState", names=["x", "y"], field="velocity", scale=2.0)
    message = action_message(state, actions, 0.1, stamp)
    assert (list(message.name), list(message.velocity), list(message.position)) == (["x", "y"], [2.0, 4.0], [])
    assert message.header.stamp.sec == 3
    path = ActionSettings("/a", "trajectory_msgs/msg/JointTrajectory", names=["y"], indices=[1], points=2)
    message = action_message(path, actions, 0.1, stamp)
    assert list(message.joint_names) == ["y"]
    assert [list(point.positions) for point in message.points] == [[2.0], [4.0]]
    assert [point.time_from_start.nanosec for point in message.points] == [100_000_000, 200_000_000]
    numbers = action_message(ActionSettings("/a", "std_msgs/msg/Float64MultiArray"), actions, 0.1, stamp)
    assert list(numbers.data) == [1.0, 2.0]
