"""The tables of README and docs, made from the folders of finished runs, and the blocks of the pages that hold them.

A block is the text between ``<!-- NAME -->`` and ``<!-- end -->``. Every table function gets the folders of its steps.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

from parapolicy.evaluate.measure.statistics import equivalence_p, mean_interval
from parapolicy.evaluate.report.gather import episode_table, gather_fidelities, gather_latencies, gather_runs
from parapolicy.evaluate.report.markdown import costs_table, equivalence_table
from parapolicy.evaluate.report.summary import Margins, recommend, summarize

BLOCK = re.compile(r"<!-- ([\w ]+) -->\n(.*?)<!-- end -->", re.DOTALL)
MARGINS = Margins(reward=0.02)  # of equivalence in the frontier; chosen before its episodes were run
TASKS = {
    "pusht": "Push-T",
    "pusht_image": "Push-T, images",
    "lift": "Lift",
    "can": "Can",
    "square": "Square",
    "metaworld_assembly": "Assembly",
    "metaworld_peg_insert_side": "Peg Insert Side",
    "metaworld_push_wall": "Push Wall",
    "kitchen": "Kitchen",
}
HEADLINE = {  # chunk of bench.json -> sampler of the runs
    "sequential": "sequential",
    "collocation (24 nodes)": "collocation-24",
    "DDIM-16": "ddim-16",
    "DDIM-10": "ddim-10",
}

Folders = Sequence[Path]


def block_names(page: str) -> list[str]:
    """Names of a page's blocks."""
    return [match[1] for match in BLOCK.finditer(page)]


def fill_page(page: str, texts: Mapping[str, str]) -> str:
    """The page with these texts, by name, in its blocks; everything else is unchanged."""

    def fill(match: re.Match[str]) -> str:
        return f"<!-- {match[1]} -->\n{texts[match[1]]}\n<!-- end -->" if match[1] in texts else match[0]

    return BLOCK.sub(fill, page)


def speedups(folders: Folders) -> str:
    """A sentence with the speed-ups over the published code."""
    chunks, engine = _bench_chunks(folders[0])
    upstream = chunks["upstream, DDPM-100"]["p50"]
    exact, draw = (upstream / chunks[f"{way}, {engine}"]["p50"] for way in ("sequential", "collocation (24 nodes)"))
    return (
        f"On a CPU it is {exact:.0f} times as fast as the published code to the same chunk, and {draw:.0f} times to a "
        "draw of the same distribution."
    )


def headline(folders: Folders) -> str:
    """README's results: times of the fastest engine, and scores of the same samplers."""
    chunks, engine = _bench_chunks(folders[0])
    scores = summary_of(folders[1:]).set_index("sampler")
    upstream = chunks["upstream, DDPM-100"]["p50"]
    rows = [["published code's way, 100 steps", f"{upstream:.0f}", "1×", "", "", "", ""]]
    for chunk, sampler in HEADLINE.items():
        p50, score = chunks[f"{chunk}, {engine}"]["p50"], scores.loc[sampler]
        compared = sampler != "sequential"
        rows.append(
            [
                chunk,
                f"{p50:.1f}",
                f"{upstream / p50:.0f}×",
                f"{score['reward']:.3f}",
                _bounds(score, "difference") if compared else "",
                f"{score['success']:.3f}",
                _bounds(score, "success_difference") if compared else "",
            ]
        )
    lines = table(["", "ms", "", "mean max reward", "difference", "success", "difference"], rows)
    counts = sorted(set(scores["episodes"]), reverse=True)
    return f"{lines}\n\nEngine `{engine}`; {' and '.join(map(str, counts))} episodes (DDIM: the fewer)."


def shipped_table(folders: Folders) -> str:
    """Scores, latency and chunk error of a run of ``eval.py``."""
    rows = []
    for label, row in _results(folders[0])["samplers"].items():
        error = row["chunk_error"]
        rows.append(
            [
                label,
                *_scores(row),
                _paired(label, row),
                "{p50:.1f} / {p95:.1f} / {p99:.1f}".format(**row["chunk_ms"]),
                f"{row['speedup_p50']:.2f}×" if "speedup_p50" in row else "",
                f"{row['rounds']['mean']:.1f}",
                f"{row['evaluations']['mean']:.0f}",
                f"{error['p95']:.0e}" if error["max"] else "0",
            ]
        )
    headings = "sampler|mean max reward|success|paired difference|chunk ms p50 / p95 / p99|speed-up|rounds|evaluations"
    return table([*headings.split("|"), "error p95"], rows)


def closed_loop_table(folders: Folders) -> str:
    """Reward, success, cost and fidelity of every sampler."""
    rows = []
    for label, row in (pair for folder in folders for pair in _results(folder)["samplers"].items()):
        distance, error = row.get("energy_distance"), row["chunk_error"]
        rows.append(
            [
                label,
                *_scores(row),
                _paired(label, row),
                "{mean:.1f} ({p95:.0f})".format(**row["rounds"]),
                f"{row['evaluations']['mean']:.0f}",
                "{median:.0e} / {p95:.0e} / {max:.0e}".format(**error) if error["max"] else "",
                "{p50:.1f} / {p99:.1f}".format(**row["chunk_ms"]),
                f"{row['speedup_p50']:.1f}×" if "speedup_p50" in row else "",
                f"{distance['mean']:.4f}" if distance else "",
            ]
        )
    headings = "sampler|mean max reward|success|paired reward difference|rounds, mean (p95)|evaluations"
    more = "chunk error, median / p95 / max|chunk ms, p50 / p99|speed-up|energy distance"
    return table([*headings.split("|"), *more.split("|")], rows)


def errors_table(folders: Folders) -> str:
    """Error quantiles of every sampler, from runs that measured them."""
    rows = []
    for label, measured in (pair for folder in folders for pair in _results(folder)["errors"].items()):
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
    headings = "sampler|chunks|rounds, mean (p95)|evaluations|error median|p95|p99|p99.9|max"
    return table([*headings.split("|"), "in action units, median / p95", "above 10 × tolerance"], rows)


def sweep_table(folders: Folders) -> str:
    """Costs and scores of runs and sweeps on one task, and which sampler the report recommends."""
    summary = summary_of(folders)
    return f"{costs_table(summary)}\n\n{recommend(summary.dropna(axis=1, how='all'), Margins())[1]}"


def equivalence_tables(folders: Folders) -> str:
    """Tests of equivalence of several tasks in one table."""
    lines: list[str] = []
    for env, task in summary_of(folders, tasks=None).groupby("env", sort=False):
        head, rule, *rows = equivalence_table(task).splitlines()
        lines = lines or [f"| task {head}", f"| --- {rule}"]
        lines += [f"| {TASKS.get(str(env), env)} {row}" for row in rows]
    return "\n".join(lines)


def rounding_scores_table(folders: Folders) -> str:
    """The sequential sampler's scores with one engine, paired by seed with those of another engine."""
    scores: list[dict[int, dict[str, float]]] = []
    for folder in folders:
        row = _results(folder)["samplers"]["sequential"]
        scores.append({episode["seed"]: episode for episode in row["per_episode"]})
    seeds = sorted(scores[0].keys() & scores[1].keys())
    numbers = []
    for name, margin in (("max_reward", 0.02), ("success", 0.07)):
        differences = [float(scores[1][seed][name]) - float(scores[0][seed][name]) for seed in seeds]
        mean = float(np.mean(differences))
        numbers.append(with_interval("{:+.3f}", mean, mean_interval(differences)))
        numbers.append(f"{equivalence_p(differences, margin):.1g}")
    return table(["pairs", "reward", "p", "success", "p"], [[str(len(seeds)), *numbers]])


def calibrations_table(folders: Folders) -> str:
    """The distance of collocation from several policies, from the records of ``parapolicy calibrate``."""
    rows = []
    for folder in folders:
        with safe_open(folder / "calibration.safetensors", "pt") as file:
            measured = json.loads(file.metadata()["measured"])["rows"]
        env = folder.name.removeprefix("calibration_")
        for row in measured:
            rows.append(
                [
                    TASKS.get(env, env),
                    row["sampler"],
                    f"{row['rounds']:.1f}",
                    f"{row['evaluations']:.1f}",
                    "{median:.1e} / {p95:.1e} / {p99:.1e}".format(**row["error"]),
                    with_interval("{:.1e}", row["energy"], row["energy_ci95"]),
                    f"{row['energy_ci95'][1] / row['spread']:.2%}",
                ]
            )
    headings = "policy|sampler|rounds|evaluations|error median / p95 / p99|energy distance|at most, of the spread"
    return table(headings.split("|"), rows)


def simulated_latency_table(folders: Folders) -> str:
    """Scores under the measured latency of each chunk."""
    samplers = _results(folders[0])["samplers"]
    rows = []
    for label, row in samplers.items():
        control = row.get("control")
        timed = control is not None and control["latency"] != "none"
        rows.append(
            [
                label,
                "{p50:.1f} / {p99:.1f}".format(**control["chunk_ms"]) if timed else "",
                *_scores(row),
                _paired(label, row),
            ]
        )
    headings = ["", "chunk ms p50 / p99", "mean max reward", "success", "difference to the first row, by seed"]
    return table(headings, rows)


def seams_table(folders: Folders) -> str:
    """Scores and motion of every way to join chunks."""
    rows = []
    for label, row in _results(folders[0])["samplers"].items():
        motion = row.get("motion", {})
        rows.append(
            [
                label,
                *_scores(row),
                *(
                    with_interval(form, motion[name]["mean"], motion[name]["ci95"]) if name in motion else ""
                    for name, form in (("relative_jump", "{:.2f}"), ("jerk", "{:.3g}"))
                ),
            ]
        )
    return table(["seam and latency", "mean max reward", "success", "jump at seams / step", "jerk"], rows)


def _scores(row: Mapping[str, Any]) -> list[str]:
    """Reward and success of a sampler, with intervals."""
    reward = with_interval("{:.3f}", row["mean_max_reward"], row["mean_max_reward_ci95"])
    return [reward, with_interval("{:.2f}", row["success_rate"], row["success_rate_ci95"])]


def _paired(label: str, row: Mapping[str, Any]) -> str:
    """The difference of reward by seed; empty for the sampler that the others are compared with."""
    paired = row.get("paired_reward_difference")
    return with_interval("{:+.3f}", paired["mean"], paired["ci95"]) if paired and paired["to"] != label else ""


def _results(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return found


def summary_of(folders: Folders, tasks: int | None = 1) -> Any:
    """The report's summary of runs and sweeps.

    Raises:
        ValueError: the number of tasks differs from ``tasks``.
    """
    runs = gather_runs(folders)
    latencies, fidelities = gather_latencies(runs, folders), gather_fidelities(runs, folders)
    summary = summarize(episode_table(runs), latencies, MARGINS, fidelities)
    found = summary[["env", "checkpoint"]].drop_duplicates()
    if tasks is not None and len(found) != tasks:
        raise ValueError(f"{', '.join(map(str, folders))} have runs of {len(found)} tasks, expected {tasks}")
    return summary.sort_values("p50_ms", kind="stable") if tasks == 1 and "p50_ms" in summary else summary


def _bench_chunks(folder: Path) -> tuple[dict[str, dict[str, Any]], str]:
    """Label -> chunk of ``bench.json``, and its last engine."""
    rows = json.loads((folder / "bench.json").read_text())["chunks"]
    return {row["chunk"]: row for row in rows}, rows[-1]["chunk"].rpartition(", ")[2]


def _bounds(row: Any, name: str) -> str:
    return f"{row[name]:+.3f} [{row[f'{name}_low']:+.3f}, {row[f'{name}_high']:+.3f}]"


def with_interval(form: str, mean: float, bounds: Sequence[float]) -> str:
    """``mean [low, high]``."""
    return f"{form} [{form}, {form}]".format(mean, *bounds)


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
