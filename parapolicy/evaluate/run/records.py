"""Records of JSON that have their own digest, so that damage is noticed."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

SEAL = "sha256"  # key of a record's digest
TIMED = {"env", "checkpoint", "sampler", "chunk_ms"}  # in every record of latencies


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


def write_latencies(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Write a sweep's ``latency.json``."""
    write_whole(path, seal({"records": records}, indent=2))


def read_latencies(path: Path) -> list[dict[str, Any]]:
    """The records of a sweep's ``latency.json``; none if there is no such file.

    Raises:
        ValueError: it is damaged.
    """
    if not path.is_file():
        return []
    text, way_out = path.read_bytes(), "delete it, and the same sweep measures it again"
    if text[:1] == b"[":  # of an older version
        text = b'{"records": %b}' % text
    found = unseal(text, str(path), way_out).get("records")
    if not isinstance(found, list) or not all(isinstance(row, dict) and row.keys() >= TIMED for row in found):
        raise ValueError(f"{path} is damaged: it has no records of samplers; {way_out}")
    return found


def write_whole(path: Path, text: str) -> None:
    """Write a file atomically."""
    part = path.with_suffix(".part")
    part.write_text(text)
    part.replace(path)


def _digest(record: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record).encode()).hexdigest()
