"""Replacements for the globals that a checkpoint's pickle may call. The arguments come from the file."""

import sys
from collections.abc import Callable
from typing import Any, TypeVar

from parapolicy.checkpoint.inert import (
    ARRAY,
    DTYPE,
    STORAGES,
    Global,
    Instance,
    Storage,
    TensorRef,
    UnsafeValue,
    read_scalar,
)

Text = TypeVar("Text", str, bytes)

BUILT_IN = ("dict", "list", "int", "long", "str", "unicode", "float", "bool", "tuple")  # types that files may name

# The names that each format's files may use besides :data:`TORCH`. "class": an object of it becomes an
# :class:`Instance`; "name": it is only referred to.
OMEGACONF = {
    "omegaconf.dictconfig.DictConfig": "class",
    "omegaconf.listconfig.ListConfig": "class",
    "omegaconf.nodes.AnyNode": "class",
    "omegaconf.base.ContainerMetadata": "class",
    "omegaconf.base.Metadata": "class",
    "typing.Any": "name",
    "dill._dill._load_type": "call",
}
NUMPY = {
    DTYPE: "call",
    ARRAY: "name",
    "numpy.core.multiarray.scalar": "call",
    "numpy._core.multiarray.scalar": "call",
    "numpy.core.multiarray._reconstruct": "call",
    "numpy._core.multiarray._reconstruct": "call",
}
TORCH = {
    "collections.OrderedDict": "call",
    "collections.defaultdict": "call",
    "_codecs.encode": "call",
    "__builtin__.bytes": "call",
    "torch._utils._rebuild_tensor_v2": "call",
    "torch._utils._rebuild_parameter": "call",
    **dict.fromkeys(STORAGES, "name"),
    **{f"{module}.{name}": "name" for module in ("builtins", "__builtin__") for name in BUILT_IN},
}


class OrderedValues(dict[Any, Any]):
    """The replacement of collections.OrderedDict; pickled attributes are dropped."""


class Budget:
    """The remaining bytes for texts: a small pickle must not ask for many copies of a long text."""

    def __init__(self, left: int) -> None:
        self.left = left

    def charge(self, value: Text) -> Text:
        """Subtract the value's size from the budget, and return the value."""
        self.left -= sys.getsizeof(value)
        if self.left < 0:
            raise UnsafeValue("texts that need more memory than the file has bytes")
        return value


def _ordered_dict(budget: Budget, *args: Any) -> dict[Any, Any]:
    if args:
        raise UnsafeValue("an OrderedDict with arguments")
    return OrderedValues()


def _default_dict(budget: Budget, *args: Any) -> dict[Any, Any]:
    if len(args) != 1 or not isinstance(args[0], Global):
        raise UnsafeValue("a defaultdict with other arguments than a type")
    return {}


def _encode(budget: Budget, *args: Any) -> bytes:
    """Bytes in pickle protocol 2, which writes them as latin-1 text."""
    if len(args) != 2 or type(args[0]) is not str or args[1] != "latin1":
        raise UnsafeValue("_codecs.encode with other arguments than a text and 'latin1'")
    try:
        return budget.charge(args[0].encode("latin1"))
    except UnicodeEncodeError:
        raise UnsafeValue("bytes with a character beyond latin-1") from None


def _no_bytes(budget: Budget, *args: Any) -> bytes:
    """Bytes of length 0 in pickle protocol 2."""
    if args:
        raise UnsafeValue("bytes with arguments")
    return b""


def _load_type(budget: Budget, *args: Any) -> Global:
    """A built-in type as dill writes it. dill's own function also gives types of code and functions."""
    if len(args) != 1 or type(args[0]) is not str or args[0] not in BUILT_IN:
        shown = repr(args[0]) if len(args) == 1 and type(args[0]) is str else "something"
        raise UnsafeValue(f"dill's type {shown:.60}, expected one of {BUILT_IN}")
    return Global(f"builtins.{args[0]}")


def _tensor(budget: Budget, *args: Any) -> TensorRef:
    """A tensor, from its storage, offset, shape, strides, requires_grad, hooks and, optionally, an empty dictionary."""
    if not 6 <= len(args) <= 7 or not isinstance(args[0], Storage):
        raise UnsafeValue("a tensor without its storage")
    if any(type(part) not in (dict, OrderedValues) or part for part in args[5:]):
        raise UnsafeValue("a tensor with hooks or metadata, which torch.save never writes")
    return TensorRef(*args[:4])


def _parameter(budget: Budget, *args: Any) -> TensorRef:
    if len(args) != 3 or not isinstance(args[0], TensorRef) or type(args[2]) is not OrderedValues or args[2]:
        raise UnsafeValue("a parameter that is not a plain tensor")
    return args[0]


def _dtype(budget: Budget, *args: Any) -> Instance:
    return Instance(DTYPE, args)


def _scalar(budget: Budget, *args: Any) -> bool | int | float:
    if len(args) != 2 or not _is_dtype(args[0]) or type(args[1]) is not bytes:
        raise UnsafeValue("a numpy number without its dtype and bytes")
    return read_scalar(args[0].args, args[0].state, args[1])


def _array(budget: Budget, *args: Any) -> Instance:
    if not args or not isinstance(args[0], Global) or args[0].name != ARRAY:
        raise UnsafeValue("a numpy array of another class than numpy.ndarray")
    return Instance(ARRAY)


def _is_dtype(value: Any) -> bool:
    return isinstance(value, Instance) and value.name == DTYPE


CALLS: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": _ordered_dict,
    "collections.defaultdict": _default_dict,
    "_codecs.encode": _encode,
    "__builtin__.bytes": _no_bytes,
    "dill._dill._load_type": _load_type,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": _parameter,
    DTYPE: _dtype,
    "numpy.core.multiarray.scalar": _scalar,
    "numpy._core.multiarray.scalar": _scalar,
    "numpy.core.multiarray._reconstruct": _array,
    "numpy._core.multiarray._reconstruct": _array,
}
