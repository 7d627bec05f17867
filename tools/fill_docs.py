"""Fill the tables of a document from evaluation runs.

    python -m tools.fill_docs docs/samplers.md RUN_FOLDER…

The text between ``<!-- NAME -->`` and ``<!-- end -->`` is replaced, for NAME one of ``machine``, ``closed loop`` and
``errors``. All other text stays.
"""

import argparse
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

Results = Mapping[str, Any]


def fill_page(page: str, runs: Sequence[Results]) -> str:
    """The page with its blocks filled from the ``results.json`` of one or more runs.

    Raises:
        ValueError: the page has no block, or a block with an unknown name.
    """

    def fill(match: re.Match[str]) -> str:
        name = match[1]
        if name not in BLOCKS:
            raise ValueError(f"the page has a block {name!r}, expected one of {sorted(BLOCKS)}")
        return f"<!-- {name} -->\n{BLOCKS[name](runs)}\n<!-- end -->"

    filled, count = re.subn(r"<!-- ([\w ]+) -->\n.*?<!-- end -->", fill, page, flags=re.DOTALL)
    if count == 0:
        raise ValueError(f"the page has no block such as '<!-- closed loop -->' … '<!-- end -->', of {sorted(BLOCKS)}")
    return filled


def describe_runs(runs: Sequence[Results]) -> str:
    """Machine and versions of the runs, without repetitions."""
    lines = []
    for run in runs:
        machine, versions = run["machine"], run["versions"]
        lines.append(
            f"{machine['cpu']}, {machine['threads']} threads, device {machine['device']}; Python {versions['python']}, "
            f"torch {versions['torch']}, diffusers {versions['diffusers']}."
        )
    return "\n".join(dict.fromkeys(lines))


def closed_loop_table(runs: Sequence[Results]) -> str:
    """Reward, success, cost and fidelity of every sampler, from runs with at least 100 episodes."""
    rows = []
    for run in runs:
        if run["episodes"] < 100:
            continue
        for label, row in run["samplers"].items():
            paired, distance = row.get("paired_reward_difference"), row.get("energy_distance")
            error = row["chunk_error"]
            rows.append(
                [
                    label,
                    _interval("{:.3f}", row["mean_max_reward"], row["mean_max_reward_ci95"]),
                    _interval("{:.2f}", row["success_rate"], row["success_rate_ci95"]),
                    _interval("{:+.3f}", paired["mean"], paired["ci95"]) if paired and paired["to"] != label else "",
                    "{mean:.1f} ({p95:.0f})".format(**row["rounds"]),
                    f"{row['evaluations']['mean']:.0f}",
                    "{median:.0e} / {p95:.0e} / {max:.0e}".format(**error) if error["max"] else "",
                    "{p50:.0f} / {p99:.0f}".format(**row["chunk_ms"]),
                    f"{row['speedup_p50']:.1f}×" if "speedup_p50" in row else "",
                    f"{distance['mean']:.4f}" if distance else "",
                ]
            )
    headings = [
        "sampler",
        "mean max reward",
        "success",
        "paired reward difference",
        "rounds, mean (p95)",
        "evaluations",
        "chunk error, median / p95 / max",
        "chunk ms, p50 / p99",
        "speed-up",
        "energy distance",
    ]
    return _table(headings, rows)


def errors_table(runs: Sequence[Results]) -> str:
    """Error quantiles of every sampler, from runs that measured them."""
    rows = []
    for run in runs:
        for label, measured in run.get("errors", {}).items():
            error, action = measured["error"], measured["action_error"]
            exceeding = measured.get("exceeding_10_tolerances")
            rows.append(
                [
                    label,
                    str(measured["chunks"]),
                    "{mean:.1f} ({p95:.0f})".format(**measured["rounds"]),
                    f"{measured['evaluations']['mean']:.0f}",
                    *(f"{error[quantile]:.1e}" for quantile in ("median", "p95", "p99", "p99.9", "max")),
                    f"{action['median']:.2f} / {action['p95']:.2f}",
                    "" if exceeding is None else f"{exceeding} of {measured['chunks']}",
                ]
            )
    headings = [
        "sampler",
        "chunks",
        "rounds, mean (p95)",
        "evaluations",
        "error median",
        "p95",
        "p99",
        "p99.9",
        "max",
        "in action units, median / p95",
        "above 10 × tolerance",
    ]
    return _table(headings, rows)


BLOCKS: dict[str, Callable[[Sequence[Results]], str]] = {
    "machine": describe_runs,
    "closed loop": closed_loop_table,
    "errors": errors_table,
}


def _interval(form: str, mean: float, bounds: Sequence[float]) -> str:
    return f"{form} [{form}, {form}]".format(mean, *bounds)


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN_FOLDER")
    arguments = parser.parse_args()
    try:
        runs = [json.loads((folder / "results.json").read_text()) for folder in arguments.runs]
        arguments.page.write_text(fill_page(arguments.page.read_text(), runs))
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: {error}") from error
    print(f"wrote {arguments.page}")


if __name__ == "__main__":
    main()
