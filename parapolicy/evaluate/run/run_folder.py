"""A run's folder: its results, and what is needed to continue after an interruption."""

import contextlib
import json
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import imageio.v2 as imageio
import numpy as np

from parapolicy.evaluate.run.rollout import EpisodeRecord

LISTS = ("rewards", "rounds", "evaluations", "seams", "motion")  # fields of an EpisodeRecord in episodes.jsonl


class RunFolder:
    """Results of one configuration; an episode is on disk as soon as it ends.

    ``run.json`` describes the run, ``episodes.jsonl`` has a line per sampler and episode, ``observations/`` has the
    observations of the first sampler's episodes, and ``results.json``, written last, has the summary.

    Args:
        path: created if missing.
        description: of the run, with its ``config``.

    Raises:
        ValueError: the folder holds a run of another configuration.
    """

    def __init__(self, path: Path, description: Mapping[str, Any]) -> None:
        self.path, self._progress = path, dict[str, float]()
        path.mkdir(parents=True, exist_ok=True)
        about = path / "run.json"
        if about.is_file():
            here = json.loads(about.read_text())["config"]
            new = json.loads(json.dumps(description["config"]))
            differing = sorted(key for key in here.keys() | new.keys() if here.get(key) != new.get(key))
            if differing:
                raise ValueError(
                    f"{path} holds a run with another {', '.join(differing)}; choose another folder (hydra.run.dir), "
                    "or delete this one"
                )
        else:
            _write_whole(about, json.dumps(description, indent=2) + "\n")

    def results(self) -> dict[str, Any] | None:
        """The summary of a finished run; None for an unfinished one."""
        path = self.path / "results.json"
        return json.loads(path.read_text()) if path.is_file() else None

    def finish(self, results: Mapping[str, Any]) -> None:
        """Write the summary."""
        _write_whole(self.path / "results.json", json.dumps(results, indent=2) + "\n")

    def note_progress(self, label: str, part: float) -> None:
        """Write which share of a sampler's episodes is done, 0 to 1; the bar of a sweep reads it."""
        self._progress[label] = part
        (self.path / "progress.json").write_text(json.dumps(self._progress))

    def append(self, name: str, row: Mapping[str, Any]) -> None:
        """Append a line of JSON to a file and flush it to disk."""
        with (self.path / name).open("a") as lines:
            print(json.dumps(row), file=lines)

    def save_episode(self, label: str, episode: EpisodeRecord, row: Mapping[str, Any], observations: bool) -> None:
        """Write an episode that has ended; its observations first, so that an episode on disk is complete."""
        if observations and episode.observations:
            place = self.path / "observations"
            place.mkdir(exist_ok=True)
            stacked = {key: np.stack([step[key] for step in episode.observations]) for key in episode.observations[0]}
            with (place / f"{episode.seed}.npz").open("wb") as file:
                np.savez_compressed(file, **stacked)  # type: ignore[arg-type]  # its own flag could be a key, not here
        lists = {name: getattr(episode, name) for name in LISTS}
        self.append("episodes.jsonl", {"sampler": label, **row, **lists})

    def save_video(self, label: str, seed: int, frames: Sequence[np.ndarray], fps: int) -> Path:
        """Write an episode's frames (H, W, 3), uint8, as an mp4 at the environment's own pace."""
        path = self.path / "videos" / f"{label}_{seed}.mp4"
        path.parent.mkdir(parents=True, exist_ok=True)
        imageio.mimwrite(path, list(frames), fps=fps)
        return path

    def load_episodes(self, label: str) -> list[tuple[EpisodeRecord, dict[str, Any]]]:
        """The finished episodes of a sampler and their records in ``episodes.jsonl``."""
        path = self.path / "episodes.jsonl"
        found: dict[int, tuple[EpisodeRecord, dict[str, Any]]] = {}
        for row in read_episodes(self.path):
            if row["sampler"] == label:
                lists = {name: row.pop(name, []) for name in LISTS}  # folders of older versions lack seams
                episode = EpisodeRecord(
                    row["seed"],
                    success=row["success"],
                    observations=read_observations(self.path / "observations" / f"{row['seed']}.npz"),
                    error=row.get("error"),
                    **lists,
                )
                found[episode.seed] = episode, row
        if path.is_file() and path.read_text()[-1:] not in ("", "\n"):  # separate a truncated line from the next one
            with path.open("a") as lines:
                lines.write("\n")
        return list(found.values())


def read_episodes(folder: Path) -> list[dict[str, Any]]:
    """The records of a run's ``episodes.jsonl``, all samplers. A line that an interruption truncated is skipped."""
    path = folder / "episodes.jsonl"
    records = []
    for line in path.read_text().splitlines() if path.is_file() else ():
        with contextlib.suppress(ValueError):
            records.append(json.loads(line))
    return records


def read_observations(path: Path) -> list[dict[str, np.ndarray]]:
    """The observations {key: (To, …)} of an episode's chunks; empty if the file does not exist."""
    if not path.is_file():
        return []
    with np.load(path, allow_pickle=False) as stacked:
        arrays = dict(stacked)
    return [{key: value[i] for key, value in arrays.items()} for i in range(len(next(iter(arrays.values()))))]


def note_failure(folder: Path, job: Callable[[], Any]) -> None:
    """Run one job of a sweep. An error is written to ``error.txt`` in its folder, and the sweep continues."""
    note = folder / "error.txt"
    try:
        job()
    except Exception:
        note.write_text(traceback.format_exc())
        print(f"this job failed; the others go on: {note}")
    else:
        note.unlink(missing_ok=True)


def _write_whole(path: Path, text: str) -> None:
    """Write a file atomically."""
    part = path.with_suffix(".part")
    part.write_text(text)
    part.replace(path)
