"""What every sampler takes and returns."""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from parapolicy.schedule import Schedule


class DenoiserLike(Protocol):
    """``(x (N, H, D), step (N,), element (N,)) -> u (N, H, D)``; see :class:`parapolicy.denoiser.Denoiser`."""

    def __call__(self, x: Tensor, step: Tensor, element: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Sample:
    """A batch of samples and what they cost.

    Attributes:
        x: the last states, (B, H, D).
        rounds: batched network calls that each element took part in one after the other, (B,) int64.
        evaluations: network evaluations spent on each element, (B,) int64.
        residual: root mean square change of x in the round that settled it, (B,); 0 where x is exact.
    """

    x: Tensor
    rounds: Tensor
    evaluations: Tensor
    residual: Tensor


class Sampler(Protocol):
    """A pure function of denoiser, schedule and noise; its parameters are dataclass fields."""

    def sample(self, denoiser: DenoiserLike, schedule: Schedule, noise: Tensor) -> Sample:
        """noise: (T + 1, B, H, D): [0] is the first state, [j + 1] the noise of step j."""
        ...
