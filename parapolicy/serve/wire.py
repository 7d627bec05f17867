"""Messages of the openpi protocol: msgpack, with arrays as maps of their bytes. Nothing is unpickled."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from operator import mul
from typing import Any

import msgpack
import numpy as np

from parapolicy.spec import PolicySpec

_DTYPE = re.compile(r"[<>|=]?(b1|[iu][1248]|f[248])")
_MAX_DIMENSIONS = 8


class WireError(ValueError):
    """A message that does not follow the protocol."""


@dataclass(frozen=True)
class Limits:
    """The largest allowed content of a message. Anything beyond is refused before it takes memory or time.

    Attributes:
        message_bytes: length of the message.
        values: numbers, lists and maps, including nested ones. The bytes of an array count as one.
        list_length, map_length: of any list and map.
    """

    message_bytes: int
    values: int
    list_length: int
    map_length: int

    @classmethod
    def of(cls, spec: PolicySpec) -> "Limits":
        """Limits for a policy's observations, all steps of each, even as nested lists of float64. There is some margin,
        so that a slightly wrong message gets an error that names the fault."""
        shapes = [
            (spec.obs_steps(key), *shape) for key, f in spec.observation.items() for shape in (f.shape, f.tensor_shape)
        ]
        values = sum(sum(accumulate(shape, mul, initial=1)) for shape in shapes)
        texts = sum(len(key.encode()) for key in spec.observation)
        return cls(
            message_bytes=max(1 << 16, 9 * values + texts + 4096),  # a float64 takes nine bytes
            values=values + 4096,
            list_length=max(1024, *(max(shape) for shape in shapes)),
            map_length=len(spec.observation) + 64,
        )


def pack(message: Any) -> bytes:
    """Pack a message; it may contain numeric numpy arrays and scalars anywhere."""
    packed: bytes = msgpack.packb(message, default=_pack_array)
    return packed


def unpack(data: bytes, limits: Limits | None = None) -> Any:
    """Unpack a message of :func:`pack`; arrays are read-only.

    Raises:
        WireError: not msgpack, beyond the limits, a repeated key in a map, or an array whose bytes, type and shape do
            not fit together.
    """
    left = math.inf if limits is None else limits.values

    def count(values: int) -> None:
        nonlocal left
        left -= values
        if left < 0:
            raise WireError(f"the message holds more than {limits and limits.values} values; send numpy arrays")

    def make_list(items: list[Any]) -> list[Any]:
        count(1 + len(items))
        return items

    def make_map(pairs: Sequence[tuple[Any, Any]]) -> Any:
        count(1 + 2 * len(pairs))
        value = dict(pairs)
        if len(value) < len(pairs):
            raise WireError(f"a map of {len(pairs)} keys has a repeated key")
        return _unpack_array(value)

    lengths = {"max_array_len": limits.list_length, "max_map_len": limits.map_length} if limits else {}
    try:
        return msgpack.unpackb(
            data, list_hook=make_list, object_pairs_hook=make_map, strict_map_key=False, max_ext_len=0, **lengths
        )
    except WireError:
        raise
    except (ValueError, TypeError, OverflowError, RecursionError) as error:
        raise WireError(f"the message is not msgpack of the expected size: {error or type(error).__name__}") from error


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
        raise WireError(
            f"an array of shape {tuple(shape)} and dtype {name!r} has {length} bytes of data, expected another length"
        )
    return np.frombuffer(data, dtype).reshape(shape)
