"""The report of any number of runs: one HTML page that needs no network, tables as files, and plots.

parapolicy report FOLDER… [--output FOLDER] [--margin 0.03 --success-margin 0.05]
"""

import html
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import plotly.graph_objects as go

from parapolicy.evaluate.report.figures import (
    calibration_figure,
    cost_figure,
    embed,
    latency_figure,
    profiles_figure,
    sampler_colors,
)
from parapolicy.evaluate.report.gather import (
    chunk_table,
    describe_machines,
    episode_table,
    gather_failures,
    gather_fidelities,
    gather_latencies,
    gather_runs,
    select_latencies,
)
from parapolicy.evaluate.report.markdown import markdown, pooled_table
from parapolicy.evaluate.report.plots import plot_pareto
from parapolicy.evaluate.report.pooled import COLUMNS, cells, pool
from parapolicy.evaluate.report.summary import MARGINS, Margins, recommend, summarize

STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:1260px;margin:2em auto;padding:0 1em;color:#222}
h1{font-size:1.5em}h2{font-size:1.2em;margin-top:2em}table{margin-bottom:1.5em}small{white-space:nowrap}
.answer{font-size:1.25em;background:#eef6ee;padding:.8em 1em;
border-left:5px solid #2a7}table{border-collapse:collapse;font-size:.9em;display:block;overflow-x:auto}
th,td{padding:.3em .7em;text-align:right;
border-bottom:1px solid #ddd}th:first-child,td:first-child{text-align:left}.best{background:#eef6ee}footer{color:#777;
font-size:.85em;margin-top:3em}.failed{color:#a22}"""


SCORES = (  # heading, column of the summary, number format, whether it has an interval
    ("reward", "reward", ".3f", True),
    ("difference of reward", "difference", "+.3f", True),
    ("equivalent, p", "equivalence_p", ".2g", False),
    ("success", "success", ".2f", True),
    ("difference of success", "success_difference", "+.2f", True),
    ("equivalent, p", "success_equivalence_p", ".2g", False),
    ("episodes needed", "episodes_needed", ".0f", False),
)
COSTS = (
    ("p50 ms", "p50_ms", ".1f", False),
    ("p99 ms", "p99_ms", ".1f", False),
    ("rounds", "rounds", ".1f", False),
    ("evaluations", "evaluations", ".0f", False),
    ("chunk error p95", "chunk_error_p95", ".1e", False),
    ("energy distance, same noise", "energy", ".1e", True),
    ("other noise", "energy_independent", ".1e", True),
    ("jump at seams", "seam", ".3g", False),
    ("motion inside", "motion", ".3g", False),
)


def _table(task: pd.DataFrame, chosen: str | None, columns: Sequence[tuple[str, str, str, bool]]) -> str:
    """A line per sampler, without columns that were not measured."""
    shown = [column for column in columns if column[1] in task and task[column[1]].notna().any()]
    headings = ["sampler", "episodes", *(heading for heading, *_ in shown)]
    lines = ["<tr>" + "".join(f"<th>{heading}</th>" for heading in headings) + "</tr>"]
    for _, row in task.iterrows():
        name = html.escape(str(row["sampler"]))
        cells = [f"<i>{name}</i>" if row["other"] else name, str(row["episodes"])]
        for _, name, form, has_interval in shown:
            if pd.isna(row[name]):
                cells.append("–")
            elif has_interval:
                low, high = row[f"{name}_low"], row[f"{name}_high"]
                cells.append(f"{row[name]:{form}} <small>[{low:{form}}, {high:{form}}]</small>")
            else:
                cells.append(f"{row[name]:{form}}")
        mark = ' class="best"' if row["sampler"] == chosen else ""
        lines.append(f"<tr{mark}>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    return f"<table>{''.join(lines)}</table>"


def _pooled(episodes: pd.DataFrame, pooled: pd.DataFrame) -> str:
    """Scores over several tasks; empty for a single task."""
    if pooled.empty:
        return ""
    headings = ["sampler", "tasks", *(heading for _, heading, _ in COLUMNS)]
    lines = ["<tr>" + "".join(f"<th>{heading}</th>" for heading in headings) + "</tr>"]
    for _, row in pooled.iterrows():
        texts = [html.escape(str(row["sampler"])), str(row["tasks"]), *cells(row)]
        lines.append("<tr>" + "".join(f"<td>{text or '–'}</td>" for text in texts) + "</tr>")
    return f"<h2>All tasks together</h2><table>{''.join(lines)}</table>" + embed(profiles_figure(episodes))


def write_report(folders: Sequence[Path], output: Path, margins: Margins = MARGINS) -> Path:
    """Write ``report.html``, a PNG per task, and the tables ``samplers`` (csv, md), ``episodes`` (csv, parquet)
    and, of several tasks, ``pooled`` (csv, md).

    Args:
        folders: of runs and sweeps.
        output: created if missing.
        margins: within which a sampler counts as equivalent to the policy's own steps.

    Returns:
        The path of the page.

    Raises:
        ValueError: the folders have no finished run.
    """
    runs = gather_runs(folders)
    episodes, chunks = episode_table(runs), chunk_table(runs)
    latencies = gather_latencies(runs, folders)
    summary = summarize(episodes, latencies, margins, gather_fidelities(runs, folders))
    output.mkdir(parents=True, exist_ok=True)
    episodes.to_csv(output / "episodes.csv", index=False)
    episodes.to_parquet(output / "episodes.parquet", index=False)
    summary.to_csv(output / "samplers.csv", index=False)
    pooled = pool(episodes)
    (output / "samplers.md").write_text(markdown(summary))
    if not pooled.empty:
        pooled.to_csv(output / "pooled.csv", index=False)
        (output / "pooled.md").write_text(pooled_table(pooled) + "\n")
    parts = []
    for (env, checkpoint), task in summary.groupby(["env", "checkpoint"], sort=False):
        chosen, sentence = recommend(task.dropna(axis=1, how="all"), margins)
        name = f"{env}, {checkpoint}"
        parts.append(f"<h2>{html.escape(name)}</h2><p class='answer'>{html.escape(sentence)}</p>")
        if "p50_ms" in task and task["p50_ms"].notna().any():
            parts.append(embed(latency_figure(task, chosen)))
            plot_pareto(task, chosen, name, output / f"pareto_{env}_{Path(str(checkpoint)).name}.png")
        parts += [_table(task, chosen, columns) for columns in (SCORES, COSTS)]
        colors, measured = sampler_colors(task, chosen), select_latencies(latencies, str(env), str(checkpoint))
        if not chunks.empty:
            own = chunks[(chunks["env"] == env) & (chunks["checkpoint"] == checkpoint)]
            evaluated = {sampler: row["evaluated"] for sampler, row in measured.items() if "evaluated" in row}
            parts.append(embed(cost_figure(own, evaluated, colors)))
        if calibration := calibration_figure(measured, colors):
            parts.append(embed(calibration))
    parts.append(_pooled(episodes, pooled))
    if failures := gather_failures(folders):
        items = "".join(f"<li>{html.escape(where)}: {html.escape(why)}</li>" for where, why in failures.items())
        parts.append(f"<h2 class='failed'>Jobs that failed</h2><ul>{items}</ul>")
    machines = "<br>".join(map(html.escape, describe_machines(runs)))
    engines = sorted({row.get("engine", "") for row in latencies.values()} - {"", "upstream"})
    footer = (
        "Brackets: 95 % intervals (bootstrap for rewards and percentiles, Wilson for success). Differences: to "
        f"the sequential sampler, by seed. Equivalent: two one-sided t-tests with margin ±{margins.reward} of reward "
        f"and ±{margins.success} of success. Energy distance to the policy's own chunks, with the same seeds and with "
        f"others; its bound is {margins.fidelity:.0%} of the mean distance between two chunks of the policy. In "
        "italics: samplers of other distributions than the policy's. Latency at "
        f"batch 1{', engine ' + ', '.join(engines) if engines else ''}; "
        "“upstream”: the eager network and diffusers' scheduler step by step, whose chunks and rewards are those of "
        "the sampler named. All tasks together: bootstraps stratified by task; probability of improvement: that an "
        "episode has a larger reward than an episode of the sequential sampler on the same task, ties count half. Jump "
        "at seams: distance from a chunk's last executed action to the next chunk's first; motion inside: distance "
        "between successive actions within a chunk; both over all numbers of an action, in its own units."
    )
    script = go.Figure().to_html(full_html=False, include_plotlyjs=True)
    page = output / "report.html"
    page.write_text(
        f"<!doctype html><html lang='en'><head><meta charset='utf-8'><title>Latency and reward</title><style>{STYLE}"
        f"</style></head><body><h1>Latency and reward</h1><div hidden>{script}</div>{''.join(parts)}"
        f"<footer><p>{footer}</p><p>{machines}</p></footer></body></html>"
    )
    return page
