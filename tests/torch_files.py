"""Files as torch.save writes them, and as it never does."""

import io
import struct
import sys
import types
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from parapolicy.checkpoint.archive import Archive
from parapolicy.checkpoint.inert import TensorRef
from parapolicy.checkpoint.pickles import unpickle
from parapolicy.checkpoint.stand_ins import NUMPY, OMEGACONF

EVERYTHING = {**OMEGACONF, **NUMPY}


def write_zip(path: Path, pickled: bytes, storages: Mapping[str, bytes] | None = None, **settings: Any) -> Path:
    """A file in torch's container around a pickle made by hand."""
    with zipfile.ZipFile(path, "w", **settings) as file:
        file.writestr("archive/data.pkl", pickled)
        for key, data in (storages or {}).items():
            file.writestr(f"archive/data/{key}", data)
        file.writestr("archive/version", b"3\n")
    return path


def pickle_global(name: str) -> bytes:
    module, _, attribute = name.rpartition(".")
    return f"c{module}\n{attribute}\n".encode()


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def whole(value: int) -> bytes:
    return b"\x8a\x08" + struct.pack("<q", value)


def storage(key: str, count: int, kind: str = "torch.FloatStorage", device: str = "cpu") -> bytes:
    """("storage", kind, key, device, count), and the instruction that fetches it."""
    return b"(" + text("storage") + pickle_global(kind) + text(key) + text(device) + whole(count) + b"tQ"


def tensor(key: str, count: int, offset: int, shape: tuple[int, ...], stride: tuple[int, ...], **more: Any) -> bytes:
    """A call of _rebuild_tensor_v2."""
    sizes = [b"(" + b"".join(map(whole, numbers)) + b"t" for numbers in (shape, stride)]
    hooks = more.pop("hooks", pickle_global("collections.OrderedDict") + b")R")
    parts = [storage(key, count, **more), whole(offset), *sizes, b"\x89", hooks]
    return pickle_global("torch._utils._rebuild_tensor_v2") + b"(" + b"".join(parts) + b"tR"


def rewrite(source: Path, target: Path, change: Mapping[str, bytes]) -> Path:
    """A copy of a file with other bytes of some entries, and right checksums."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            new.writestr(name, change.get(name.split("/", 1)[1], old.read(name)))
    return target


def stand_ins(monkeypatch: pytest.MonkeyPatch) -> types.SimpleNamespace:
    """Tiny classes under the names of omegaconf's, which pickle like them."""
    made = {}
    for module, names in {
        "omegaconf.dictconfig": ["DictConfig"],
        "omegaconf.listconfig": ["ListConfig"],
        "omegaconf.nodes": ["AnyNode"],
        "omegaconf.base": ["ContainerMetadata", "Metadata"],
    }.items():
        fake = types.ModuleType(module)
        for name in names:
            made[name] = type(name, (), {"__module__": module, "__qualname__": name})
            setattr(fake, name, made[name])
        monkeypatch.setitem(sys.modules, module, fake)
    return types.SimpleNamespace(**made)


def as_config(classes: types.SimpleNamespace, value: Any, parent: Any = None, key: Any = None) -> Any:
    """A value as omegaconf's nodes hold it."""
    kind = {dict: "DictConfig", list: "ListConfig"}.get(type(value), "AnyNode")
    node = getattr(classes, kind)()
    node._metadata = (classes.Metadata if kind == "AnyNode" else classes.ContainerMetadata)()
    node._metadata.__dict__.update(ref_type=Any, object_type=type(value), optional=True, key=key, flags={})
    if kind != "AnyNode":
        node._metadata.__dict__["resolver_cache"] = {"now": {("%Y", "%m"): "2026"}}
    node._parent = parent
    if isinstance(value, dict):
        node._content = {k: as_config(classes, v, node, k) for k, v in value.items()}
    elif isinstance(value, list):
        node._content = [as_config(classes, v, node, i) for i, v in enumerate(value)]
    else:
        node._val = value
    return node


def saved(value: Any) -> bytes:
    """What torch.save writes of a value, with python's own pickle."""
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def load(path: Path) -> Any:
    """The object in a file, with its tensors read."""
    with Archive(path) as archive:
        return _read(unpickle(archive, EVERYTHING))


def _read(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _read(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(_read, value))
    return value.load() if isinstance(value, TensorRef) else value
