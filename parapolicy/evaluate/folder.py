"""A run's folder: everything that is needed to read it, and to go on after an interruption."""

import json
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from parapolicy.evaluate.rollout import Episode

LISTS = ("rewards", "rounds", "evaluations", "seams", "motion")  # of an episode, in its line


class RunFolder:
    """Results of one configuration, each episode on disk as soon as it has ended.

    ``run.json`` describes the run, ``episodes.jsonl`` has a line per sampler and episode, ``observations/`` what the
    first sampler's episodes saw, and ``results.json``, written last, the summary.

    Args:
        path: made where it is not there.
        description: the run's, with its ``config``.

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
        """The summary of a run that is finished."""
        path = self.path / "results.json"
        return json.loads(path.read_text()) if path.is_file() else None

    def finish(self, results: Mapping[str, Any]) -> None:
        """Write the summary."""
        _write_whole(self.path / "results.json", json.dumps(results, indent=2) + "\n")

    def note_progress(self, label: str, part: float) -> None:
        """How much of a sampler's episodes is done, for whoever watches the folder."""
        self._progress[label] = part
        (self.path / "progress.json").write_text(json.dumps(self._progress))

    def append(self, name: str, row: Mapping[str, Any]) -> None:
        """Add a line of JSON to a file, at once on disk."""
        with (self.path / name).open("a") as lines:
            print(json.dumps(row), file=lines)

    def save_episode(self, label: str, episode: Episode, row: Mapping[str, Any], observations: bool) -> None:
        """Keep an episode that has ended; its observations first, so that an episode on disk is whole."""
        if observations and episode.observations:
            place = self.path / "observations"
            place.mkdir(exist_ok=True)
            stacked = {key: np.stack([step[key] for step in episode.observations]) for key in episode.observations[0]}
            with (place / f"{episode.seed}.npz").open("wb") as file:
                np.savez_compressed(file, **stacked)  # type: ignore[arg-type]  # its own flag could be a key, not here
        lists = {name: getattr(episode, name) for name in LISTS}
        self.append("episodes.jsonl", {"sampler": label, **row, **lists})

    def load_episodes(self, label: str) -> list[tuple[Episode, dict[str, Any]]]:
        """The episodes of a sampler that had ended, with their rows. A line that was cut off is left out."""
        path = self.path / "episodes.jsonl"
        if not path.is_file():
            return []
        found: dict[int, tuple[Episode, dict[str, Any]]] = {}
        text = path.read_text()
        for line in text.splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if row["sampler"] == label:
                lists = {name: row.pop(name, []) for name in LISTS}  # older folders have no seams
                episode = Episode(
                    row["seed"],
                    success=row["success"],
                    observations=self._observed(row["seed"]),
                    error=row.get("error"),
                    **lists,
                )
                found[episode.seed] = episode, row
        if text and not text.endswith("\n"):  # the next line must not be glued to it
            with path.open("a") as lines:
                lines.write("\n")
        return list(found.values())

    def _observed(self, seed: int) -> list[dict[str, np.ndarray]]:
        path = self.path / "observations" / f"{seed}.npz"
        if not path.is_file():
            return []
        with np.load(path, allow_pickle=False) as stacked:
            arrays = dict(stacked)
        return [{key: value[i] for key, value in arrays.items()} for i in range(len(next(iter(arrays.values()))))]


def describe_git(folder: Path) -> dict[str, Any] | None:
    """The commit that runs, and whether files differ from it; None outside a repository."""
    try:
        commit, status = (
            subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True).stdout.strip()
            for arguments in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return {"commit": commit, "changed": bool(status)}


def _write_whole(path: Path, text: str) -> None:
    """The whole file or none of it, whenever it is interrupted."""
    part = path.with_suffix(".part")
    part.write_text(text)
    part.replace(path)
