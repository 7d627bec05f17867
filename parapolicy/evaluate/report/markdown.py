"""The summary as tables for documents."""

from collections.abc import Sequence

import pandas as pd

from parapolicy.evaluate.report.pooled import COLUMNS, cells


def markdown(summary: pd.DataFrame) -> str:
    """Two tables per environment and checkpoint: costs and scores of the samplers, and the tests of equivalence."""
    parts = []
    for (env, checkpoint), task in summary.groupby(["env", "checkpoint"], sort=False):
        parts.append(f"## {env}, {checkpoint}\n\n{costs_table(task)}\n\n{equivalence_table(task)}\n")
    return "\n".join(parts)


def costs_table(task: pd.DataFrame) -> str:
    """Costs, fidelity and scores of one task's samplers; other distributions than the policy's in italics."""
    headings = (
        "sampler",
        "evaluations",
        "rounds",
        "ms, p50",
        "energy distance, same noise",
        "other noise",
        "episodes",
        "reward",
        "success",
        "reward, by seed",
        "success, by seed",
    )
    rows = [
        [
            f"*{row['sampler']}*" if row["other"] else str(row["sampler"]),
            _number(row, "evaluations", ".1f"),
            _number(row, "rounds", ".1f"),
            _number(row, "p50_ms", ".1f"),
            _interval(row, "energy", ".1e"),
            _interval(row, "energy_independent", ".1e"),
            str(row["episodes"]),
            _interval(row, "reward", ".3f"),
            _interval(row, "success", ".3f"),
            _interval(row, "difference", "+.3f"),
            _interval(row, "success_difference", "+.3f"),
        ]
        for _, row in task.iterrows()
    ]
    return _table(headings, rows)


def equivalence_table(task: pd.DataFrame) -> str:
    """The samplers of one task compared with its sequential one, by seed."""
    headings = ("sampler", "pairs", "reward", "TOST, p", "shown", "success", "TOST, p", "shown", "episodes needed")
    rows = [
        [
            str(row["sampler"]),
            _number(row, "pairs", ".0f"),
            _interval(row, "difference", "+.3f"),
            _number(row, "equivalence_p", ".2g"),
            "yes" if row["same"] else "no",
            _interval(row, "success_difference", "+.3f"),
            _number(row, "success_equivalence_p", ".2g"),
            "yes" if row["success_same"] else "no",
            _number(row, "episodes_needed", ".0f"),
        ]
        for _, row in task.iterrows()
        if not pd.isna(row.get("pairs", float("nan")))
    ]
    return _table(headings, rows)


def pooled_table(pooled: pd.DataFrame) -> str:
    """Scores over several tasks, of :func:`parapolicy.evaluate.report.pooled.pool`."""
    headings = ["sampler", "tasks", "episodes", *(heading for _, heading, _ in COLUMNS)]
    rows = [[str(row["sampler"]), str(row["tasks"]), str(row["episodes"]), *cells(row)] for _, row in pooled.iterrows()]
    return _table(headings, rows)


def _number(row: pd.Series, name: str, form: str) -> str:
    value = row.get(name, float("nan"))
    return "" if pd.isna(value) else f"{value:{form}}"


def _interval(row: pd.Series, name: str, form: str) -> str:
    if not (text := _number(row, name, form)):
        return ""
    return f"{text} [{row[f'{name}_low']:{form}}, {row[f'{name}_high']:{form}}]"


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
