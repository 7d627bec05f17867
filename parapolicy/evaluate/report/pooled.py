"""Scores of several tasks together, as rliable (Agarwal et al., NeurIPS 2021) pools them."""

from collections.abc import Sequence

import pandas as pd

from parapolicy.evaluate.measure.statistics import pooled_improvement, pooled_interval, pooled_mean

TASK = ["env", "checkpoint"]
# column of pool, heading, number format
COLUMNS = (
    ("mean", "mean reward", ".3f"),
    ("iqm", "interquartile mean", ".3f"),
    ("difference", "difference by seed", "+.3f"),
    ("improvement", "probability of improvement", ".3f"),
)


def pool(episodes: pd.DataFrame) -> pd.DataFrame:
    """One record per sampler, over the tasks that it ran on; empty where there is but one task.

    Its columns, each with ``_low`` and ``_high``, 95 % intervals of bootstraps stratified by task: ``mean`` of the
    tasks' mean maximum rewards; ``iqm``, the interquartile mean of all episodes; and against the sequential sampler,
    on the tasks that both ran on, ``difference``, the mean of the tasks' mean differences by seed, and
    ``improvement``, the probability that an episode has a larger reward than one of the sequential sampler.

    Where the reward is success, the interquartile mean is 1 as soon as three quarters of the episodes succeed.

    Args:
        episodes: of :func:`parapolicy.evaluate.report.gather.episode_table`.
    """
    rows: list[dict[str, object]] = []
    if len(episodes[TASK].drop_duplicates()) < 2:
        return pd.DataFrame(rows)
    reference = episodes[episodes["is_reference"]]
    # Of several, the one with the most evaluations per chunk, as in the comparison of a single task.
    baselines = {
        task: group[group["sampler"] == group.loc[group["evaluations"].idxmax(), "sampler"]].set_index("seed")["reward"]
        for task, group in reference.groupby(TASK)
    }
    names = {str(group["sampler"].iloc[0]) for _, group in reference.groupby("sampler")}
    for sampler, group in episodes.groupby("sampler", sort=False):
        own = {task: records.set_index("seed")["reward"] for task, records in group.groupby(TASK)}
        scores = [task.tolist() for task in own.values()]
        row: dict[str, object] = {"sampler": sampler, "tasks": len(own), "episodes": len(group)}
        row |= _interval("mean", pooled_mean(scores)) | _interval("iqm", pooled_interval(scores))
        common = [task for task in own if task in baselines]
        if common and sampler not in names:
            paired = [(own[task] - baselines[task]).dropna().tolist() for task in common]
            if all(paired):
                row |= _interval("difference", pooled_mean(paired))
            others = [baselines[task].tolist() for task in common]
            row |= _interval("improvement", pooled_improvement([own[task].tolist() for task in common], others))
        rows.append(row)
    return pd.DataFrame(rows)


def _interval(name: str, found: tuple[float, tuple[float, float]]) -> dict[str, float]:
    value, (low, high) = found
    return {name: value, f"{name}_low": low, f"{name}_high": high}


def cells(row: pd.Series) -> Sequence[str]:
    """A record of :func:`pool` as text, one cell for each of ``COLUMNS``; empty where there is nothing."""
    texts = []
    for name, _, form in COLUMNS:
        missing = name not in row or pd.isna(row[name])
        text = "" if missing else f"{row[name]:{form}} [{row[f'{name}_low']:{form}}, {row[f'{name}_high']:{form}}]"
        texts.append(text)
    return texts
