"""Hostile input, made up at random: ``python -m tests.fuzzing`` (``make fuzz``), and a short slice of it in the tests.

Each module of this package has ``CASES``: name -> case. A case gets a random generator and an empty folder, makes one
input and tries it. It returns "refused" (an error named what is wrong) or "equal" (the input was taken, and the result
is right). Anything else that it returns or raises is a finding.
"""

import logging
import pkgutil
import shlex
import signal
import tempfile
import threading
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import numpy as np
import torch

Case = Callable[[np.random.Generator, Path], str]
OUTCOMES = ("refused", "equal")
LIMIT = 120  # seconds; a case that takes longer hangs


@dataclass(frozen=True)
class Finding:
    """What a case returned or raised that it should not have.

    Attributes:
        case, seed, number: repeat it.
        what: its type and text.
    """

    case: str
    seed: int
    number: int
    what: str

    def __str__(self) -> str:
        repeat = f"python -m tests.fuzzing --seed {self.seed} --case {shlex.quote(self.case)} --number {self.number}"
        return f"{self.case}: {self.what}\n  repeat it: {repeat}"


def find_cases() -> dict[str, Case]:
    """``module.case`` -> case, of every module of this package."""
    names = [module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_")]
    modules = {name: import_module(f"{__name__}.{name}") for name in names}
    return {f"{name}.{case}": function for name, module in modules.items() for case, function in module.CASES.items()}


def run_case(name: str, case: Case, seed: int, number: int) -> str:
    """One try; the same ``name``, ``seed`` and ``number`` give the same input. Raises what the case raises."""
    torch.manual_seed(0)  # weights of a policy that a case keeps do not depend on which try made it
    generator = np.random.default_rng([seed, zlib.crc32(name.encode()), number])
    with tempfile.TemporaryDirectory(prefix="fuzz") as folder, _quiet(), _limited():
        return case(generator, Path(folder))


def try_case(name: str, case: Case, seed: int, number: int) -> str | Finding:
    """One try: its outcome, or what was found."""
    try:
        outcome = run_case(name, case, seed, number)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # panics of compiled packages are no Exception
        return Finding(name, seed, number, f"{type(error).__name__}: {error}")
    return outcome if outcome in OUTCOMES else Finding(name, seed, number, f"returned {outcome!r}")


@contextmanager
def _quiet() -> Iterator[None]:
    """Without warnings and log lines: a case checks what is raised and what comes out."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


@contextmanager
def _limited() -> Iterator[None]:
    """A case that hangs is a finding."""

    def ring(number: int, frame: object) -> None:
        raise TimeoutError(f"no end after {LIMIT} s")

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(LIMIT)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
