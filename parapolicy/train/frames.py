"""Camera pictures of a data set: read block by block, kept as bytes in a file that the system pages in and out."""

import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from parapolicy.errors import DataError

BLOCK_BYTES = 2**26  # of one reading, before decoding to another type


def read_blocks(array: Any) -> Iterator[np.ndarray]:
    """A stored array (N, ...), of zarr or HDF5, in parts of consecutive steps, whole chunks each where it has them."""
    step = max(1, array.dtype.itemsize * int(np.prod(array.shape[1:])))
    chunk = array.chunks[0] if array.chunks else 1
    size = max(1, BLOCK_BYTES // (step * chunk)) * chunk
    for start in range(0, array.shape[0], size):
        yield array[start : start + size]


class FrameFile:
    """Pictures (N, H, W, C) of one camera, uint8.

    They are in a file without a name, which goes with the process. So memory does not grow with the data set: what is
    mapped of the file can be dropped by the system at any time.

    Args:
        shape: of one picture, (H, W, C).
        folder: of the file; None: the system's, which on some systems is in memory.
    """

    def __init__(self, shape: tuple[int, ...], folder: Path | None = None) -> None:
        self.shape, self.steps = shape, 0
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 lives as long as the pictures

    def add(self, blocks: Iterable[np.ndarray], where: str) -> int:
        """Append pictures (n, H, W, C) and return how many; ``where`` names them in errors.

        Raises:
            DataError: another shape, or values that are not whole numbers from 0 to 255.
        """
        before = self.steps
        for block in blocks:
            if block.shape[1:] != self.shape:
                raise DataError(
                    f"{where} has pictures of shape {block.shape[1:]}, the configuration asks for {self.shape}: "
                    "(height, width, channels); correct the shape there, or write the pictures anew"
                )
            self._file.write(np.ascontiguousarray(_as_bytes(block, where, self.steps - before)).data)
            self.steps += len(block)
        return self.steps - before

    def tensor(self) -> Tensor:
        """All pictures, (N, H, W, C) uint8, read from the file where they are looked at."""
        self._file.flush()
        return torch.from_numpy(np.memmap(self._file, np.uint8, "r+", shape=(self.steps, *self.shape)))


def _as_bytes(block: np.ndarray, where: str, first: int) -> np.ndarray:
    if block.dtype == np.uint8:
        return block
    if block.dtype.kind not in "iuf":
        raise DataError(f"{where} holds {block.dtype}, expected pictures of whole numbers from 0 to 255")
    with np.errstate(invalid="ignore"):
        values = block.astype(np.uint8)
    wrong = values != block
    if wrong.any():
        step, *_ = np.argwhere(wrong)[0]
        value = block[wrong][0]
        raise DataError(
            f"{where} holds {value} at step {first + step}, expected whole numbers from 0 to 255, as uint8 or as "
            "another type; scale and round the pictures, and write them anew"
        )
    return values
