"""A sweep's records about its samplers besides their episodes: latencies and distances of distributions."""

from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import Any

from parapolicy.files import seal, unseal, write_whole

NAMED = {"env", "checkpoint", "sampler"}
TIMED = NAMED | {"chunk_ms"}  # in every record of latencies
COMPARED = NAMED | {"energy_distance", "paired_energy_distance"}  # in every record of distributions


def write_records(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Write a sweep's ``latency.json`` or ``fidelity.json``."""
    write_whole(path, seal({"records": records}, indent=2))


def read_records(path: Path, keys: Set[str] = TIMED) -> list[dict[str, Any]]:
    """The records of such a file; none if there is no such file.

    Args:
        keys: which every record must have.

    Raises:
        ValueError: it is damaged.
    """
    if not path.is_file():
        return []
    text, way_out = path.read_bytes(), "delete it, and the same command measures it again"
    if text[:1] == b"[":  # from an older version
        text = b'{"records": %b}' % text
    found = unseal(text, str(path), way_out).get("records")
    if not isinstance(found, list) or not all(isinstance(row, dict) and row.keys() >= keys for row in found):
        raise ValueError(f"{path} is damaged: it has no records of samplers; {way_out}")
    return found
