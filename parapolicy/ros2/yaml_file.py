"""Dataclasses from YAML, strictly: errors name unknown, missing, repeated or wrongly typed settings."""

import dataclasses
import math
import types
import typing
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

Settings = TypeVar("Settings")


def read_yaml(path: str | Path, kind: type[Settings]) -> Settings:
    """Read a dataclass of settings from a YAML file.

    Raises:
        ValueError: not YAML, a repeated key, an unknown or missing setting, or a value of the wrong type.
        OSError: the file cannot be read.
    """
    try:
        value = yaml.load(Path(path).read_text(encoding="utf-8"), Loader=_StrictLoader)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    settings: Settings = _convert("", kind, value)
    return settings


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader, which reads plain values only, without repeated keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = sorted({str(key) for key in keys if keys.count(key) > 1})
        if twice:
            raise yaml.YAMLError(f"the keys {twice} occur twice, near line {node.start_mark.line + 1}")
        return super().construct_mapping(node, deep)


def _convert(where: str, kind: Any, value: Any) -> Any:
    """A value checked as a type: a dataclass, or a type of a setting. ``where`` is its name in the file."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in arguments:
            return None
        kinds = [each for each in arguments if each is not type(None)]
        lists = [each for each in kinds if typing.get_origin(each) is list]
        return _convert(where, lists[0] if lists and isinstance(value, list) else kinds[0], value)
    if origin is Literal:
        if value not in arguments:
            raise ValueError(f"{where} is {value!r}, expected one of {list(arguments)}")
        return value
    if origin is list and isinstance(value, list):
        return [_convert(f"{where}[{i}]", arguments[0], each) for i, each in enumerate(value)]
    if (origin is dict or dataclasses.is_dataclass(kind)) and isinstance(value, Mapping):
        if not all(isinstance(key, str) for key in value):
            raise ValueError(f"{where or 'the file'} has keys {list(value)}, expected texts")
        if origin is dict:
            return {key: _convert(f"{where}.{key}", arguments[1], each) for key, each in value.items()}
        return _make(where, kind, value)
    if kind is Any:
        return value
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is kind and not (isinstance(value, float) and not math.isfinite(value)):
        return value
    expected = "a map" if origin is dict or dataclasses.is_dataclass(kind) else getattr(kind, "__name__", str(kind))
    raise ValueError(f"{where or 'the file'} is {value!r}, expected {expected}")


def _make(where: str, kind: Any, value: Mapping[str, Any]) -> Any:
    """A dataclass from a map."""
    known = typing.get_type_hints(kind)
    fields = dataclasses.fields(kind)
    needed = {f.name for f in fields if f.default is f.default_factory is dataclasses.MISSING}
    unknown, missing = sorted(value.keys() - known), sorted(needed - value.keys())
    name = where or "the file"
    if unknown or missing:
        raise ValueError(f"{name} has unknown settings {unknown} and lacks {missing}; known are {sorted(known)}")
    prefix = f"{where}." if where else ""
    arguments = {key: _convert(prefix + key, known[key], each) for key, each in value.items()}
    try:
        return kind(**arguments)
    except ValueError as error:
        raise ValueError(f"{where}: {error}" if where else str(error)) from error
