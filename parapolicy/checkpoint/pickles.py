"""Reads what ``torch.save`` pickled, without running anything.

A pickle is a program for a small stack machine (the standard library's ``pickletools`` describes its instructions).
This file is such a machine that can only build values: no instruction imports, calls or sets an attribute. A global is
a name, and only listed names are accepted. Calls of listed names are replaced by functions written here: an ordered
dictionary becomes a dictionary, a tensor a :class:`TensorRef` to its numbers in the file. Everything else is refused by
name. Numbers of instructions, bytes and sizes are bounded before anything is built.
"""

import pickle
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

from parapolicy.checkpoint.archive import Archive
from parapolicy.checkpoint.inert import STORAGES, Global, Instance, Storage, UnsafeValue
from parapolicy.checkpoint.stand_ins import CALLS, NUMPY, OMEGACONF, TORCH, Budget, OrderedValues

MAX_OPCODES = 500_000  # published checkpoints have up to 41,000; bounds time (about 1 s) and memory (about 40 MB)
MAX_KEY_PARTS = 16  # values in a tuple that is a dictionary's key

_MARK = object()


def unpickle(archive: Archive, listed: Mapping[str, str]) -> Any:
    """The object in a file of ``torch.save``, as plain values, :class:`Instance` and lazy :class:`TensorRef`.

    Containers may be shared or contain themselves: bound any walk through them.

    Args:
        archive: the open file.
        listed: names that the format may use besides torch's own, such as :data:`OMEGACONF`.

    Raises:
        CheckpointError: a global that is not listed, an instruction or value that ``torch.save`` never writes, a tensor
            outside of its storage, or a size beyond the bounds.
    """
    machine = _Machine(archive, {**TORCH, **listed})
    try:
        return machine.run()
    except UnsafeValue as error:
        raise archive.error(f"it holds {error}, at byte {machine.at} of its pickle") from error
    except (IndexError, struct.error, UnicodeDecodeError) as error:
        raise archive.error(f"its pickle is damaged at byte {machine.at}; copy it again") from error


def refuse_unknown(path: Path) -> NoReturn:
    """Raise a CheckpointError that describes a file of torch.save that no reader recognises."""
    with Archive(path) as archive:
        value = unpickle(archive, {**OMEGACONF, **NUMPY})
        found = f"a dictionary with the keys {list(value)[:5]!r:.150}" if isinstance(value, dict) else "another object"
        raise archive.error(
            f"a file of torch.save with {found}, which no reader recognises; expected a checkpoint of "
            "real-stanford/diffusion_policy ('cfg', 'state_dicts') or of robomimic ('algo_name', 'model')"
        )


class _Machine:
    def __init__(self, archive: Archive, listed: Mapping[str, str]) -> None:
        self.data, self.at = archive.pickle(), 0
        self.archive, self.listed = archive, listed
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.budget = Budget(archive.size + 2**20)
        self.globals: dict[str, Global] = {}

    def run(self) -> Any:
        table, data = _OPCODES, self.data
        for _ in range(MAX_OPCODES):
            code = data[self.at]
            self.at += 1
            if code == 0x2E:  # STOP
                return self.pop()
            handler = table.get(code)
            if handler is None:
                raise UnsafeValue(f"the instruction {chr(code)!r}, which torch.save never writes")
            handler(self)
        raise UnsafeValue(f"more than {MAX_OPCODES} instructions, more than any checkpoint needs")

    # Reading from the pickle and the stack.

    def take(self, size: int) -> bytearray:
        begin, self.at = self.at, self.at + size
        if size < 0 or self.at > len(self.data):
            raise IndexError
        return self.data[begin : self.at]

    def number(self, form: struct.Struct) -> Any:
        (value,) = form.unpack(self.take(form.size))
        return value

    def line(self) -> str:
        end = self.data.find(b"\n", self.at, self.at + 200)
        if end < 0:
            raise UnsafeValue("a global with a name of more than 200 characters")
        text = self.data[self.at : end].decode()
        self.at = end + 1
        return text

    def pop(self) -> Any:
        value = self.stack.pop()
        if value is _MARK:
            raise IndexError
        return value

    def pop_mark(self) -> list[Any]:
        for at in range(len(self.stack) - 1, -1, -1):
            if self.stack[at] is _MARK:
                items = self.stack[at + 1 :]
                del self.stack[at:]
                return items
        raise IndexError

    # Values.

    def set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) not in (dict, OrderedValues) or len(items) % 2:
            raise UnsafeValue("items set on a value that is not a dictionary")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if _count_parts(key) > MAX_KEY_PARTS:
                raise UnsafeValue(f"a dictionary's key of type {type(key).__name__}")
            target[key] = value

    def append(self, items: list[Any]) -> None:
        if type(self.stack[-1]) is not list:
            raise UnsafeValue("items appended to a value that is not a list")
        self.stack[-1].extend(items)

    def get(self, index: int) -> None:
        if index not in self.memo:
            raise IndexError
        self.stack.append(self.memo[index])

    def put(self, index: int) -> None:
        self.memo[index] = self.stack[-1]

    def find_global(self, module: Any, name: Any) -> None:
        full = f"{module!s:.100}.{name!s:.100}"
        if full not in self.listed:
            raise UnsafeValue(
                f"the global {full!r}, which no checkpoint of this format needs: loading it with its author's code may "
                "run programs, or it is of another version; ask for its weights as safetensors"
            )
        self.stack.append(self.globals.setdefault(full, Global(full)))

    def stack_global(self) -> None:
        name, module = self.pop(), self.pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise UnsafeValue("a global whose name is not a text")
        self.find_global(module, name)

    def reduce(self) -> None:
        args, function = self.pop(), self.pop()
        rebuild = CALLS.get(function.name) if isinstance(function, Global) else None
        if rebuild is None or type(args) is not tuple:
            named = repr(function.name) if isinstance(function, Global) else f"a {type(function).__name__}"
            raise UnsafeValue(f"a call of {named}, which is never made here")
        self.stack.append(rebuild(self.budget, *args))

    def new_object(self) -> None:
        args, kind = self.pop(), self.pop()
        if not isinstance(kind, Global) or self.listed.get(kind.name) != "class" or type(args) is not tuple:
            named = repr(kind.name) if isinstance(kind, Global) else f"a {type(kind).__name__}"
            raise UnsafeValue(f"an object of {named}, which is never built here")
        self.stack.append(Instance(kind.name, args))

    def build(self) -> None:
        state, target = self.pop(), self.stack[-1]
        if isinstance(target, OrderedValues) and type(state) is dict:
            return  # a state dict's _metadata: versions of modules, not needed
        if not isinstance(target, Instance) or target.state is not None or type(state) not in (dict, tuple):
            raise UnsafeValue(f"a state for a {type(target).__name__}, which has none")
        target.state = state

    def storage(self) -> None:
        """A storage, from ("storage", its type, its key, its device, its number of elements)."""
        pid = self.pop()
        if type(pid) is not tuple or len(pid) != 5 or pid[0] != "storage" or not isinstance(pid[1], Global):
            raise UnsafeValue("a reference to a value that is not a storage")
        _, kind, key, location, count = pid
        dtype = STORAGES.get(kind.name)
        if dtype is None or type(key) is not str or type(location) is not str or type(count) is not int:
            raise UnsafeValue("a damaged reference to a storage")
        entry = self.archive.entry(f"data/{key}")
        if entry is None or count < 0 or entry.size != count * dtype.itemsize:
            found = "missing" if entry is None else f"of {entry.size} bytes"
            raise UnsafeValue(f"the storage {key!r:.40} is {found}, expected {count} numbers of {dtype}")
        self.stack.append(Storage(self.archive, dtype, entry, count))


def _count_parts(key: Any, depth: int = 0) -> int:
    """The number of values in a dictionary's key; above the limit if the key has an unsupported type."""
    if key is None or type(key) in (str, bool, float) or (type(key) is int and -(2**63) <= key < 2**63):
        return 1
    if type(key) is not tuple or depth == 4 or len(key) > MAX_KEY_PARTS:
        return MAX_KEY_PARTS + 1
    parts = 1
    for part in key:
        parts += _count_parts(part, depth + 1)
        if parts > MAX_KEY_PARTS:
            break
    return parts


_U8, _U16, _I32, _U32, _U64 = (struct.Struct(f) for f in ("<B", "<H", "<i", "<I", "<Q"))
_F64 = struct.Struct(">d")


def _push(read: Callable[[_Machine], Any]) -> Callable[[_Machine], None]:
    return lambda m: m.stack.append(read(m))


def _text(size: struct.Struct) -> Callable[[_Machine], None]:
    return _push(lambda m: m.budget.charge(m.take(m.number(size)).decode()))


def _bytes(size: struct.Struct) -> Callable[[_Machine], None]:
    return _push(lambda m: m.budget.charge(bytes(m.take(m.number(size)))))


def _long(size: struct.Struct) -> Callable[[_Machine], None]:
    return _push(lambda m: int.from_bytes(m.take(m.number(size)), "little", signed=True))


def _last(count: int) -> Callable[[_Machine], None]:
    """Make a tuple of the last ``count`` values."""

    def collect(m: _Machine) -> None:
        items = [m.pop() for _ in range(count)]
        m.stack.append(tuple(reversed(items)))

    return collect


def _pairs_of_one(m: _Machine) -> None:
    value, key = m.pop(), m.pop()
    m.set_items([key, value])


# The instructions of protocols 2 to 5 that build plain data (pickletools has them all).
_BY_NAME: dict[str, Callable[[_Machine], Any]] = {
    "PROTO": lambda m: m.take(1),
    "FRAME": lambda m: m.take(8),
    "MARK": _push(lambda m: _MARK),
    "POP": lambda m: m.stack.pop(),
    "POP_MARK": lambda m: m.pop_mark(),
    "NONE": _push(lambda m: None),
    "NEWTRUE": _push(lambda m: True),
    "NEWFALSE": _push(lambda m: False),
    "BININT": _push(lambda m: m.number(_I32)),
    "BININT1": _push(lambda m: m.number(_U8)),
    "BININT2": _push(lambda m: m.number(_U16)),
    "LONG1": _long(_U8),
    "LONG4": _long(_I32),
    "BINFLOAT": _push(lambda m: m.number(_F64)),
    "BINUNICODE": _text(_U32),
    "SHORT_BINUNICODE": _text(_U8),
    "BINUNICODE8": _text(_U64),
    "BINBYTES": _bytes(_U32),
    "SHORT_BINBYTES": _bytes(_U8),
    "BINBYTES8": _bytes(_U64),
    "EMPTY_LIST": _push(lambda m: []),
    "APPEND": lambda m: m.append([m.pop()]),
    "APPENDS": lambda m: m.append(m.pop_mark()),
    "EMPTY_TUPLE": _push(lambda m: ()),
    "TUPLE": _push(lambda m: tuple(m.pop_mark())),
    "TUPLE1": _last(1),
    "TUPLE2": _last(2),
    "TUPLE3": _last(3),
    "EMPTY_DICT": _push(lambda m: {}),
    "SETITEM": _pairs_of_one,
    "SETITEMS": lambda m: m.set_items(m.pop_mark()),
    "BINGET": lambda m: m.get(m.number(_U8)),
    "LONG_BINGET": lambda m: m.get(m.number(_U32)),
    "BINPUT": lambda m: m.put(m.number(_U8)),
    "LONG_BINPUT": lambda m: m.put(m.number(_U32)),
    "MEMOIZE": lambda m: m.put(len(m.memo)),
    "GLOBAL": lambda m: m.find_global(m.line(), m.line()),
    "STACK_GLOBAL": _Machine.stack_global,
    "REDUCE": _Machine.reduce,
    "NEWOBJ": _Machine.new_object,
    "BUILD": _Machine.build,
    "BINPERSID": _Machine.storage,
}
_OPCODES = {getattr(pickle, name)[0]: handler for name, handler in _BY_NAME.items()}
