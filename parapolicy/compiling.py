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

VARIANTS = 64  # compiled at most of one function


class Compiling:
    """A function that its first call compiles, or finds in torch's own cache on disk.

    Where that fails, for want of a C++ compiler, it warns once and goes on as it is; where torch's cache cannot be
    written to, it compiles into a temporary folder. Other shapes and constants compile
    it again: a sweep has more windows and schedules than the eight variants after which torch goes on uncompiled.

    Args:
        function: of tensors.
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
            with self._lock:  # one thread compiles, and the others find it done
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
    """Have torch keep what it compiles in a temporary folder where its own cannot be written to."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir  # a second, which only what compiles has to spend

    try:
        with tempfile.TemporaryFile(dir=cache_dir()):
            pass
    except (OSError, KeyError) as error:  # KeyError: a user that the system does not know
        try:
            folder = tempfile.mkdtemp(prefix="parapolicy-")
        except OSError:
            return  # compiling fails, which is said then
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
        warnings.warn(f"torch's cache cannot be written to ({error}), so each process compiles anew", stacklevel=3)
