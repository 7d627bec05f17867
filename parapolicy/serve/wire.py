"""Messages of the openpi protocol: msgpack, with arrays as maps of their bytes. Nothing is ever unpickled."""

import math
import re
from typing import Any

import msgpack
import numpy as np

_DTYPE = re.compile(r"[<>|=]?(b1|[iu][1248]|f[248])")
_MAX_DIMENSIONS = 8


class WireError(ValueError):
    """A message that is not of the protocol."""


def pack(message: Any) -> bytes:
    """A message as bytes; numpy arrays and scalars of numbers may stand anywhere in it."""
    packed: bytes = msgpack.packb(message, default=_pack_array)
    return packed


def unpack(data: bytes) -> Any:
    """What :func:`pack` packed; arrays are read-only views of ``data``.

    Raises:
        WireError: not msgpack, or an array whose bytes, type and shape do not fit together.
    """
    try:
        return msgpack.unpackb(data, object_hook=_unpack_array, strict_map_key=False)
    except WireError:
        raise
    except (ValueError, TypeError, OverflowError, RecursionError) as error:
        raise WireError(f"the message is not msgpack: {error or type(error).__name__}") from error


def _pack_array(value: Any) -> dict[bytes, Any]:
    if isinstance(value, np.ndarray | np.generic) and value.dtype.kind in "biuf":
        if isinstance(value, np.ndarray):
            data = {b"data": value.tobytes(), b"dtype": value.dtype.str, b"shape": value.shape}
            return {b"__ndarray__": True, **data}
        return {b"__npgeneric__": True, b"data": value.item(), b"dtype": value.dtype.str}
    raise TypeError(f"{type(value).__name__} cannot be sent; expected numbers, texts, lists, maps and numeric arrays")


def _unpack_array(value: dict[Any, Any]) -> Any:
    if b"__ndarray__" not in value and b"__npgeneric__" not in value:
        return value
    name, data = value.get(b"dtype"), value.get(b"data")
    if not isinstance(name, str) or not _DTYPE.fullmatch(name):
        raise WireError(f"an array has dtype {name!r}, expected numbers, such as '<f4'")
    dtype = np.dtype(name)
    if b"__npgeneric__" in value:
        if not isinstance(data, bool | int | float):
            raise WireError(f"a numpy scalar has data of type {type(data).__name__}, expected a number")
        try:
            return dtype.type(data)
        except (OverflowError, ValueError) as error:
            raise WireError(f"a numpy scalar does not fit its dtype {name!r}: {error}") from error
    shape = value.get(b"shape")
    if (
        not isinstance(shape, list | tuple)
        or len(shape) > _MAX_DIMENSIONS
        or not all(isinstance(size, int) and not isinstance(size, bool) and size >= 0 for size in shape)
    ):
        raise WireError(f"an array has shape {shape!r}, expected at most {_MAX_DIMENSIONS} sizes")
    if not isinstance(data, bytes) or len(data) != math.prod(shape) * dtype.itemsize:
        length = len(data) if isinstance(data, bytes) else type(data).__name__
        raise WireError(f"an array of shape {tuple(shape)} and dtype {name!r} has {length} bytes of data")
    return np.frombuffer(data, dtype).reshape(shape)
