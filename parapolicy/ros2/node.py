"""The ROS 2 node: lifecycle, parameters, the reset service, and the thread that computes and sends."""

import dataclasses
import logging
import os
import signal
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import rclpy
from rcl_interfaces.msg import SetParametersResult
from rclpy.executors import SingleThreadedExecutor
from rclpy.lifecycle import LifecycleNode, LifecycleState, TransitionCallbackReturn
from rclpy.parameter import Parameter
from rclpy.publisher import Publisher
from rclpy.signals import SignalHandlerOptions
from rclpy.subscription import Subscription
from rclpy.utilities import remove_ros_args
from std_msgs.msg import String
from std_srvs.srv import Trigger

from parapolicy.control import Controller
from parapolicy.loading import load_policy
from parapolicy.planner import made_up_observations
from parapolicy.ros2.loop import ControlLoop
from parapolicy.ros2.node_settings import NodeSettings, TimingSettings
from parapolicy.ros2.topics import Diagnostics, action_sender, subscribe
from parapolicy.ros2.yaml_file import read_yaml

log = logging.getLogger("parapolicy.ros2")

NETWORK = "ROS_AUTOMATIC_DISCOVERY_RANGE"
DIAGNOSTICS_S = 1.0  # seconds between two messages of diagnostics
WARM_UP = 3  # chunks before the first observation: the first ones allocate and compile
SPIN_S = 0.05
LATENCY = "latency_ms."  # followed by a source's name: a parameter
NONE = -1.0  # value of the parameters action_latency_ms and deadline_ms if the setting is null


class PolicyNode(LifecycleNode):
    """A policy between topics of observations and topics of actions.

    Configuring loads the policy, checks the settings against it, warms it up and opens the topics; activating starts to
    send. ``error`` is the error of configuring or of the thread that computes, or None.
    """

    def __init__(self, settings: NodeSettings) -> None:
        super().__init__(settings.name, namespace=settings.namespace)
        self.settings = settings
        self.error: Exception | None = None
        self._loop: ControlLoop | None = None
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None
        self._subscriptions_in: list[Subscription] = []
        self._publishers_out: list[Publisher] = []
        self._heartbeat = self.create_publisher(String, "~/heartbeat", 1)
        self._diagnostics = Diagnostics(self, settings)
        self.create_service(Trigger, "~/reset", self._reset)
        self._declare_parameters()

    def on_configure(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Load the policy and open the topics."""
        try:
            self._configure()
        except (ValueError, OSError, RuntimeError) as error:
            self.error = error
            log.error("the node cannot be configured: %s", error)
            return TransitionCallbackReturn.FAILURE
        self.error = None
        return TransitionCallbackReturn.SUCCESS

    def on_activate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Start acting on observations."""
        assert self._loop is not None  # configured
        self._loop.activate()
        return super().on_activate(state)

    def on_deactivate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Stop sending."""
        assert self._loop is not None  # configured
        self._loop.deactivate()
        return super().on_deactivate(state)

    def on_cleanup(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Close the topics and drop the policy."""
        self.close()
        return TransitionCallbackReturn.SUCCESS

    def on_shutdown(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Stop sending, and close the topics."""
        self.close()
        return TransitionCallbackReturn.SUCCESS

    def on_error(self, state: LifecycleState) -> TransitionCallbackReturn:
        """The same as cleaning up."""
        self.close()
        return TransitionCallbackReturn.SUCCESS

    def close(self) -> None:
        """Stop sending, end the thread and close the topics."""
        if self._loop is None:
            return
        self._loop.deactivate()
        self._closing.set()
        self._loop.wake.set()
        if self._thread is not None:
            self._thread.join()
        self._loop.controller.close()
        for subscription in self._subscriptions_in:
            self.destroy_subscription(subscription)
        for publisher in self._publishers_out:
            self.destroy_publisher(publisher)
        self._subscriptions_in, self._publishers_out = [], []
        self._loop = self._thread = None

    def _configure(self) -> None:
        given, control = self.settings.policy, self.settings.control
        policy = load_policy(given.checkpoint, given.sampler, given.device, given.engine, **given.parameters)
        self.settings.check(policy.spec)
        for observation in made_up_observations(policy, WARM_UP):
            policy.predict(observation)
        controller = Controller(
            policy, control.control_hz, control.asynchronous, self._deadline_ms(), warm_start=control.warm_start
        )
        send, self._publishers_out = action_sender(self, self.settings, 1 / controller.control_hz)
        loop = ControlLoop(controller, self.settings, send, self._robot_time)
        self._loop, self._closing = loop, threading.Event()
        self._apply({parameter.name: parameter.value for parameter in self._run_time_parameters()})
        features = {**policy.spec.observation, **{key: each.feature for key, each in self.settings.monitors.items()}}
        self._subscriptions_in = subscribe(self, self.settings, features, loop)
        self._thread = threading.Thread(target=self._run, args=(loop, self._closing), name="parapolicy-control")
        self._thread.start()

    def _run(self, loop: ControlLoop, closing: threading.Event) -> None:
        """Take control steps, send the heartbeat and publish diagnostics. The only thread that computes."""
        beat_at = told_at = -np.inf
        try:
            while not closing.is_set():
                loop.wake.clear()
                wait = loop.step()
                now = loop.monotonic()
                if now >= beat_at:
                    beat_at = now + loop.period
                    self._heartbeat.publish(String(data=loop.state))
                if now >= told_at + DIAGNOSTICS_S:
                    told_at = now
                    self._diagnostics.publish(loop.snapshot(), loop.period)
                if wait > 0:
                    loop.wake.wait(wait)
        except Exception as error:
            log.exception("the control thread has failed, and no action is sent from now on")
            self.error = error
            loop.deactivate()
            signal.raise_signal(signal.SIGTERM)

    def _reset(self, request: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        try:
            if self._loop is None:
                raise RuntimeError("the node is not configured; configure and activate it first")
            self._loop.reset()
            response.success, response.message = (
                True,
                f"the next observation begins an episode of seed {self._loop.seed}",
            )
        except RuntimeError as error:
            response.success, response.message = False, str(error)
        return response

    def _declare_parameters(self) -> None:
        timing = self.settings.timing
        for name in ("tolerance_ms", "timeout_ms", "on_fault", "repeat"):
            self.declare_parameter(name, getattr(timing, name))
        for name, value in (
            ("action_latency_ms", timing.action_latency_ms),
            ("deadline_ms", self.settings.control.deadline_ms),
        ):
            self.declare_parameter(name, NONE if value is None else value)
        self.declare_parameter("seed", self.settings.control.seed)
        for key, source in self.settings.sources.items():
            self.declare_parameter(LATENCY + key, source.latency_ms)
        self.add_on_set_parameters_callback(self._set_parameters)

    def _run_time_parameters(self) -> list[Parameter]:
        names = ["tolerance_ms", "timeout_ms", "on_fault", "repeat", "action_latency_ms", "deadline_ms", "seed"]
        return self.get_parameters([*names, *(LATENCY + key for key in self.settings.sources)])

    def _set_parameters(self, parameters: Sequence[Parameter]) -> SetParametersResult:
        """Check new values together, and use them from the next control step on."""
        current = {parameter.name: parameter.value for parameter in self._run_time_parameters()}
        given = {parameter.name: parameter.value for parameter in parameters if parameter.name in current}
        try:
            self._apply({**current, **given})
        except (ValueError, TypeError) as error:
            return SetParametersResult(successful=False, reason=str(error))
        return SetParametersResult(successful=True)

    def _apply(self, values: dict[str, Any]) -> None:
        """Use the values of all run-time parameters. If one does not fit, raise ValueError and change nothing."""
        settings, loop = self.settings, self._loop
        timing = TimingSettings(
            tolerance_ms=values["tolerance_ms"],
            timeout_ms=values["timeout_ms"],
            on_fault=_one_of(values["on_fault"], ("hold", "stop")),
            repeat=values["repeat"],
            action_latency_ms=None if values["action_latency_ms"] == NONE else values["action_latency_ms"],
            stop_action=settings.timing.stop_action,
        )
        deadline = None if values["deadline_ms"] == NONE else values["deadline_ms"]
        control = dataclasses.replace(settings.control, seed=values["seed"], deadline_ms=deadline)
        latencies = {key: values[LATENCY + key] for key in settings.sources}
        for key, source in settings.sources.items():
            dataclasses.replace(source, latency_ms=latencies[key])  # checks the value
        changed = dataclasses.replace(settings, timing=timing, control=control)
        if loop is not None:
            changed.check(loop.controller.policy.spec)
            loop.controller.deadline = None if deadline is None else deadline / 1e3
            loop.seed, loop.latencies = control.seed, latencies
            loop.set_timing(timing)

    def _deadline_ms(self) -> float | None:
        value = self.get_parameter("deadline_ms").value
        return None if value == NONE else value

    def _robot_time(self) -> float:
        """Seconds by the clock that stamps messages: the system's, or ``/clock`` with ``use_sim_time``."""
        seconds, nanoseconds = self.get_clock().now().seconds_nanoseconds()
        return float(seconds + 1e-9 * nanoseconds)


class _ToRos(logging.Handler):
    """Passes Python's log to the node's."""

    def __init__(self, node: PolicyNode) -> None:
        super().__init__()
        self._log = node.get_logger()

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.ERROR:
            self._log.error(self.format(record))
        elif record.levelno >= logging.WARNING:
            self._log.warning(self.format(record))
        else:
            self._log.info(self.format(record))


def run_node(path: str | Path, ros_arguments: Sequence[str] = ()) -> None:
    """Run the node of a settings file until SIGTERM or SIGINT.

    Raises:
        ValueError, OSError: the settings or the policy cannot be read, or do not fit each other.
    """
    settings = read_yaml(path, NodeSettings)
    left = remove_ros_args(["parapolicy", *ros_arguments])[1:]
    if left:
        raise ValueError(f"the arguments {left} are unknown, expected a settings file and --ros-args …")
    if NETWORK not in os.environ:
        os.environ[NETWORK] = "LOCALHOST"
        print(
            f"{NETWORK} is not set, so only this machine is reached; set it to SUBNET to reach the network", flush=True
        )
    stopping = threading.Event()
    rclpy.init(args=["parapolicy", *ros_arguments], signal_handler_options=SignalHandlerOptions.NO)
    before = {number: signal.signal(number, lambda *_: stopping.set()) for number in (signal.SIGTERM, signal.SIGINT)}
    node = PolicyNode(settings)
    handler = _ToRos(node)
    logging.captureWarnings(True)
    for name in ("parapolicy", "py.warnings"):
        logging.getLogger(name).addHandler(handler)
    logging.getLogger("parapolicy").setLevel(logging.INFO)
    try:
        executor = SingleThreadedExecutor()
        executor.add_node(node)
        if settings.autostart and node.trigger_configure() == TransitionCallbackReturn.SUCCESS:
            node.trigger_activate()
        log.info("ready" if node.error is None else "not configured")
        while not stopping.is_set() and (node.error is None or not settings.autostart):
            executor.spin_once(timeout_sec=SPIN_S)
        log.info("closing")
        if node.error is not None:
            raise node.error
    finally:
        node.close()
        node.destroy_node()
        rclpy.shutdown()
        for number, old in before.items():
            signal.signal(number, old)


def _one_of(value: Any, expected: Sequence[str]) -> Any:
    if value not in expected:
        raise ValueError(f"on_fault is {value!r}, expected one of {list(expected)}")
    return value
