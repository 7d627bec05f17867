"""The public interface is what ``public_api.txt`` says: names, signatures, fields.

After a change that is meant to change it: ``python -m tests.test_public_api --write``, and look at the difference.
"""

import dataclasses
import difflib
import inspect
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import parapolicy
from parapolicy.samplers import make_sampler

SNAPSHOT = Path(__file__).with_name("public_api.txt")
DUNDERS = ("__getitem__", "__enter__", "__len__")  # besides methods without an underscore


class Text:
    """Stands for an annotation or a default, by its text."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __repr__(self) -> str:
        return self.text


def plain(value: Any) -> str:
    """An annotation's text without quotes and without the modules that its names live in, which may move."""
    text = value if isinstance(value, str) else inspect.formatannotation(value)
    return re.sub(r"\b(?:[A-Za-z_]\w*\.)+(?=[A-Za-z_])", "", text).translate(str.maketrans("", "", "'\""))


def signature(function: Callable[..., Any]) -> str:
    found = inspect.signature(function)
    parameters = []
    for parameter in found.parameters.values():
        if parameter.annotation is not parameter.empty:
            parameter = parameter.replace(annotation=Text(plain(parameter.annotation)))
        if callable(parameter.default) and parameter.default is not parameter.empty:
            parameter = parameter.replace(default=Text(parameter.default.__name__))
        parameters.append(parameter)
    returned = found.return_annotation
    text = str(found.replace(parameters=parameters, return_annotation=inspect.Signature.empty))
    return text if returned is inspect.Signature.empty else f"{text} -> {plain(returned)}"


def fields(cls: Any) -> Iterator[str]:
    for field in dataclasses.fields(cls):
        default = "" if field.default is dataclasses.MISSING else f" = {field.default!r}"
        default = default if field.default_factory is dataclasses.MISSING else " = a new one"
        yield f"{field.name}: {plain(field.type)}{default}"


def members(cls: type) -> Iterator[str]:
    """A class's own public methods and properties, and those that it inherits from this library."""
    own = [base for base in cls.__mro__ if base.__module__.partition(".")[0] == "parapolicy"]
    for name in sorted({name for base in own for name in vars(base)}):
        if name.startswith("_") and name not in DUNDERS:
            continue
        value = inspect.getattr_static(cls, name)
        if isinstance(value, property):
            assert value.fget is not None
            yield f"{name}: {plain(inspect.signature(value.fget).return_annotation)}  (property)"
        elif isinstance(value, classmethod | staticmethod):
            yield f"{name}{signature(getattr(cls, name))}  ({type(value).__name__})"
        elif inspect.isfunction(value):
            yield f"{name}{signature(value)}"


def describe() -> str:
    """The whole public interface, one line per thing."""
    lines = []
    for name in sorted(parapolicy.__all__):
        value = getattr(parapolicy, name)
        if inspect.isfunction(value):
            lines += [f"{name}{signature(value)}", ""]
            continue
        bases = [base.__name__ for base in value.__bases__ if base is not object]
        lines.append(f"class {name}" + (f"({', '.join(bases)})" if bases else ""))
        if dataclasses.is_dataclass(value):
            frozen = "frozen " if value.__dataclass_params__.frozen else ""
            lines += [f"    {frozen}dataclass", *(f"    .{line}" for line in fields(value))]
        elif "__init__" in vars(value):
            lines.append(f"    __init__{signature(value.__init__)}")
        lines += [f"    {line}" for line in members(value)] + [""]
    lines.append("samplers, with their parameters")
    for name in parapolicy.list_samplers():
        lines.append(f"    {name}({', '.join(fields(make_sampler(name)))})")
    return "\n".join(lines) + "\n"


def test_the_public_interface_is_the_one_on_file() -> None:
    expected, found = SNAPSHOT.read_text(), describe()
    difference = "\n".join(difflib.unified_diff(expected.splitlines(), found.splitlines(), "on file", "now", "", "", 1))
    if found != expected:
        advice = "the public interface has changed; if that is meant, run python -m tests.test_public_api --write"
        pytest.fail(f"{advice}\n{difference}", pytrace=False)


if __name__ == "__main__" and sys.argv[1:] == ["--write"]:
    SNAPSHOT.write_text(describe())
