"""Closed-loop episodes in a world that keeps moving during inference."""

import dataclasses
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np

from parapolicy.control import Controller, ControlRecord, SimulatedClock
from parapolicy.errors import ObservationError
from parapolicy.evaluate.run.rollout import EpisodeRecord
from parapolicy.evaluate.run.watch import View
from parapolicy.evaluate.run.workers import EnvFailed, Transition, attempt, close, execute, reset
from parapolicy.files import unseal
from parapolicy.noise import mix_seeds
from parapolicy.observation import copy_observation
from parapolicy.policy import Chunk, Policy
from parapolicy.spec import PolicySpec

Trace = Mapping[tuple[int, int], float]  # (episode's seed, chunk) -> seconds


@dataclasses.dataclass(frozen=True)
class SimulatedLatency:
    """A chunk's inference latency in the simulated world: measured wall time, a fixed time, or a recorded one.

    Attributes:
        kind: ``measured``, ``fixed`` or ``trace``.
        seconds: of every chunk, for ``fixed``.
        trace: sampler's label -> recorded latencies, for ``trace``.
    """

    kind: str
    seconds: float = 0.0
    trace: Mapping[str, Trace] = dataclasses.field(default_factory=dict)

    @classmethod
    def parse(cls, text: str) -> "SimulatedLatency":
        """From ``none``, ``measured``, ``fixed:80ms`` (or ``fixed:0.08s``), or ``trace:FILE``.

        A trace has one JSON object per line, ``{"sampler": …, "seed": …, "chunk": …, "seconds": …}``, as a run with
        simulated latency writes it to ``chunks.jsonl``.

        Raises:
            ValueError: any other text, or a file that is not a trace.
        """
        kind, _, value = text.partition(":")
        if text == "none":
            return cls("fixed", 0.0)
        if text == "measured":
            return cls("measured")
        if kind == "fixed":
            return cls("fixed", _parse_seconds(value))
        if kind == "trace" and value:
            return cls("trace", trace=_read_trace(Path(value)))
        raise ValueError(f"latency is {text!r}, expected none, measured, fixed:80ms or trace:FILE")

    def chunk_seconds(self, label: str, seed: int, chunk: int, measured: float) -> float:
        """Seconds of one chunk. If a trace lacks the chunk, the seed picks another one of the same sampler.

        Raises:
            ValueError: the trace has no chunk of this sampler.
        """
        if self.kind == "measured":
            return measured
        if self.kind == "fixed":
            return self.seconds
        if label not in self.trace:
            raise ValueError(f"the latency trace has no sampler {label!r}, only {sorted(self.trace)}")
        times = self.trace[label]
        if (seed, chunk) in times:
            return times[seed, chunk]
        return list(times.values())[mix_seeds(seed, chunk) % len(times)]


def _parse_seconds(text: str) -> float:
    for unit, scale in (("ms", 1e-3), ("s", 1.0)):
        if text.endswith(unit):
            try:
                seconds = float(text.removesuffix(unit)) * scale
            except ValueError:
                break
            if 0 <= seconds < float("inf"):
                return seconds
    raise ValueError(f"latency is 'fixed:{text}', expected a time such as fixed:80ms or fixed:0.08s")


def _read_trace(path: Path) -> dict[str, dict[tuple[int, int], float]]:
    trace: dict[str, dict[tuple[int, int], float]] = {}
    if not path.is_file():
        raise ValueError(f"there is no latency trace {str(path)!r}")
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            row = unseal(line, "the line", "run the run that it is from again")
            seconds = float(row["seconds"])
            if not 0 <= seconds < float("inf"):
                raise ValueError("seconds must not be negative")
            trace.setdefault(str(row["sampler"]), {})[int(row["seed"]), int(row["chunk"])] = seconds
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f'{path}, line {number}: expected {{"sampler": …, "seed": …, "chunk": …, "seconds": …}}: {error}'
            ) from None
    if not trace:
        raise ValueError(f"the latency trace {str(path)!r} is empty")
    return trace


@dataclasses.dataclass
class _ClockedPolicy:
    """A policy whose inference time passes on the clock; it records its observations."""

    policy: Policy
    clock: SimulatedClock
    observations: list[dict[str, np.ndarray]] = dataclasses.field(default_factory=list)

    @property
    def spec(self) -> PolicySpec:
        return self.policy.spec

    def predict(self, observation: Mapping[str, Any], **options: Any) -> Chunk:
        self.observations.append(copy_observation(observation))
        chunk: Chunk = self.clock.compute(self.policy.predict, observation, **options)
        return chunk


def run_with_latency(
    policy: Policy,
    label: str,
    make_env: Callable[[SimulatedClock], gymnasium.Env],
    seeds: Sequence[int],
    latency: SimulatedLatency,
    asynchronous: bool = False,
    noise_seed: int = 0,
    record: Container[int] = (),
    log: Callable[[Mapping[str, Any]], Any] = lambda row: None,
    progress: Callable[[int], Any] = lambda steps: None,
    view: View | None = None,
    seam: str = "none",
) -> Iterator[tuple[EpisodeRecord, ControlRecord]]:
    """Run one episode per seed, one after the other, by a :class:`parapolicy.Controller` on simulated time.

    Args:
        policy: runs at batch 1, with its ``warm_start``.
        label: of its sampler, used by traces.
        make_env: builds an environment that runs on the clock (:class:`envs.inference_delay.InferenceDelay`).
        seeds: of the episodes' initial states.
        latency: of each chunk. With ``measured``, results differ from run to run, and other load on the machine counts;
            the other kinds repeat exactly.
        asynchronous: compute the next chunk during the execution of the current one.
        noise_seed: of the sampling noise.
        record: seeds whose episodes are filmed.
        log: called with the controller's record of each action, and the episode's seed under ``episode``.
        progress: called with the number of control steps since the last call.
        view: shows each control step.
        seam: how chunks are joined; see :class:`parapolicy.control.seam.Seam`.
    """
    seed, chunk = 0, 0  # of the running episode

    def chunk_seconds(measured: float) -> float:
        nonlocal chunk
        chunk += 1
        return latency.chunk_seconds(label, seed, chunk - 1, measured)

    clock = SimulatedClock(chunk_seconds, live=latency.kind == "measured")
    env = make_env(clock)
    newest: dict[str, Any] = {}  # record of the log

    def log_action(action: Mapping[str, Any]) -> None:
        newest.update(action)
        executed.append((np.array(action["action"]), action["chunk"]))
        log({"episode": seed, **action})

    clocked = _ClockedPolicy(policy, clock)
    controller = Controller(
        clocked,
        asynchronous=asynchronous,
        warm_start=policy.warm_start,
        log=log_action,
        clock=clock,
        executor=clock if asynchronous else None,
        seam=seam,
    )
    executed: list[tuple[np.ndarray, int]] = []  # actions, and the chunk that each is from
    try:
        for seed in seeds:
            chunk = 0
            executed.clear()
            episode = EpisodeRecord(seed)
            show = _watcher(view, label, seed, env, controller, newest)
            try:
                (first,) = attempt(env, reset, seed, seed in record)
                controller.reset((noise_seed, seed))  # rollout() draws the same noise for this episode
                clocked.observations = episode.observations
                _run_episode(controller, env, first, episode, progress, show)
            except (EnvFailed, ObservationError) as failure:
                episode.fail(str(failure))
                close(env)
                env = make_env(clock)
            chunks = [done.stats for done in controller.record.chunks if done.stats is not None]
            episode.rounds = [int(stats.rounds) for stats in chunks]
            episode.evaluations = [int(stats.evaluations) for stats in chunks]
            episode.measure([action for action, _ in executed], [number for _, number in executed])
            yield episode, controller.record
    finally:
        close(env)


def _watcher(
    view: View | None, label: str, seed: int, env: gymnasium.Env, controller: Controller, newest: Mapping[str, Any]
) -> Callable[[EpisodeRecord], Any]:
    """A function that shows the newest control step; without a view, it does nothing."""
    if view is None:
        return lambda episode: None
    scene: Any = env.unwrapped
    if not hasattr(scene, "to_frame"):
        raise ValueError(f"{type(scene).__name__} has no to_frame(actions), which watching needs")
    view.begin(label, seed)

    def show(episode: EpisodeRecord) -> None:
        reward = episode.rewards[-1] if episode.rewards else None
        view.step(scene, controller, newest, reward, episode.observations[newest["chunk"]])

    return show


def _run_episode(
    controller: Controller,
    env: gymnasium.Env,
    before: Transition,
    episode: EpisodeRecord,
    progress: Callable[[int], Any],
    show: Callable[[EpisodeRecord], Any],
) -> None:
    film = before.frame is not None
    while not before.over:
        if before.frame is not None:
            episode.frames.append(before.frame)
        action = controller.act(before.observation)
        show(episode)
        (before,) = attempt(env, execute, [action], film)
        episode.rewards.append(before.reward)
        episode.success = episode.success or before.success
        progress(1)
