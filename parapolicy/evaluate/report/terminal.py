"""The table of one run on the terminal."""

import os
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table


def print_table(results: Mapping[str, Any], console: Console | None = None) -> None:
    """Print a table of one ``results.json``, with a line per sampler."""
    title = f"{results['env']}, {results['checkpoint']}: {results['episodes']} episodes from seed {results['seeds'][0]}"
    table = Table(title=title, caption="[ ]: 95 % intervals; chunk latency in ms at batch 1")
    headings = "sampler|mean max reward|success|paired diff|ms p50|p95|p99|speed-up|rounds (p95)|evals (p95)|error p95"
    _add_columns(table, headings)
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
        )
    failed = sum("error" in episode for row in results["samplers"].values() for episode in row["per_episode"])
    if failed:
        table.caption = (
            f"{table.caption}\n{failed} episodes ended with an error and count as failures; see episodes.jsonl"
        )
    # Into a pipe, rich would wrap the table at 80 columns.
    console = console or Console(width=None if os.isatty(1) else 160)
    console.print(table)
    if measured := next(iter(results["samplers"].values())).get("energy_distance"):
        console.print(_fidelity_table(results, measured["resampling_mean"]))


def _add_columns(table: Table, headings: str) -> None:
    for i, heading in enumerate(headings.split("|")):
        table.add_column(heading, justify="right" if i else "left")


def _fidelity_table(results: Mapping[str, Any], resampling: float) -> Table:
    table = Table(caption="[ ]: 95 % intervals; of chunks, normalised, from the sequential sampler's")
    _add_columns(table, f"sampler|energy distance (resampling {resampling:.4f})|same noise")
    for name, row in results["samplers"].items():
        names = ("energy_distance", "paired_energy_distance")
        table.add_row(name, *(_distance(row[kind]) if kind in row else "—" for kind in names))
    return table


def _distance(measured: Mapping[str, Any]) -> str:
    low, high = measured.get("ci95", (None, None))  # older results have none
    return f"{measured['mean']:.4f}" + ("" if low is None else f" [{low:.4f}, {high:.4f}]")
