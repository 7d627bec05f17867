"""Terminal tables and a plot of benchmark results."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def print_tables(results: Mapping[str, Any], engines: Sequence[str]) -> None:
    from rich.console import Console
    from rich.table import Table

    machine = results["machine"]
    rate, bandwidth = machine["flops_per_second"] / 1e9, machine["bytes_per_second"] / 1e9
    network = Table(
        "rows",
        "floor",
        *(f"{name} (× floor)" for name in engines),
        title=f"{results['parameters'] / 1e6:.2f} M parameters, one network call, ms; floor: {rate:.0f} GFLOP/s, "
        f"{bandwidth:.1f} GB/s",
    )
    for row in results["network"]:
        cells = (f"{1e3 * row[name]:.2f} ({row[name] / row['floor']:.1f}×)" for name in engines)
        network.add_row(str(row["batch"]), f"{1e3 * row['floor']:.2f}", *cells)
    columns = ("p50", "p95", "p99", "max", "× up", "rounds", "floor (×)", "error p95")
    chunks = Table("chunk", *columns, title="one chunk, ms at batch 1; × up: upstream's DDPM-100 over p50")
    baseline = results["chunks"][0]["p50"]
    for row in results["chunks"]:
        floor = f"{row['floor']:.1f} ({row['p50'] / row['floor']:.1f}×)" if "floor" in row else ""
        error = f"{row['error_p95']:.0e}" if "error_p95" in row else ""
        times = (f"{row[key]:.1f}" for key in ("p50", "p95", "p99", "max"))
        rounds = f"{row['rounds']:.1f}" if "rounds" in row else ""
        chunks.add_row(row["chunk"], *times, f"{baseline / row['p50']:.1f}×", rounds, floor, error)
    tables = [network, chunks]
    if "robots" in results:
        robots = Table("robots", "sampler", *engines, title="one call for several robots, ms")
        for row in results["robots"]:
            robots.add_row(str(row["robots"]), row["sampler"], *(f"{1e3 * row[name]:.0f}" for name in engines))
        tables.append(robots)
    for name, rows in results.get("scaling", {}).items():
        table = Table(*rows[0], title=f"{name}, {engines[-1]}; times in ms")
        for row in rows:
            first, *others = row.items()
            cells = (f"{value:.1f}" if key == "rounds" else f"{1e3 * value:.1f}" for key, value in others)
            table.add_row(str(first[1]), *cells)
        tables.append(table)
    console = Console()
    for table in tables:
        console.print(table)
    console.print("peak memory, MiB: " + ", ".join(f"{k} {v:.0f}" for k, v in results["peak_memory"].items()))


def plot(results: Mapping[str, Any], engines: Sequence[str], path: Path) -> None:
    """Plot the time of a network call against its rows, with the floor."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 4.0), layout="constrained")
    batches = [row["batch"] for row in results["network"]]
    for name in (*engines, "floor"):
        style = "k--" if name == "floor" else "o-"
        axes.plot(batches, [1e3 * row[name] for row in results["network"]], style, label=name)
    axes.set(xscale="log", yscale="log", xlabel="rows per network call", ylabel="ms")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)
    plt.close(figure)
