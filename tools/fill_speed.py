"""The tables of times, made from the files of the benchmarks; see :mod:`tools.fill_docs`."""

import json
from pathlib import Path
from typing import Any

from tools.fill_docs import Folders, table


def chunks_table(folders: Folders) -> str:
    """A chunk by sampler and engine, and a network call by rows, from ``bench.json``."""
    results = _read(folders[0], "bench.json")
    rows = {row["chunk"]: row for row in results["chunks"]}
    upstream = [label for label in rows if label.startswith("upstream, ")]
    ways: dict[str, dict[str, Any]] = {}  # sampler -> engine -> record
    for label, row in rows.items():
        way, _, engine = label.rpartition(", ")
        if label not in upstream:
            ways.setdefault(way, {})[engine] = row
    engines = list(next(iter(ways.values())))
    lines = []
    for way, found in ways.items():
        last = found[engines[-1]]
        lines.append(
            [
                way,
                *("{p50:.1f} / {p99:.1f}".format(**found[engine]) for engine in engines),
                f"{rows[upstream[0]]['p50'] / last['p50']:.1f}×",
                f"{last['rounds']:.1f}",
                f"{last['evaluations']:.0f}",
                f"{last['floor']:.1f}",
                f"{last['error_p95']:.0e}" if "error_p95" in last else "",
            ]
        )
    for label in upstream:
        cells = ["{p50:.1f} / {p99:.1f}".format(**rows[label]), *[""] * (len(engines) - 1)]
        lines.append([f"{label} (eager)", *cells, "", "", "", "", ""])
    headings = ["p50 / p99, ms", *engines, "against upstream", "rounds", "evaluations", "float32 floor", "error p95"]
    calls = [
        [
            str(row["batch"]),
            f"{1e3 * row['floor']:.2f}",
            *(f"{1e3 * row[engine]:.2f} ({row[engine] / row['floor']:.1f}×)" for engine in engines),
        ]
        for row in results["network"]
    ]
    machine, peak = results["machine"], results["peak_memory"]
    facts = (
        f"{results['parameters'] / 1e6:.1f} M parameters. Floor: {machine['flops_per_second'] / 1e9:.0f} GFLOP/s in "
        f"float32, {machine['bytes_per_second'] / 1e9:.0f} GB/s for the weights. "
        f"Peak memory: {peak['process']:.0f} MiB."
    )
    call_headings = ["rows of a call", "float32 floor, ms", *(f"{engine}, ms (× floor)" for engine in engines)]
    return f"{table(headings, lines)}\n\n{table(call_headings, calls)}\n\n{facts}"


def calls_table(folders: Folders) -> str:
    """A network call by rows and engine, from one or more files of ``tools.time_calls``."""
    runs = [_read(folder, "calls.json") for folder in folders]
    headings = ["rows", *(f"{engine}, {_threads(run)}" for run in runs for engine in run["ms"])]
    rows = [
        [str(count), *(f"{values[i]:.3g}" for run in runs for values in run["ms"].values())]
        for i, count in enumerate(runs[0]["rows"])
    ]
    return f"{table(headings, rows)}\n\nMedians, ms."


def _threads(run: Any) -> str:
    return "1 thread" if run["threads"] == 1 else f"{run['threads']} threads"


def scaling_tables(folders: Folders) -> str:
    """By steps, window, horizon and processes, from ``bench.json``; the last engine's."""
    scaling = _read(folders[0], "bench.json")["scaling"]
    parts = []
    for rows in scaling.values():
        first, *others = rows[0]
        lines = [[first, *(str(row[first]) for row in rows)]]
        for key in others:
            form, unit, factor = ("{:.1f}", "", 1.0) if key == "rounds" else ("{:.3g}", ", ms", 1e3)
            lines.append([f"{key}{unit}", *(form.format(factor * row[key]) for row in rows)])
        parts.append(table(lines[0], lines[1:]))
    return "\n\n".join(parts)


def robots_table(folders: Folders) -> str:
    """Several robots in one call, by sampler and engine."""
    rows = _read(folders[0], "bench.json")["robots"]
    engines = [key for key in rows[0] if key not in ("robots", "sampler", "rounds", "evaluations")]
    lines = [
        [
            str(row["robots"]),
            f"`{row['sampler']}`",
            f"{row['evaluations']:.0f}",
            f"{row['rounds']:.1f}",
            *(f"{1e3 * row[engine]:.1f}" for engine in engines),
        ]
        for row in rows
    ]
    return table(["robots", "sampler", "evaluations", "rounds", *(f"ms, `{engine}`" for engine in engines)], lines)


def soak_table(folders: Folders) -> str:
    """Percentiles and memory along many chunks."""
    found = _read(folders[0], "soak.json")
    percentiles = found["percentiles"]
    lines = [
        [row["chunks"], *(f"{value:.2f}" for value in row["ms"]), f"{row['resident_mib']:.0f}"] for row in found["rows"]
    ]
    return table(["chunks", *(f"p{p:g} ms" for p in percentiles), "resident MiB"], lines)


def frames_table(folders: Folders) -> str:
    """Encoding of two frames, without and with one kept."""
    lines = [
        [row["encoder"], f"{row['two']:.1f} ms", f"{row['one']:.1f} ms", f"{row['two'] / row['one']:.1f}×"]
        for row in _read(folders[0], "frames.json")
    ]
    return table(["encoder", "two frames", "one new frame", ""], lines)


def lerobot_table(folders: Folders) -> str:
    """LeRobot's own sampling against ours."""
    rows = _read(folders[0], "lerobot.json")
    lines = [
        [
            row["way"],
            f"{row['ms']:.1f}",
            f"{rows[0]['ms'] / row['ms']:.1f}",
            f"{row['evaluations']:.0f}",
            *(f"{row[key]:.1e}" for key in ("median", "p95")),
        ]
        for row in rows
    ]
    return table(["", "ms", "ratio", "evaluations", "difference, median", "p95"], lines)


def _read(folder: Path, name: str) -> Any:
    return json.loads((folder / name).read_text())
