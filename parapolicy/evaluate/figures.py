"""The report's figures: for the page by plotly, and the Pareto picture as a PNG, too."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from parapolicy.evaluate.summary import pareto


def pareto_figure(task: pd.DataFrame, chosen: str | None) -> go.Figure:
    """Reward and success against chunk latency, with what nothing else beats."""
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


def cost_figure(chunks: pd.DataFrame) -> go.Figure:
    """Rounds per chunk, and along the episode."""
    figure = make_subplots(rows=1, cols=2, subplot_titles=("rounds per chunk", "mean rounds along the episode"))
    for sampler, group in chunks.groupby("sampler", sort=False):
        figure.add_box(y=group["rounds"], name=str(sampler), showlegend=False, boxpoints=False, row=1, col=1)
        phase = group.groupby("chunk")["rounds"].mean()
        figure.add_scatter(x=phase.index, y=phase, name=str(sampler), mode="lines", row=1, col=2)
    figure.update_yaxes(type="log")
    figure.update_xaxes(title="chunk", row=1, col=2)
    return figure.update_layout(height=420, template="simple_white", margin={"t": 40, "l": 50, "r": 20})


def profiles_figure(episodes: pd.DataFrame) -> go.Figure:
    """Share of episodes above each reward, over all tasks."""
    figure = go.Figure()
    thresholds = np.linspace(0, 1, 101)
    for sampler, group in episodes.groupby("sampler", sort=False):
        share = [(group["reward"] > threshold).mean() for threshold in thresholds]
        figure.add_scatter(x=thresholds, y=share, mode="lines", name=str(sampler))
    return figure.update_layout(
        height=380, template="simple_white", xaxis_title="reward τ", yaxis_title="episodes above τ"
    )


def embed(figure: go.Figure) -> str:
    """As HTML, without the library, which the page has once."""
    text: str = figure.to_html(full_html=False, include_plotlyjs=False)
    return text


def plot_pareto(task: pd.DataFrame, chosen: str | None, title: str, path: Path) -> None:
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
