"""Samplers by name. Each file holds one algorithm."""

import dataclasses
from typing import Any

from parapolicy.samplers.anderson import Anderson
from parapolicy.samplers.base import DenoiserLike, Rounds, Sample, Sampler
from parapolicy.samplers.collocation import Collocation
from parapolicy.samplers.genetic import Genetic
from parapolicy.samplers.paradigms import ParaDiGMS
from parapolicy.samplers.parareal import Parareal
from parapolicy.samplers.restart import PartialDenoising, Restart
from parapolicy.samplers.secant import Secant
from parapolicy.samplers.semi_implicit import SemiImplicit
from parapolicy.samplers.sequential import Sequential
from parapolicy.samplers.speculative import Speculative

SAMPLERS: dict[str, type[Any]] = {
    "sequential": Sequential,
    "paradigms": ParaDiGMS,
    "semi_implicit": SemiImplicit,
    "anderson": Anderson,
    "secant": Secant,
    "speculative": Speculative,
    "parareal": Parareal,
    "collocation": Collocation,
    # These do not sample the policy's distribution; they are here for comparison:
    "restart": Restart,
    "partial_denoising": PartialDenoising,
    "genetic": Genetic,
}

__all__ = [
    "SAMPLERS",
    "Anderson",
    "Collocation",
    "DenoiserLike",
    "Genetic",
    "ParaDiGMS",
    "Parareal",
    "PartialDenoising",
    "Restart",
    "Rounds",
    "Sample",
    "Sampler",
    "Secant",
    "SemiImplicit",
    "Sequential",
    "Speculative",
    "list_samplers",
    "make_sampler",
]


def list_samplers() -> list[str]:
    """The names that :func:`make_sampler`, ``load_policy`` and ``with_sampler`` take."""
    return list(SAMPLERS)


def make_sampler(name: str, **parameters: Any) -> Sampler:
    """A sampler by name.

    Raises:
        ValueError: an unknown name or parameter, or a parameter's value out of range.
    """
    if name not in SAMPLERS:
        raise ValueError(f"sampler is {name!r}, expected one of {list_samplers()}")
    known = [field.name for field in dataclasses.fields(SAMPLERS[name])]
    if unknown := sorted(set(parameters) - set(known)):
        raise ValueError(f"sampler {name!r} has no parameters {unknown}, expected {known or 'none'}")
    return SAMPLERS[name](**parameters)
