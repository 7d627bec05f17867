"""torch.compile where it works."""

import warnings
from collections.abc import Callable
from typing import Any

import torch

VARIANTS = 64  # compiled at most of one function


class Compiling:
    """A function that its first call compiles, or finds in torch's own cache on disk.

    Where that fails, for want of a C++ compiler, it warns once and goes on as it is. Other shapes and constants compile
    it again: a sweep has more windows and schedules than the eight variants after which torch goes on uncompiled.

    Args:
        function: of tensors.
        options: of ``torch.compile``.
    """

    def __init__(self, function: Callable[..., Any], **options: Any) -> None:
        self.function, self.options = function, options
        self.compiled: Callable[..., Any] | None = None

    def __call__(self, *arguments: Any) -> Any:
        if self.compiled is None:
            settings = torch._dynamo.config
            settings.recompile_limit = max(settings.recompile_limit, VARIANTS)
            self.compiled = torch.compile(self.function, **self.options)
        try:
            return self.compiled(*arguments)
        except torch._dynamo.exc.TorchDynamoException as error:
            warnings.warn(f"torch.compile does not work here, so the engine runs uncompiled: {error}", stacklevel=2)
            self.compiled = self.function
            return self.function(*arguments)
