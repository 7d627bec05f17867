"""torch.compile where it works."""

import atexit
import os
import shutil
import tempfile
import threading
import warnings
from collections.abc import Callable
from typing import Any

import torch

VARIANTS = 64  # most compiled variants of one function


class Compiling:
    """A function compiled by torch.compile at its first call, or loaded from torch's cache on disk.

    If compiling fails, for example without a C++ compiler, it warns once and runs uncompiled. If torch's cache cannot
    be written, it compiles into a temporary folder. New shapes and constants compile again, up to ``VARIANTS`` times: a
    sweep has more windows and schedules than torch's own limit of eight.

    Args:
        function: takes and returns tensors.
        options: of ``torch.compile``.
    """

    def __init__(self, function: Callable[..., Any], **options: Any) -> None:
        self.function, self.options = function, options
        self.compiled: Callable[..., Any] | None = None
        self._lock = threading.Lock()

    def __call__(self, *arguments: Any) -> Any:
        try:
            if self.compiled is not None:
                return self.compiled(*arguments)
            with self._lock:  # one thread compiles, the others wait for it
                if self.compiled is None:
                    settings = torch._dynamo.config
                    settings.recompile_limit = max(settings.recompile_limit, VARIANTS)
                    _find_cache()
                    compiled = torch.compile(self.function, **self.options)
                    output = compiled(*arguments)
                    self.compiled = compiled
                    return output
            return self.compiled(*arguments)
        except (torch._dynamo.exc.TorchDynamoException, OSError) as error:
            if self.compiled is not self.function:
                warnings.warn(f"torch.compile does not work here, so the engine runs uncompiled: {error}", stacklevel=2)
            self.compiled = self.function
            return self.function(*arguments)


def _find_cache() -> None:
    """Let torch cache compiled code in a temporary folder if its own cannot be written."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir  # takes a second, so only where something compiles

    try:
        with tempfile.TemporaryFile(dir=cache_dir()):
            pass
    except (OSError, KeyError) as error:  # KeyError: the system does not know the user
        try:
            folder = tempfile.mkdtemp(prefix="parapolicy-")
        except OSError:
            return  # compiling will fail and warn
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
        warnings.warn(f"torch's cache cannot be written ({error}), so each process compiles again", stacklevel=3)
