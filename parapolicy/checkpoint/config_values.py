"""Settings of a foreign config: each is type-checked before use, and messages name the file and the setting."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from parapolicy.checkpoint.folder_files import cut
from parapolicy.errors import CheckpointError

MAX_NUMBERS = (
    2**20
)  # of an observation that is not an image, and of the action: bounds memory before weights are compared


def is_shape(value: Any, picture: bool = False) -> bool:
    """Whether a value is a list of positive sizes within the limits."""
    sizes = isinstance(value, list | tuple) and len(value) <= 8 and all(type(n) is int and n > 0 for n in value)
    return sizes and (max(value, default=1) if picture else math.prod(value)) <= MAX_NUMBERS


class Settings:
    """The settings of a config, with type checks.

    Args:
        path: the config's file, for messages.
        values: by name.
        prefix: put before names in messages.
    """

    def __init__(self, path: Path, values: Mapping[str, Any], prefix: str = "") -> None:
        self.path, self.values, self.prefix = path, values, prefix

    def get(self, name: str, kind: type, *default: Any) -> Any:
        """One setting of type bool, int, float (accepts whole numbers), str, list or dict.

        Raises:
            CheckpointError: it has another type, or it is missing and has no default.
        """
        if name not in self.values and default:
            return default[0]
        value = self.values.get(name)
        kinds = (int, float) if kind is float else (kind,)
        if not isinstance(value, kinds) or (isinstance(value, bool) and kind is not bool):
            raise self.wrong(name, f"expected a value of type {kind.__name__}")
        return value

    def choice(self, name: str, among: Any) -> str:
        """A text that is one of ``among``."""
        value: str = self.get(name, str)
        if value not in among:
            raise self.wrong(name, f"expected one of {[*among]}")
        return value

    def size(self, name: str) -> list[int] | None:
        """A height and width, or None."""
        value = self.values.get(name)
        if value is None:
            return None
        if not isinstance(value, list) or len(value) != 2 or not all(type(v) is int and v > 0 for v in value):
            raise self.wrong(name, "expected [height, width] or null")
        return value

    def wrong(self, name: str, expected: str) -> CheckpointError:
        """An error that names a setting, its value and what was expected."""
        value = f"is {cut(repr(self.values[name]), 100)}" if name in self.values else "is missing"
        return CheckpointError(f"{self.path}: {self.prefix}{name} {value}, {expected}")

    def inner(self, *names: str) -> "Settings":
        """The settings of a map within."""
        found = self
        for name in names:
            found = Settings(self.path, found.get(name, dict), f"{found.prefix}{name}.")
        return found
