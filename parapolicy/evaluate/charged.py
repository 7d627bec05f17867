"""Closed-loop episodes in a world that goes on while the policy thinks."""

import dataclasses
import json
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np

from parapolicy.checkpoint.spec import PolicySpec
from parapolicy.control import Controller, ControlRecord, SimulatedClock
from parapolicy.evaluate.rollout import Episode
from parapolicy.evaluate.watch import View
from parapolicy.noise import mix_seeds
from parapolicy.policy import Chunk, Policy

Trace = Mapping[tuple[int, int], float]  # (episode's seed, chunk) -> seconds


@dataclasses.dataclass(frozen=True)
class Latency:
    """What a chunk takes in the simulated world: its measured wall time, a fixed time, or a recorded one."""

    kind: str
    seconds: float = 0.0
    trace: Mapping[str, Trace] = dataclasses.field(default_factory=dict)

    @classmethod
    def parse(cls, text: str) -> "Latency":
        """From ``none``, ``measured``, ``fixed:80ms`` (or ``fixed:0.08s``), or ``trace:FILE``.

        A trace has one JSON mapping per line, ``{"sampler": …, "seed": …, "chunk": …, "seconds": …}``, as a run with
        charged latency writes it to ``chunks.jsonl``.

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

    def charge(self, label: str, seed: int, chunk: int, measured: float) -> float:
        """Seconds of one chunk. A trace that lacks this chunk gives one of its sampler's others, by seed.

        Raises:
            ValueError: the trace has none of this sampler.
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
            row = json.loads(line)
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
class _ChargedPolicy:
    """The policy, its time charged to the clock, and what it was shown."""

    policy: Policy
    clock: SimulatedClock
    observations: list[dict[str, np.ndarray]] = dataclasses.field(default_factory=list)

    @property
    def spec(self) -> PolicySpec:
        return self.policy.spec

    def predict(self, observation: Mapping[str, Any], **options: Any) -> Chunk:
        self.observations.append(dict(observation))
        chunk: Chunk = self.clock.compute(self.policy.predict, observation, **options)
        return chunk


def run_charged(
    policy: Policy,
    label: str,
    make_env: Callable[[SimulatedClock], gymnasium.Env],
    seeds: Sequence[int],
    latency: Latency,
    asynchronous: bool = False,
    noise_seed: int = 0,
    record: Container[int] = (),
    log: Callable[[Mapping[str, Any]], Any] = lambda row: None,
    progress: Callable[[int], Any] = lambda steps: None,
    view: View | None = None,
) -> Iterator[tuple[Episode, ControlRecord]]:
    """Run one episode per seed, one after the other, by a :class:`parapolicy.Controller` on simulated time.

    Args:
        policy: run at batch 1; its ``warm_start`` counts.
        label: of its sampler, by which a trace names it.
        make_env: builds an environment that is charged on the clock (:class:`envs.charged.Charged`).
        seeds: of the episodes' initial states.
        latency: what is charged. With ``measured`` the machine should have nothing else to do, and results differ from
            run to run; the others repeat exactly.
        asynchronous: compute the next chunk while the old one is executed.
        noise_seed: of the sampling noise.
        record: seeds whose episodes are filmed.
        log: called with each action's row, with the episode's ``seed`` under ``episode``.
        progress: called with the number of control steps taken since the last call.
        view: shows each control step.
    """
    place = [0, 0]  # the episode's seed and its chunk, for the latency

    def charge(measured: float) -> float:
        seconds = latency.charge(label, place[0], place[1], measured)
        place[1] += 1
        return seconds

    clock = SimulatedClock(charge, live=latency.kind == "measured")
    env = make_env(clock)
    last: dict[str, Any] = {}  # the newest row of the log

    def keep(row: Mapping[str, Any]) -> None:
        last.update(row)
        log({"episode": place[0], **row})

    charged = _ChargedPolicy(policy, clock)
    controller = Controller(
        charged,
        asynchronous=asynchronous,
        warm_start=policy.warm_start,
        log=keep,
        clock=clock,
        executor=clock if asynchronous else None,
    )
    try:
        for seed in seeds:
            place[:] = seed, 0
            observation, _ = env.reset(seed=seed)
            controller.reset((noise_seed, seed))  # the noise that rollout() gives this episode
            episode = Episode(seed, observations=[])
            charged.observations = episode.observations
            show = _watcher(view, label, seed, env, controller, last)
            _run_episode(controller, env, observation, episode, seed in record, progress, show)
            yield episode, controller.record
    finally:
        env.close()


def _watcher(
    view: View | None, label: str, seed: int, env: gymnasium.Env, controller: Controller, last: Mapping[str, Any]
) -> Callable[[Episode], Any]:
    """Shows the step that was just decided, or nothing."""
    if view is None:
        return lambda episode: None
    scene: Any = env.unwrapped
    if not hasattr(scene, "to_frame"):
        raise ValueError(f"{type(scene).__name__} has no to_frame(actions), which watching needs")
    view.begin(label, seed)
    return lambda episode: view.step(scene, controller, last, episode.rewards[-1] if episode.rewards else None)


def _run_episode(
    controller: Controller,
    env: gymnasium.Env,
    observation: Mapping[str, np.ndarray],
    episode: Episode,
    film: bool,
    progress: Callable[[int], Any],
    show: Callable[[Episode], Any],
) -> None:
    over = False
    while not over:
        if film:
            episode.frames.append(np.asarray(env.render()))
        action = controller.act(observation)
        show(episode)
        observation, reward, terminated, truncated, info = env.step(action)
        over = terminated or truncated
        episode.rewards.append(float(reward))
        episode.success = episode.success or bool(info.get("is_success", False))
        progress(1)
    chunks = [chunk.stats for chunk in controller.record.chunks if chunk.stats is not None]
    episode.rounds = [int(stats.rounds) for stats in chunks]
    episode.evaluations = [int(stats.evaluations) for stats in chunks]
