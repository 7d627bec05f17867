"""The library of the engine ``fused``: a wheel's binary, or compiled once into the user's cache folder."""

import ctypes
import functools
import os
import platform
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from parapolicy.engine.native_build import (
    FLAGS,
    PATIENCE,
    VARIANTS,
    compile_library,
    digest_sources,
    find_compiler,
    prebuilt_path,
)
from parapolicy.files import cache_folder, replacing


@functools.cache
def load_library(flags: tuple[str, ...] = FLAGS) -> ctypes.CDLL:
    """The library for this processor: the wheel's, or one compiled at the first use on a machine, in some seconds.

    Compiled libraries are cached by source, compiler, flags and processor. They contain nothing of a policy.

    Raises:
        OSError: there is no C++ compiler, or it fails; the message ends with its output.
    """
    if flags == FLAGS and (prebuilt := _find_prebuilt(_processor())) is not None:
        return _declared(prebuilt)
    compiler = find_compiler()
    if compiler is None:
        raise OSError("there is no C++ compiler; install g++ or set CXX")
    name = f"fused-{digest_sources(*flags, _version(compiler), _processor())}.so"
    try:
        path = cache_folder() / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.is_file():
            with replacing(path, f"{os.getpid()}.partial") as partial:
                compile_library(compiler, flags, partial)
        return _declared(ctypes.CDLL(str(path)))
    except (
        RuntimeError,
        PermissionError,
        FileNotFoundError,
        NotADirectoryError,
    ):  # no home folder, or it cannot be written
        with tempfile.TemporaryDirectory(prefix="parapolicy-") as folder:
            path = Path(folder) / name
            compile_library(compiler, flags, path)
            return _declared(ctypes.CDLL(str(path)))  # stays loaded when the file is deleted


def _find_prebuilt(processor: str) -> ctypes.CDLL | None:
    """The wheel's best library for a processor with these /proc/cpuinfo lines; None if no library fits."""
    words = frozenset(processor.split())
    for variant, (_, needed) in VARIANTS.items():
        if needed <= words and (path := prebuilt_path(variant)).is_file():
            try:
                return ctypes.CDLL(str(path))
            except OSError:  # needs a newer C library, or is damaged
                continue
    return None


def _version(compiler: str) -> str:
    try:
        return subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=PATIENCE).stdout
    except (subprocess.TimeoutExpired, OSError) as error:
        raise OSError(f"the C++ compiler {compiler!r} does not run ({error}); install g++ or set CXX") from error


def _processor() -> str:
    """The processor's properties that the compiler's ``native`` depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        return platform.processor() + platform.machine()
    return "\n".join(line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part")))


class Network(ctypes.Structure):
    """A packed network: the structure of that name in ``fused.h``, which documents the fields."""

    _fields_ = (
        ("layers", ctypes.c_void_p),
        ("count", ctypes.c_int64),
        ("weights", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
        ("memory", ctypes.c_int64),
        ("length", ctypes.c_int64),
        ("channels", ctypes.c_int64),
        ("film", ctypes.c_int64),
        ("precision", ctypes.c_int64),
    )


class Films(ctypes.Structure):
    """FiLM values by step and by batch element: the structure of that name in ``fused.h``."""

    _fields_ = (
        ("by_step", ctypes.c_void_p),
        ("steps", ctypes.c_int64),
        ("by_element", ctypes.c_void_p),
        ("elements", ctypes.c_int64),
    )


def _declared(library: ctypes.CDLL) -> ctypes.CDLL:
    integer, pointer = ctypes.c_int64, ctypes.c_void_p
    library.parapolicy_multiplies_bfloat16.restype = integer
    function: Any = library.parapolicy_compute
    function.argtypes = [
        *(ctypes.POINTER(Network), ctypes.POINTER(Films)),
        *(pointer, pointer, pointer, integer, pointer, integer),
    ]
    function.restype = integer
    library.parapolicy_sequential.argtypes = [pointer, pointer, integer, pointer, pointer]
    library.parapolicy_collocation.argtypes = [pointer, pointer, pointer, integer, pointer, pointer, pointer]
    for loop in (library.parapolicy_sequential, library.parapolicy_collocation):
        loop.restype = integer
    library.parapolicy_film_values.argtypes = [pointer, pointer, integer, integer, integer, pointer]
    library.parapolicy_film_values.restype = None
    return library
