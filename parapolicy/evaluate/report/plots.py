"""Plots as PNG files: of one run, and the Pareto plot of the report."""

import textwrap
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

from parapolicy.evaluate.report.figures import CHOSEN, interval, legend_entries, panels


def plot_latency_reward(results: Mapping[str, Any], path: Path) -> None:
    """Mean maximum reward with its interval against chunk latency, p50 to p95; from one ``results.json``."""
    figure, axes = plt.subplots(figsize=(8.4, 4.0), layout="constrained")
    timed = {name: row for name, row in results["samplers"].items() if "chunk_ms" in row}
    fastest_first = sorted(timed.items(), key=lambda entry: entry[1]["chunk_ms"]["p50"])
    for (name, row), marker in zip(fastest_first, cycle("osD^vPX*<>p"), strict=False):
        latency, reward = row["chunk_ms"], row["mean_max_reward"]
        low, high = row["mean_max_reward_ci95"]
        axes.errorbar(
            latency["p50"],
            reward,
            xerr=[[0.0], [latency["p95"] - latency["p50"]]],
            yerr=[[max(0.0, reward - low)], [max(0.0, high - reward)]],
            fmt=marker,
            capsize=3,
            label=textwrap.fill(f"{name}: {latency['p50']:.3g} ms", 30),
        )
    axes.set(
        xlabel="chunk latency, ms (p50, whisker to p95; batch 1)",
        ylabel="mean maximum reward (95 % interval)",
        title=f"{results['env']}: {results['episodes']} episodes",
    )
    _log_axis(axes)
    axes.margins(x=0.1)
    if timed:  # names beside the points would overlap
        figure.legend(loc="outside right center", frameon=False)
    _save(figure, path)


def plot_simulated_latency(results: Mapping[str, Any], path: Path) -> None:
    """Reward and success with intervals against simulated latency (p50), blocking and asynchronous."""
    figure, panels = plt.subplots(1, 2, figsize=(9.6, 3.8), layout="constrained")
    rows = results["samplers"].values()
    for asynchronous, marker in ((False, "o"), (True, "s")):
        loops = [row.get("control") for row in rows]
        # Without latency, blocking and asynchronous control are the same.
        points = [
            (loop["chunk_ms"]["p50"] if loop else 0.0, row)
            for loop, row in zip(loops, rows, strict=True)
            if loop is None or loop["asynchronous"] == asynchronous
        ]
        points.sort(key=lambda point: point[0])
        for axes, key in zip(panels, ("mean_max_reward", "success_rate"), strict=True):
            latencies = [latency for latency, _ in points]
            values = np.array([row[key] for _, row in points])
            bounds = np.array([row[f"{key}_ci95"] for _, row in points]).T
            errors = np.abs(bounds - values).clip(0)
            label = "asynchronous" if asynchronous else "blocking"
            axes.errorbar(latencies, values, yerr=errors, fmt=f"{marker}-", capsize=3, label=label)
            axes.set(xlabel="simulated chunk latency, ms (p50)", ylabel=f"{key.replace('_', ' ')} (95 % interval)")
            axes.grid(alpha=0.3)
    panels[0].legend()
    figure.suptitle(f"{results['env']}: {results['episodes']} episodes per point")
    _save(figure, path)


def plot_pareto(
    task: pd.DataFrame, chosen: str | None, title: str, path: Path, scores: Sequence[str] | None = None
) -> None:
    """Scores and fidelity against chunk latency, as in the report's page; a task's rows of ``samplers.csv``.

    ``scores`` are the columns to show; None: all.
    """
    shown = [(heading, score) for heading, score in panels(task) if scores is None or score in scores]
    entries = legend_entries(task, chosen)
    size = 2 + 4.2 * len(shown), max(4.4, 0.19 * len(entries))
    figure, axes = plt.subplots(1, len(shown), figsize=size, layout="constrained")
    for axis, (heading, score) in zip(axes, shown, strict=True):
        for row, color, text in entries:
            if score == "energy" and row["baseline"]:  # its distance from itself is a rounding error
                continue
            best = row["sampler"] == chosen
            value, low, high = interval(row, score)
            axis.errorbar(
                row["p50_ms"],
                value,
                xerr=[[0.0], [max(0.0, row["p99_ms"] - row["p50_ms"])]],
                yerr=[[max(0.0, value - low)], [max(0.0, high - value)]],
                fmt="*" if best else "X" if row["upstream"] else "o",
                markersize=15 if best else 7,
                zorder=3 if best else 2,
                color=color,
                capsize=2,
                linewidth=1,
                label=text,
            )
        axis.set(title=heading, xlabel="chunk latency, ms (p50, whisker to p99)")
        _log_axis(axis)
        if score.endswith("difference"):
            axis.axhline(0, color="#bbb", linestyle=":")
        if score == "energy":
            axis.set_yscale("log")
    handles, labels = axes[0].get_legend_handles_labels()
    legend = figure.legend(handles, labels, loc="outside right center", frameon=False)
    for line in legend.get_texts():
        if line.get_text().startswith(f"{chosen}: "):
            line.set(fontweight="bold", color=CHOSEN)
    figure.suptitle(title)
    _save(figure, path)


def _log_axis(axes: Axes) -> None:
    """Logarithmic x axis with plain numbers."""
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.3)


def _save(figure: Figure, path: Path) -> None:
    figure.savefig(path, dpi=150)
    plt.close(figure)
