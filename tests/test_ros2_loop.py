"""When the node acts, holds and stops, on clocks that the tests move, with a real controller and policy."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from parapolicy.control import Controller
from parapolicy.policy import Policy
from parapolicy.ros2.loop import ControlLoop
from parapolicy.ros2.node_settings import (
    ActionSettings,
    ControlSettings,
    NodeSettings,
    PolicySettings,
    SourceSettings,
    TimingSettings,
)
from parapolicy.ros2.synchronizer import Synchronizer
from tests.helpers import small_policy, some_observation

START = 1_000.0
pytestmark = pytest.mark.filterwarnings("ignore:act was called")  # the tests make it late


class World:
    """A robot that stamps messages by a clock of its own, and what the loop sent, with the time since the start."""

    def __init__(self, policy: Policy, points: int = 1, latency: dict[str, float] | None = None, **timing: Any) -> None:
        def source(key: str, kind: str) -> SourceSettings:
            settings = (
                {"names": ["a", "b"]} if kind == "JointState" else {"shape": [4, 6, 3]} if kind == "Image" else {}
            )
            package = "std_msgs" if kind == "Float64MultiArray" else "sensor_msgs"
            milliseconds = (latency or {}).get(key, 0.0)
            return SourceSettings(f"/{key}", f"{package}/msg/{kind}", latency_ms=milliseconds, **settings)

        names = ["x", "y"]
        settings = NodeSettings(
            PolicySettings("here"),
            {"position": source("position", "JointState"), "points": source("points", "Float64MultiArray")},
            [ActionSettings("/a", "trajectory_msgs/msg/JointTrajectory", names=names, points=points)],
            ControlSettings(asynchronous=False),
            TimingSettings(**{"tolerance_ms": 20.0, "timeout_ms": 400.0, **timing}),
            {"camera": source("camera", "Image")},
        )
        settings.check(policy.spec)
        self.now = self.robot_now = START
        self.sent: list[tuple[float, np.ndarray]] = []
        self.computing = 0.0  # seconds that a call of the policy takes
        self.during: Callable[[], object] = lambda: None
        self.policy = policy
        self.controller = Controller(policy, clock=lambda: self.now)
        predict = policy.predict

        def slow(*arguments: Any, **options: Any) -> Any:
            self.pass_time(self.computing)
            self.during()
            return predict(*arguments, **options)

        self.controller.policy = type("Slow", (), {"spec": policy.spec, "predict": staticmethod(slow)})()
        self.loop = ControlLoop(self.controller, settings, self._send, lambda: self.robot_now, lambda: self.now)
        self.loop.activate()

    def _send(self, actions: np.ndarray) -> None:
        self.sent.append((round(self.now - START, 6), actions.copy()))

    def pass_time(self, seconds: float) -> None:
        self.now += seconds
        self.robot_now += seconds

    def observe(
        self, seed: int, keys: str = "position points camera", age: float = 0.0, publisher: bytes = b""
    ) -> None:
        for key in keys.split():
            self.loop.receive(key, self.robot_now - age, self.values(seed)[key], publisher)

    def values(self, seed: int) -> dict[str, np.ndarray]:
        step = {key: value[-1] for key, value in some_observation(self.policy.spec, seed=seed).items()}
        return {**step, "camera": np.full((4, 6, 3), seed, np.uint8)}

    def run(self, seconds: float, every: float = 0.01, observe: Callable[[float], object] = lambda now: None) -> None:
        """Let time pass, with an observation for each tick, if any."""
        for _ in range(round(seconds / every)):
            observe(self.now - START)
            while self.loop.step() == 0.0 and self.loop.state == "running":
                pass
            self.pass_time(every)

    def expected(self, seeds: list[int]) -> list[np.ndarray]:
        """Actions of a controller in the same process."""
        controller = Controller(self.policy, clock=lambda: 0.0)
        names = list(self.policy.spec.observation)
        return [controller.act({key: self.values(seed)[key] for key in names}) for seed in seeds]

    @property
    def actions(self) -> list[np.ndarray]:
        return [actions[0] for _, actions in self.sent]

    @property
    def times(self) -> list[float]:
        return [time for time, _ in self.sent]


@pytest.fixture(scope="module")
def policy() -> Policy:
    return small_policy("semi_implicit")


def test_each_source_gives_the_value_nearest_to_the_one_furthest_behind() -> None:
    synchronizer = Synchronizer(["slow", "fast"], keep=1.0)
    assert synchronizer.newest() is None
    for i in range(20):
        synchronizer.add("fast", 0.01 * i, np.float32([i]))
    synchronizer.add("slow", 0.094, np.float32([0]))
    matched = synchronizer.newest()
    assert matched is not None
    assert (matched.time, matched.values["fast"][0]) == (0.094, 9)
    assert matched.spread == pytest.approx(0.004)
    synchronizer.add("slow", 2.0, np.float32([0]))
    synchronizer.add("slow", 3.5, np.float32([0]))
    matched = synchronizer.newest()
    assert matched is not None
    assert matched.time == 0.19
    assert matched.spread == pytest.approx(3.31)  # values older than the newest by more than a second are gone


def test_one_observation_gives_one_action_as_in_one_process(policy: Policy) -> None:
    world = World(policy)
    world.run(1.2, 0.1, lambda now: world.observe(round(now * 10)))
    np.testing.assert_array_equal(world.actions, world.expected(list(range(12))))
    assert world.loop.counts["sent"] == 12
    assert not {"repeated", "late", "breaks"} & set(world.loop.counts)


@pytest.mark.parametrize("hz", [12, 100])
def test_sources_may_be_faster_than_the_policy(policy: Policy, hz: int) -> None:
    world = World(policy)
    observed = -1.0

    def observe(now: float) -> None:
        nonlocal observed
        if now >= observed + 1 / hz - 1e-9:
            observed = max(observed + 1 / hz, now - 0.005)
            world.observe(round(now * 10))

    world.run(2.0, 0.005, observe)
    assert abs(len(world.sent) - 20) <= 1
    assert world.loop.counts["repeated"] == 0
    np.testing.assert_allclose(np.diff(world.times), 0.1, atol=0.06)


def test_a_slow_source_makes_control_steps_repeat(policy: Policy) -> None:
    """Two observations a second short of ten: the motion keeps its speed, and it is told."""
    world = World(policy)
    world.run(2.0, 0.01, lambda now: world.observe(0) if round(now * 100) % 25 == 0 else None)
    assert abs(len(world.sent) - 20) <= 2
    assert world.loop.counts["repeated"] >= 10


def test_a_lost_message_repeats_one_step_and_no_more(policy: Policy) -> None:
    def observe(now: float) -> None:
        tick = round(now * 100)
        if tick % 10 == 0 and tick != 30:
            world.observe(tick // 10)

    world = World(policy)
    world.run(0.8, 0.01, observe)
    np.testing.assert_array_equal(world.actions, world.expected([0, 1, 2, 2, 4, 5, 6, 7]))
    assert world.loop.counts["repeated"] == 1
    assert world.times[3] == pytest.approx(0.35, abs=0.011)
    waiting = World(policy, repeat=False)
    world = waiting
    waiting.run(0.8, 0.01, observe)
    np.testing.assert_array_equal(waiting.actions, waiting.expected([0, 1, 2, 4, 5, 6, 7]))


@pytest.mark.parametrize("missing", ["position", "points", "camera"])
def test_a_topic_that_stops_holds_and_then_begins_a_new_episode(policy: Policy, missing: str) -> None:
    rest = " ".join({"position", "points", "camera"} - {missing})
    world = World(policy)
    world.run(1.0, 0.1, lambda now: world.observe(round(now * 10)))
    world.run(2.0, 0.1, lambda now: world.observe(50, rest))
    assert world.loop.state == "holding"
    assert missing in world.loop.reason
    held = [action for time, action in zip(world.times, world.actions, strict=True) if time > 1.6]
    assert len(held) >= 13
    for action in held:  # never anything of the seconds without a whole observation
        np.testing.assert_array_equal(action, world.actions[len(world.actions) - len(held)])
    world.sent.clear()
    world.run(0.3, 0.1, lambda now: world.observe(round(now * 10)))
    np.testing.assert_array_equal(world.actions, world.expected([30, 31, 32]))
    assert world.loop.counts["episodes"] == 2


def test_a_topic_that_stops_stops_until_a_reset(policy: Policy) -> None:
    world = World(policy, on_fault="stop", stop_action=[7.0, 8.0])
    world.run(0.5, 0.1, lambda now: world.observe(round(now * 10)))
    world.run(1.0, 0.1)
    assert world.loop.state == "stopped"
    np.testing.assert_array_equal(world.actions[-1], [7.0, 8.0])
    count = len(world.sent)
    world.run(1.0, 0.1, lambda now: world.observe(round(now * 10)))
    assert len(world.sent) == count
    world.loop.reset()
    world.run(0.2, 0.1, lambda now: world.observe(round(now * 10)))
    np.testing.assert_array_equal(world.actions[count:], world.expected([25, 26]))
    assert world.loop.state == "running"


def test_refused_messages_are_as_good_as_none(policy: Policy) -> None:
    """So a sensor that gives NaN, or stamps ahead of the clock, ends in a hold."""
    world = World(policy)
    world.run(0.5, 0.1, lambda now: world.observe(round(now * 10)))
    ahead = lambda now: world.observe(60, age=-5.0)  # noqa: E731
    world.run(1.5, 0.1, ahead)
    assert world.loop.state == "holding"
    assert world.loop.counts["refused"] == 45
    world.loop.refuse("position", "number 0 is nan")
    assert world.loop.counts["refused"] == 46


def test_a_clock_that_jumps_ahead_or_back_begins_a_new_episode(policy: Policy) -> None:
    for jump in (-5.0, 5.0):
        world = World(policy)
        world.run(0.5, 0.1, lambda now, w=world: w.observe(round(now * 10)))
        world.robot_now += jump
        world.sent.clear()
        world.run(0.6, 0.1, lambda now, w=world: w.observe(round(now * 10)))
        assert world.loop.counts["episodes"] == 2
        expected = world.expected(list(range(5 if jump < 0 else 6, 11)))
        np.testing.assert_array_equal(world.actions[-len(expected) :], expected)


def test_a_small_step_back_is_refused(policy: Policy) -> None:
    world = World(policy)
    world.pass_time(0.1)
    world.observe(0)
    world.observe(1, age=0.01)
    world.observe(2)
    assert world.loop.counts["refused"] == 6
    world.run(0.1, 0.1)
    np.testing.assert_array_equal(world.actions, world.expected([0]))


def test_a_publisher_that_restarts_begins_a_new_episode(policy: Policy) -> None:
    world = World(policy)
    world.run(0.5, 0.1, lambda now: world.observe(round(now * 10), publisher=b"one"))
    world.sent.clear()
    world.run(0.4, 0.1, lambda now: world.observe(round(now * 10), publisher=b"two"))
    np.testing.assert_array_equal(world.actions[-4:], world.expected([5, 6, 7, 8]))
    assert world.loop.counts["episodes"] == 2


def test_values_apart_by_more_than_the_tolerance_are_not_joined(policy: Policy) -> None:
    world = World(policy)
    world.observe(0, "position camera")
    world.observe(0, "points", age=0.021)
    world.run(0.1)
    assert world.sent == []
    world.observe(1, "points", age=0.019)
    world.run(0.01)
    assert len(world.sent) == 0  # its time has passed meanwhile
    world = World(policy)
    world.observe(0, "position camera")
    world.observe(0, "points", age=-0.019)
    world.run(0.01)
    assert len(world.sent) == 1


def test_a_sources_latency_moves_its_values_in_time(policy: Policy) -> None:
    """The camera's images come 80 ms late; without the offset they would be joined with joints of another moment."""
    world = World(policy, latency={"camera": 80.0}, tolerance_ms=5.0)

    def observe(now: float) -> None:
        tick = round(now * 100)
        world.observe(tick, "position points")
        world.observe(tick, "camera")

    world.run(0.5, 0.01, observe)
    assert world.times[0] == pytest.approx(0.08)
    controller = Controller(policy)
    expected = controller.act({key: world.values(0)[key] for key in policy.spec.observation})
    np.testing.assert_array_equal(world.actions[0], expected)


def test_actions_are_chosen_for_when_they_will_act(policy: Policy) -> None:
    world = World(policy, action_latency_ms=100.0, points=3)
    world.run(0.4, 0.1, lambda now: world.observe(0))
    chunk = Controller(policy)
    chunk.act({key: world.values(0)[key] for key in policy.spec.observation})
    for step, (_, actions) in enumerate(world.sent):
        np.testing.assert_array_equal(actions, chunk.planned()[step + 1 : step + 4])
    world = World(policy, action_latency_ms=100.0)
    world.computing = 0.08  # from the observation on, 180 ms: two control steps
    world.observe(0)
    world.loop.step()
    np.testing.assert_array_equal(world.actions[0], chunk.planned()[2])


def test_beyond_the_chunks_end_the_last_action_is_held_or_nothing_is_sent(policy: Policy) -> None:
    for on_fault in ("hold", "stop"):
        world = World(policy, action_latency_ms=300.0, on_fault=on_fault, timeout_ms=2000.0)
        world.computing = 0.6
        world.observe(0)
        world.loop.step()
        assert (len(world.sent), world.loop.counts["beyond"]) == ((1, 1) if on_fault == "hold" else (0, 0))
        assert world.loop.state == ("running" if on_fault == "hold" else "stopped")


def test_an_action_that_took_too_long_is_not_sent(policy: Policy) -> None:
    world = World(policy)
    world.computing = 0.5
    world.observe(0)
    world.loop.step()
    assert world.sent == []
    assert world.loop.state == "holding"
    assert "500 ms after its observation" in world.loop.reason
    world.computing = 0.2
    world.observe(1)
    world.loop.step()
    assert len(world.sent) == world.loop.counts["late"] == 1


@pytest.mark.parametrize("event", ["reset", "deactivate"])
def test_what_is_computed_across_a_reset_is_not_sent(policy: Policy, event: str) -> None:
    world = World(policy)
    world.during = getattr(world.loop, event)
    world.observe(0)
    world.loop.step()
    assert world.sent == []
    assert world.loop.counts["dropped"] == 1
    if event == "deactivate":
        with pytest.raises(RuntimeError, match="not active"):
            world.loop.reset()


def test_observations_of_before_a_reset_do_not_count(policy: Policy) -> None:
    world = World(policy)
    world.run(0.3, 0.1, lambda now: world.observe(round(now * 10)))
    world.loop.reset()
    world.observe(9, age=0.001)  # it was under way
    world.loop.step()
    assert len(world.sent) == 3
    world.observe(4)
    world.loop.step()
    np.testing.assert_array_equal(world.actions[3:], world.expected([4]))
    assert world.loop.counts["before_reset"] == 3


def test_a_first_chunk_that_fails_is_tried_again(policy: Policy) -> None:
    def fail() -> None:
        raise MemoryError("no room")

    world = World(policy)
    world.during = fail
    world.observe(0)
    world.loop.step()
    assert world.sent == []
    assert "MemoryError: no room" in world.loop.reason
    world.during = lambda: None
    world.pass_time(0.1)
    world.observe(1)
    world.loop.step()
    np.testing.assert_array_equal(world.actions, world.expected([1]))


def test_nothing_is_sent_before_activation_and_after_deactivation(policy: Policy) -> None:
    world = World(policy, stop_action=[0.0, 1.0])
    world.loop.deactivate()
    np.testing.assert_array_equal(world.actions, [[0.0, 1.0]])
    world.observe(0)
    world.run(0.5)
    assert len(world.sent) == 1
    world.loop.activate()
    world.run(0.5)
    assert world.loop.state == "waiting"
    world.observe(1)
    world.loop.step()
    np.testing.assert_array_equal(world.actions[1:], world.expected([1]))


def test_settings_change_from_the_next_step_on(policy: Policy) -> None:
    world = World(policy)
    world.run(0.3, 0.1, lambda now: world.observe(0))
    world.loop.set_timing(dataclasses.replace(world.loop.timing, on_fault="stop", timeout_ms=150.0))
    world.run(0.3, 0.01)
    assert world.loop.state == "stopped"
    snapshot = world.loop.snapshot()
    assert snapshot["state"] == "stopped"
    assert snapshot["controller"]["steps"] >= 3
