"""Scores, costs and fidelity of each sampler, and the recommended sampler."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd

from parapolicy.evaluate.measure.statistics import (
    episodes_needed,
    equivalence_p,
    is_equivalent,
    mean_interval,
    percentile_interval,
    proportion_interval,
)
from parapolicy.evaluate.report.gather import select_latencies

Measurements = Mapping[tuple[str, str, str], dict[str, Any]]  # by env, checkpoint and sampler
SCORES = (("", "reward"), ("success_", "success"))  # prefix of a comparison's columns, its score


@dataclass(frozen=True)
class Margins:
    """The margins within which a sampler counts as equivalent to the policy's own steps.

    Attributes:
        reward, success: largest differences of the mean.
        fidelity: largest energy distance, relative to the mean distance between two chunks of the policy.
        others: also recommend samplers of other distributions than the policy's.
    """

    reward: float = 0.03
    success: float = 0.05
    fidelity: float = 0.01
    others: bool = False


MARGINS = Margins()


def summarize(
    episodes: pd.DataFrame, latencies: Measurements, margins: Margins, fidelities: Measurements | None = None
) -> pd.DataFrame:
    """One record per env, checkpoint and sampler: scores, latencies and the comparison with the sequential sampler.

    A latency with ``same_as`` computes the chunks of that sampler; its record has that sampler's scores.

    Args:
        episodes: from :func:`parapolicy.evaluate.report.gather.episode_table`.
        latencies: from :func:`parapolicy.evaluate.report.gather.gather_latencies`.
        margins: of the comparison.
        fidelities: from :func:`parapolicy.evaluate.report.gather.gather_fidelities`; None: not measured.
    """
    rows = []
    for (env, checkpoint), task in episodes.groupby(["env", "checkpoint"], sort=False):
        baseline = _baseline(task)
        own = select_latencies(latencies, str(env), str(checkpoint))
        distances = select_latencies(fidelities or {}, str(env), str(checkpoint))
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
                "other": bool(group["other"].any()),
            }
            row |= _costs(own.get(str(sampler))) | _fidelity(distances.get(str(sampler)), margins.fidelity)
            scores = group.set_index("seed")[["reward", "success"]].astype(float)
            paired = scores.sub(reference).dropna()
            if baseline not in (None, sampler, upstream.get(str(sampler))) and len(paired) > 1:
                row |= _comparison(paired, margins)
            rows.append(row | {"baseline": sampler == baseline, "upstream": sampler in upstream})
    return pd.DataFrame(rows)


def _costs(timed: Mapping[str, Any] | None) -> dict[str, Any]:
    row: dict[str, Any] = {}
    if timed is not None:
        times = timed["chunk_ms"].get("each") or [timed["chunk_ms"]["p50"]]
        for percent in (50, 99):
            low, high = percentile_interval(times, percent)
            value = timed["chunk_ms"][f"p{percent}"]
            row |= {f"p{percent}_ms": value, f"p{percent}_low": low, f"p{percent}_high": high}
        if "chunk_error" in timed:
            row["chunk_error_p95"] = timed["chunk_error"]["p95"]
    return row


def _fidelity(measured: Mapping[str, Any] | None, share: float) -> dict[str, Any]:
    """Energy distances, and whether the interval of the distance with equal noise is within the bound."""
    if measured is None:
        return {}
    row: dict[str, Any] = {}
    for name, key in (("energy", "paired_energy_distance"), ("energy_independent", "energy_distance")):
        low, high = measured[key]["ci95"]
        row |= {name: measured[key]["mean"], f"{name}_low": low, f"{name}_high": high}
    bound = share * measured["paired_energy_distance"]["spread"]
    return row | {"energy_bound": bound, "keeps": bool(row["energy_high"] <= bound)}


def _comparison(paired: pd.DataFrame, margins: Margins) -> dict[str, Any]:
    """Differences of reward and success, by seed."""
    row: dict[str, Any] = {"pairs": len(paired), "episodes_needed": 0}
    for prefix, score in SCORES:
        values, margin = paired[score].tolist(), getattr(margins, score)
        low, high = mean_interval(values)
        name = f"{prefix}difference"
        row |= {name: paired[score].mean(), f"{name}_low": low, f"{name}_high": high}
        row |= {f"{prefix}equivalence_p": equivalence_p(values, margin), f"{prefix}same": is_equivalent(values, margin)}
        row["episodes_needed"] = max(row["episodes_needed"], episodes_needed(values, margin))
    return row


def _baseline(task: pd.DataFrame) -> str | None:
    """The sampler to compare with: the sequential one with the most evaluations per chunk."""
    sequential = task[task["is_reference"]]
    return None if sequential.empty else str(sequential.loc[sequential["evaluations"].idxmax(), "sampler"])


def recommend(task: pd.DataFrame, margins: Margins) -> tuple[str | None, str]:
    """The recommended sampler, and a sentence with the reason.

    It is the fastest sampler of the policy's own distribution for which three things are shown: the sequential
    sampler's mean reward and success rate within the margins, from enough episodes, and, if distributions were
    compared, an energy distance below the bound. If the sequential sampler is faster, that one is recommended.
    """
    if "p50_ms" not in task or task["p50_ms"].isna().all():
        return None, "No latency was measured, so no sampler can be recommended."
    base = task[task["baseline"]]
    if base.empty or "equivalence_p" not in task:
        return None, "There is no sequential sampler, or nothing to compare with it."
    base = base.iloc[0]
    rivals = task[task["equivalence_p"].notna() & task["p50_ms"].notna() & ~task["upstream"]].sort_values("p50_ms")
    lacks = {str(row["sampler"]): _missing(row, margins, "keeps" in task) for _, row in rivals.iterrows()}
    shown = rivals[[not lacks[name] for name in rivals["sampler"]]]
    compared = "" if "keeps" in task else " No distance between distributions was measured."
    if shown.empty:
        own = rivals if margins.others else rivals[~rivals["other"]]
        if own.empty:
            return None, "All samplers but the sequential one sample another distribution than the policy's." + compared
        needed = int(own["episodes_needed"].min())
        return None, (
            f"No sampler is shown to keep the sequential sampler's reward within ±{margins.reward} and its success "
            f"within ±{margins.success}: it takes about {needed} episodes or more (there are {int(base['episodes'])})."
            f"{_reasons(own, lacks)}{compared}"
        )
    best = shown.iloc[0]
    if best["p50_ms"] >= base["p50_ms"]:
        return str(base["sampler"]), (
            f"Use “{base['sampler']}”: {base['p50_ms']:.3g} ms per chunk. The samplers shown to keep its reward and "
            f"success are no faster: “{best['sampler']}”, {best['p50_ms']:.3g} ms."
            f"{_reasons(rivals[rivals['p50_ms'] < base['p50_ms']], lacks)}{compared}"
        )
    faster = f", {base['p50_ms'] / best['p50_ms']:.1f} times as fast"
    upstream = task.loc[task["sampler"] == f"upstream {base['sampler']}", "p50_ms"]
    published = f" (the published code: {upstream.iloc[0]:.0f})" if len(upstream) else ""
    return str(best["sampler"]), (
        f"Use “{best['sampler']}”: {best['p50_ms']:.3g} ms per chunk against {base['p50_ms']:.3g}{published}{faster}. "
        f"Same reward within ±{margins.reward} (difference {best['difference']:+.3f}, p = {best['equivalence_p']:.2g} "
        f"of TOST, {int(best['pairs'])} episodes), same success within ±{margins.success}: {best['success']:.2f} "
        f"[{best['success_low']:.2f}, {best['success_high']:.2f}] against {base['success']:.2f} "
        f"[{base['success_low']:.2f}, {base['success_high']:.2f}]."
        f"{_reasons(rivals[rivals['p50_ms'] < best['p50_ms']], lacks)}{compared}"
    )


def _missing(row: pd.Series, margins: Margins, compared: bool) -> list[str]:
    """The reasons against recommending a sampler."""
    lacks = []
    same = bool(row["same"]) and bool(row["success_same"])
    if row["other"] and not margins.others:
        lacks.append("samples another distribution")
    if row["success_difference_high"] < 0:
        lacks.append(
            f"succeeds less often: {row['success']:.2f}, by seed {row['success_difference']:+.2f} "
            f"[{row['success_difference_low']:+.2f}, {row['success_difference_high']:+.2f}]"
        )
    if not same and int(row["episodes_needed"]) > int(row["pairs"]):
        lacks.append(f"is not shown to score the same, which takes about {int(row['episodes_needed'])} episodes")
    elif not same and row["success_difference_high"] >= 0:
        lacks.append("does not score the same")
    known = compared and not pd.isna(row["keeps"])
    if compared and not (known and row["keeps"]) and not (row["other"] and margins.others):
        lacks.append(
            f"is up to {row['energy_high']:.1e} from the policy's distribution (bound {row['energy_bound']:.1e})"
            if known
            else "was not compared in distribution"
        )
    return lacks


def _reasons(rivals: pd.DataFrame, lacks: Mapping[str, list[str]]) -> str:
    return "".join(
        f" “{row['sampler']}”, {row['p50_ms']:.3g} ms, {' and '.join(lacks[str(row['sampler'])])}."
        for _, row in rivals.iterrows()
    )
