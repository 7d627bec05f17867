"""A run's folder: its results, and the data needed to continue after an interruption."""

import hashlib
import json
import re
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import imageio.v2 as imageio
import numpy as np
from tqdm import tqdm

from parapolicy.evaluate.run.rollout import EpisodeRecord
from parapolicy.files import seal, unseal, write_whole
from parapolicy.observation import stack_observations

MAX_NAME = 100  # characters of a folder's name
LISTS = ("rewards", "rounds", "evaluations", "seams", "motion", "jerk")  # fields of an EpisodeRecord in episodes.jsonl


FORMAT = 2  # all records of a folder of this format have a digest
NEUTRAL = {"env_timeout_s"}  # settings that do not change results
OTHER_FOLDER = "choose another folder (hydra.run.dir), or delete this one"


class RunFolder:
    """Results of one configuration. An episode is written to disk as soon as it ends.

    ``run.json`` describes the run, ``episodes.jsonl`` has a line per sampler and episode, ``observations/`` has the
    observations of the first sampler's episodes, and ``results.json``, written last, has the summary. Every record has
    a digest, so that damaged records are refused.

    Args:
        path: created if missing.
        description: of the run, with its ``config`` and the ``checkpoint_digest`` of its policy.

    Raises:
        ValueError: the folder has a run of another configuration or checkpoint, or is damaged.
    """

    def __init__(self, path: Path, description: Mapping[str, Any]) -> None:
        self.path, self._progress, self._told = path, dict[str, float](), False
        path.mkdir(parents=True, exist_ok=True)
        about = read_about(path)
        if about is None:
            for name in ("results.json", "episodes.jsonl"):
                if (path / name).exists():
                    raise ValueError(f"{path} has {name}, but no run.json that describes its run; {OTHER_FOLDER}")
            write_whole(path / "run.json", seal({"format": FORMAT, **description}, indent=2))
            return
        here, new = about["config"], json.loads(json.dumps(description["config"]))
        differing = sorted(key for key in (here.keys() | new.keys()) - NEUTRAL if here.get(key) != new.get(key))
        if differing:
            raise ValueError(f"{path} has a run with another {', '.join(differing)}; {OTHER_FOLDER}")
        weights = about.get("checkpoint_digest")  # older folders have none
        if weights is not None and weights != description.get("checkpoint_digest"):
            raise ValueError(
                f"{path} has a run of another checkpoint: the one at {new.get('checkpoint')!r} was replaced since; "
                f"restore the old one, {OTHER_FOLDER}"
            )

    def results(self) -> dict[str, Any] | None:
        """The summary of a finished run; None for an unfinished one."""
        return read_results(self.path)

    def finish(self, results: Mapping[str, Any]) -> None:
        """Write the summary."""
        write_whole(self.path / "results.json", seal({"format": FORMAT, **results}, indent=2))

    def note_progress(self, label: str, part: float) -> None:
        """Write the finished share of a sampler's episodes, 0 to 1, for the progress bar of a sweep."""
        self._progress[label] = part
        (self.path / "progress.json").write_text(json.dumps(self._progress))

    def append(self, name: str, row: Mapping[str, Any]) -> None:
        """Append a line of JSON to a file and flush it to disk."""
        with (self.path / name).open("a") as lines:
            lines.write(seal(row))

    def save_episode(self, label: str, episode: EpisodeRecord, row: Mapping[str, Any], observations: bool) -> None:
        """Write a finished episode: its observations first, so that an episode on disk is complete."""
        if observations and episode.observations:
            path = self._observations(episode.seed)
            path.parent.mkdir(exist_ok=True)
            with path.open("wb") as file:
                np.savez_compressed(file, **stack_observations(episode.observations))  # type: ignore[arg-type]  # its own flag could be a key, not here
            row = {**row, "observations_sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        lists = {name: getattr(episode, name) for name in LISTS}
        self.append("episodes.jsonl", {"sampler": label, **row, **lists})

    def save_video(self, label: str, seed: int, frames: Sequence[np.ndarray], fps: int) -> None:
        """Write an episode's frames (H, W, 3), uint8, as an mp4 at ``fps``. If that fails, warn and continue."""
        path = self.video(label, seed)
        part = path.with_suffix(".part.mp4")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            imageio.mimwrite(part, list(frames), fps=fps)
            part.replace(path)
        except Exception as error:  # many kinds: no ffmpeg, ffmpeg fails, a full disk
            part.unlink(missing_ok=True)
            if not self._told:
                tqdm.write(
                    f"videos cannot be written, the run continues without: {error}; install ffmpeg, or set videos=0"
                )
            self._told = True

    def video(self, label: str, seed: int) -> Path:
        """The path of an episode's video, if it was filmed."""
        return self.path / "videos" / f"{label}_{seed}.mp4"

    def load_episodes(self, label: str) -> list[tuple[EpisodeRecord, dict[str, Any]]]:
        """The finished episodes of a sampler and their records in ``episodes.jsonl``.

        Raises:
            ValueError: a record, or an episode's observations, are damaged.
        """
        path = self.path / "episodes.jsonl"
        found: dict[int, tuple[EpisodeRecord, dict[str, Any]]] = {}
        for row in read_episodes(self.path):
            if row["sampler"] == label:
                lists = {name: row.pop(name, []) for name in LISTS}  # folders of older versions lack seams
                episode = EpisodeRecord(
                    row["seed"],
                    success=row["success"],
                    observations=self._load_observations(row),
                    error=row.get("error"),
                    **lists,
                )
                found[episode.seed] = episode, row
        if path.is_file() and path.read_bytes()[-1:] not in (b"", b"\n"):  # end a truncated line before appending
            with path.open("a") as lines:
                lines.write("\n")
        return list(found.values())

    def _observations(self, seed: int) -> Path:
        return self.path / "observations" / f"{seed}.npz"

    def _load_observations(self, row: dict[str, Any]) -> list[dict[str, np.ndarray]]:
        path, expected = self._observations(row["seed"]), row.pop("observations_sha256", None)
        if expected is None:
            return read_observations(path)
        if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != expected:
            raise ValueError(
                f"{path} is damaged or missing; delete the line of seed {row['seed']} and sampler {row['sampler']!r} "
                f"from {self.path / 'episodes.jsonl'}, and the same command runs the episode again"
            )
        return read_observations(path)


def read_about(folder: Path) -> dict[str, Any] | None:
    """A run's ``run.json``; None if there is none.

    Raises:
        ValueError: it is damaged.
    """
    path = folder / "run.json"
    if not path.is_file():
        return None
    about = unseal(path.read_bytes(), str(path), OTHER_FOLDER)
    if not isinstance(about.get("config"), dict):
        raise ValueError(f"{path} is damaged: it does not describe a run; {OTHER_FOLDER}")
    return about


def read_results(folder: Path) -> dict[str, Any] | None:
    """The summary of a finished run; None if there is none.

    Raises:
        ValueError: it is damaged.
    """
    path, way_out = folder / "results.json", "delete it, and the same command writes it again from episodes.jsonl"
    if not path.is_file():
        return None
    results = unseal(path.read_bytes(), str(path), way_out, _is_sealed(folder))
    if results.pop("format", None) and read_about(folder) is None:
        raise ValueError(f"{path} has no run.json beside it, which describes its run; copy that too")
    if not isinstance(results.get("samplers"), dict):
        raise ValueError(f"{path} is damaged: it has no samplers; {way_out}")
    return results


def read_episodes(folder: Path) -> list[dict[str, Any]]:
    """The records of a run's ``episodes.jsonl``, all samplers. A line that an interruption truncated is skipped.

    Raises:
        ValueError: a complete line is damaged.
    """
    path, sealed = folder / "episodes.jsonl", _is_sealed(folder)
    records = []
    for number, line in enumerate(path.read_bytes().split(b"\n") if path.is_file() else (), 1):
        where = f"{path}, line {number}"
        try:
            json.loads(line)
        except (ValueError, RecursionError):  # truncated; the episode is run again
            continue
        row = unseal(line, where, way_out := "delete this line, and its episode is run again", sealed)
        lists = [row.get(name, []) for name in LISTS]
        whole = isinstance(row.get("seed"), int) and isinstance(row.get("success"), bool) and "sampler" in row
        if not whole or not all(isinstance(values, list) for values in lists):
            raise ValueError(f"{where} is not an episode's record; {way_out}")
        records.append(row)
    return records


def read_observations(path: Path) -> list[dict[str, np.ndarray]]:
    """The observations {key: (To, …)} of an episode's chunks; empty if the file does not exist.

    Raises:
        ValueError: the file is damaged.
    """
    if not path.is_file():
        return []
    try:
        with np.load(path, allow_pickle=False) as stacked:
            arrays = dict(stacked)
        return [{key: value[i] for key, value in arrays.items()} for i in range(len(next(iter(arrays.values()))))]
    except Exception as error:  # many kinds: from numpy, zipfile or zlib
        raise ValueError(f"{path} is damaged ({error}); delete this run's folder and run it again") from error


def job_folder(overrides: str) -> str:
    """The name of a job's folder in a sweep, from its overrides: independent of the sweep's other jobs."""
    name = re.sub(r"[^\w.=,+-]+", "_", overrides, flags=re.ASCII)
    if name == overrides and 0 < len(name) <= MAX_NAME:
        return name
    return f"{name[:MAX_NAME]}-{hashlib.sha256(overrides.encode()).hexdigest()[:8]}"


def note_failure(folder: Path, job: Callable[[], Any]) -> None:
    """Run one job of a sweep. An error is written to ``error.txt`` in its folder, and the sweep continues."""
    note = folder / "error.txt"
    try:
        job()
    except Exception:
        note.write_text(traceback.format_exc())
        print(f"this job failed; the others continue: {note}")
    else:
        note.unlink(missing_ok=True)


def _is_sealed(folder: Path) -> bool:
    about = read_about(folder)
    return about is not None and "format" in about
