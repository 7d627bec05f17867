"""ParaDiGMS: Picard iteration over a sliding window (Shih et al., NeurIPS 2023, Algorithm 1)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from parapolicy.samplers.base import DenoiserLike, Sampler, check_count, check_tolerance
from parapolicy.samplers.window import WindowRounds
from parapolicy.schedule import Schedule


@dataclass(frozen=True)
class ParaDiGMS(Sampler):
    """Picard iteration on the states.

    A round evaluates the network at every state of the window and sums the increments from the window's start:
    x_{i+1} = x_start + sum_{j=start..i} (step(x_j) - x_j), with the noise drawn beforehand.

    Attributes:
        window: states evaluated per round.
        tolerance: a state is settled when its mean squared change is at most tolerance² times the variance of the
            noise that the *next* step adds. This is the published rule; under it the last two states must stop
            changing altogether. 0: exact.
    """

    window: int = 20
    tolerance: float = 0.1

    def __post_init__(self) -> None:
        check_count("window", self.window)
        check_tolerance(self.tolerance)

    def rounds(self, schedule: Schedule, noise: Tensor, compiled: bool = False) -> "ParaDiGMSRounds":
        return ParaDiGMSRounds(self, schedule)


class ParaDiGMSRounds(WindowRounds):
    """Rounds of :class:`ParaDiGMS`."""

    def __init__(self, sampler: ParaDiGMS, schedule: Schedule) -> None:
        super().__init__(schedule, sampler.window)
        variance = torch.cat((schedule.variance, schedule.variance.new_zeros(1)))
        self.limit = sampler.tolerance**2 * variance  # (T + 1,)

    def begin(self, noise: Tensor, guess: Tensor | None) -> None:
        super().begin(noise, guess)
        self.cold = guess is None

    def advance(self, denoiser: DenoiserLike) -> None:
        entries, x, u = self.entries(), self.x, self.u
        element, step, valid = entries
        if self.cold:
            end = self.end[element]  # states after it are still equal to it
        else:
            self.extrapolate(element, step[:, -1] + 1)
            end = torch.full_like(element, self.steps)
        before = x[element, torch.minimum(step, end)]  # (A, W, S)
        elements, steps = entries.inside
        u[elements, steps + 1] = denoiser(before[valid], steps, elements)
        drift = self.schedule.increment(u[element, step + 1], u[element, step], self.z[element, step], step)
        drift = drift + (self.schedule.A[step] - 1)[..., None] * before
        after = before[:, :1] + drift.cumsum(1)
        change = (after - x[element, torch.minimum(step + 1, end)]).square().mean(2)  # (A, W)
        x[elements, steps + 1] = after[valid]
        self.move(entries, change <= self.limit[step + 1])
