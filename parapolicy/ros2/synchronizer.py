"""Matching values of several sources in time."""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

MAX_SAMPLES = 1000  # of one source


@dataclass(frozen=True)
class Matched:
    """One value of every source.

    Attributes:
        time: of the source that is furthest behind, seconds.
        spread: time between the oldest and the newest value, seconds.
        values: {key: value}.
    """

    time: float
    spread: float
    values: dict[str, np.ndarray]


class Synchronizer:
    """Finds, for each source, the value nearest in time to the newest value of the source that is furthest behind.

    Args:
        keys: of the sources.
        keep: seconds for which values are stored.
    """

    def __init__(self, keys: Iterable[str], keep: float) -> None:
        self.keep = keep
        self._samples: dict[str, deque[tuple[float, np.ndarray]]] = {key: deque(maxlen=MAX_SAMPLES) for key in keys}

    def add(self, key: str, time: float, value: np.ndarray) -> None:
        """Store a value; a source's times must increase."""
        samples = self._samples[key]
        samples.append((time, value))
        while samples[0][0] < time - self.keep:
            samples.popleft()

    def last_time(self, key: str) -> float | None:
        """The time of a source's newest value; None if there is none."""
        return self._samples[key][-1][0] if self._samples[key] else None

    def newest(self) -> Matched | None:
        """The newest matching values; None if a source has none yet."""
        if not all(self._samples.values()):
            return None
        time = min(samples[-1][0] for samples in self._samples.values())
        nearest = {
            key: min(samples, key=lambda sample: abs(sample[0] - time)) for key, samples in self._samples.items()
        }
        times = [found for found, _ in nearest.values()]
        return Matched(time, max(times) - min(times), {key: value for key, (_, value) in nearest.items()})

    def clear(self, key: str | None = None) -> None:
        """Drop a source's values; None: those of all sources."""
        for each in self._samples if key is None else [key]:
            self._samples[each].clear()
