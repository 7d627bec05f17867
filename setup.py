"""The part of a wheel that pyproject.toml cannot describe: the evaluation, and compiled libraries of the engine fused.

``eval.py``, ``train.py``, ``conf`` and ``envs`` are at the top of the repository. In a wheel they would be top-level
modules with common names for every program of the environment, so they go into ``parapolicy/application``. An editable
install uses them where they are.
"""

import importlib.util
import logging
import platform
import shutil
import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
APPLICATION = ("eval.py", "train.py", "conf", "envs")

_spec = importlib.util.spec_from_file_location("native_build", ROOT / "parapolicy" / "engine" / "native_build.py")
assert _spec is not None
assert _spec.loader is not None
native_build = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(native_build)


class BuildPython(build_py):
    """Adds the evaluation and the compiled libraries to the packages."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            package = Path(self.build_lib, "parapolicy")
            prebuilt = package / "engine" / native_build.PREBUILT.name
            for folder in (package / "application", prebuilt):
                shutil.rmtree(folder, ignore_errors=True)  # from an earlier build
                folder.mkdir()
            copy_application(package / "application")
            compile_variants(prebuilt)


class BuildWheel(bdist_wheel):
    """Names the platform in the wheel's tag if it contains machine code; any Python 3 can load it."""

    def run(self) -> None:
        self.run_command("build")
        self.root_is_pure = not any(Path(self.get_finalized_command("build_py").build_lib).rglob("*.so"))
        self.distribution.has_ext_modules = lambda: (
            not self.root_is_pure
        )  # otherwise everything goes into the wheel's purelib
        super().run()

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


def copy_application(target: Path) -> None:
    for name in APPLICATION:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, target / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, target)


def compile_variants(target: Path) -> None:
    """Compile every variant of the library. Without a compiler there is none, and the user's machine compiles it."""
    compiler = native_build.find_compiler()
    if compiler is None or sys.platform != "linux" or platform.machine() != "x86_64":
        logging.warning("the wheel has no compiled libraries: they need a C++ compiler, and Linux on x86-64")
        return
    for variant, (flags, _) in native_build.VARIANTS.items():
        try:
            native_build.compile_library(compiler, flags, target / native_build.prebuilt_path(variant).name)
        except OSError as error:
            logging.warning("the wheel has no library for %s: %s", variant, error)


setup(cmdclass={"build_py": BuildPython, "bdist_wheel": BuildWheel})
