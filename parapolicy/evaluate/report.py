"""What a person sees of an evaluation: the table, the picture, the videos; and what machine it was."""

import importlib.metadata
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import imageio.v2 as imageio
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter
from rich.console import Console
from rich.table import Table


def print_table(results: Mapping[str, Any], console: Console | None = None) -> None:
    """The per-sampler table of one ``results.json``."""
    title = f"{results['env']}, {results['checkpoint']}: {results['episodes']} episodes from seed {results['seeds'][0]}"
    table = Table(title=title, caption="[ ]: 95 % intervals; chunk latency in ms at batch 1")
    headings = "sampler|mean max reward|success|paired diff|ms p50|p95|p99|speed-up|rounds (p95)|evals (p95)|error p95"
    measured = next(iter(results["samplers"].values())).get("energy_distance")
    if measured:
        headings += f"|energy distance (resampling {measured['resampling_mean']:.4f})"
    for i, heading in enumerate(headings.split("|")):
        table.add_column(heading, justify="right" if i else "left")
    for name, row in results["samplers"].items():
        low, high = row["mean_max_reward_ci95"]
        latency, error = row.get("chunk_ms"), row.get("chunk_error")
        difference = row.get("paired_reward_difference")
        paired = "—"
        if difference and difference["to"] != name:
            paired = "{:+.3f} [{:+.3f}, {:+.3f}]".format(difference["mean"], *difference["ci95"])
        table.add_row(
            name,
            f"{row['mean_max_reward']:.3f} [{low:.3f}, {high:.3f}]",
            f"{row['success_rate']:.2f}",
            paired,
            *(f"{latency[percentile]:.1f}" if latency else "—" for percentile in ("p50", "p95", "p99")),
            f"{row['speedup_p50']:.2f}×" if "speedup_p50" in row else "—",
            *("{mean:.1f} ({p95:.0f})".format(**row[cost]) for cost in ("rounds", "evaluations")),
            f"{error['p95']:.1e}" if error else "—",
            *([f"{row['energy_distance']['mean']:.4f}"] if measured else []),
        )
    # Piped into a file the table would be folded at 80 columns.
    (console or Console(width=None if os.isatty(1) else 160)).print(table)


def plot_latency_reward(results: Mapping[str, Any], path: Path) -> None:
    """Mean maximum reward against p50 chunk latency, with the rewards' intervals and the latencies' p50 to p95."""
    figure, axes = plt.subplots(figsize=(6.4, 4.0), layout="constrained")
    for name, row in results["samplers"].items():
        if "chunk_ms" not in row:  # latency was not measured
            continue
        latency, reward = row["chunk_ms"], row["mean_max_reward"]
        low, high = row["mean_max_reward_ci95"]
        axes.errorbar(
            latency["p50"],
            reward,
            xerr=[[0.0], [latency["p95"] - latency["p50"]]],
            yerr=[[max(0.0, reward - low)], [max(0.0, high - reward)]],
            fmt="o",
            capsize=3,
        )
        axes.annotate(name, (latency["p50"], reward), xytext=(6, 6), textcoords="offset points")
    axes.set(
        xscale="log",
        xlabel="chunk latency, ms (p50, whisker to p95; batch 1)",
        ylabel="mean maximum reward (95 % interval)",
        title=f"{results['env']}: {results['episodes']} episodes",
    )
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.margins(x=0.2)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def plot_charged_latency(results: Mapping[str, Any], path: Path) -> None:
    """Reward and success against the latency that was charged (p50), blocking and asynchronous, with intervals."""
    figure, panels = plt.subplots(1, 2, figsize=(9.6, 3.8), layout="constrained")
    rows = results["samplers"].values()
    for asynchronous, marker in ((False, "o"), (True, "s")):
        loops = [row.get("control") for row in rows]
        # Where thinking takes no time, both are the same.
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
            axes.set(xlabel="chunk latency, ms (charged, p50)", ylabel=f"{key.replace('_', ' ')} (95 % interval)")
            axes.grid(alpha=0.3)
    panels[0].legend()
    figure.suptitle(f"{results['env']}: {results['episodes']} episodes per point")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def write_video(frames: Sequence[np.ndarray], path: Path, fps: int) -> None:
    """Frames (H, W, 3) uint8 as an mp4 at the environment's own pace."""
    path.parent.mkdir(parents=True, exist_ok=True)
    imageio.mimwrite(path, list(frames), fps=fps)


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Enough of the machine to judge a latency by."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        names = [line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
    }


def describe_versions() -> dict[str, str]:
    """Versions of Python and of the packages that a result depends on."""
    packages = ("parapolicy", "torch", "diffusers", "numpy", "gymnasium", "gym-pusht", "pymunk")
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
