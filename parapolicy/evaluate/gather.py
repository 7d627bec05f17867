"""Result folders, any number of them, as one tidy table."""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from tqdm import tqdm

from parapolicy.evaluate import report
from parapolicy.evaluate.latency import count_evaluations, measure_chunks
from parapolicy.evaluate.metrics import summarize_chunks
from parapolicy.evaluate.variants import build_variants
from parapolicy.policy import load_policy

COUNTED = 20  # chunks of each sampler whose evaluations are counted by diffusion time


@dataclass
class Run:
    """One finished run.

    Attributes:
        folder: where it stands.
        about: its ``run.json``; None for a folder that has only results.
        results: its ``results.json``.
    """

    folder: Path
    about: dict[str, Any] | None
    results: dict[str, Any]


def gather_runs(folders: Sequence[Path]) -> list[Run]:
    """Every finished run in the folders and below, by path.

    Raises:
        ValueError: there is none.
    """
    runs = []
    for path in sorted({path for folder in folders for path in folder.rglob("results.json")}):
        about = path.with_name("run.json")
        runs.append(
            Run(path.parent, json.loads(about.read_text()) if about.is_file() else None, json.loads(path.read_text()))
        )
    if not runs:
        raise ValueError(f"no results.json in {', '.join(map(str, folders))} or below")
    return runs


def gather_failures(folders: Sequence[Path]) -> dict[str, str]:
    """Folder -> last line of what ended its job."""
    notes = sorted({path for folder in folders for path in folder.rglob("error.txt")})
    return {str(note.parent): note.read_text().strip().splitlines()[-1] for note in notes}


def episode_table(runs: Sequence[Run]) -> pd.DataFrame:
    """One row per episode: env, checkpoint, sampler, seed, reward, success, steps, rounds and evaluations per chunk,
    and, where the run recorded them, the mean jump at the seams of chunks and the mean motion inside them.

    A sampler is named by its label, and where the runs charge latency, by that too. An episode that several runs hold
    is taken from the first.
    """
    rows = []
    for run in runs:
        for label, result in run.results["samplers"].items():
            control = result.get("control")
            name = label if not control or control["latency"] == "none" else f"{label} ({control['latency']})"
            for episode in result["per_episode"]:
                rows.append(
                    {
                        "env": run.results["env"],
                        "checkpoint": run.results["checkpoint"],
                        "sampler": name,
                        "seed": episode["seed"],
                        "reward": episode["max_reward"],
                        "success": bool(episode["success"]),
                        "steps": episode["steps"],
                        "rounds": episode["rounds_mean"],
                        "evaluations": episode["evaluations_mean"],
                        "seam": episode.get("seam_mean", float("nan")),
                        "motion": episode.get("motion_mean", float("nan")),
                        "folder": str(run.folder),
                    }
                )
    keys = ["env", "checkpoint", "sampler", "seed"]
    return pd.DataFrame(rows).drop_duplicates(keys).reset_index(drop=True)


def chunk_table(runs: Sequence[Run]) -> pd.DataFrame:
    """One row per chunk of every episode: env, checkpoint, sampler, seed, chunk, rounds, evaluations."""
    rows = []
    for run in runs:
        lines = run.folder / "episodes.jsonl"
        if not lines.is_file():
            continue
        for line in lines.read_text().splitlines():
            try:
                episode = json.loads(line)
            except ValueError:  # cut off when the run was interrupted; it was run again
                continue
            if "rounds" not in episode:
                continue
            place = {"env": run.results["env"], "checkpoint": run.results["checkpoint"], "sampler": episode["sampler"]}
            for chunk, costs in enumerate(zip(episode["rounds"], episode["evaluations"], strict=True)):
                rows.append(
                    {**place, "seed": episode["seed"], "chunk": chunk, "rounds": costs[0], "evaluations": costs[1]}
                )
    return pd.DataFrame(rows).drop_duplicates() if rows else pd.DataFrame()


def gather_latencies(runs: Sequence[Run], folders: Sequence[Path]) -> dict[tuple[str, str, str], dict[str, Any]]:
    """(env, checkpoint, sampler) -> its measurements, such as chunk_ms; a sweep's own come before its runs'."""
    found: dict[tuple[str, str, str], dict[str, Any]] = {}
    for path in sorted({path for folder in folders for path in folder.rglob("latency.json")}):
        for row in json.loads(path.read_text()):
            found.setdefault((row["env"], row["checkpoint"], row["sampler"]), row)
    for run in runs:
        for label, row in run.results["samplers"].items():
            if "chunk_ms" in row:
                found.setdefault((run.results["env"], run.results["checkpoint"], label), row)
    return found


def select_latencies(
    latencies: Mapping[tuple[str, str, str], dict[str, Any]], env: str, checkpoint: str
) -> dict[str, dict[str, Any]]:
    """Sampler -> what :func:`gather_latencies` found of it, for one task."""
    return {sampler: row for (*task, sampler), row in latencies.items() if task == [env, checkpoint]}


def measure_latencies(
    runs: Sequence[Run], path: Path, chunks: int, engine: str | None = None, upstream: Collection[str] = ()
) -> None:
    """Time every sampler of the runs side by side, per environment and checkpoint; what was timed is not timed again.


    Args:
        runs: with ``run.json`` and the observations of their episodes.
        path: of the result, a list of rows.
        chunks: per sampler.
        engine: that computes; None: the runs' own.
        upstream: sequential samplers, by label, beside which stands what the published code takes for the same steps;
            see :func:`parapolicy.evaluate.upstream.upstream_chunk`.
    """
    done = json.loads(path.read_text()) if path.is_file() else []
    groups: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        if run.about is not None:
            groups.setdefault((run.results["env"], run.results["checkpoint"]), []).append(run)
    for (env, checkpoint), members in groups.items():
        entries: dict[str, Any] = {}
        for run in members:
            assert run.about is not None
            for entry in run.about["config"]["samplers"]:
                entries.setdefault(entry_label(entry), entry)
        timed = {row["sampler"] for row in done if (row["env"], row["checkpoint"]) == (env, checkpoint)}
        if not entries.keys() - timed:
            continue
        config = members[0].about["config"] if members[0].about else {}
        name = engine or config["engine"]
        policy = load_policy(checkpoint, device=config["device"], engine=name)
        policies = {label: variant.policy for label, variant in build_variants(policy, list(entries.values())).items()}
        pairs = [pair for run in members for pair in _observed_pairs(run.folder)]
        if not pairs:
            continue
        chosen = pairs[:: max(1, len(pairs) // chunks)][:chunks]
        previous, current = zip(*chosen, strict=True)
        ways = {f"upstream {label}": policies[label] for label in upstream if label in policies}
        with tqdm(total=len(chosen) * len(policies | ways), desc=f"latency, {env}", unit="chunk") as bar:
            measured = measure_chunks(policies, current, 0, previous, bar.update, ways)
        machine = report.describe_machine(policy.device)
        done = [row for row in done if (row["env"], row["checkpoint"]) != (env, checkpoint)]
        for label, result in measured.items():
            row: dict[str, Any] = {"env": env, "checkpoint": checkpoint, "sampler": label, "machine": machine}
            if label in ways:
                row |= {"engine": "upstream", "same_as": label.removeprefix("upstream ")}
            else:
                row["engine"] = name
                row["evaluated"] = count_evaluations(policies[label], current[:COUNTED])
            done.append(row | summarize_chunks(result, policies.get(label)))
        path.write_text(json.dumps(done, indent=2) + "\n")


def entry_label(entry: str | Mapping[str, Any]) -> str:
    """The name of a sampler's row, from its entry in a configuration."""
    return entry if isinstance(entry, str) else str(entry.get("label", entry["name"]))


def _observed_pairs(folder: Path) -> list[tuple[dict[str, np.ndarray], dict[str, np.ndarray]]]:
    """(previous, current) observation of each chunk that a run kept, an episode's first one as its own predecessor."""
    pairs = []
    for path in sorted((folder / "observations").glob("*.npz")):
        with np.load(path, allow_pickle=False) as stacked:
            arrays = dict(stacked)
        steps = [{key: value[i] for key, value in arrays.items()} for i in range(len(next(iter(arrays.values()))))]
        pairs += list(zip(steps[:1] + steps, steps, strict=False))
    return pairs


def describe_machines(runs: Sequence[Run]) -> list[str]:
    """Machine and versions of the runs, each once."""
    lines = []
    for run in runs:
        machine, versions = run.results["machine"], run.results["versions"]
        lines.append(
            f"{machine['cpu']}, {machine['threads']} threads, {machine['device']}; "
            + ", ".join(f"{name} {version}" for name, version in versions.items())
        )
    return list(dict.fromkeys(lines))
