"""The content of ``results.json``: summaries of episodes and of measured chunks.

It has the keys of two published formats: ``test/mean_score`` and ``test/sim_max_reward_<seed>`` of
real-stanford/diffusion_policy's logs, ``overall`` and ``per_episode`` of LeRobot's evaluation.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from parapolicy.control import ControlRecord
from parapolicy.evaluate.measure.chunk_error import ChunkErrors
from parapolicy.evaluate.measure.fidelity import ReferenceChunks
from parapolicy.evaluate.measure.statistics import mean_interval, proportion_interval
from parapolicy.evaluate.measure.timing import ChunkMeasurements
from parapolicy.evaluate.run.rollout import EpisodeRecord
from parapolicy.policy import Policy


def summarize_episodes(episodes: Sequence[EpisodeRecord], seconds: float, video_paths: Sequence[str]) -> dict[str, Any]:
    """Summarise the scores and costs of one sampler's episodes."""
    episodes = sorted(episodes, key=lambda episode: episode.seed)
    best = [episode.max_reward for episode in episodes]
    successes = sum(episode.success for episode in episodes)
    count = len(episodes)
    return {
        "mean_max_reward": float(np.mean(best)),
        "mean_max_reward_ci95": mean_interval(best),
        "success_rate": successes / count,
        "success_rate_ci95": proportion_interval(successes, count),
        "rounds": _mean_p95([value for episode in episodes for value in episode.rounds]),
        "evaluations": _mean_p95([value for episode in episodes for value in episode.evaluations]),
        **_summarize_motion(episodes),
        "overall": {
            "avg_max_reward": float(np.mean(best)),
            "avg_sum_reward": float(np.mean([episode.sum_reward for episode in episodes])),
            "pc_success": 100.0 * successes / count,
            "n_episodes": count,
            "eval_s": seconds,
            "eval_ep_s": seconds / count,
            "video_paths": list(video_paths),
        },
        "per_episode": [episode_row(i, episode) for i, episode in enumerate(episodes)],
        "test/mean_score": float(np.mean(best)),
        **{f"test/sim_max_reward_{episode.seed}": episode.max_reward for episode in episodes},
    }


def _summarize_motion(episodes: Sequence[EpisodeRecord]) -> dict[str, Any]:
    """Means over episodes, in the actions' own units, and the jump relative to the mean step inside chunks."""
    measured = [episode for episode in episodes if episode.seams and episode.motion and episode.jerk]
    if not measured:
        return {}
    jump, step, jerk = (
        [float(np.mean(getattr(episode, name))) for episode in measured] for name in ("seams", "motion", "jerk")
    )
    relative = [a / b for a, b in zip(jump, step, strict=True) if b > 0]
    values = {"jump": jump, "step": step, "relative_jump": relative, "jerk": jerk}
    means = {name: {"mean": float(np.mean(v)), "ci95": mean_interval(v)} for name, v in values.items() if v}
    return {"motion": means}


def episode_row(index: int, episode: EpisodeRecord) -> dict[str, Any]:
    """The record of an episode in ``episodes.jsonl`` and in ``per_episode``."""
    return {
        "episode_ix": index,
        "seed": episode.seed,
        "sum_reward": episode.sum_reward,
        "max_reward": episode.max_reward,
        "success": episode.success,
        "steps": len(episode.rewards),
        "rounds_mean": float(np.mean(episode.rounds or [0])),
        "evaluations_mean": float(np.mean(episode.evaluations or [0])),
        **({"seam_mean": float(np.mean(episode.seams))} if episode.seams else {}),
        **({"motion_mean": float(np.mean(episode.motion))} if episode.motion else {}),
        **({"jerk_mean": float(np.mean(episode.jerk))} if episode.jerk else {}),
        **({"error": episode.error} if episode.error else {}),
    }


def summarize_chunks(measured: ChunkMeasurements, policy: Policy | None) -> dict[str, Any]:
    """Summarise latencies (ms, batch 1) and distances from the sequential chunk.

    Args:
        policy: which computed the chunks; None: the published code.
    """
    p50, p95, p99 = np.percentile(np.asarray(measured.seconds) * 1e3, [50, 95, 99])
    summary: dict[str, Any] = {
        "chunk_ms": {
            "p50": float(p50),
            "p95": float(p95),
            "p99": float(p99),
            "max": 1e3 * max(measured.seconds),
            "batch": 1,
            "chunks": len(measured.seconds),
            "each": [1e3 * seconds for seconds in measured.seconds],
        }
    }
    if measured.encode:
        summary["chunk_ms"]["encode_p50"] = 1e3 * float(np.median(measured.encode))
    if measured.errors:
        summary["chunk_error"] = {
            "median": float(np.median(measured.errors)),
            "p95": float(np.percentile(measured.errors, 95)),
            "max": max(measured.errors),
            "each": measured.errors,
        }
        if policy and (asked := policy.sampler.asked_error):
            summary["chunk_error"]["asked"] = asked
    return summary


COUNTS = ("steps", "misses", "failures", "late", "stale", "continued", "held", "clock_faults", "unlogged")


def control_row(record: ControlRecord) -> dict[str, Any]:
    """The controller's counts of one episode, and the latency of each chunk."""
    return {**record.summary(), "chunk_seconds": [chunk.seconds for chunk in record.chunks if chunk.stats is not None]}


def summarize_control(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Sum the counts of several episodes; percentiles of the simulated chunk latencies, in ms."""
    seconds = [value for row in rows for value in row["chunk_seconds"]] or [0.0]
    percentiles = {f"p{q}": float(np.percentile(seconds, q) * 1e3) for q in (50, 95, 99)}
    return {**{name: sum(row.get(name, 0) for row in rows) for name in COUNTS}, "chunk_ms": percentiles}


def summarize_errors(measured: ChunkErrors, tolerance: float | None) -> dict[str, Any]:
    """Summarise the errors and costs of many chunks.

    Args:
        tolerance: of the sampler (``asked_error``); chunks above ten times the tolerance are counted.
    """
    summary: dict[str, Any] = {
        "chunks": len(measured.errors),
        "rounds": _mean_p95(measured.rounds),
        "evaluations": _mean_p95(measured.evaluations),
    }
    for name, values in (("error", measured.errors), ("action_error", measured.action_errors)):
        median, p95, p99, p999 = np.quantile(values, [0.5, 0.95, 0.99, 0.999])
        quantiles = {"median": median, "p95": p95, "p99": p99, "p99.9": p999, "max": max(values)}
        summary[name] = {key: float(value) for key, value in quantiles.items()}
    if tolerance:
        exceeding = sum(error > 10 * tolerance for error in measured.errors)
        summary["tolerance"] = tolerance
        summary["exceeding_10_tolerances"] = exceeding
        summary["exceeding_10_tolerances_ci95"] = proportion_interval(exceeding, len(measured.errors))
    return summary


def summarize_fidelity(
    independent: Sequence[float], paired: Sequence[float], reference: ReferenceChunks
) -> dict[str, Any]:
    """Summarise one sampler's energy distances to the reference, with intervals of their means over observations."""
    rows: dict[str, Any] = {}
    for name, each in (("energy_distance", independent), ("paired_energy_distance", paired)):
        mean, largest = float(np.mean(each)), float(np.max(each))
        rows[name] = {"mean": mean, "ci95": mean_interval(each), "max": largest, "observations": len(each)}
    rows["energy_distance"]["resampling_mean"] = float(np.mean(reference.resampling))
    rows["energy_distance"]["resampling_max"] = float(np.max(reference.resampling))
    rows["paired_energy_distance"] |= {
        "each": list(paired),
        "spread": reference.spread,
        "draws": len(reference.same[0]),
    }
    return rows


def compare_to_baseline(row: dict[str, Any], baseline: dict[str, Any], name: str) -> dict[str, Any]:
    """Speed-up over the baseline, and the reward difference to it, paired by seed."""
    rewards, others = (
        {episode["seed"]: episode["max_reward"] for episode in side["per_episode"]} for side in (row, baseline)
    )
    differences = [reward - others[seed] for seed, reward in rewards.items()]
    timed = "chunk_ms" in row
    return {
        "paired_reward_difference": {
            "to": name,
            "mean": float(np.mean(differences)),
            "ci95": mean_interval(differences),
        },
        **({"speedup_p50": baseline["chunk_ms"]["p50"] / row["chunk_ms"]["p50"]} if timed else {}),
    }


def _mean_p95(values: Sequence[int]) -> dict[str, float]:
    values = values or [0]  # if every episode failed before its first chunk
    return {"mean": float(np.mean(values)), "p95": float(np.percentile(values, 95))}
