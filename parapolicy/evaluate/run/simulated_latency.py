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
from parapolicy.evaluate.run.watchers import Watcher
from parapolicy.evaluate.run.workers import EnvFailed, Transition, attempt, close, execute, reset
from parapolicy.files import unseal
from parapolicy.noise import mix_seeds
from parapolicy.observation import copy_observation
from parapolicy.policy import Chunk, Policy
from parapolicy.spec import PolicySpec

# (episode's seed, chunk) -> seconds. Times without an episode have the key (None, line in the file).
Trace = Mapping[tuple[int | None, int], float]
TRACE_LINE = '{"seconds": …}, and besides "sampler", or "seed" and "chunk"'


@dataclasses.dataclass(frozen=True)
class SimulatedLatency:
    """A chunk's inference latency in the simulated world: measured wall time, a fixed time, or a recorded one.

    Attributes:
        kind: ``measured``, ``fixed`` or ``trace``.
        seconds: of every chunk, for ``fixed``.
        trace: sampler's label, or None for every other sampler -> recorded latencies, for ``trace``.
    """

    kind: str
    seconds: float = 0.0
    trace: Mapping[str | None, Trace] = dataclasses.field(default_factory=dict)

    @classmethod
    def parse(cls, text: str) -> "SimulatedLatency":
        """From ``none``, ``measured``, ``fixed:80ms`` (or ``fixed:0.08s``), or ``trace:FILE``.

        A trace has one JSON object per line, ``{"sampler": …, "seed": …, "chunk": …, "seconds": …}``, as in the
        ``chunks.jsonl`` of a run with simulated latency. ``{"seconds": …}`` is enough: times without a sampler are for
        all samplers that have none; times without seed and chunk are drawn in any order.

        Raises:
            ValueError: another text, or a file that is not a trace.
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
        """Seconds of one chunk. If a trace lacks the chunk, the seed draws one of the same sampler's times.

        Raises:
            ValueError: the trace has no time for this sampler.
        """
        if self.kind == "measured":
            return measured
        if self.kind == "fixed":
            return self.seconds
        times = self.trace.get(label) or self.trace.get(None)
        if times is None:
            named = sorted(name for name in self.trace if name is not None)
            raise ValueError(
                f"the latency trace has no sampler {label!r}, only {named}; give the entry one of these labels, or "
                "leave out the trace's sampler"
            )
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


def _read_trace(path: Path) -> dict[str | None, dict[tuple[int | None, int], float]]:
    trace: dict[str | None, dict[tuple[int | None, int], float]] = {}
    if not path.is_file():
        raise ValueError(f"there is no latency trace {str(path)!r}")
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            row = unseal(line, "the line", "run again to record it")
            if unknown := sorted(row.keys() - {"sampler", "seed", "chunk", "seconds"}):
                raise ValueError(f"unknown {', '.join(unknown)}")
            seconds = float(row["seconds"])
            if not 0 <= seconds < float("inf"):
                raise ValueError(f"seconds is {seconds}, expected a number of at least 0")
            recorded = "seed" in row or "chunk" in row
            key = (int(row["seed"]), int(row["chunk"])) if recorded else (None, number)
            sampler = str(row["sampler"]) if "sampler" in row else None
        except (ValueError, KeyError, TypeError) as error:
            missing = "no " if isinstance(error, KeyError) else ""
            raise ValueError(f"{path}, line {number}: expected {TRACE_LINE}: {missing}{error}") from None
        trace.setdefault(sampler, {})[key] = seconds  # an interrupted run may have an episode's chunks twice
    if not trace:
        raise ValueError(f"the latency trace {str(path)!r} is empty")
    return trace


@dataclasses.dataclass
class _ClockedPolicy:
    """A policy whose inference time passes on the clock. It records its observations."""

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
    view: Watcher | None = None,
    seam: str = "none",
) -> Iterator[tuple[EpisodeRecord, ControlRecord]]:
    """Run one episode per seed, one after the other, with a :class:`parapolicy.Controller` on simulated time.

    Args:
        policy: runs at batch 1, with its ``warm_start``.
        label: of its sampler, used by traces.
        make_env: builds an environment that runs on the clock (:class:`envs.inference_delay.InferenceDelay`).
        seeds: of the episodes' initial states.
        latency: of each chunk. With ``measured``, results differ from run to run and depend on other load on the
            machine; the other kinds repeat exactly.
        asynchronous: compute the next chunk during the execution of the current one.
        noise_seed: of the sampling noise.
        record: seeds whose episodes are filmed.
        log: called with the controller's record of each action, and the episode's seed under ``episode``.
        progress: called with the number of control steps since the last call.
        view: gets each control step.
        seam: how chunks are joined; see :class:`parapolicy.control.seam.Seam`.
    """
    episode = EpisodeRecord(0)  # the running one

    def chunk_seconds(measured: float) -> float:
        episode.charged.append(latency.chunk_seconds(label, episode.seed, len(episode.charged), measured))
        return episode.charged[-1]

    clock = SimulatedClock(chunk_seconds, live=latency.kind == "measured")
    env = make_env(clock)
    newest: dict[str, Any] = {}  # record of the log

    def log_action(action: Mapping[str, Any]) -> None:
        newest.update(action)
        executed.append((np.array(action["action"]), action["chunk"]))
        log({"episode": episode.seed, **action})

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
    executed: list[tuple[np.ndarray, int]] = []  # actions, and their chunks' numbers
    try:
        for seed in seeds:
            executed.clear()
            episode = EpisodeRecord(seed)
            show = _watcher(view, label, seed, env, controller, newest)
            try:
                (first,) = attempt(env, reset, seed, seed in record)
                controller.reset((noise_seed, seed))  # the noise that rollout() draws for this episode
                clocked.observations = episode.observations
                _run_episode(controller, env, first, episode, progress, show)
                if view is not None and episode.rewards:
                    view.end(controller, episode.rewards[-1])
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
    view: Watcher | None, label: str, seed: int, env: gymnasium.Env, controller: Controller, newest: Mapping[str, Any]
) -> Callable[[EpisodeRecord], Any]:
    """A function that passes the newest control step to the view; without a view, it does nothing."""
    if view is None:
        return lambda episode: None
    view.begin(label, seed)
    scene = env.unwrapped

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
