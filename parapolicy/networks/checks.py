"""Checks of settings that come from files."""

from typing import Any

MAX_SIDE, MAX_FEATURES = 4096, 2**16  # more than any real network; a larger number means a damaged config


def check_count(name: str, value: Any, most: int = MAX_FEATURES) -> int:
    """Return a whole number from 1 to ``most``; raise ValueError for anything else."""
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
        raise ValueError(f"{name} is {value!r}, expected a whole number from 1 to {most}")
    return value


def check_size(name: str, value: Any) -> tuple[int, int] | None:
    """Return (height, width) or None; raise ValueError for anything else."""
    if value is None:
        return None
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise ValueError(f"{name} is {value!r}, expected [height, width] or null")
    height, width = (check_count(f"{name}[{i}]", side, MAX_SIDE) for i, side in enumerate(value))
    return height, width


def check_flag(name: str, value: Any) -> bool:
    """Return True or False; raise ValueError for anything else."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} is {value!r}, expected true or false")
    return value
