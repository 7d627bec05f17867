"""Scores and costs of each sampler, and which sampler to use."""

from typing import Any

import numpy as np
import pandas as pd

from parapolicy.evaluate.measure.statistics import (
    episodes_needed,
    equivalence_p,
    mean_interval,
    percentile_interval,
    proportion_interval,
)
from parapolicy.evaluate.report.gather import select_latencies


def summarize(
    episodes: pd.DataFrame, latencies: dict[tuple[str, str, str], dict[str, Any]], margin: float
) -> pd.DataFrame:
    """One record per env, checkpoint and sampler: scores, latencies and the comparison with the sequential sampler.

    A latency with ``same_as`` computes the chunks of that sampler; its record has that sampler's scores.

    Args:
        episodes: of :func:`parapolicy.evaluate.report.gather.episode_table`.
        latencies: of :func:`parapolicy.evaluate.report.gather.gather_latencies`.
        margin: of the equivalence tests, in units of reward.
    """
    rows = []
    for (env, checkpoint), task in episodes.groupby(["env", "checkpoint"], sort=False):
        baseline = _baseline(task)
        own = select_latencies(latencies, str(env), str(checkpoint))
        upstream = {sampler: row["same_as"] for sampler, row in own.items() if "same_as" in row}
        copies = [task[task["sampler"] == same].assign(sampler=sampler) for sampler, same in upstream.items()]
        task = pd.concat([task, *copies])
        reference = task[task["sampler"] == baseline].set_index("seed")[["reward", "success"]].astype(float)
        for sampler, group in task.groupby("sampler", sort=False):
            successes, count = int(group["success"].sum()), len(group)
            low, high = mean_interval(group["reward"].tolist())
            success_low, success_high = proportion_interval(successes, count)
            row = {
                "env": env,
                "checkpoint": checkpoint,
                "sampler": sampler,
                "episodes": count,
                "reward": group["reward"].mean(),
                "reward_low": low,
                "reward_high": high,
                "success": successes / count,
                "success_low": success_low,
                "success_high": success_high,
                "rounds": group["rounds"].mean(),
                "evaluations": group["evaluations"].mean(),
                "seam": group["seam"].mean(),
                "motion": group["motion"].mean(),
            }
            timed = own.get(str(sampler))
            if timed is not None:
                times = timed["chunk_ms"].get("each") or [timed["chunk_ms"]["p50"]]
                for percent in (50, 99):
                    low, high = percentile_interval(times, percent)
                    value = timed["chunk_ms"][f"p{percent}"]
                    row |= {f"p{percent}_ms": value, f"p{percent}_low": low, f"p{percent}_high": high}
                if "chunk_error" in timed:
                    row["chunk_error_p95"] = timed["chunk_error"]["p95"]
            scores = group.set_index("seed")[["reward", "success"]].astype(float)
            paired = scores.sub(reference).dropna()
            if baseline not in (None, sampler, upstream.get(str(sampler))) and len(paired) > 1:
                for name, score in (("difference", "reward"), ("success_difference", "success")):
                    low, high = mean_interval(paired[score].tolist())
                    row |= {name: paired[score].mean(), f"{name}_low": low, f"{name}_high": high}
                rewards = paired["reward"].tolist()
                row["equivalence_p"] = equivalence_p(rewards, margin)
                row["episodes_needed"] = episodes_needed(rewards, margin)
            rows.append(row | {"baseline": sampler == baseline, "upstream": sampler in upstream})
    return pd.DataFrame(rows)


def _baseline(task: pd.DataFrame) -> str | None:
    """The sampler to compare with: sequential, with the most evaluations per chunk."""
    sequential = task[task["is_reference"]]
    return None if sequential.empty else str(sequential.loc[sequential["evaluations"].idxmax(), "sampler"])


def recommend(task: pd.DataFrame, margin: float) -> tuple[str | None, str]:
    """Which sampler to use, and a sentence with the reason.

    It is the fastest sampler with a mean reward equivalent to the sequential sampler's and no significantly lower
    success rate. Success is a separate condition because it is a strict threshold on reward.
    """
    if "p50_ms" not in task or task["p50_ms"].isna().all():
        return None, "No latency was measured, so that no sampler can be recommended."
    base = task[task["baseline"]]
    if base.empty or "equivalence_p" not in task:
        return None, "There is no sequential sampler with other samplers beside it to compare with."
    base = base.iloc[0]
    equal = task[(task["equivalence_p"] < 0.05) & task["p50_ms"].notna() & ~task["upstream"]].sort_values("p50_ms")
    worse = equal["success_difference_high"] < 0
    if worse.all():
        needed = int(task["episodes_needed"].min())
        return None, (
            f"No sampler is shown to keep the sequential sampler's reward within ±{margin} without losing successes: "
            f"it takes about {needed} episodes or more (there are {int(base['episodes'])})."
        )
    best = equal[~worse].iloc[0]
    faster = f", {base['p50_ms'] / best['p50_ms']:.1f} times as fast" if base["p50_ms"] > 0 else ""
    upstream = task.loc[task["sampler"] == f"upstream {base['sampler']}", "p50_ms"]
    published = f" (the published code: {upstream.iloc[0]:.0f})" if len(upstream) else ""
    passed = [
        f" “{row['sampler']}” is faster, {row['p50_ms']:.0f} ms, but succeeds less often: {row['success']:.2f}, by "
        f"seed {row['success_difference']:+.2f} [{row['success_difference_low']:+.2f}, "
        f"{row['success_difference_high']:+.2f}]."
        for _, row in equal[worse & (equal["p50_ms"] < best["p50_ms"])].iterrows()
    ]
    return str(best["sampler"]), (
        f"Use “{best['sampler']}”: {best['p50_ms']:.0f} ms per chunk against {base['p50_ms']:.0f}{published}{faster}, "
        f"and the same reward within ±{margin} (difference {best['difference']:+.3f}, p = "
        f"{best['equivalence_p']:.2g} of TOST, {int(best['episodes'])} episodes). Success: {best['success']:.2f} "
        f"[{best['success_low']:.2f}, {best['success_high']:.2f}] against {base['success']:.2f} "
        f"[{base['success_low']:.2f}, {base['success_high']:.2f}].{''.join(passed)}"
    )


def pareto(task: pd.DataFrame, score: str) -> list[str]:
    """Samplers on the Pareto front of p50 latency and a score, fastest first."""
    front, best = [], -np.inf
    for _, row in task.dropna(subset=["p50_ms"]).sort_values("p50_ms").iterrows():
        if row[score] > best:
            best = row[score]
            front.append(str(row["sampler"]))
    return front
