"""The configuration in a published checkpoint. Values are looked up one by one; nothing is instantiated or evaluated.

It is an omegaconf tree, taken apart by the unpickler, or plain dictionaries. References to other values (``${a.b}``)
are followed. Of the other forms of ``${…}``, only a sum of references is supported, because every published
configuration has one. Expressions, environment variables and clocks are refused.
"""

import re
from collections.abc import Callable
from typing import Any

from parapolicy.checkpoint.inert import Instance

MAX_REFERENCES, MAX_FOLLOWED = 20, 10_000  # in one chain, and in total
MAX_NODES, MAX_DEPTH = 10_000, 16  # of one value

_REFERENCE = re.compile(r"\$\{\s*([A-Za-z_]\w*(?:\.\w+)*)\s*\}")
_TERM = r"\s*(?:\$\{[\w.]+\}|\d{1,6})\s*"
_SUM = re.compile(rf"\$\{{eval:\s*'?({_TERM}(?:\+{_TERM})+)'?\s*\}}")
_MISSING = object()


class Unresolved(ValueError):
    """A value of the configuration is an expression, which is not evaluated here."""


class Config:
    """Values by their path, such as ``policy.horizon``.

    Args:
        root: the configuration.
        error: makes an error that names the file.
    """

    def __init__(self, root: Any, error: Callable[[str], Exception]) -> None:
        self._root, self._error, self._left = root, error, MAX_FOLLOWED

    def get(self, path: str, default: Any = _MISSING) -> Any:
        """The plain value at a path: numbers, texts, lists and dictionaries.

        Raises:
            CheckpointError: it is missing and has no default, or it is an expression.
        """
        try:
            found = self._value(path)
        except Unresolved as error:
            raise self._error(str(error)) from error
        if found is _MISSING:
            if default is _MISSING:
                raise self._error(f"its config lacks {path}; save the checkpoint with its whole config")
            return default
        return found

    def known(self, path: str) -> Any:
        """As :meth:`get`, but None if the value is missing or an expression."""
        try:
            found = self._value(path)
        except Unresolved:
            return None
        return None if found is _MISSING else found

    def flag(self, path: str, default: Any = _MISSING) -> bool:
        """A value that is true or false."""
        found = self.get(path, default)
        if not isinstance(found, bool):
            raise self._error(f"{path} is {found!r:.80} in its config, expected true or false")
        return found

    def count(self, path: str, default: Any = _MISSING, least: int = 1) -> int:
        """A whole number of at least ``least``."""
        found = self.get(path, default)
        if type(found) is not int or not least <= found < 2**31:
            raise self._error(f"{path} is {found!r:.80} in its config, expected a whole number of at least {least}")
        return found

    def text(self, path: str, default: Any = _MISSING) -> str:
        """A text of at most 200 characters."""
        found = self.get(path, default)
        if not isinstance(found, str) or len(found) > 200:
            raise self._error(f"{path} is {found!r:.80} in its config, expected a short text")
        return found

    def keys(self, path: str) -> list[str]:
        """The names in the dictionary at a path; their values are not read."""
        try:
            content = self._content(self._find(path, 0), path, 0)
        except Unresolved as error:
            raise self._error(str(error)) from error
        if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
            raise self._error(f"{path} is not a dictionary in its config; save the checkpoint with its whole config")
        return list(content)

    def _value(self, path: str) -> Any:
        node = self._find(path, 0)
        return _MISSING if node is _MISSING else self._plain(node, path, [MAX_NODES], 0)

    def _find(self, path: str, references: int) -> Any:
        node = self._root
        for part in path.split("."):
            content = self._content(node, path, references)
            if isinstance(content, dict) and part in content:
                node = content[part]
            elif isinstance(content, list) and part.isdigit() and int(part[:9]) < len(content):
                node = content[int(part[:9])]
            else:
                return _MISSING
        return node

    def _content(self, node: Any, path: str, references: int) -> Any:
        """A node's content after following references: a dictionary or list of nodes, or a plain value."""
        if isinstance(node, Instance):
            state = node.state if isinstance(node.state, dict) else {}
            node = state.get("_val", state.get("_content", _MISSING))
        if isinstance(node, str) and "${" in node:
            return self._follow(node, path, references)
        if node == "???" if isinstance(node, str) else node is _MISSING:
            raise Unresolved(f"{path} has no value in its config; save the checkpoint with its whole config")
        return node

    def _follow(self, text: str, path: str, references: int) -> Any:
        self._left -= 1
        if references >= MAX_REFERENCES or self._left < 0:
            raise Unresolved(f"{path} is {text!r:.60} in its config, which refers to itself; give it a value")
        match = _REFERENCE.fullmatch(text)
        if match:
            node = self._find(match[1], references + 1)
            if node is _MISSING:
                raise Unresolved(f"{path} is {text!r:.60} in its config, which does not exist; give it a value")
            return self._content(node, path, references + 1)
        match = _SUM.fullmatch(text) if len(text) < 200 else None
        terms = [t.strip() for t in match[1].split("+")] if match else []
        values = [int(t) if t.isdigit() else self._follow(t, path, references + 1) for t in terms]
        if not values or not all(type(value) is int for value in values):
            raise Unresolved(
                f"{path} is the expression {text!r:.100} in its config, and expressions in files are never evaluated; "
                "save it with the config resolved (OmegaConf.resolve), as the published train.py does"
            )
        return sum(values)

    def _plain(self, node: Any, path: str, left: list[int], depth: int) -> Any:
        left[0] -= 1
        if left[0] < 0 or depth > MAX_DEPTH:
            raise Unresolved(f"{path} is too large or nested too deeply in its config; give it a plain value")
        content = self._content(node, path, 0)
        if isinstance(content, dict) and all(isinstance(key, str) for key in content):
            return {key: self._plain(value, path, left, depth + 1) for key, value in content.items()}
        if isinstance(content, list | tuple):
            return [self._plain(value, path, left, depth + 1) for value in content]
        if content is None or isinstance(content, str | int | float):
            return content
        raise Unresolved(f"{path} is a {type(content).__name__} in its config, expected a plain value")
