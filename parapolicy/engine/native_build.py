"""Compiling the C++ of the engine ``fused``, by ``setup.py`` for a wheel or at the first use on a machine.

It imports nothing of the package: ``setup.py`` runs it without the package and torch.
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
    "tiles.h",
    "attention.h",
    "work_sharing.h",
    "chunk.h",
    "plan_file.h",
    "parapolicy_fused.h",
)
# No -ffast-math: sums keep their order, and values that are not finite stay so.
COMMON = ("-O3", "-ffp-contract=fast", "-fopenmp-simd", "-std=c++17", "-shared", "-fPIC", "-pthread")
NATIVE = "-mcpu=native" if platform.machine() in ("aarch64", "arm64") else "-march=native"
FLAGS = (*COMMON, NATIVE)
PATIENCE = 300  # timeout of the compiler, s

AVX2 = frozenset(["abm", "avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "movbe", "xsave"])
AVX512 = AVX2 | frozenset(["avx512bw", "avx512cd", "avx512dq", "avx512f", "avx512vl"])
# The libraries of a wheel, best first: compiler flags, and the processor flags of /proc/cpuinfo that it needs.
VARIANTS: Mapping[str, tuple[tuple[str, ...], frozenset[str]]] = {
    "x86-64-v4-amx": (
        (*COMMON, "-march=x86-64-v4", "-mavx512bf16", "-mamx-tile", "-mamx-bf16"),
        AVX512 | {"avx512_bf16", "amx_tile", "amx_bf16"},
    ),
    "x86-64-v4-avx512bf16": ((*COMMON, "-march=x86-64-v4", "-mavx512bf16"), AVX512 | {"avx512_bf16"}),
    "x86-64-v4": ((*COMMON, "-march=x86-64-v4"), AVX512),
    "x86-64-v3": ((*COMMON, "-march=x86-64-v3"), AVX2),
}


def find_compiler() -> str | None:
    """The C++ compiler: ``$CXX``, or one on the path."""
    return os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++") or shutil.which("clang++")


def digest_sources(*more: str) -> str:
    """A library's name: 16 digits of the SHA-256 of the C++ sources and of ``more`` that it depends on."""
    sources = [(FOLDER / name).read_text(encoding="utf-8") for name in (*SOURCES, *HEADERS)]
    return hashlib.sha256("\n".join([*sources, *more]).encode()).hexdigest()[:16]


def prebuilt_path(variant: str) -> Path:
    """The path of a variant in a wheel. The digest in its name keeps libraries of other sources or flags from use."""
    flags, _ = VARIANTS[variant]
    return PREBUILT / f"fused-{variant}-{digest_sources(*flags)}.so"


def compile_library(compiler: str, flags: tuple[str, ...], path: Path) -> None:
    """Compile the sources into a shared library.

    Raises:
        OSError: the compiler fails; the message ends with its output.
    """
    command = [compiler, *flags, *(str(FOLDER / source) for source in SOURCES), "-o", str(path)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    except subprocess.TimeoutExpired as error:
        raise OSError(f"{compiler} did not finish within {PATIENCE} s; set CXX to another compiler") from error
    if done.returncode:
        raise OSError(f"{compiler} failed: {done.stderr[-500:]}")
