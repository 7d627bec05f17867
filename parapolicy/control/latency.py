"""Measurements of a control loop: times on a logarithmic scale, in fixed memory, and the origin of every action."""

import math
from collections import Counter, deque
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np

from parapolicy.policy import ChunkStats

_SHORTEST, _RATIO, _BINS = 1e-6, 1.01, 2100  # from 1 µs to 1000 s


class Histogram:
    """Times in bins whose width is 1 % of the time, as in HDR histograms: percentiles in fixed memory."""

    def __init__(self) -> None:
        self.counts = np.zeros(_BINS, dtype=np.int64)
        self.max = 0.0
        self.sum = 0.0

    def add(self, seconds: float) -> None:
        """Count one time; shorter times than 1 µs count as 1 µs."""
        place = np.log(max(seconds, _SHORTEST) / _SHORTEST) / np.log(_RATIO)
        self.counts[min(int(place), _BINS - 1)] += 1
        self.max = max(self.max, seconds)
        self.sum += seconds

    def percentile(self, percent: float) -> float:
        """Seconds that ``percent`` of the times do not exceed, to 1 %; nan if there are no times."""
        total = int(self.counts.sum())
        if total == 0:
            return float("nan")
        place = int(np.searchsorted(self.counts.cumsum(), max(1, np.ceil(total * percent / 100))))
        return float(min(_SHORTEST * _RATIO ** (place + 1), self.max))

    def summary(self) -> dict[str, float]:
        """Count, and p50, p95, p99 and max in ms; empty if there are no times."""
        count = int(self.counts.sum())
        if count == 0:
            return {}
        percentiles = {f"p{percent}": 1e3 * self.percentile(percent) for percent in (50, 95, 99)}
        return {"count": count, **percentiles, "max": 1e3 * self.max}


@dataclass
class ChunkRecord:
    """How one chunk was computed; enough to compute it again.

    Attributes:
        number: of the chunk in its episode.
        seed: of its noise.
        begin: control step of its observation.
        observed_at: time of that observation, seconds of the controller's clock.
        warm_from: number of the chunk it started from; None: cold.
        executed: control steps between the two chunks' observations; None: cold.
        seconds: from its start to the finished chunk.
        finished_at: time of the finished chunk, seconds of the controller's clock.
        stats: its cost; None if it failed.
        error: why it failed; None if it did not.
        held_from: number of the chunk whose actions it was sampled with; None: nothing was held.
        committed: control steps from ``begin`` on that were held with weight 1.
    """

    number: int
    seed: int
    begin: int
    observed_at: float
    warm_from: int | None
    executed: int | None
    seconds: float = float("nan")
    finished_at: float = float("nan")
    stats: ChunkStats | None = None
    error: str | None = None
    held_from: int | None = None
    committed: int = 0


ROUNDING = 1e-6  # seconds, of sums of times
STAGES = ("observe", "encode", "sample", "post", "queue", "chunk", "act", "jitter")


@dataclass
class ControlRecord:
    """Times and counts since the last reset, in fixed memory.

    Attributes:
        times: histograms. Per chunk: ``encode``, ``sample``, ``post`` (of :class:`parapolicy.ChunkStats`), ``chunk``
            (in total) and ``queue`` (from the finished chunk until the loop took it). Per control step: ``observe``
            (adding the observation), ``act`` (all of :meth:`Controller.act`) and ``jitter`` (difference of the time
            since the last step from the control period).
        rounds: number of rounds -> chunks.
        chunks: the last 1000, including failed ones.
        steps: control steps.
        misses: steps whose ``act`` took longer than the control period, and calls of ``act`` that came more than half
            a period late.
        failures: computations that raised an error; the robot continued with the old chunk.
        late: chunks that took longer than the deadline.
        stale: actions of new chunks that were dropped because their time had passed.
        continued: steps that took an action beyond the old chunk's ``n_action_steps``.
        held: steps that repeated the last action because the old chunk had ended.
        clock_faults: times that were invalid, because the clock went back or gave no finite number.
        unlogged: actions whose ``log`` raised an error.
    """

    times: dict[str, Histogram] = field(default_factory=lambda: {stage: Histogram() for stage in STAGES})
    rounds: Counter[int] = field(default_factory=Counter)
    chunks: deque[ChunkRecord] = field(default_factory=lambda: deque(maxlen=1000))
    steps: int = 0
    misses: int = 0
    failures: int = 0
    late: int = 0
    stale: int = 0
    continued: int = 0
    held: int = 0
    clock_faults: int = 0
    unlogged: int = 0

    def add_time(self, stage: str, seconds: float) -> None:
        """Count a stage's time; a negative or infinite one counts as a clock fault."""
        if -ROUNDING <= seconds < math.inf:
            self.times[stage].add(seconds)
        else:
            self.clock_faults += 1

    def add_chunk(self, chunk: ChunkRecord, deadline: float | None) -> None:
        """Count a finished computation."""
        self.chunks.append(chunk)
        if chunk.stats is None:
            self.failures += 1
            return
        self.add_time("chunk", chunk.seconds)
        for stage in self.times.keys() & chunk.stats.stages.keys():
            self.add_time(stage, chunk.stats.stages[stage])
        self.rounds[int(chunk.stats.rounds)] += 1
        self.late += deadline is not None and chunk.seconds > deadline

    def summary(self) -> dict[str, Any]:
        """All but the chunks, as a dictionary for JSON; times in ms."""
        counts = [f.name for f in fields(self) if f.type in (int, "int")]
        times = {stage: summary for stage, histogram in self.times.items() if (summary := histogram.summary())}
        rounds = {str(rounds): chunks for rounds, chunks in sorted(self.rounds.items())}
        return {**{name: getattr(self, name) for name in counts}, "rounds": rounds, "times": times}
