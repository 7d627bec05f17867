"""Safe reading of the files of a policy folder. Each must lie in the folder, and its size is checked before reading.

A folder may name its own files, as LeRobot's do. A name that leads out of the folder, by its text or by a symbolic
link, is refused. One kind of link is followed: the cache of huggingface_hub keeps a snapshot as links from
``snapshots/REVISION`` to ``blobs`` beside it.
"""

import json
import os
import stat
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from parapolicy.errors import CheckpointError

MAX_JSON, MAX_HEADER = 2**20, 2**22  # bytes
DTYPES = ("F64", "F32", "F16", "BF16")


def find_file(folder: Path, name: object, named_by: Path | None = None) -> Path:
    """The path of a file that lies directly in the folder.

    Args:
        folder: to read from.
        name: of the file.
        named_by: the file that contains the name, for messages.

    Raises:
        CheckpointError: not a plain name, not a regular file, or a link out of the folder.
    """
    plain = isinstance(name, str) and 0 < len(name) < 256 and name not in (".", "..") and not set(name) & set("/\\\0")
    if not isinstance(name, str) or not plain:
        raise CheckpointError(
            f"{named_by or folder} names the file {cut(repr(name), 100)}, expected a plain name of a file in the "
            "folder; put the file there"
        )
    path = folder / name
    try:
        regular = stat.S_ISREG(path.stat().st_mode)
        target, home = path.resolve(strict=True).parent, folder.resolve(strict=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"{path} is missing or cannot be read ({type(error).__name__}); copy the whole folder again"
        ) from error
    if not regular:
        raise CheckpointError(f"{path} is not a regular file; copy the folder again")
    if target not in (home, *_blobs(home)):
        raise CheckpointError(
            f"{path} is a link to {cut(repr(os.readlink(path)), 100)}, out of the folder, which only the cache of "
            "huggingface_hub may have; put the file itself there"
        )
    return path


def _blobs(home: Path) -> list[Path]:
    """The blob folders of a snapshot in huggingface_hub's cache: …/snapshots/REVISION[/FOLDER] has …/blobs."""
    places = (home, home.parent)
    return [place.parent.parent / "blobs" for place in places if place.parent.name == "snapshots"]


def read_json(path: Path) -> Any:
    """Read a JSON value of at most ``MAX_JSON`` bytes, with unique keys and finite numbers.

    Raises:
        CheckpointError: the file is too large or not such JSON.
    """
    try:
        size = path.stat().st_size
        if size > MAX_JSON:
            raise CheckpointError(f"{path} has {size} bytes, expected at most {MAX_JSON}")
        return parse_json(path.read_bytes())
    except (ValueError, RecursionError, OSError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path} is not a JSON text ({cut(error)}); copy the folder again") from error


def parse_json(text: str | bytes) -> Any:
    """Parse a JSON value; raises ValueError or RecursionError."""
    return json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)


class Tensors:
    """The tensors of an open safetensors file, read one by one; see :func:`open_tensors`.

    Attributes:
        path: of the file.
        shapes: of all tensors in it, by name.
    """

    def __init__(self, path: Path, weights: Any) -> None:
        self.path, self._weights = path, weights
        slices = {name: weights.get_slice(name) for name in weights.keys()}  # noqa: SIM118
        self.shapes = {name: tuple(part.get_shape()) for name, part in slices.items()}
        self._dtypes = {name: part.get_dtype() for name, part in slices.items()}
        self._names = {name: name for name in slices}
        # safetensors stores tensors that share memory once, and lists the other names in the metadata.
        for alias, name in (weights.metadata() or {}).items():
            if name in slices and alias not in slices:
                self.shapes[alias], self._dtypes[alias], self._names[alias] = (
                    self.shapes[name],
                    self._dtypes[name],
                    name,
                )

    def rename(self, names: Mapping[str, str]) -> None:
        """Rename tensors, {old: new}."""
        if len({names.get(name, name) for name in self._names}) < len(self._names):
            raise CheckpointError(f"{self.path} holds a tensor twice, with and without '_orig_mod'; save it again")
        for table in (self.shapes, self._dtypes, self._names):
            entries: Any = {names.get(name, name): value for name, value in table.items()}
            table.clear()
            table.update(entries)

    def read(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Read one tensor as float32.

        Raises:
            CheckpointError: it is missing, has another shape or type, or holds a value that is not finite.
        """
        if name not in self.shapes:
            raise CheckpointError(f"{self.path} lacks the tensor {name}")
        if self.shapes[name] != shape:
            raise CheckpointError(f"{self.path}: {name} has shape {cut(self.shapes[name], 60)}, expected {shape}")
        if self._dtypes[name] not in DTYPES:
            raise CheckpointError(f"{self.path}: {name} has type {self._dtypes[name]}, expected one of {DTYPES}")
        # Cloned: rounding of matrix products depends on memory alignment, which in a file depends on its header.
        value = self._weights.get_tensor(self._names[name]).to(torch.float32, copy=True)
        if not torch.isfinite(value).all():
            raise CheckpointError(f"{self.path}: {name} holds a value that is not finite; the training run diverged")
        return value


@contextmanager
def open_tensors(path: Path) -> Iterator[Tensors]:
    """Open a safetensors file whose header has at most ``MAX_HEADER`` bytes.

    Raises:
        CheckpointError: the file is damaged or not a safetensors file.
    """
    try:
        with path.open("rb") as file:
            if int.from_bytes(file.read(8), "little") > MAX_HEADER:
                raise ValueError(f"its header is larger than {MAX_HEADER} bytes")
        with safe_open(path, "pt") as weights:
            yield Tensors(path, weights)
    except CheckpointError:
        raise
    except (SafetensorError, ValueError, OSError) as error:
        raise CheckpointError(f"{path} is damaged or not a safetensors file ({cut(error)}); copy it again") from error


def cut(text: object, most: int = 250) -> str:
    """Shorten a text for messages."""
    return f"{text!s:.{most}}"


def some(names: list[str]) -> str:
    """The first names of a list, for messages."""
    return f"{names[:4]} and {len(names) - 4} more" if len(names) > 4 else str(names)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    twice = [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]
    if twice:
        raise ValueError(f"keys {some(twice)} occur twice")
    return dict(pairs)


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")
