"""The report of any number of runs: tables, pictures, and one HTML page that needs no network.

parapolicy report FOLDER… [--output FOLDER] [--margin 0.03]
"""

import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from parapolicy.evaluate.gather import (
    chunk_table,
    describe_machines,
    episode_table,
    gather_failures,
    gather_latencies,
    gather_runs,
)
from parapolicy.evaluate.statistics import (
    episodes_needed,
    equivalence_p,
    mean_interval,
    percentile_interval,
    pooled_interval,
    proportion_interval,
)

STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:1100px;margin:2em auto;padding:0 1em;color:#222}
h1{font-size:1.5em}h2{font-size:1.2em;margin-top:2em}.answer{font-size:1.25em;background:#eef6ee;padding:.8em 1em;
border-left:5px solid #2a7}table{border-collapse:collapse;font-size:.9em}th,td{padding:.3em .7em;text-align:right;
border-bottom:1px solid #ddd}th:first-child,td:first-child{text-align:left}.best{background:#eef6ee}footer{color:#777;
font-size:.85em;margin-top:3em}.failed{color:#a22}"""


def summarize(
    episodes: pd.DataFrame, latencies: dict[tuple[str, str, str], dict[str, Any]], margin: float
) -> pd.DataFrame:
    """One row per env, checkpoint and sampler: scores, latencies and the comparison with the sequential sampler."""
    rows = []
    for (env, checkpoint), task in episodes.groupby(["env", "checkpoint"], sort=False):
        baseline = _baseline(task)
        reference = task[task["sampler"] == baseline].set_index("seed")["reward"]
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
            }
            timed = latencies.get((str(env), str(checkpoint), str(sampler)))
            if timed is not None:
                times = timed["chunk_ms"].get("each") or [timed["chunk_ms"]["p50"]]
                for percent in (50, 99):
                    low, high = percentile_interval(times, percent)
                    value = timed["chunk_ms"][f"p{percent}"]
                    row |= {f"p{percent}_ms": value, f"p{percent}_low": low, f"p{percent}_high": high}
                row["chunk_error_p95"] = timed["chunk_error"]["p95"]
            paired = group.set_index("seed")["reward"].sub(reference).dropna().tolist()
            if baseline is not None and sampler != baseline and len(paired) > 1:
                low, high = mean_interval(paired)
                row |= {
                    "difference": float(np.mean(paired)),
                    "difference_low": low,
                    "difference_high": high,
                    "equivalence_p": equivalence_p(paired, margin),
                    "episodes_needed": episodes_needed(paired, margin),
                }
            rows.append(row | {"baseline": sampler == baseline})
    return pd.DataFrame(rows)


def _baseline(task: pd.DataFrame) -> str | None:
    """The sampler that others are compared with: sequential, with the most evaluations per chunk."""
    sequential = task[task["sampler"].str.startswith("sequential")]
    return None if sequential.empty else str(sequential.loc[sequential["evaluations"].idxmax(), "sampler"])


def recommend(task: pd.DataFrame, margin: float) -> tuple[str | None, str]:
    """The fastest sampler whose reward is shown to be that of the sequential one, and a sentence that says so."""
    if "p50_ms" not in task or task["p50_ms"].isna().all():
        return None, "No latency was measured, so that no sampler can be recommended."
    base = task[task["baseline"]]
    if base.empty or "equivalence_p" not in task:
        return None, "There is no sequential sampler with other samplers beside it to compare with."
    base = base.iloc[0]
    equal = task[(task["equivalence_p"] < 0.05) & task["p50_ms"].notna()]
    if equal.empty:
        needed = int(task["episodes_needed"].min())
        return None, (
            f"No sampler is shown to keep the sequential sampler's reward within ±{margin}: it takes about {needed} "
            f"episodes or more (there are {int(base['episodes'])})."
        )
    best = equal.loc[equal["p50_ms"].idxmin()]
    faster = f", {base['p50_ms'] / best['p50_ms']:.1f} times as fast" if base["p50_ms"] > 0 else ""
    return str(best["sampler"]), (
        f"Use “{best['sampler']}”: {best['p50_ms']:.0f} ms per chunk against {base['p50_ms']:.0f}{faster}, and the "
        f"same reward within ±{margin} (difference {best['difference']:+.3f}, p = {best['equivalence_p']:.2g} of TOST, "
        f"{int(best['episodes'])} episodes)."
    )


def pareto(task: pd.DataFrame, score: str) -> list[str]:
    """Samplers that none of the others beats both in p50 latency and in a score, fastest first."""
    front, best = [], -np.inf
    for _, row in task.dropna(subset=["p50_ms"]).sort_values("p50_ms").iterrows():
        if row[score] > best:
            best = row[score]
            front.append(str(row["sampler"]))
    return front


def _pareto_figure(task: pd.DataFrame, chosen: str | None) -> go.Figure:
    figure = make_subplots(rows=1, cols=2, subplot_titles=("mean maximum reward", "success rate"))
    timed = task.dropna(subset=["p50_ms"])
    for column, score in enumerate(("reward", "success"), 1):
        front = timed.set_index("sampler").loc[pareto(timed, score)]
        figure.add_scatter(
            x=front["p50_ms"],
            y=front[score],
            mode="lines",
            line={"color": "#bbb", "dash": "dot", "shape": "hv"},
            row=1,
            col=column,
            showlegend=False,
            hoverinfo="skip",
        )
        for _, row in timed.iterrows():
            color = "#2a7" if row["sampler"] == chosen else "#444" if row["baseline"] else "#47a"
            figure.add_scatter(
                x=[row["p50_ms"]],
                y=[row[score]],
                mode="markers+text",
                text=[row["sampler"]],
                textposition="top center",
                marker={"size": 11, "color": color},
                textfont={"color": color, "size": 11},
                error_x={
                    "type": "data",
                    "symmetric": False,
                    "array": [row["p99_ms"] - row["p50_ms"]],
                    "arrayminus": [0],
                    "color": color,
                    "thickness": 1,
                },
                error_y={
                    "type": "data",
                    "symmetric": False,
                    "array": [row[f"{score}_high"] - row[score]],
                    "arrayminus": [row[score] - row[f"{score}_low"]],
                    "color": color,
                    "thickness": 1,
                },
                hovertemplate=f"{row['sampler']}<br>p50 %{{x:.1f}} ms, p99 {row['p99_ms']:.1f} ms<br>{score} "
                f"%{{y:.3f}} [{row[f'{score}_low']:.3f}, {row[f'{score}_high']:.3f}]<extra></extra>",
                row=1,
                col=column,
                showlegend=False,
            )
    figure.update_xaxes(type="log", title="chunk latency, ms (dot: p50, whisker: to p99)", dtick="D2")
    return figure.update_layout(height=460, template="simple_white", margin={"t": 40, "l": 50, "r": 20})


def _cost_figure(chunks: pd.DataFrame) -> go.Figure:
    figure = make_subplots(rows=1, cols=2, subplot_titles=("rounds per chunk", "mean rounds along the episode"))
    for sampler, group in chunks.groupby("sampler", sort=False):
        figure.add_box(y=group["rounds"], name=str(sampler), showlegend=False, boxpoints=False, row=1, col=1)
        phase = group.groupby("chunk")["rounds"].mean()
        figure.add_scatter(x=phase.index, y=phase, name=str(sampler), mode="lines", row=1, col=2)
    figure.update_yaxes(type="log")
    figure.update_xaxes(title="chunk", row=1, col=2)
    return figure.update_layout(height=420, template="simple_white", margin={"t": 40, "l": 50, "r": 20})


def _table(task: pd.DataFrame, chosen: str | None) -> str:
    def interval(row: Any, name: str, form: str) -> str:
        if pd.isna(row.get(name, np.nan)):
            return "–"
        return f"{row[name]:{form}} <small>[{row[f'{name}_low']:{form}}, {row[f'{name}_high']:{form}}]</small>"

    headings = (
        "sampler",
        "episodes",
        "reward",
        "success",
        "difference",
        "equivalent, p",
        "episodes needed",
        "p50 ms",
        "p99 ms",
        "rounds",
        "evaluations",
        "chunk error p95",
    )
    lines = ["<tr>" + "".join(f"<th>{heading}</th>" for heading in headings) + "</tr>"]
    for _, row in task.iterrows():

        def number(name: str, form: str, row: Any = row) -> str:
            return "–" if pd.isna(row.get(name, np.nan)) else f"{row[name]:{form}}"

        cells = (
            html.escape(str(row["sampler"])),
            str(row["episodes"]),
            interval(row, "reward", ".3f"),
            interval(row, "success", ".2f"),
            interval(row, "difference", "+.3f"),
            number("equivalence_p", ".2g"),
            number("episodes_needed", ".0f"),
            number("p50_ms", ".1f"),
            number("p99_ms", ".1f"),
            number("rounds", ".1f"),
            number("evaluations", ".0f"),
            number("chunk_error_p95", ".1e"),
        )
        mark = ' class="best"' if row["sampler"] == chosen else ""
        lines.append(f"<tr{mark}>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    return f"<table>{''.join(lines)}</table>"


def _pooled(episodes: pd.DataFrame) -> str:
    """Interquartile means over several tasks; empty for a single one."""
    if len(episodes[["env", "checkpoint"]].drop_duplicates()) < 2:
        return ""
    lines = ["<tr><th>sampler</th><th>tasks</th><th>interquartile mean</th></tr>"]
    for sampler, group in episodes.groupby("sampler", sort=False):
        tasks = [task["reward"].tolist() for _, task in group.groupby(["env", "checkpoint"])]
        value, (low, high) = pooled_interval(tasks)
        lines.append(
            f"<tr><td>{html.escape(str(sampler))}</td><td>{len(tasks)}</td>"
            f"<td>{value:.3f} <small>[{low:.3f}, {high:.3f}]</small></td></tr>"
        )
    figure = go.Figure()
    thresholds = np.linspace(0, 1, 101)
    for sampler, group in episodes.groupby("sampler", sort=False):
        share = [(group["reward"] > threshold).mean() for threshold in thresholds]
        figure.add_scatter(x=thresholds, y=share, mode="lines", name=str(sampler))
    figure.update_layout(height=380, template="simple_white", xaxis_title="reward τ", yaxis_title="episodes above τ")
    return f"<h2>All tasks together</h2><table>{''.join(lines)}</table>" + _div(figure)


def _div(figure: go.Figure) -> str:
    text: str = figure.to_html(full_html=False, include_plotlyjs=False)
    return text


def _plot(task: pd.DataFrame, chosen: str | None, title: str, path: Path) -> None:
    """The Pareto picture as a PNG."""
    timed = task.dropna(subset=["p50_ms"])
    figure, panels = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for axes, score in zip(panels, ("reward", "success"), strict=True):
        front = timed.set_index("sampler").loc[pareto(timed, score)]
        axes.plot(front["p50_ms"], front[score], color="#bbb", linestyle=":", drawstyle="steps-post")
        for _, row in timed.iterrows():
            color = "#2a7" if row["sampler"] == chosen else "#444" if row["baseline"] else "#47a"
            axes.errorbar(
                row["p50_ms"],
                row[score],
                xerr=[[0.0], [max(0.0, row["p99_ms"] - row["p50_ms"])]],
                yerr=[[max(0.0, row[score] - row[f"{score}_low"])], [max(0.0, row[f"{score}_high"] - row[score])]],
                fmt="o",
                color=color,
                capsize=2,
                linewidth=1,
            )
            axes.annotate(
                row["sampler"],
                (row["p50_ms"], row[score]),
                xytext=(5, 5),
                textcoords="offset points",
                color=color,
                fontsize=9,
            )
        axes.set(xscale="log", xlabel="chunk latency, ms (p50, whisker to p99)", ylabel=f"{score} (95 % interval)")
        axes.grid(alpha=0.3, which="both")
        axes.margins(x=0.15)
    figure.suptitle(title)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def write_report(folders: Sequence[Path], output: Path, margin: float = 0.03) -> Path:
    """Write ``report.html``, ``samplers.csv``, ``episodes.csv``, ``episodes.parquet`` and a PNG per task.

    Args:
        folders: of runs and sweeps.
        output: made where it is not there.
        margin: of the equivalence tests, in units of reward.

    Returns:
        The page's path.

    Raises:
        ValueError: the folders hold no finished run.
    """
    runs = gather_runs(folders)
    episodes, chunks = episode_table(runs), chunk_table(runs)
    summary = summarize(episodes, gather_latencies(runs, folders), margin)
    output.mkdir(parents=True, exist_ok=True)
    episodes.to_csv(output / "episodes.csv", index=False)
    episodes.to_parquet(output / "episodes.parquet", index=False)
    summary.to_csv(output / "samplers.csv", index=False)
    parts = []
    for (env, checkpoint), task in summary.groupby(["env", "checkpoint"], sort=False):
        chosen, sentence = recommend(task, margin)
        name = f"{env}, {checkpoint}"
        parts.append(f"<h2>{html.escape(name)}</h2><p class='answer'>{html.escape(sentence)}</p>")
        if "p50_ms" in task and task["p50_ms"].notna().any():
            parts.append(_div(_pareto_figure(task, chosen)))
            _plot(task, chosen, name, output / f"pareto_{env}_{Path(str(checkpoint)).name}.png")
        parts.append(_table(task, chosen))
        if not chunks.empty:
            own = chunks[(chunks["env"] == env) & (chunks["checkpoint"] == checkpoint)]
            parts.append(_div(_cost_figure(own)))
    parts.append(_pooled(episodes))
    if failures := gather_failures(folders):
        items = "".join(f"<li>{html.escape(where)}: {html.escape(why)}</li>" for where, why in failures.items())
        parts.append(f"<h2 class='failed'>Jobs that failed</h2><ul>{items}</ul>")
    machines = "<br>".join(map(html.escape, describe_machines(runs)))
    footer = (
        "Brackets: 95 % intervals (bootstrap for rewards and percentiles, Wilson for success). Difference: of reward "
        f"to the sequential sampler, by seed. Equivalent: two one-sided t-tests with margin ±{margin}. Latency at "
        "batch 1."
    )
    script = go.Figure().to_html(full_html=False, include_plotlyjs=True)
    page = output / "report.html"
    page.write_text(
        f"<!doctype html><html lang='en'><head><meta charset='utf-8'><title>Latency and reward</title><style>{STYLE}"
        f"</style></head><body><h1>Latency and reward</h1><div hidden>{script}</div>{''.join(parts)}"
        f"<footer><p>{footer}</p><p>{machines}</p></footer></body></html>"
    )
    return page
