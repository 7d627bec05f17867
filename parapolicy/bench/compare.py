"""A comparison of every sampler on one policy: rounds, evaluations, distance from the sequential chunk, latency."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from parapolicy.evaluate.measure.chunk_error import normalized_error
from parapolicy.policy import Policy
from parapolicy.samplers import list_samplers


def compare_samplers(
    policy: Policy,
    observations: Sequence[Mapping[str, np.ndarray]],
    progress: Callable[[int], Any] = lambda chunks: None,
) -> list[dict[str, Any]]:
    """One record per sampler with its default settings, on the same observations and noise, in a rotating order.

    Args:
        policy: with the schedule, device and engine to measure.
        observations: {key: (To, …)} each.
        progress: called with 1 after each chunk.

    Returns:
        Records of ``sampler``, ``keeps_distribution``, means of ``rounds`` and ``evaluations``, ``error_median`` and
        ``error_max`` (largest absolute difference from the sequential chunk, normalised; None for samplers that do not
        reproduce that chunk), and medians of ``milliseconds`` (one chunk) and ``encode`` (its part before sampling).
    """
    candidates = {name: policy.with_sampler(name) for name in ("sequential", *list_samplers())}
    names = list(candidates)
    chunks: dict[str, list[Any]] = {name: [] for name in names}
    for candidate in candidates.values():
        candidate.predict(observations[0])  # compiles, allocates
        progress(1)
    for i, observation in enumerate(observations):
        turn = i % len(names)
        for name in names[turn:] + names[:turn]:
            chunks[name].append(candidates[name].predict(observation, seed=i))
            progress(1)
    rows = []
    for name, candidate in candidates.items():
        pairs = zip(chunks[name], chunks["sequential"], strict=True)
        errors = [float(normalized_error(policy, a.trajectory, b.trajectory)) for a, b in pairs]
        same = candidate.sampler.reuses_noise and candidate.sampler.keeps_distribution
        stats = [chunk.stats for chunk in chunks[name]]
        rows.append(
            {
                "sampler": name,
                "keeps_distribution": candidate.sampler.keeps_distribution,
                "rounds": statistics.fmean(s.rounds for s in stats),
                "evaluations": statistics.fmean(s.evaluations for s in stats),
                "error_median": statistics.median(errors) if same else None,
                "error_max": max(errors) if same else None,
                "milliseconds": 1e3 * statistics.median(s.seconds for s in stats),
                "encode": 1e3 * statistics.median(s.stages["encode"] for s in stats),
            }
        )
    return rows


def present(rows: Sequence[Mapping[str, Any]]) -> str:
    """The records as a table."""
    lines = [f"{'sampler':<18}{'rounds':>8}{'evaluations':>13}{'error':>20}{'ms':>9}{'encode ms':>11}"]
    for row in rows:
        median, largest = row["error_median"], row["error_max"]
        other = "another draw" if row["keeps_distribution"] else "another policy"
        error = other if median is None else f"{median:.0e}, max {largest:.0e}"
        costs = f"{row['milliseconds']:>9.1f}{row['encode']:>11.1f}"
        lines.append(f"{row['sampler']:<18}{row['rounds']:>8.1f}{row['evaluations']:>13.1f}{error:>20}{costs}")
    return "\n".join(lines)
