"""The figures of the HTML report, made with plotly."""

from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.colors import qualitative
from plotly.subplots import make_subplots

COLORS = [color for color in qualitative.D3 + qualitative.T10 if color not in ("#2CA02C", "#54A24B")]
CHOSEN = "#1b8a5a"  # green; no other sampler gets it


def sampler_colors(task: pd.DataFrame, chosen: str | None) -> dict[str, str]:
    """Sampler -> color in all figures of a task: the chosen one green, the sequential one black."""
    colors, found = cycle(COLORS), {}
    for _, row in task.sort_values("p50_ms" if "p50_ms" in task else "sampler").iterrows():
        name = str(row["sampler"])
        found[name] = CHOSEN if name == chosen else "#222" if row["baseline"] else next(colors)
    return found


def legend_entries(task: pd.DataFrame, chosen: str | None) -> list[tuple[pd.Series, str, str]]:
    """(record, color, legend text) of each timed sampler, fastest first."""
    colors = sampler_colors(task, chosen)
    timed = task.dropna(subset=["p50_ms"]).sort_values("p50_ms")
    return [(row, colors[row["sampler"]], f"{row['sampler']}: {row['p50_ms']:.3g} ms") for _, row in timed.iterrows()]


def latency_figure(task: pd.DataFrame, chosen: str | None) -> go.Figure:
    """Each sampler's scores and fidelity against its chunk latency.

    Reward and success are differences from the sequential sampler by seed, with the intervals of the comparison;
    without a sequential sampler they are means. A further panel has the distance from the policy's distribution with
    equal noise, if it was measured.
    """
    shown = panels(task)
    figure = make_subplots(rows=1, cols=len(shown), subplot_titles=[title for title, _ in shown])
    for column, (_, score) in enumerate(shown, 1):
        for row, color, text in legend_entries(task, chosen):
            value, low, high = interval(row, score)
            best = row["sampler"] == chosen
            figure.add_scatter(
                x=[row["p50_ms"]],
                y=[value],
                mode="markers+text",
                text=[row["sampler"] if best or row["baseline"] else ""],
                textposition="bottom center",
                textfont={"color": color},
                name=f"<b>{text}</b>" if best else text,
                legendgroup=row["sampler"],
                showlegend=column == 1,
                marker={
                    "size": 16 if best else 10,
                    "color": color,
                    "symbol": "star" if best else "x" if row["upstream"] else "circle",
                },
                error_x=_error_bar(row["p50_ms"], row["p50_ms"], row["p99_ms"], color),
                error_y=_error_bar(value, low, high, color),
                hovertemplate=f"{row['sampler']}<br>p50 %{{x:.1f}} ms, p99 {row['p99_ms']:.1f} ms<br>{score} "
                f"%{{y:.3g}} [{low:.3g}, {high:.3g}]<extra></extra>",
                row=1,
                col=column,
            )
        if score.endswith("difference"):
            figure.add_hline(y=0, line={"color": "#bbb", "dash": "dot"}, row=1, col=column)
        if score == "energy":
            figure.update_yaxes(**_log_axis(task["energy"]), row=1, col=column)
    latencies = pd.concat([task["p50_ms"], task["p99_ms"]])
    figure.update_xaxes(title="chunk latency, ms (dot: p50, whisker: to p99)", **_log_axis(latencies))
    legend = {"orientation": "h", "y": -0.25}
    return figure.update_layout(height=520, template="simple_white", margin={"t": 40, "l": 50, "r": 20}, legend=legend)


def panels(task: pd.DataFrame) -> list[tuple[str, str]]:
    """(title, score) of each panel: scores, by seed if they can be compared, and fidelity if it was measured."""
    compared = "difference" in task and task["difference"].notna().any()
    scores = [
        ("reward, difference by seed", "difference") if compared else ("mean maximum reward", "reward"),
        ("success, difference by seed", "success_difference") if compared else ("success rate", "success"),
    ]
    measured = "energy" in task and (task["energy"] > 0).any()
    return [*scores, ("energy distance from the policy, same noise", "energy")] if measured else scores


def interval(row: pd.Series, score: str) -> tuple[float, float, float]:
    """Value, low and high; the differences of the sequential sampler and its copies are 0."""
    if score.endswith("difference") and pd.isna(row[score]) and (row["baseline"] or row["upstream"]):
        return 0.0, 0.0, 0.0
    return row[score], row[f"{score}_low"], row[f"{score}_high"]


def _error_bar(value: float, low: float, high: float, color: str) -> dict[str, Any]:
    bar = {"type": "data", "symmetric": False, "color": color, "thickness": 1}
    return bar | {"array": [high - value], "arrayminus": [value - low]}


def _log_axis(values: pd.Series) -> dict[str, Any]:
    """A logarithmic axis with whole numbers as labels; plotly's own labels leave out the decade."""
    positive = values[values > 0]
    first, last = (int(np.floor(np.log10(bound))) for bound in (positive.min(), positive.max()))
    decades = range(first, last + 1)
    digits = (1, 2, 5) if len(decades) < 4 else (1,)
    ticks = [digit * 10.0**decade for decade in decades for digit in digits]
    return {"type": "log", "tickvals": ticks, "ticktext": [f"{tick:g}" for tick in ticks]}


def cost_figure(
    chunks: pd.DataFrame, evaluated: Mapping[str, tuple[Sequence[int], Sequence[float]]], colors: Mapping[str, str]
) -> go.Figure:
    """Rounds per chunk, rounds along the episode, and evaluations per step of the schedule.

    Args:
        chunks: a record per chunk, see :func:`parapolicy.evaluate.report.gather.chunk_table`.
        evaluated: sampler -> timesteps, and a chunk's mean number of evaluations at each.
        colors: of the samplers.
    """
    titles = ["rounds per chunk", "mean rounds along the episode", "mean evaluations of each diffusion step"]
    titles = titles if evaluated else titles[:2]
    figure = make_subplots(rows=1, cols=len(titles), subplot_titles=titles)
    for sampler, group in chunks.groupby("sampler", sort=False):
        name, same = str(sampler), {"legendgroup": str(sampler), "marker_color": colors.get(str(sampler))}
        figure.add_box(y=group["rounds"], name=name, showlegend=False, boxpoints=False, row=1, col=1, **same)
        phase = group.groupby("chunk")["rounds"].mean()
        figure.add_scatter(x=phase.index, y=phase, name=name, mode="lines", row=1, col=2, **same)
        if name in evaluated:
            timesteps, counts = evaluated[name]
            mode = "lines" if len(timesteps) > 20 else "markers"
            figure.add_scatter(x=timesteps, y=counts, name=name, mode=mode, showlegend=False, row=1, col=3, **same)
    for column in (1, 2):
        figure.update_yaxes(**_log_axis(chunks["rounds"]), row=1, col=column)
    figure.update_xaxes(title="chunk", row=1, col=2)
    if evaluated:
        figure.update_xaxes(title="timestep (sampling goes from left to right)", autorange="reversed", row=1, col=3)
    return figure.update_layout(height=420, template="simple_white", margin={"t": 40, "l": 50, "r": 20})


def calibration_figure(measured: Mapping[str, Mapping[str, Any]], colors: Mapping[str, str]) -> go.Figure | None:
    """Each sampler's chunk errors and the tolerance that was requested.

    Args:
        measured: sampler -> its record of ``latency.json``.
        colors: of the samplers.

    Returns:
        None if no errors were recorded.
    """
    kept = {name: row for name, row in measured.items() if any(row.get("chunk_error", {}).get("each", []))}
    if not kept:
        return None
    figure = go.Figure()
    for name, row in sorted(kept.items(), key=lambda item: item[1]["chunk_error"]["median"]):
        errors = row["chunk_error"]["each"]
        figure.add_box(
            y=[error for error in errors if error > 0],  # the axis is logarithmic
            name=name,
            marker={"color": colors.get(name), "size": 3},
            boxpoints="all",
            jitter=0.5,
            showlegend=False,
        )
    asked = {name: row["chunk_error"]["asked"] for name, row in kept.items() if "asked" in row["chunk_error"]}
    marker = {"symbol": "line-ew", "size": 60, "line": {"width": 3, "color": "#c22"}}
    figure.add_scatter(x=list(asked), y=list(asked.values()), mode="markers", marker=marker, name="asked for")
    figure.update_yaxes(type="log", title="largest error of a chunk (normalised)", exponentformat="power")
    title = "distance from the sequential chunk of the same noise and schedule: each point a chunk"
    return figure.update_layout(
        title={"text": title, "font": {"size": 15}}, height=400, template="simple_white", margin={"l": 50, "r": 20}
    )


def profiles_figure(episodes: pd.DataFrame) -> go.Figure:
    """Performance profiles: the share of episodes above each reward, over all tasks."""
    figure = go.Figure()
    thresholds = np.linspace(0, 1, 101)
    for sampler, group in episodes.groupby("sampler", sort=False):
        share = [(group["reward"] > threshold).mean() for threshold in thresholds]
        figure.add_scatter(x=thresholds, y=share, mode="lines", name=str(sampler))
    return figure.update_layout(
        height=380, template="simple_white", xaxis_title="reward τ", yaxis_title="episodes above τ"
    )


def embed(figure: go.Figure) -> str:
    """A figure as HTML, without plotly's script, which the page includes once."""
    text: str = figure.to_html(full_html=False, include_plotlyjs=False, config={"displayModeBar": False})
    return text
