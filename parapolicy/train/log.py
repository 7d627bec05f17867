"""Records of a run's losses."""

import csv
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

from parapolicy.files import write_whole

LOG, EVENTS = "log.csv", "tensorboard"  # in the run's folder


class Log(Protocol):
    """A record of losses, a context manager."""

    def __enter__(self) -> "Log": ...

    def __exit__(self, *error: object) -> None: ...

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Record named values after ``step`` steps."""


class CsvLog:
    """``log.csv``, a line per value: step, name, value.

    Args:
        folder: of the run.
        step: at which the run continues. Lines of later steps are dropped, because these steps are repeated.
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


class TensorboardLog:
    """Event files in the folder ``tensorboard``, for ``tensorboard --logdir``.

    Args:
        folder, step: as in :class:`CsvLog`.

    Raises:
        ValueError: tensorboard is not installed.
    """

    def __init__(self, folder: Path, step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ValueError(
                f"tensorboard is not installed ({error}); pip install 'parapolicy[tensorboard]'"
            ) from error
        self._writer = SummaryWriter(str(folder / EVENTS), purge_step=step + 1 if step else None)

    def __enter__(self) -> "TensorboardLog":
        return self

    def __exit__(self, *error: object) -> None:
        self._writer.close()

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)


LOGGERS: Mapping[str, Callable[[Path, int], Log]] = {"csv": CsvLog, "tensorboard": TensorboardLog}
