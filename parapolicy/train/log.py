"""Where a run's losses are recorded."""

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from parapolicy.files import write_whole

LOG = "log.csv"


class Log(Protocol):
    """A record of losses, closed behind its block."""

    def __enter__(self) -> "Log": ...

    def __exit__(self, *error: object) -> None: ...

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Record values by name, as they are after so many steps."""


class CsvLog:
    """``log.csv``, a line per value: step, name, value.

    Args:
        folder: of the run.
        step: that it goes on from. Lines of later steps, which are taken again, are dropped.
    """

    def __init__(self, folder: Path, step: int) -> None:
        path = folder / LOG
        lines = path.read_text().splitlines()[1:] if step and path.is_file() else []
        kept = [line for line in lines if int(line.partition(",")[0]) <= step]
        write_whole(path, "\n".join(["step,name,value", *kept]) + "\n")
        self._file = path.open("a", newline="")
        self._writer = csv.writer(self._file, lineterminator="\n")

    def __enter__(self) -> "CsvLog":
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._writer.writerows((step, name, f"{value:.6g}") for name, value in values.items())
        self._file.flush()
