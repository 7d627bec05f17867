"""Intervals for scores: every figure that compares samplers carries one."""

from collections.abc import Sequence

import numpy as np
from scipy import stats

Interval = tuple[float, float]


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """Bootstrap interval (BCa, Efron 1987) of the mean; a point where the values do not vary or there is only one."""
    data = np.asarray(values, dtype=np.float64)
    if np.ptp(data) == 0:
        return float(data[0]), float(data[0])
    result = stats.bootstrap(
        (data,), np.mean, confidence_level=confidence, n_resamples=9999, rng=np.random.default_rng(0)
    )
    return float(result.confidence_interval.low), float(result.confidence_interval.high)


def proportion_interval(successes: int, trials: int, confidence: float = 0.95) -> Interval:
    """Wilson's interval of a success rate."""
    interval = stats.binomtest(successes, trials).proportion_ci(confidence, method="wilson")
    return float(interval.low), float(interval.high)
