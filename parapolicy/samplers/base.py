"""Base classes of the samplers: parameters, and rounds over a batch of flat states."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from numbers import Real
from typing import ClassVar, Protocol

from torch import Tensor

from parapolicy.schedule import Schedule


class DenoiserLike(Protocol):
    """``(x (N, S), step (N,), element (N,)) -> u (N, S)``; see :class:`parapolicy.denoiser.Denoiser`."""

    def __call__(self, x: Tensor, step: Tensor, element: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Sample:
    """A batch of samples and what they cost.

    Attributes:
        x: final states, (B, S); their best estimate where sampling was stopped early.
        u: the estimates u_j that led there, (B, T, S): a guess for the next chunk.
        rounds: successive batched network calls that each element took part in, (B,) int64.
        evaluations: network evaluations spent on each element, (B,) int64.
        residual: root mean square change of the estimate of x in its last round, (B,); 0 where x is exact.
        complete: (B,) bool, False where sampling was stopped early.
        error: (B,) estimated largest absolute error of x, infinite where nothing is known yet; None for samplers that
            do not estimate it.
        rejections: (B,) int64, drafted states that a speculative sampler refused; None for the others.
    """

    x: Tensor
    u: Tensor
    rounds: Tensor
    evaluations: Tensor
    residual: Tensor
    complete: Tensor
    error: Tensor | None = None
    rejections: Tensor | None = None


class Rounds(ABC):
    """A sampler at work on one batch, one round (one batched network call) at a time.

    Attributes:
        fixed_shapes: :meth:`advance` works on the same memory in every round of every chunk and never waits for the
            device, so that a CUDA graph can replay it.
    """

    fixed_shapes: ClassVar[bool] = False

    @property
    @abstractmethod
    def done(self) -> bool | Tensor:
        """Whether every element has its sample; a () bool tensor where the answer is on the device."""

    @abstractmethod
    def begin(self, noise: Tensor, guess: Tensor | None) -> None:
        """Start a batch of samples; see :meth:`parapolicy.engine.Engine.run`."""

    @abstractmethod
    def advance(self, denoiser: DenoiserLike) -> None:
        """One round of every element that is not done."""

    @abstractmethod
    def result(self) -> Sample:
        """The samples, or their best estimate after the rounds so far. The tensors belong to the caller."""


class Sampler(ABC):
    """An algorithm and its parameters, which are dataclass fields. A sample is a pure function of denoiser, schedule
    and noise.

    Attributes:
        keeps_distribution: samples follow the schedule's distribution, within the tolerance. Plans never choose a
            sampler without this; reports recommend one only on request.
        is_reference: it computes the schedule step by step; the other samplers are compared with it.
        reuses_noise: samples stay exact when the previous chunk's noise is used again.
        uses_calibration: a calibrated schedule makes its samples more accurate.
    """

    keeps_distribution: ClassVar[bool] = True
    is_reference: ClassVar[bool] = False
    reuses_noise: ClassVar[bool] = True
    uses_calibration: ClassVar[bool] = False

    @property
    def asked_error(self) -> float | None:
        """The error that the sampler was asked to stay below; None for samplers without an error estimate."""
        return None

    @abstractmethod
    def rounds(self, schedule: Schedule, noise: Tensor, compiled: bool = False) -> Rounds:
        """The rounds of a batch.

        Args:
            schedule: the steps.
            noise: (T + 1, B, S), for its shape and device.
            compiled: compile the work between two network calls, if the sampler supports it.
        """


def root_mean_square(value: Tensor) -> Tensor:
    """(…, S) -> (…)."""
    return value.square().mean(-1).sqrt()


def check_count(name: str, value: object, least: int = 1) -> None:
    """Raise ``ValueError`` unless a sampler's parameter is a whole number of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} is {value!r}, expected a whole number of at least {least}")


def check_tolerance(value: float) -> None:
    """Raise ``ValueError`` unless a tolerance is a finite number of at least 0."""
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 <= value < float("inf"):
        raise ValueError(f"tolerance is {value!r}, expected a number of at least 0 (0: exact)")
