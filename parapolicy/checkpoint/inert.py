"""The inert values that a pickle of ``torch.save`` becomes: names, objects taken apart, tensors still on disk."""

import math
import re
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from parapolicy.checkpoint.archive import Archive, Entry

MAX_RANK, MAX_AXIS = 16, 2**40  # of a tensor
DTYPE, ARRAY = "numpy.dtype", "numpy.ndarray"

# Types of storages. Any bytes are valid numbers of these types.
STORAGES = {
    "torch.FloatStorage": torch.float32,
    "torch.DoubleStorage": torch.float64,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.LongStorage": torch.int64,
    "torch.IntStorage": torch.int32,
    "torch.ShortStorage": torch.int16,
    "torch.CharStorage": torch.int8,
    "torch.ByteStorage": torch.uint8,
    "torch.BoolStorage": torch.bool,
}


class UnsafeValue(ValueError):
    """A pickle contains a value that is not supported."""


class Global:
    """The name of a class or function; the object itself is never looked up."""

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name


class Instance:
    """An object taken apart: the name of its class, its arguments, and its pickled state (None: none)."""

    __slots__ = ("args", "name", "state")

    def __init__(self, name: str, args: tuple[Any, ...] = ()) -> None:
        self.name, self.args = name, args
        self.state: Any = None


class Storage(NamedTuple):
    """An entry of the archive with ``length`` numbers."""

    archive: Archive
    dtype: torch.dtype
    entry: Entry
    length: int


class TensorRef:
    """A tensor whose numbers are still in the file.

    Attributes:
        dtype, shape: of the tensor; checked to fit its storage.

    Raises:
        UnsafeValue: a view that is malformed, ends outside of its storage, or has more elements than its storage.
    """

    __slots__ = ("_offset", "_storage", "_stride", "dtype", "shape")

    def __init__(self, storage: Storage, offset: Any, shape: Any, stride: Any) -> None:
        for sizes in (shape, stride, (offset,)):
            fits = type(sizes) is tuple and len(sizes) <= MAX_RANK
            if not fits or not all(type(n) is int and 0 <= n < MAX_AXIS for n in sizes):
                raise UnsafeValue("a tensor with a damaged offset, shape or stride")
        if len(stride) != len(shape):
            raise UnsafeValue(f"a tensor of shape {shape} with {len(stride)} strides")
        elements = math.prod(shape)
        end = offset + 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True)) if elements else 0
        if elements > storage.length or end > storage.length:
            raise UnsafeValue(f"a tensor of shape {shape} on a storage of {storage.length} numbers, which is too small")
        self.dtype, self.shape = storage.dtype, tuple(shape)
        self._storage, self._offset, self._stride = storage, offset, stride

    def load(self) -> Tensor:
        """Read the tensor, contiguous and on the CPU.

        Raises:
            CheckpointError: damaged data.
        """
        archive, dtype, entry, length = self._storage
        data = torch.empty(entry.size, dtype=torch.uint8, device="cpu")
        archive.read_into(entry, data.numpy().data)
        flat = data != 0 if dtype is torch.bool else data.view(dtype)
        view = flat.as_strided(self.shape, self._stride, self._offset)
        return view.contiguous() if view.numel() == length else view.clone(memory_format=torch.contiguous_format)

    def equals(self, other: "TensorRef") -> bool:
        """Whether another tensor of the file has the same values; read only if checksums do not decide."""
        if (self.dtype, self.shape) != (other.dtype, other.shape):
            return False
        mine, theirs = self._storage.entry, other._storage.entry
        same = (mine.size, mine.crc, self._offset, self._stride) == (
            theirs.size,
            theirs.crc,
            other._offset,
            other._stride,
        )
        return same or torch.equal(self.load(), other.load())


def read_array(value: Any) -> np.ndarray:
    """A copy of the numpy array that an :class:`Instance` describes.

    Raises:
        UnsafeValue: not a description of an array of numbers.
    """
    if not isinstance(value, Instance) or value.name != ARRAY or type(value.state) is not tuple:
        raise UnsafeValue(f"a {type(value).__name__}, expected a numpy array")
    if len(value.state) != 5:
        raise UnsafeValue("a damaged numpy array")
    _, shape, dtype, fortran, data = value.state
    if not isinstance(dtype, Instance) or dtype.name != DTYPE or type(data) is not bytes or type(fortran) is not bool:
        raise UnsafeValue("a damaged numpy array")
    if (
        type(shape) is not tuple
        or len(shape) > MAX_RANK
        or not all(type(n) is int and 0 <= n < MAX_AXIS for n in shape)
    ):
        raise UnsafeValue("a numpy array with a damaged shape")
    kind = _dtype(dtype.args, dtype.state)
    if math.prod(shape) * kind.itemsize != len(data):
        raise UnsafeValue(f"a numpy array of shape {shape} with {len(data)} bytes")
    return np.frombuffer(data, kind).reshape(shape, order="F" if fortran else "C").copy()


def read_scalar(args: Any, state: Any, data: bytes) -> bool | int | float:
    """A numpy number as a Python number, from the pickled arguments and state of its dtype."""
    kind = _dtype(args, state)
    if len(data) != kind.itemsize:
        raise UnsafeValue(f"a numpy number of {len(data)} bytes, expected {kind.itemsize}")
    number: bool | int | float = np.frombuffer(data, kind)[0].item()
    return number


def _dtype(args: Any, state: Any) -> np.dtype:
    code = args[0] if args else None
    order = state[1] if type(state) is tuple and len(state) > 1 else "|"
    if type(code) is not str or not re.fullmatch(r"b1|[iu][1248]|f[248]", code) or order not in ("<", ">", "|", "="):
        raise UnsafeValue(f"the numpy dtype {code!r:.40}, expected a numeric one")
    return np.dtype(f"{order}{code}")
