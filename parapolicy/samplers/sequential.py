"""One step after the other: the reference that every other sampler is measured against."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from parapolicy.samplers.base import DenoiserLike, Rounds, Sample, Sampler, root_mean_square
from parapolicy.schedule import Schedule


@dataclass(frozen=True)
class Sequential(Sampler):
    """Ancestral sampling (Ho et al., 2020), or the schedule's own solver; T rounds.

    If stopped early, it returns the last estimate of the clean sample. It ignores a guess.
    """

    is_reference: ClassVar[bool] = True

    def rounds(self, schedule: Schedule, noise: Tensor, compiled: bool = False) -> "SequentialRounds":
        return SequentialRounds(schedule)


class SequentialRounds(Rounds):
    """One round is one step.

    Attributes:
        first: index of the first step that is run.
        steps_taken: index of the next step.
    """

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule

    @property
    def done(self) -> bool:
        return self.steps_taken == len(self.schedule)

    def begin(self, noise: Tensor, guess: Tensor | None) -> None:
        self.noise, self.first, self.steps_taken = noise, 0, 0
        self.x, self.u = noise[0], torch.zeros_like(noise[0])
        self.estimates = noise.new_zeros(noise.shape[1], len(self.schedule), noise.shape[2])
        self.element = torch.arange(len(self.x), device=noise.device)

    def advance(self, denoiser: DenoiserLike) -> None:
        j = self.steps_taken
        step = torch.full_like(self.element, j)
        self.previous_u, self.u = self.u, denoiser(self.x, step, self.element)
        self.estimates[:, j] = self.u
        self.x = self.schedule.step(self.x, self.u, self.previous_u, self.noise[j + 1], step)
        self.steps_taken += 1

    def result(self) -> Sample:
        self.estimates[:, self.steps_taken :] = self.u[:, None]
        complete = torch.full_like(self.element, self.done, dtype=torch.bool)
        residual = torch.where(complete, 0.0, root_mean_square(self.u - self.previous_u))
        count = torch.full_like(self.element, self.steps_taken - self.first)
        x = self.x if self.done else self.u
        return Sample(x, self.estimates, count, count, residual, complete)
