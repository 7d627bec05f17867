"""Tables of any number of result folders."""

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from parapolicy.evaluate.run.records import COMPARED, NAMED, TIMED, read_records
from parapolicy.evaluate.run.run_folder import read_about, read_episodes, read_results
from parapolicy.evaluate.run.variants import SCHEDULE_SETTINGS, entry_label
from parapolicy.samplers import SAMPLERS


@dataclass
class Run:
    """One finished run.

    Attributes:
        folder: of the run.
        about: its ``run.json``; None if the folder has only results.
        results: its ``results.json``.
    """

    folder: Path
    about: dict[str, Any] | None
    results: dict[str, Any]

    @property
    def settings(self) -> dict[str, Any]:
        """Its configuration; only of a run with ``run.json``."""
        assert self.about is not None
        config: dict[str, Any] = self.about["config"]
        return config


def gather_runs(folders: Sequence[Path]) -> list[Run]:
    """All finished runs in the folders and their subfolders, sorted by path.

    Raises:
        ValueError: there is none, or one is damaged.
    """
    runs = []
    for path in sorted({path.parent for folder in folders for path in folder.rglob("results.json")}):
        if (results := read_results(path)) is not None:
            runs.append(Run(path, read_about(path), results))
    if not runs:
        raise ValueError(f"no results.json in {', '.join(map(str, folders))} or below")
    return runs


def gather_failures(folders: Sequence[Path]) -> dict[str, str]:
    """Folder of a failed job -> last line of its error."""
    notes = sorted({path for folder in folders for path in folder.rglob("error.txt")})
    return {str(note.parent): note.read_text().strip().splitlines()[-1] for note in notes}


def episode_table(runs: Sequence[Run]) -> pd.DataFrame:
    """One record per episode: env, checkpoint, sampler, seed, reward, success, steps, rounds and evaluations per chunk,
    and, if the run recorded them, the mean jump between chunks and the mean motion inside chunks.

    A sampler is named by its label and its simulated latency, if any. Of an episode in several runs, the first counts.
    """
    rows = []
    for run in runs:
        references, others = find_references(run), find_others(run)
        for label, result in run.results["samplers"].items():
            control = result.get("control")
            name = label if not control or control["latency"] == "none" else f"{label} ({control['latency']})"
            for episode in result["per_episode"]:
                rows.append(
                    {
                        "env": run.results["env"],
                        "checkpoint": run.results["checkpoint"],
                        "sampler": name,
                        "is_reference": label in references,
                        "other": label in others,
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


def find_references(run: Run) -> set[str]:
    """Labels of the samplers that ran the trained schedule step by step."""
    return {label for label, sampler, own in _samplers(run) if own and sampler is not None and sampler.is_reference}


def find_others(run: Run) -> set[str]:
    """Labels of samplers of other distributions than the policy's: another schedule, or ``keeps_distribution`` off."""
    return {label for label, sampler, own in _samplers(run) if not own or (sampler and not sampler.keeps_distribution)}


def _samplers(run: Run) -> list[tuple[str, type[Any] | None, bool]]:
    """(label, sampler, whether on the trained schedule). A label without an entry is a sampler's name."""
    entries = run.settings["samplers"] if run.about else list(run.results["samplers"])
    found = []
    for entry in entries:
        settings = {"name": entry} if isinstance(entry, str) else entry
        found.append((entry_label(entry), SAMPLERS.get(settings["name"]), not settings.keys() & SCHEDULE_SETTINGS))
    return found


def chunk_table(runs: Sequence[Run]) -> pd.DataFrame:
    """One record per chunk of every episode: env, checkpoint, sampler, seed, chunk, rounds, evaluations."""
    rows = []
    for run in runs:
        task = {"env": run.results["env"], "checkpoint": run.results["checkpoint"]}
        episodes = read_episodes(run.folder)
        found = {(episode["sampler"], episode["seed"]) for episode in episodes}
        for label, result in run.results["samplers"].items() if run.about is not None else ():
            for episode in result["per_episode"]:
                if (label, episode["seed"]) not in found:
                    raise ValueError(
                        f"{run.folder / 'episodes.jsonl'} lacks seed {episode['seed']} of {label}, which results.json "
                        "has; delete results.json, and the same command runs that episode again"
                    )
        for episode in episodes:
            name = {"sampler": episode["sampler"], "seed": episode["seed"]}
            costs = zip(episode.get("rounds", []), episode.get("evaluations", []), strict=True)
            for chunk, (rounds, evaluations) in enumerate(costs):
                rows.append({**task, **name, "chunk": chunk, "rounds": rounds, "evaluations": evaluations})
    return pd.DataFrame(rows).drop_duplicates() if rows else pd.DataFrame()


def gather_latencies(runs: Sequence[Run], folders: Sequence[Path]) -> dict[tuple[str, str, str], dict[str, Any]]:
    """(env, checkpoint, sampler) -> measurements, such as chunk_ms; those of a sweep replace those of its runs."""
    return _gather_records(runs, folders, "latency.json", TIMED)


def gather_fidelities(runs: Sequence[Run], folders: Sequence[Path]) -> dict[tuple[str, str, str], dict[str, Any]]:
    """(env, checkpoint, sampler) -> distances from the policy's distribution, as :func:`gather_latencies`."""
    return _gather_records(runs, folders, "fidelity.json", COMPARED)


def _gather_records(
    runs: Sequence[Run], folders: Sequence[Path], name: str, keys: Set[str]
) -> dict[tuple[str, str, str], dict[str, Any]]:
    found: dict[tuple[str, str, str], dict[str, Any]] = {}
    for path in sorted({path for folder in folders for path in folder.rglob(name)}):
        for row in read_records(path, keys):
            found.setdefault((row["env"], row["checkpoint"], row["sampler"]), row)
    for run in runs:
        for label, row in run.results["samplers"].items():
            if row.keys() >= keys - NAMED:
                found.setdefault((run.results["env"], run.results["checkpoint"], label), row)
    return found


def select_latencies(
    latencies: Mapping[tuple[str, str, str], dict[str, Any]], env: str, checkpoint: str
) -> dict[str, dict[str, Any]]:
    """Sampler -> measurements from :func:`gather_latencies`, for one task."""
    return {sampler: row for (*task, sampler), row in latencies.items() if task == [env, checkpoint]}


def describe_machines(runs: Sequence[Run]) -> list[str]:
    """Machine and versions of the runs, without repetitions."""
    lines = []
    for run in runs:
        machine, versions = run.results["machine"], run.results["versions"]
        lines.append(
            f"{machine['cpu']}, {machine['threads']} threads, {machine['device']}; "
            + ", ".join(f"{name} {version}" for name, version in versions.items())
        )
    return list(dict.fromkeys(lines))
