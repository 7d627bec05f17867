"""Files that are written whole or not at all, and JSON records with a digest, which detects damage."""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

SEAL = "sha256"  # key of a record's digest


def cache_folder() -> Path:
    """The folder of this user's measurements and compiled code: ``$PARAPOLICY_CACHE`` or ``~/.cache/parapolicy``.

    Raises:
        RuntimeError: the user has no home folder.
    """
    return Path(os.environ.get("PARAPOLICY_CACHE") or Path.home() / ".cache" / "parapolicy")


@contextlib.contextmanager
def replacing(path: Path, tag: str = "partial") -> Iterator[Path]:
    """A path to write to, in the same folder. It replaces ``path`` if the block ends without an error.

    Args:
        path: the final path.
        tag: part of the temporary name; unique per process if several write the same file.
    """
    partial = path.with_name(f".{path.name}.{tag}")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_whole(path: Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    with replacing(path) as partial:
        partial.write_text(text)


def seal(record: Mapping[str, Any], indent: int | None = None) -> str:
    """A record as a line of JSON with its digest."""
    return json.dumps({**record, SEAL: _digest(record)}, indent=indent) + "\n"


def unseal(text: str | bytes, where: str, way_out: str, sealed: bool = False) -> dict[str, Any]:
    """Read a record that :func:`seal` wrote, or one without a digest from an older version.

    Args:
        text: JSON.
        where: name of the file, for the error.
        way_out: what to do about damage, for the error.
        sealed: require a digest; a record with a ``format`` must always have one.

    Raises:
        ValueError: the record is damaged.
    """
    try:
        record: dict[str, Any] = json.loads(text)
        found = record.pop(SEAL, None)
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{where} is damaged ({error}); {way_out}") from error
    if (found is not None or sealed or "format" in record) and found != _digest(record):
        raise ValueError(f"{where} is damaged: its digest does not match its content; {way_out}")
    return record


def _digest(record: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record).encode()).hexdigest()
