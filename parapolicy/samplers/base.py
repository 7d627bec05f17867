"""What every sampler takes and returns."""

from collections.abc import Callable
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
        x: the last states, (B, H, D); the best estimate of them where sampling was stopped early.
        u: the estimates u_j that led there, (B, T, H, D): a guess for the next chunk.
        rounds: batched network calls that each element took part in one after the other, (B,) int64.
        evaluations: network evaluations spent on each element, (B,) int64.
        residual: root mean square change of the estimate of x in its last round, (B,); 0 where x is exact.
        complete: (B,) bool, False where sampling was stopped before the sampler's own rule did.
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


def never() -> bool:
    """The ``stop`` of a sampler that may take its time."""
    return False


class Sampler(Protocol):
    """A pure function of denoiser, schedule and noise; its parameters are dataclass fields."""

    def sample(
        self,
        denoiser: DenoiserLike,
        schedule: Schedule,
        noise: Tensor,
        stop: Callable[[], bool] = never,
        guess: Tensor | None = None,
    ) -> Sample:
        """Draw a batch of samples.

        Args:
            noise: (T + 1, B, H, D): [0] is the first state, [j + 1] the noise of step j.
            stop: asked after every round; True ends sampling there with the best estimate so far. One round is
                always run.
            guess: (B, T, H, D) what the estimates u_j may turn out to be, from the chunk before; None: a cold start.
                It changes what sampling costs, not what is sampled.
        """
        ...


def root_mean_square(value: Tensor) -> Tensor:
    """(B, H, D) -> (B,)."""
    return value.square().mean((1, 2)).sqrt()
