"""Confidence intervals and equivalence tests for scores.

Rewards of several tasks are pooled as in rliable (Agarwal et al., NeurIPS 2021): bootstrap within each task,
interquartile mean, probability of improvement, performance profile. rliable itself asks for arch below 8, which fails
at its import beside pandas 3.
"""

from collections.abc import Callable, Sequence

import numpy as np
from scipy import stats

Interval = tuple[float, float]
RESAMPLES = 2000  # of the bootstraps of percentiles and of pooled scores


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """Bootstrap interval (BCa, Efron 1987) of the mean; a single point if all values are equal."""
    data = np.asarray(values, dtype=np.float64)
    if np.ptp(data) == 0:
        return float(data[0]), float(data[0])
    result = stats.bootstrap(
        (data,), np.mean, confidence_level=confidence, n_resamples=9999, rng=np.random.default_rng(0)
    )
    return float(result.confidence_interval.low), float(result.confidence_interval.high)


def proportion_interval(successes: int, trials: int, confidence: float = 0.95) -> Interval:
    """Wilson interval of a success rate."""
    interval = stats.binomtest(successes, trials).proportion_ci(confidence, method="wilson")
    return float(interval.low), float(interval.high)


def percentile_interval(values: Sequence[float], percent: float, confidence: float = 0.95) -> Interval:
    """Bootstrap interval of a percentile, for example of latencies."""
    data = np.asarray(values, dtype=np.float64)
    rng = np.random.default_rng(0)
    return _quantiles(np.percentile(rng.choice(data, (RESAMPLES, len(data))), percent, axis=1), confidence)


def interquartile_mean(values: Sequence[float] | np.ndarray) -> float:
    """Mean of the middle half of the values."""
    return float(stats.trim_mean(values, 0.25))


def pooled_interval(tasks: Sequence[Sequence[float]], confidence: float = 0.95) -> tuple[float, Interval]:
    """Interquartile mean of several tasks' scores, and its bootstrap interval, stratified by task."""
    return _stratified(tasks, lambda arrays: interquartile_mean(np.concatenate(arrays)), confidence)


def pooled_mean(tasks: Sequence[Sequence[float]], confidence: float = 0.95) -> tuple[float, Interval]:
    """Mean of the tasks' means, and its bootstrap interval, stratified by task."""
    return _stratified(tasks, lambda arrays: float(np.mean([array.mean() for array in arrays])), confidence)


def _stratified(
    tasks: Sequence[Sequence[float]], statistic: Callable[[list[np.ndarray]], float], confidence: float
) -> tuple[float, Interval]:
    rng = np.random.default_rng(0)
    arrays = [np.asarray(task, dtype=np.float64) for task in tasks]
    resampled = [statistic([rng.choice(task, len(task)) for task in arrays]) for _ in range(RESAMPLES)]
    return statistic(arrays), _quantiles(resampled, confidence)


def pooled_improvement(
    tasks: Sequence[Sequence[float]], others: Sequence[Sequence[float]], confidence: float = 0.95
) -> tuple[float, Interval]:
    """Probability that a score is larger than one of the other sampler on the same task, and its bootstrap interval.

    Half of the ties count, as in rliable; mean over the tasks, resampled within each of them.

    Args:
        tasks: scores of each task.
        others: of the same tasks, those of the sampler to compare with.
    """
    rng = np.random.default_rng(0)
    values, resampled = [], np.zeros(RESAMPLES)
    for task, other in zip(tasks, others, strict=True):
        mine, theirs = np.asarray(task, dtype=np.float64), np.asarray(other, dtype=np.float64)
        wins = (np.sign(mine[:, None] - theirs[None, :]) + 1) / 2  # (N, M)
        values.append(wins.mean())
        # How often a resampling draws each score.
        n, m = (rng.multinomial(len(x), np.full(len(x), 1 / len(x)), RESAMPLES) / len(x) for x in (mine, theirs))
        resampled += ((n @ wins) * m).sum(axis=1) / len(tasks)
    return float(np.mean(values)), _quantiles(resampled, confidence)


def _quantiles(values: Sequence[float] | np.ndarray, confidence: float) -> Interval:
    low, high = np.quantile(values, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def equivalence_p(differences: Sequence[float], margin: float) -> float:
    """p-value of two one-sided t-tests (Schuirmann, 1987) on paired differences; 1 for fewer than two differences.

    A small value shows that the mean difference is within ±margin.
    """
    data = np.asarray(differences, dtype=np.float64)
    if len(data) < 2:
        return 1.0
    if np.ptp(data) == 0:
        return 0.0 if abs(data[0]) < margin else 1.0
    above = stats.ttest_1samp(data, -margin, alternative="greater").pvalue
    below = stats.ttest_1samp(data, margin, alternative="less").pvalue
    return float(max(above, below))


def is_equivalent(differences: Sequence[float], margin: float) -> bool:
    """Whether a bootstrap shows at 5 % that the mean of paired differences is within ±margin.

    The 90 % interval must lie within the margin. There must also be enough pairs: a difference of 1 that occurs in some
    pairs but was not observed must not be able to move the mean out of the margin; see :func:`least_episodes`.
    """
    if len(differences) < least_episodes(margin):
        return False
    low, high = mean_interval(differences, 0.90)
    return -margin < low and high < margin


def least_episodes(margin: float) -> int:
    """Fewest episodes, 3 / margin: if none differs by 1, fewer than ``margin`` of all do, at 5 %."""
    return int(np.ceil(3 / margin - 1e-9))


def episodes_needed(differences: Sequence[float], margin: float, power: float = 0.8, alpha: float = 0.05) -> int:
    """Episodes for :func:`is_equivalent` with ``power``, if the true difference is 0."""
    deviation = float(np.std(np.asarray(differences, dtype=np.float64), ddof=1))
    z = stats.norm.ppf(1 - alpha) + stats.norm.ppf((1 + power) / 2)
    return max(least_episodes(margin), int(np.ceil((z * deviation / margin) ** 2)))
