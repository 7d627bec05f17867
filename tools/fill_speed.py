"""The tables of times, made from the files of the benchmarks; see :mod:`tools.fill_docs`."""

import json
from pathlib import Path
from typing import Any

from tools.fill_docs import TASKS, Folders, table

# Rows of the scaling tables.
SCALED = {"seconds": "`secant`", "rounds": "its rounds", "sequential": "`sequential`", "1 rows": "1 row"}


def chunks_table(folders: Folders) -> str:
    """A chunk by sampler and engine, and a network call by rows, from ``bench.json``."""
    return _chunks(_read(folders[0], "bench.json"))


def _chunks(results: Any) -> str:
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
                f"{last['floor']:.1f} ({last['p50'] / last['floor']:.1f}×)",
                f"{last['error_p95']:.0e}" if "error_p95" in last else "",
            ]
        )
    for label in upstream:
        cells = ["{p50:.1f} / {p99:.1f}".format(**rows[label]), *[""] * (len(engines) - 1)]
        lines.append([f"{label} (eager)", *cells, "", "", "", "", ""])
    headings = [
        "p50 / p99, ms",
        *engines,
        "against upstream",
        "rounds",
        "evaluations",
        "float32 floor (× floor)",
        "error p95",
    ]
    called = [engine for engine in engines if engine in results["network"][0]]
    calls = [
        [
            str(row["batch"]),
            f"{1e3 * row['floor']:.2f}",
            *(f"{1e3 * row[engine]:.2f} ({row[engine] / row['floor']:.1f}×)" for engine in called),
        ]
        for row in results["network"]
    ]
    machine, peak = results["machine"], results["peak_memory"]
    facts = (
        f"{results['parameters'] / 1e6:.1f} M parameters. Floor: {machine['flops_per_second'] / 1e9:.0f} GFLOP/s in "
        f"float32, {machine['bytes_per_second'] / 1e9:.0f} GB/s for the weights. "
        f"Peak memory: {peak['process']:.0f} MiB."
    )
    call_headings = ["rows of a call", "float32 floor, ms", *(f"{engine}, ms (× floor)" for engine in called)]
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
    """Times by robots, and of the last engine by window, steps, horizon and processes; from ``bench.json``."""
    return _scaling(_read(folders[0], "bench.json"))


def _scaling(results: Any) -> str:
    scaling, parts = results["scaling"], [_robots(results["robots"])]
    for rows in scaling.values():
        first, *others = rows[0]
        lines = [[first, *(str(row[first]) for row in rows)]]
        for key in others:
            form, unit, factor = ("{:.1f}", "", 1.0) if key == "rounds" else ("{:.3g}", ", ms", 1e3)
            name = SCALED.get(key, key)
            lines.append([f"{name}{unit}", *(form.format(factor * row[key]) for row in rows)])
        parts.append(table(lines[0], lines[1:]))
    return "\n\n".join(parts)


def robots_table(folders: Folders) -> str:
    """Times of one call for several robots, by sampler and engine."""
    return _robots(_read(folders[0], "bench.json")["robots"])


def _robots(rows: Any) -> str:
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
    """Percentiles and memory along many chunks or a controller's ticks."""
    found = _read(folders[0], "soak.json")
    percentiles = [f"p{p:g} ms" for p in found["percentiles"]]
    lines = [
        [
            row["chunks"],
            *(f"{value:.2f}" for value in row["ms"]),
            *(f"{row[key]:.4g}" for key in ("missed", "own", "waited_s") if key in row),
            f"{row['resident_mib']:.0f}",
        ]
        for row in found["rows"]
    ]
    chunk = found["rows"][-1].get("chunk_ms")
    if chunk is None:
        return table(["chunks", *percentiles, "resident MiB"], lines)
    made = f"{chunk['count']:,} chunks: p50 {chunk['p50']:.1f} ms, p99 {chunk['p99']:.1f}."
    return table(["ticks", *percentiles, "missed", "own", "waited, s", "resident MiB"], lines) + f"\n\n{made}"


def frames_table(folders: Folders) -> str:
    """Times of encoding two frames, without and with one of them cached."""
    lines = [
        [row["encoder"], f"{row['two']:.1f} ms", f"{row['one']:.1f} ms", f"{row['two'] / row['one']:.1f}×"]
        for row in _read(folders[0], "frames.json")
    ]
    return table(["encoder", "two frames", "one new frame", ""], lines)


def cameras_table(folders: Folders) -> str:
    """Clients with cameras at one server, by the form of their images."""
    keys = ("kB per message", "per second", "p50 ms", "p99 ms", "max ms")
    lines = [
        [
            form,
            "{answers} of {ticks}".format(**found),
            *(str(found[key]) for key in keys),
            "{} to {}".format(*found["memory, first quarter and end, MiB"]),
            str(len(found["errors"])),
        ]
        for form, found in _read(folders[0], "cameras.json").items()
    ]
    headings = ["images", "answered, of ticks", *keys[:1], "answers per second", *keys[2:], "server's MiB", "errors"]
    return table(headings, lines)


def rounding_table(folders: Folders) -> str:
    """The effect of rounding to bfloat16 on the chunks of the shipped policies."""
    lines = [
        [
            TASKS[row["env"]],
            *(f"{row[key]:.1e}" for key in ("median", "p95")),
            *("{:.0e} to {:.0e}".format(*row[key]) for key in ("equal", "own")),
        ]
        for row in _read(folders[0], "rounding.json")
    ]
    headings = "policy|error, median|error, 95th percentile|distance, equal noise|distance, noise of their own"
    return table(headings.split("|"), lines)


def gpu_tables(folders: Folders) -> str:
    """All of ``gpu.json``, including failed and skipped parts."""
    found = _read(folders[0], "gpu.json")
    parts, git = dict(found["parts"]), found["git"] or {"commit": "unknown", "changed": False}
    failed = [name for name, part in parts.items() if "error" in part]
    texts = [
        f"{' and '.join(found['devices']) or 'No GPU, a dry run'}, torch {found['versions']['torch']}, "
        f"{found['date']}, commit {git['commit'][:10]}{' with changes' if git['changed'] else ''}: "
        "`make results-gpu`. Times in ms."
    ]
    if failed or found["left_out"]:
        texts.append(f"Failed: {', '.join(failed) or 'none'}. Left out: {', '.join(found['left_out']) or 'none'}.")
    for name, part in parts.items():
        if name in failed:
            continue
        if "chunks" in part:
            texts.append(f"**{name}**\n\n{_chunks(part)}")
        elif name == "tests" and part["passed"] is not None:
            texts.append(f"The CUDA tests {'passed' if part['passed'] else 'failed'}.")
        elif name == "agreement":
            differences = (f"`{engine}` {value:.0e}" for engine, value in part.items() if engine != "seconds")
            texts.append(f"Largest difference from the CPU's sequential chunk, normalised: {', '.join(differences)}.")
        elif name == "scaling":
            texts.append(_scaling(part))
        elif name == "devices":
            rows = [[str(row["devices"]), f"{1e3 * row['seconds']:.1f}"] for row in part["devices"]]
            texts.append(table([f"devices ({part['backend']}, `{part['engine']}`)", "ms"], rows))
    return "\n\n".join(texts)


def lerobot_table(folders: Folders) -> str:
    """LeRobot's own sampling compared with ours."""
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


def history_table(folders: Folders) -> str:
    """A policy's scores with its last observations, and with the present observation alone."""
    found = _read(folders[0], "history.json")
    names = {"stacked": "the last steps, stacked", "single": "the present step"}
    rows = [[names[row["way"]], f"{row['reward']:.3f}", f"{row['success']:.2f}"] for row in found["rows"]]
    return table(["sent", "mean max reward", f"success, of {found['episodes']}"], rows)


def live_table(folders: Folders) -> str:
    """Largest differences of accelerated live policies from their own loops."""
    rows = []
    for folder in folders:
        found = _read(folder, "live.json")
        worst = (f"at most {max(found[sampler].values()):.1e}" for sampler in ("sequential", "secant"))
        name = folder.name.removeprefix("live_").replace("stanford", "real-stanford")
        rows.append([name, str(len(found["sequential"])), *worst])
    return table(["", "policies", "`sequential`, eager", "`secant`, tolerance 1e-4"], rows)


def check_table(folders: Folders) -> str:
    """What faster samplers do to several policies, from the lines of ``parapolicy check --json``."""
    rows = []
    for line in (folders[0] / "checks.jsonl").read_text().splitlines():
        check = json.loads(line)
        found = {row["sampler"]: row for row in check["samplers"]}
        parts = [part for part in Path(check["checkpoint"]).with_suffix("").parts if part != "pretrained_model"]
        row = ["/".join(parts[-2:]), f"{found['sequential']['evaluations']:.0f}"]
        for name in ("secant", "collocation"):
            one = found[name]
            row += [f"{one['error_median']:.0e} / {one['error_max']:.0e}", f"{one['rounds']:.1f}"]
            row.append(f"{one['evaluations']:.0f}")
        rows.append(row)
    return table(["policy", "steps", "secant", "rounds", "evaluations", "collocation", "rounds", "evaluations"], rows)


def printed(folders: Folders) -> str:
    """The output of a program."""
    return f"```\n{(folders[0] / 'printed.txt').read_text().strip()}\n```"


def _read(folder: Path, name: str) -> Any:
    return json.loads((folder / name).read_text())
