"""When the node takes a control step, with which observation, and what it sends when there is none. Imports no ROS."""

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from parapolicy.control import Controller
from parapolicy.ros2.node_settings import NodeSettings, TimingSettings
from parapolicy.ros2.synchronizer import Matched, Synchronizer

log = logging.getLogger("parapolicy.ros2")

State = Literal["inactive", "waiting", "running", "holding", "stopped"]
WARN_EVERY = 5.0  # seconds between two warnings of one kind
EARLY = 0.25  # of a period, by which an observation may come before its control step is due


@dataclass
class _Episode:
    """The present episode on the grid of control steps; observation times are those of the robot's clock."""

    observation: dict[str, np.ndarray] = field(default_factory=dict)  # of the last step
    observed: float = -np.inf  # its time
    step_time: float = -np.inf  # the time that the last step stands for
    due: float = -np.inf  # observation time of the next step
    age: float = 0.0  # seconds from the last new observation's time to its being taken
    fresh_at: float = -np.inf  # when that was
    repeat_at: float = np.inf  # before it no step is taken without a new observation


class ControlLoop:
    """Takes whole observations to a controller, one per control step, and sends what it answers.

    Values come in by :meth:`receive`, on any thread. :meth:`step` is called by one thread, which computes and sends.

    A control step is taken when a new observation of every source has come and the step is due; the grid of control
    steps is in the observations' own times, so that sources may be faster than the policy. After everything that
    breaks an episode's history (observations that cease, a clock that jumps, a publisher that restarts) the robot is
    held or stopped, and a new episode begins: no observation is ever joined with one from before.

    Args:
        controller: of the policy.
        settings: of the node.
        send: called with actions (n, Da), the first one to be followed at once.
        robot_clock: seconds, of the clock that stamps messages.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        controller: Controller,
        settings: NodeSettings,
        send: Callable[[np.ndarray], None],
        robot_clock: Callable[[], float] = time.time,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.controller, self.settings, self.timing = controller, settings, settings.timing
        self.period = 1 / controller.control_hz
        self.points = max(action.points for action in settings.actions)
        self.latencies = {key: source.latency_ms for key, source in settings.sources.items()}
        self.seed = settings.control.seed
        self.wake = threading.Event()  # something has come that a step may be waiting for
        self.counts: Counter[str] = Counter()
        self.state: State = "inactive"
        self.reason = ""
        self.last_latency = 0.0  # seconds from the last sent action's observation to sending it
        self._send, self._robot_clock, self.monotonic = send, robot_clock, clock
        self._lock = threading.RLock()
        self._generation = 0  # what is computed for an older one is not sent
        self._synchronizer = Synchronizer(self.latencies, self.timing.timeout_ms / 1e3)
        self._publishers: dict[str, bytes] = {}
        self._not_before = -np.inf
        self._episode = _Episode()
        self._sent: np.ndarray | None = None  # the last action (Da,)
        self._hold_at = -np.inf
        self._warned: dict[str, float] = {}

    def receive(self, key: str, stamp: float | None, value: np.ndarray, publisher: bytes = b"") -> None:
        """Take in one source's checked value.

        Args:
            key: of the source.
            stamp: of the message, seconds of the robot's clock; None: now.
            value: as the policy takes it.
            publisher: which one sent it.
        """
        with self._lock:
            now, tolerance = self._robot_clock(), self.timing.tolerance_ms / 1e3
            stamp = now if stamp is None else stamp
            if self._publishers.setdefault(key, publisher) != publisher:
                self._publishers[key] = publisher
                self._break_source(key, f"the publisher of {key!r} is another one; it has restarted, or there are two")
            if now < self._not_before:
                self._not_before = -np.inf
            if stamp > now + tolerance:
                self.refuse(key, f"its stamp is {1e3 * (stamp - now):.0f} ms ahead of this node's clock")
                return
            if stamp < self._not_before:
                self.counts["before_reset"] += 1
                return
            moment, last = stamp - self.latencies[key] / 1e3, self._synchronizer.last_time(key)
            if last is not None and moment <= last:
                if moment >= last - tolerance:
                    self.refuse(key, f"its stamp is not after the one before, by {1e3 * (last - moment):.1f} ms")
                    return
                self._break_source(key, f"the time of {key!r} went back by {last - moment:.3f} s")
            self._synchronizer.add(key, moment, value)
        self.wake.set()

    def refuse(self, key: str, reason: str) -> None:
        """Count a message that cannot be used, as if it had not come."""
        with self._lock:
            self.counts["refused"] += 1
            self._warn(f"refused {key}", f"a message of {key!r} is refused: {reason}")

    def activate(self) -> None:
        """Wait for observations, and act on them."""
        with self._lock:
            self._begin("waiting", "waiting for a first observation")

    def deactivate(self) -> None:
        """Send nothing from now on, but ``stop_action`` once, where there is one."""
        with self._lock:
            if self.state != "inactive":
                self._send_stop_action()
                self._begin("inactive", "")

    def reset(self) -> None:
        """Begin an episode with what is observed from now on; also after a stop.

        Raises:
            RuntimeError: the node is not active.
        """
        with self._lock:
            if self.state == "inactive":
                raise RuntimeError("the node is not active; activate it first")
            self._begin("waiting", "waiting for an observation after a reset")

    def set_timing(self, timing: TimingSettings) -> None:
        """Other settings, from the next step on."""
        with self._lock:
            self.timing = timing
            self._synchronizer.keep = timing.timeout_ms / 1e3

    def step(self) -> float:
        """Take a control step if one is due; else hold, stop or wait. Returns seconds after which to call again, if
        nothing comes before."""
        with self._lock:
            if self.state == "inactive":
                return self.period
            observation = self._next_observation()
            generation, now = self._generation, self.monotonic()
        if observation is not None:
            self._act(observation, generation)
            return 0.0
        wait = self._hold_at - now if self.state == "holding" else self.period / 4
        return float(min(max(wait, 0.0), self.period / 2))

    def snapshot(self) -> dict[str, Any]:
        """What the node tells of itself; called by the thread that calls :meth:`step`."""
        with self._lock:
            now = self._robot_clock()
            ages = {key: self._synchronizer.last_time(key) for key in self.latencies}
            return {
                "state": self.state,
                "reason": self.reason,
                "counts": dict(self.counts),
                "latency_ms": 1e3 * self.last_latency,
                "ages_ms": {key: None if moment is None else 1e3 * (now - moment) for key, moment in ages.items()},
                "controller": self.controller.latency,
            }

    def _next_observation(self) -> dict[str, np.ndarray] | None:
        """The observation of the control step that is due, if any; watches over what does not come."""
        episode, timeout, now = self._episode, self.timing.timeout_ms / 1e3, self.monotonic()
        running = self.state == "running"
        matched = None if self.state == "stopped" else self._fresh()
        if matched is not None and running and matched.time - episode.observed > timeout:
            self._break(f"the time of the observations went ahead by {matched.time - episode.observed:.3f} s")
            return None
        lost = running and self.timing.repeat and now >= episode.repeat_at and self._robot_clock() >= self._latest()
        if matched is not None and (not running or lost or self._is_due(matched.time)):
            if not running:
                self._start_episode()
            self._take(matched, now)
            return matched.values
        if running and now - episode.fresh_at > timeout:
            self._break(f"no whole observation has come for {1e3 * timeout:.0f} ms; {self._missing()}")
        elif lost:
            self.counts["repeated"] += 1
            self._warn("repeated", f"a control step repeats the observation before; {self._missing()}")
            episode.step_time += self.period
            episode.due += self.period
            return episode.observation
        if self.state == "holding" and now >= self._hold_at and self._sent is not None:
            self._hold_at = max(self._hold_at + self.period, now)
            self.counts["held"] += 1
            self._send(self._sent[None])
        return None

    def _fresh(self) -> Matched | None:
        """A whole observation that was not taken yet and is not old."""
        matched = self._synchronizer.newest()
        if matched is None or matched.time <= self._episode.observed:
            return None
        if matched.spread > self.timing.tolerance_ms / 1e3:
            self._warn(
                "spread", f"values are {1e3 * matched.spread:.0f} ms apart, beyond tolerance_ms; {self._missing()}"
            )
            return None
        return matched if self._robot_clock() - matched.time <= self.timing.timeout_ms / 1e3 else None

    def _is_due(self, moment: float) -> bool:
        """Whether an observation is for the next control step, or is the newest when that step cannot wait any more."""
        early, due = EARLY * self.period, self._episode.due
        return moment >= due - early or self._robot_clock() >= due + early

    def _latest(self) -> float:
        """When the next control step's observation is lost, if it has not come."""
        return self._episode.due + self._episode.age + self.period / 2

    def _take(self, matched: Matched, now: float) -> None:
        """This is the observation of the control step."""
        episode = self._episode
        on_grid = matched.time <= episode.due + self.period / 2
        episode.due = (episode.due if on_grid else matched.time) + self.period
        episode.observation, episode.observed, episode.step_time = matched.values, matched.time, matched.time
        episode.fresh_at, episode.age = now, self._robot_clock() - matched.time

    def _act(self, values: Mapping[str, np.ndarray], generation: int) -> None:
        """Compute the control step's action and send it, unless it is not wanted any more."""
        observation = {key: values[key] for key in self.settings.observations}
        held = self.controller.record.held
        try:
            action = self.controller.act(observation)
        except Exception as error:  # of an episode's first chunk: there is nothing to fall back on
            with self._lock:
                self.counts["failed"] += 1
                if generation == self._generation:
                    self._break(f"no action can be computed: {type(error).__name__}: {error}")
            return
        with self._lock:
            if generation != self._generation:
                self.counts["dropped"] += 1
                return
            self._episode.repeat_at = self.monotonic() + self.period / 2
            now = self._robot_clock()
            self.last_latency = now - self._episode.step_time
            if self.last_latency > self.timing.timeout_ms / 1e3:
                self._break(f"an action was computed {1e3 * self.last_latency:.0f} ms after its observation")
                return
            if self.last_latency > self.period:
                self.counts["late"] += 1
                self._warn(
                    "late",
                    f"an action is sent {1e3 * self.last_latency:.0f} ms after its observation, and the control period "
                    f"is {1e3 * self.period:.0f} ms",
                )
            actions, beyond = self._chosen(action, now)
            if self.timing.on_fault == "stop" and (beyond or self.controller.record.held > held):
                self._break("the chunk has ended and no new one is ready")
                return
            self.counts["beyond"] += beyond
            self.counts["sent"] += 1
            self._sent = actions[0]
            self._send(actions)

    def _chosen(self, action: np.ndarray, now: float) -> tuple[np.ndarray, bool]:
        """Actions (n, Da) to send, the first one for when it will act, and whether the chunk ends before that."""
        latency = self.timing.action_latency_ms
        if latency is None and self.points == 1:
            return action[None], False
        planned = self.controller.planned()
        planned[0] = action
        ahead = 0 if latency is None else round((now + latency / 1e3 - self._episode.step_time) / self.period)
        first = min(max(ahead, 0), len(planned) - 1)
        return planned[first : first + self.points], ahead >= len(planned)

    def _break_source(self, key: str, reason: str) -> None:
        """One source's values do not go on from those before."""
        if self.state == "running":
            self._break(reason)
        else:  # no history to lose; the others' values may be of the same moment as what comes now
            self._synchronizer.clear(key)

    def _break(self, reason: str) -> None:
        """The history is broken: hold or stop, and begin anew with what comes."""
        self._synchronizer.clear()
        self._generation += 1
        self.counts["breaks"] += 1
        self._episode = _Episode()
        self._warn("break", f"{reason}; {self.timing.on_fault}")
        if self.state not in ("running", "holding"):
            self.reason = reason if self.state == "waiting" else self.reason
            return
        if self.timing.on_fault == "stop":
            self._send_stop_action()
            self.state = "stopped"
        else:
            self.state = "holding"
            self._hold_at = self.monotonic()
        self.reason = reason

    def _begin(self, state: State, reason: str) -> None:
        """Forget what was observed and sent."""
        self.state, self.reason = state, reason
        self._generation += 1
        self._synchronizer.clear()
        self._publishers.clear()
        self._not_before = self._robot_clock()
        self._episode, self._sent = _Episode(), None
        self.wake.set()

    def _start_episode(self) -> None:
        self.controller.reset(self.seed)
        self.counts["episodes"] += 1
        self.state, self.reason = "running", ""

    def _send_stop_action(self) -> None:
        if self.timing.stop_action is not None:
            self._send(np.asarray(self.timing.stop_action, np.float32)[None])

    def _missing(self) -> str:
        """Which source is the furthest behind."""
        times = {key: self._synchronizer.last_time(key) for key in self.latencies}
        never = [key for key, moment in times.items() if moment is None]
        if never:
            return f"nothing has come of {never}"
        behind = min(times, key=lambda key: times[key] or 0.0)
        return f"{behind!r} is the furthest behind, {1e3 * (self._robot_clock() - (times[behind] or 0.0)):.0f} ms"

    def _warn(self, kind: str, text: str) -> None:
        """Warn, of each kind not too often."""
        now = self.monotonic()
        if now - self._warned.get(kind, -np.inf) >= WARN_EVERY:
            self._warned[kind] = now
            log.warning(text)
