"""The tables of one run on the terminal."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from parapolicy.evaluate.report.gather import episode_table, gather_fidelities, gather_latencies, gather_runs
from parapolicy.evaluate.report.summary import MARGINS, recommend, summarize

WIDTH = 80  # columns; every table fits


def print_tables(results: Mapping[str, Any], console: Console | None = None) -> None:
    """Print the tables of one ``results.json``, with a line per sampler: its scores and its costs.

    Args:
        console: at least 80 columns wide; long names are wrapped, numbers are not.
    """
    console = console or Console()
    console = console if console.width >= WIDTH else Console(file=console.file, width=WIDTH)
    tables = [_score_table(results), _cost_table(results)]
    if moved := {name: row for name, row in results["samplers"].items() if {"motion", "control"} <= row.keys()}:
        tables.append(_motion_table(moved))
    if measured := next(iter(results["samplers"].values())).get("energy_distance"):
        tables.append(_fidelity_table(results, measured["resampling_mean"]))
    for table in tables:
        console.print(table, "")


def advise(folder: Path) -> str:
    """The recommendation of the report for a finished run, as a sentence."""
    runs = gather_runs([folder])
    measured = gather_latencies(runs, [folder]), MARGINS, gather_fidelities(runs, [folder])
    return recommend(summarize(episode_table(runs), *measured).dropna(axis=1, how="all"), MARGINS)[1]


def _table(headings: str, **settings: Any) -> Table:
    """A table that wraps the names in its first column, but no numbers."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0), **settings)
    for i, heading in enumerate(headings.split("|")):
        table.add_column(heading, justify="right" if i else "left", no_wrap=i > 0, overflow="fold", vertical="top")
    return table


def _short(value: float, digits: int = 1) -> str:
    """A number with ``digits`` decimals below 100, and none above."""
    return f"{value:.{digits}f}" if abs(value) < 100 else f"{value:.0f}"


def _score_table(results: Mapping[str, Any]) -> Table:
    title = f"{results['env']}, {results['checkpoint']}: {results['episodes']} episodes from seed {results['seeds'][0]}"
    caption = "[ ]: 95 % intervals; difference of reward, by seed"
    failed = sum("error" in episode for row in results["samplers"].values() for episode in row["per_episode"])
    if failed:
        caption += f"\n{failed} episodes ended with an error and count as failures; see episodes.jsonl"
    table = _table("sampler|mean max reward|success|difference", title=title, caption=caption)
    for name, row in results["samplers"].items():
        low, high = row["mean_max_reward_ci95"]
        difference = row.get("paired_reward_difference")
        paired = "—"
        if difference and difference["to"] != name:
            paired = "{:+.3f} [{:+.3f}, {:+.3f}]".format(difference["mean"], *difference["ci95"])
        table.add_row(
            name, f"{row['mean_max_reward']:.3f} [{low:.3f}, {high:.3f}]", f"{row['success_rate']:.2f}", paired
        )
    return table


def _cost_table(results: Mapping[str, Any]) -> Table:
    headings = "sampler|ms\np50|\np95|\np99|speed-\nup|rounds\n(p95)|evals\n(p95)|error\np95"
    caption = "chunk latency at batch 1"
    measured = [row.get("chunk_ms", {}) for row in results["samplers"].values()]
    encode = [chunk["encode_p50"] for chunk in measured if "encode_p50" in chunk]
    if encode:
        caption += f", of which {min(encode):.1f} to {max(encode):.1f} ms (p50) encode the observation"
    table = _table(headings, caption=caption)
    for name, row in results["samplers"].items():
        latency, error = row.get("chunk_ms"), row.get("chunk_error")
        table.add_row(
            name,
            *(_short(latency[percentile]) if latency else "—" for percentile in ("p50", "p95", "p99")),
            f"{_short(row['speedup_p50'], 2)}×" if "speedup_p50" in row else "—",
            *(f"{_short(row[cost]['mean'])} ({row[cost]['p95']:.0f})" for cost in ("rounds", "evaluations")),
            f"{error['p95']:.1e}" if error else "—",
        )
    return table


def _motion_table(rows: Mapping[str, Any]) -> Table:
    caption = "[ ]: 95 % intervals; in the actions' units, per control step; step: inside chunks"
    table = _table("sampler\nseam|jump\nat seams|step|jump /\nstep|jerk", caption=caption)
    for name, row in rows.items():
        values = (row["motion"].get(kind) for kind in ("jump", "step", "relative_jump", "jerk"))
        cells = ("{:.3g}\n[{:.3g}, {:.3g}]".format(v["mean"], *v["ci95"]) if v else "—" for v in values)
        table.add_row(f"{name}\n{row['control'].get('seam', 'none')}", *cells)
    return table


def _fidelity_table(results: Mapping[str, Any], resampling: float) -> Table:
    headings = f"sampler|energy distance\n(resampling {resampling:.4f})|same noise"
    table = _table(headings, caption="[ ]: 95 % intervals; of chunks, normalised, from the sequential sampler's")
    for name, row in results["samplers"].items():
        names = ("energy_distance", "paired_energy_distance")
        table.add_row(name, *(_distance(row[kind]) if kind in row else "—" for kind in names))
    return table


def _distance(measured: Mapping[str, Any]) -> str:
    low, high = measured.get("ci95", (None, None))  # older results have none
    return f"{measured['mean']:.4f}" + ("" if low is None else f" [{low:.4f}, {high:.4f}]")
