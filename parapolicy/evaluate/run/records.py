"""A sweep's record of latencies."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from parapolicy.files import seal, unseal, write_whole

TIMED = {"env", "checkpoint", "sampler", "chunk_ms"}  # in every record of latencies


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
