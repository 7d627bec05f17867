"""How the C++ of the engine ``fused`` is compiled, by ``setup.py`` for a wheel and at the first use on a machine.

It imports nothing of the package: ``setup.py`` runs it where neither the package nor torch is installed.
"""

import hashlib
import os
import platform
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

FOLDER = Path(__file__).parent
PREBUILT = FOLDER / "prebuilt"  # only in wheels
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
COMMON = ("-O3", "-ffp-contract=fast", "-fopenmp-simd", "-std=c++17", "-shared", "-fPIC", "-pthread")
NATIVE = "-mcpu=native" if platform.machine() in ("aarch64", "arm64") else "-march=native"
FLAGS = (*COMMON, NATIVE)
PATIENCE = 300  # seconds of compiling

AVX2 = frozenset(["abm", "avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "movbe", "xsave"])
AVX512 = AVX2 | frozenset(["avx512bw", "avx512cd", "avx512dq", "avx512f", "avx512vl"])
# The libraries of a wheel, best first: flags, and what the processor must have, in the words of /proc/cpuinfo.
VARIANTS: Mapping[str, tuple[tuple[str, ...], frozenset[str]]] = {
    "x86-64-v4-avx512bf16": ((*COMMON, "-march=x86-64-v4", "-mavx512bf16"), AVX512 | {"avx512_bf16"}),
    "x86-64-v4": ((*COMMON, "-march=x86-64-v4"), AVX512),
    "x86-64-v3": ((*COMMON, "-march=x86-64-v3"), AVX2),
}


def find_compiler() -> str | None:
    """The C++ compiler: ``$CXX``, or one on the path."""
    return os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++") or shutil.which("clang++")


def digest_sources(*more: str) -> str:
    """Names a library: 16 digits of the SHA-256 of the C++ sources and of what else it depends on."""
    sources = [(FOLDER / name).read_text(encoding="utf-8") for name in (*SOURCES, *HEADERS)]
    return hashlib.sha256("\n".join([*sources, *more]).encode()).hexdigest()[:16]


def prebuilt_path(variant: str) -> Path:
    """Where a wheel has a variant. The name holds the digest of sources and flags: others find no file."""
    flags, _ = VARIANTS[variant]
    return PREBUILT / f"fused-{variant}-{digest_sources(*flags)}.so"


def compile_library(compiler: str, flags: tuple[str, ...], path: Path) -> None:
    """Compile the sources into a shared library.

    Raises:
        OSError: the compiler fails; the message has its words.
    """
    command = [compiler, *flags, *(str(FOLDER / source) for source in SOURCES), "-o", str(path)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    except subprocess.TimeoutExpired as error:
        raise OSError(f"{compiler} did not finish within {PATIENCE} s") from error
    if done.returncode:
        raise OSError(f"{compiler} fails: {done.stderr[-500:]}")
