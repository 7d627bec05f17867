"""The C++ of the engine ``fused``, compiled once for this processor into the user's own cache folder."""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from parapolicy.files import cache_folder, replacing

FOLDER = Path(__file__).parent
SOURCES = ("fused.cpp", "work_sharing.cpp", "chunk.cpp", "plan_file.cpp", "embedding.cpp")
HEADERS = (
    "fused.h",
    "vectors.h",
    "convolution.h",
    "attention.h",
    "work_sharing.h",
    "chunk.h",
    "plan_file.h",
    "parapolicy_fused.h",
)
# No -ffast-math: sums keep their order, and what is not finite stays so.
NATIVE = "-mcpu=native" if platform.machine() in ("aarch64", "arm64") else "-march=native"
FLAGS = ("-O3", NATIVE, "-ffp-contract=fast", "-fopenmp-simd", "-std=c++17", "-shared", "-fPIC", "-pthread")
PATIENCE = 300  # seconds of compiling


@functools.cache
def load_library(flags: tuple[str, ...] = FLAGS) -> ctypes.CDLL:
    """The library, compiled at the first use on a machine, in some seconds.

    It is kept by source, compiler, flags and processor. Nothing of a policy goes into it.

    Raises:
        OSError: there is no C++ compiler, or it fails; the message has its words.
    """
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++") or shutil.which("clang++")
    if compiler is None:
        raise OSError("there is no C++ compiler; install g++, or set CXX")
    sources = [(FOLDER / name).read_text() for name in (*SOURCES, *HEADERS)]
    key = hashlib.sha256("\n".join([*sources, *flags, _version(compiler), _processor()]).encode())
    name = f"fused-{key.hexdigest()[:16]}.so"
    try:
        path = cache_folder() / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.is_file():
            with replacing(path, f"{os.getpid()}.partial") as partial:
                _compile(compiler, flags, partial)
        return _declared(ctypes.CDLL(str(path)))
    except (RuntimeError, PermissionError, FileNotFoundError, NotADirectoryError):  # no home, or no writing there
        with tempfile.TemporaryDirectory(prefix="parapolicy-") as folder:
            path = Path(folder) / name
            _compile(compiler, flags, path)
            return _declared(ctypes.CDLL(str(path)))  # stays loaded when the file is gone


def _compile(compiler: str, flags: tuple[str, ...], path: Path) -> None:
    command = [compiler, *flags, *(str(FOLDER / source) for source in SOURCES), "-o", str(path)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    except subprocess.TimeoutExpired as error:
        raise OSError(f"{compiler} did not finish within {PATIENCE} s") from error
    if done.returncode:
        raise OSError(f"{compiler} fails: {done.stderr[-500:]}")


def _version(compiler: str) -> str:
    try:
        return subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=PATIENCE).stdout
    except (subprocess.TimeoutExpired, OSError) as error:
        raise OSError(f"the C++ compiler {compiler!r} does not run ({error}); install g++, or set CXX") from error


def _processor() -> str:
    """What the compiler looks at for ``native``."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        return platform.processor() + platform.machine()
    return "\n".join(line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part")))


class Network(ctypes.Structure):
    """A packed network, as the structure of that name in ``fused.h``, which says what the fields are."""

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
    """FiLM values by step and by batch element, as the structure of that name in ``fused.h``."""

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
