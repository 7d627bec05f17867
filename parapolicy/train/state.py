"""A training run's folder: the state of an unfinished run, and the record of a finished one."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from parapolicy.checkpoint.native import CONFIG
from parapolicy.digest import digest
from parapolicy.files import replacing, seal, unseal, write_whole

STATE, RECORD = "training.pt", "training.json"


class TrainingFolder:
    """The folder of one run.

    Args:
        path: created if missing.
        run: settings and digests of data that must be equal for a run to continue; of dicts, lists, numbers, strings.

    Raises:
        ValueError: the folder has a finished policy of another run, or a damaged record.
    """

    def __init__(self, path: Path, run: Mapping[str, Any]) -> None:
        self.path, self.run = path, run
        self.finished: dict[str, Any] | None = None  # the results of a finished run
        path.mkdir(parents=True, exist_ok=True)
        if (path / CONFIG).is_file() and not (path / STATE).is_file():
            self.finished = self._read_record()

    def load(self, device: torch.device) -> dict[str, Any] | None:
        """The state that was saved last; None if there is none.

        Raises:
            ValueError: it belongs to another run, or is damaged.
        """
        path = self.path / STATE
        if not path.is_file():
            return None
        try:
            saved = torch.load(path, map_location="cpu", weights_only=True)
            state: dict[str, Any] = saved["state"]
            sound = saved["digest"] == digest([saved["run"], state])
        except Exception as error:  # many kinds
            raise ValueError(f"{path} is damaged or of an older version ({error}); delete it to start again") from error
        if not sound:
            raise ValueError(f"{path} is damaged: its digest does not match its content; delete it to start again")
        if differing := _differing(saved["run"], self.run):
            raise ValueError(
                f"{path} is the state of a run with other settings ({differing}); continue that run with its own "
                "settings, or delete the file to start again"
            )
        return _to(state, device)

    def save(self, state: Mapping[str, Any]) -> None:
        """Write the state, whole or not at all."""
        with replacing(self.path / STATE) as partial:
            torch.save({"run": self.run, "state": state, "digest": digest([self.run, state])}, partial)

    def record(self, results: Mapping[str, Any]) -> None:
        """Write the record, before the policy: a run is finished when both exist and the state does not."""
        write_whole(self.path / RECORD, seal({"run": self.run, "results": results}, indent=2))

    def finish(self) -> None:
        """Delete the state."""
        (self.path / STATE).unlink(missing_ok=True)

    def _read_record(self) -> dict[str, Any]:
        path = self.path / RECORD
        way_out = "choose another folder (output=FOLDER), or delete this one"
        if not path.is_file():
            raise ValueError(f"{self.path} has a finished policy without {RECORD}, which is not overwritten; {way_out}")
        saved = unseal(path.read_bytes(), str(path), way_out, sealed=True)
        if differing := _differing(saved["run"], self.run):
            raise ValueError(f"{self.path} has a finished policy of a run with other settings ({differing}); {way_out}")
        results: dict[str, Any] = saved["results"]
        return results


def _differing(there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    """The names of the settings that differ, at most one level down."""
    names = []
    for key in sorted(there.keys() | here.keys()):
        old, new = there.get(key), here.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            names += [name for name in sorted(old.keys() | new.keys()) if old.get(name) != new.get(name)]
        elif old != new:
            names.append(key)
    return ", ".join(names)


def _to(value: Any, device: torch.device) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {key: _to(inner, device) for key, inner in value.items()}
    return [_to(inner, device) for inner in value] if isinstance(value, list) else value
