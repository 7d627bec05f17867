"""The node's control loop: when to take a control step, with which observation, and what to send. Imports no ROS."""

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
WARN_EVERY = 5.0  # seconds between two warnings of the same kind
EARLY = 0.25  # periods by which an observation may come before its control step is due


@dataclass
class _Episode:
    """The present episode on the grid of control steps. Observation times are by the robot's clock."""

    observation: dict[str, np.ndarray] = field(default_factory=dict)  # of the last step
    observed: float = -np.inf  # time of the last step's observation
    step_time: float = -np.inf  # nominal time of the last step
    due: float = -np.inf  # observation time of the next step
    age: float = 0.0  # seconds from the last new observation's time to its step
    fresh_at: float = -np.inf  # time of that step, by the local clock
    repeat_at: float = np.inf  # before this time, a step needs a new observation


class ControlLoop:
    """Passes whole observations to a controller, one per control step, and sends its actions.

    :meth:`receive` takes values from any thread. :meth:`step` is called by one thread, which computes and sends.

    A control step is taken when every source has a new value and the step is due. The grid of control steps is in the
    observations' own times, so sources may be faster than the policy. When an episode's history breaks (observations
    stop, a clock jumps, a publisher restarts), the robot is held or stopped and a new episode begins: an observation is
    never joined with one from before the break.

    Args:
        controller: of the policy.
        settings: of the node.
        send: called with actions (n, Da), the first one to be followed immediately.
        robot_clock: seconds, by the clock that stamps messages.
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
        self.wake = threading.Event()  # set when a value arrives that a step may be waiting for
        self.counts: Counter[str] = Counter()
        self.state: State = "inactive"
        self.reason = ""
        self.last_latency = 0.0  # seconds from the last sent action's observation to its sending
        self._send, self._robot_clock, self.monotonic = send, robot_clock, clock
        self._lock = threading.RLock()
        self._generation = 0  # actions computed for an older generation are not sent
        self._synchronizer = Synchronizer(self.latencies, self.timing.timeout_ms / 1e3)
        self._publishers: dict[str, bytes] = {}
        self._not_before = -np.inf
        self._episode = _Episode()
        self._sent: np.ndarray | None = None  # the last action (Da,)
        self._hold_at = -np.inf
        self._warned: dict[str, float] = {}

    def receive(self, key: str, stamp: float | None, value: np.ndarray, publisher: bytes = b"") -> None:
        """Receive one source's checked value.

        Args:
            key: of the source.
            stamp: of the message, seconds by the robot's clock; None: now.
            value: as the policy takes it.
            publisher: identifier of its publisher.
        """
        with self._lock:
            now, tolerance = self._robot_clock(), self.timing.tolerance_ms / 1e3
            stamp = now if stamp is None else stamp
            if self._publishers.setdefault(key, publisher) != publisher:
                self._publishers[key] = publisher
                self._break_source(key, f"the publisher of {key!r} has changed: it restarted, or there are two")
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
                    self.refuse(
                        key,
                        f"its stamp is {1e3 * (last - moment):.1f} ms before the previous one, expected a later one",
                    )
                    return
                self._break_source(key, f"the time of {key!r} went back by {last - moment:.3f} s")
            self._synchronizer.add(key, moment, value)
        self.wake.set()

    def refuse(self, key: str, reason: str) -> None:
        """Count a message that cannot be used; it is otherwise ignored."""
        with self._lock:
            self.counts["refused"] += 1
            self._warn(f"refused {key}", f"a message of {key!r} is refused: {reason}")

    def activate(self) -> None:
        """Start waiting for observations and acting on them."""
        with self._lock:
            self._begin("waiting", "waiting for a first observation")

    def deactivate(self) -> None:
        """Stop sending, after one ``stop_action`` if there is one."""
        with self._lock:
            if self.state != "inactive":
                self._send_stop_action()
                self._begin("inactive", "")

    def reset(self) -> None:
        """Begin an episode with the next observations; also after a stop.

        Raises:
            RuntimeError: the node is not active.
        """
        with self._lock:
            if self.state == "inactive":
                raise RuntimeError("the node is not active; activate it first")
            self._begin("waiting", "waiting for an observation after a reset")

    def set_timing(self, timing: TimingSettings) -> None:
        """Change the timing settings, from the next step on."""
        with self._lock:
            self.timing = timing
            self._synchronizer.keep = timing.timeout_ms / 1e3

    def step(self) -> float:
        """Take a control step if one is due; otherwise hold, stop or wait. Returns the seconds after which to call
        again if no value arrives earlier."""
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
        """The state for diagnostics. Call it from the thread that calls :meth:`step`."""
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
        """The observation of the control step that is due, if any. Detects missing observations."""
        episode, timeout, now = self._episode, self.timing.timeout_ms / 1e3, self.monotonic()
        running = self.state == "running"
        matched = None if self.state == "stopped" else self._fresh()
        if matched is not None and running and matched.time - episode.observed > timeout:
            self._break(f"the time of the observations jumped ahead by {matched.time - episode.observed:.3f} s")
            return None
        lost = running and self.timing.repeat and now >= episode.repeat_at and self._robot_clock() >= self._latest()
        if matched is not None and (not running or lost or self._is_due(matched.time)):
            if not running:
                self._start_episode()
            self._take(matched, now)
            return matched.values
        if running and now - episode.fresh_at > timeout:
            self._break(f"no whole observation arrived for {1e3 * timeout:.0f} ms; {self._missing()}")
        elif lost:
            self.counts["repeated"] += 1
            self._warn("repeated", f"a control step repeats the previous observation; {self._missing()}")
            episode.step_time += self.period
            episode.due += self.period
            return episode.observation
        if self.state == "holding" and now >= self._hold_at and self._sent is not None:
            self._hold_at = max(self._hold_at + self.period, now)
            self.counts["held"] += 1
            self._send(self._sent[None])
        return None

    def _fresh(self) -> Matched | None:
        """A whole observation that was not used yet and is not old."""
        matched = self._synchronizer.newest()
        if matched is None or matched.time <= self._episode.observed:
            return None
        if matched.spread > self.timing.tolerance_ms / 1e3:
            self._warn(
                "spread", f"values are {1e3 * matched.spread:.0f} ms apart, more than tolerance_ms; {self._missing()}"
            )
            return None
        return matched if self._robot_clock() - matched.time <= self.timing.timeout_ms / 1e3 else None

    def _is_due(self, moment: float) -> bool:
        """Whether an observation is for the next control step, or is the newest when that step cannot wait longer."""
        early, due = EARLY * self.period, self._episode.due
        return moment >= due - early or self._robot_clock() >= due + early

    def _latest(self) -> float:
        """The time after which the next control step's observation counts as lost."""
        return self._episode.due + self._episode.age + self.period / 2

    def _take(self, matched: Matched, now: float) -> None:
        """Use this observation for the control step."""
        episode = self._episode
        on_grid = matched.time <= episode.due + self.period / 2
        episode.due = (episode.due if on_grid else matched.time) + self.period
        episode.observation, episode.observed, episode.step_time = matched.values, matched.time, matched.time
        episode.fresh_at, episode.age = now, self._robot_clock() - matched.time

    def _act(self, values: Mapping[str, np.ndarray], generation: int) -> None:
        """Compute the control step's action and send it, unless it is outdated by then."""
        observation = {key: values[key] for key in self.settings.observations}
        held = self.controller.record.held
        try:
            action = self.controller.act(observation)
        except Exception as error:  # an episode's first chunk has no fallback
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
                    f"an action is sent {1e3 * self.last_latency:.0f} ms after its observation, but the control period "
                    f"is {1e3 * self.period:.0f} ms",
                )
            actions, beyond = self._chosen(action, now)
            if self.timing.on_fault == "stop" and (beyond or self.controller.record.held > held):
                self._break("the chunk has ended, but no new one is ready")
                return
            self.counts["beyond"] += beyond
            self.counts["sent"] += 1
            self._sent = actions[0]
            self._send(actions)

    def _chosen(self, action: np.ndarray, now: float) -> tuple[np.ndarray, bool]:
        """Actions (n, Da) to send, the first for the time at which it acts, and whether the chunk ends before that."""
        latency = self.timing.action_latency_ms
        if latency is None and self.points == 1:
            return action[None], False
        planned = self.controller.planned()
        planned[0] = action
        ahead = 0 if latency is None else round((now + latency / 1e3 - self._episode.step_time) / self.period)
        first = min(max(ahead, 0), len(planned) - 1)
        return planned[first : first + self.points], ahead >= len(planned)

    def _break_source(self, key: str, reason: str) -> None:
        """Handle a break in one source's values."""
        if self.state == "running":
            self._break(reason)
        else:  # no history to lose; the other sources' values may still match the next one
            self._synchronizer.clear(key)

    def _break(self, reason: str) -> None:
        """Handle a break in the history: hold or stop, and begin a new episode with the next observation."""
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
        """Clear observations and sent actions, and enter a state."""
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
        """A description of the source that is furthest behind."""
        times = {key: self._synchronizer.last_time(key) for key in self.latencies}
        never = [key for key, moment in times.items() if moment is None]
        if never:
            return f"no message of {never} has arrived"
        behind = min(times, key=lambda key: times[key] or 0.0)
        return f"{behind!r} is furthest behind, by {1e3 * (self._robot_clock() - (times[behind] or 0.0)):.0f} ms"

    def _warn(self, kind: str, text: str) -> None:
        """Warn, at most every ``WARN_EVERY`` seconds per kind."""
        now = self.monotonic()
        if now - self._warned.get(kind, -np.inf) >= WARN_EVERY:
            self._warned[kind] = now
            log.warning(text)
