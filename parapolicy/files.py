"""Files that appear whole or not at all, and records of JSON that have their own digest, so that damage is noticed."""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

SEAL = "sha256"  # key of a record's digest


def cache_folder() -> Path:
    """Where this user's measurements and compiled code are kept: ``$PARAPOLICY_CACHE`` or ``~/.cache/parapolicy``.

    Raises:
        RuntimeError: the user has no home.
    """
    return Path(os.environ.get("PARAPOLICY_CACHE") or Path.home() / ".cache" / "parapolicy")


@contextlib.contextmanager
def replacing(path: Path, tag: str = "partial") -> Iterator[Path]:
    """A path to write to, in the same folder; what is there takes the place of ``path`` if the block ends well.

    Args:
        tag: in its name; one of its own for each process where several write the same file.
    """
    partial = path.with_name(f".{path.name}.{tag}")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_whole(path: Path, text: str) -> None:
    """Write a file of text."""
    with replacing(path) as partial:
        partial.write_text(text)


def seal(record: Mapping[str, Any], indent: int | None = None) -> str:
    """A record as JSON, with its digest, and the end of a line."""
    return json.dumps({**record, SEAL: _digest(record)}, indent=indent) + "\n"


def unseal(text: str | bytes, where: str, way_out: str, sealed: bool = False) -> dict[str, Any]:
    """The record that :func:`seal` wrote, or one without a digest, as older versions wrote them.

    Args:
        text: as JSON.
        where: it stands, for the error.
        way_out: what to do about damage, for the error.
        sealed: whether it must have a digest, as one with a ``format`` must.

    Raises:
        ValueError: it is damaged.
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
