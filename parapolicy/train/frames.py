"""Camera images of a data set: read in blocks, and stored as bytes in a memory-mapped file."""

import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from parapolicy.errors import DataError

BLOCK_BYTES = 2**26  # read at once, before conversion to another type


def read_blocks(array: Any) -> Iterator[np.ndarray]:
    """Read an array (N, ...) of zarr or HDF5 in blocks of consecutive steps; if it has chunks, in whole chunks."""
    step = max(1, array.dtype.itemsize * int(np.prod(array.shape[1:])))
    chunk = array.chunks[0] if array.chunks else 1
    size = max(1, BLOCK_BYTES // (step * chunk)) * chunk
    for start in range(0, array.shape[0], size):
        yield array[start : start + size]


class FrameFile:
    """Images (N, H, W, C) of one camera, uint8.

    They are in a file without a name, which the system deletes when the process ends. Memory does not grow with the
    data set, because the system can drop mapped pages at any time.

    Args:
        shape: of one image, (H, W, C).
        folder: of the file; None: the system's temporary folder, which on some systems is in memory.
    """

    def __init__(self, shape: tuple[int, ...], folder: Path | None = None) -> None:
        self.shape, self.steps = shape, 0
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 lives as long as the images

    def add(self, blocks: Iterable[np.ndarray], where: str) -> int:
        """Append images (n, H, W, C), and return their number; ``where`` names them in errors.

        Raises:
            DataError: another shape, or values that are not whole numbers from 0 to 255.
        """
        before = self.steps
        for block in blocks:
            if block.shape[1:] != self.shape:
                raise DataError(
                    f"{where} has images of shape {block.shape[1:]}, expected {self.shape}, (height, width, channels), "
                    "from the configuration; correct the shape there, or write the images again"
                )
            self._file.write(np.ascontiguousarray(_as_bytes(block, where, self.steps - before)).data)
            self.steps += len(block)
        return self.steps - before

    def tensor(self) -> Tensor:
        """All images, (N, H, W, C) uint8, read from the file on access."""
        self._file.flush()
        return torch.from_numpy(np.memmap(self._file, np.uint8, "r+", shape=(self.steps, *self.shape)))


def _as_bytes(block: np.ndarray, where: str, first: int) -> np.ndarray:
    if block.dtype == np.uint8:
        return block
    if block.dtype.kind not in "iuf":
        raise DataError(f"{where} holds {block.dtype}, expected images of whole numbers from 0 to 255")
    with np.errstate(invalid="ignore"):
        values = block.astype(np.uint8)
    wrong = values != block
    if wrong.any():
        step, *_ = np.argwhere(wrong)[0]
        value = block[wrong][0]
        raise DataError(
            f"{where} holds {value} at step {first + step}, expected whole numbers from 0 to 255, as uint8 or another "
            "type; scale and round the images, and write them again"
        )
    return values
