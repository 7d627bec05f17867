"""Genetic denoising: a population of samples, of which the likelier survive. It samples another distribution."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from parapolicy.samplers.base import DenoiserLike, Rounds, Sample, Sampler, check_count
from parapolicy.samplers.speculative import element_generators
from parapolicy.schedule import Schedule


@dataclass(frozen=True)
class Genetic(Sampler):
    """After the idea of genetic denoising (Clemente et al., NeurIPS 2025); its details may differ from the paper's.

    A population is denoised along a schedule of two to five steps with little noise (DDIM with an eta). Before each
    step its members are resampled: a member is likelier the closer the mean square of its state's noise is to the
    expected value or below. At the end the best member is taken. This prefers the modes of the policy's distribution
    and does not sample it.

    Attributes:
        population: members; 1 is the sequential sampler.
        temperature: of the resampling. A member's score is the mean square of its state's noise over the expected
            value; lower is better.
    """

    keeps_distribution: ClassVar[bool] = False
    reuses_noise: ClassVar[bool] = False

    population: int = 8
    temperature: float = 0.1

    def __post_init__(self) -> None:
        check_count("population", self.population)
        value = self.temperature
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e6:
            raise ValueError(f"temperature is {value!r}, expected a number above 0")

    def rounds(self, schedule: Schedule, noise: Tensor, compiled: bool = False) -> "GeneticRounds":
        return GeneticRounds(self, schedule)


class GeneticRounds(Rounds):
    """Rounds of :class:`Genetic`. One round is one step of the whole population.

    Attributes:
        x, u: (B, P, S) states, and estimates at the step before.
        noise: (T + 1, B, P, S); the first member's is the one given.
        uniform: (T, B, P) for the choice of members.
    """

    def __init__(self, sampler: Genetic, schedule: Schedule) -> None:
        self.sampler, self.schedule = sampler, schedule

    @property
    def done(self) -> bool:
        return self.steps_taken == len(self.schedule)

    def begin(self, noise: Tensor, guess: Tensor | None) -> None:
        self.noise, self.uniform = population_noise(noise, self.sampler.population)
        self.x, self.u, self.steps_taken = self.noise[0], torch.zeros_like(self.noise[0]), 0
        self.estimates = self.x.new_zeros(*self.x.shape[:2], len(self.schedule), self.x.shape[2])  # (B, P, T, S)
        self.score = self.x.new_zeros(self.x.shape[:2])
        self.change = self.x.new_zeros(self.x.shape[:2])

    def advance(self, denoiser: DenoiserLike) -> None:
        j, (batch, population, _) = self.steps_taken, self.x.shape
        step = torch.full((batch * population,), j, device=self.x.device)
        element = torch.arange(batch, device=self.x.device)[:, None].expand(-1, population)
        u = denoiser(self.x.flatten(0, 1), step, element.flatten()).view_as(self.x)
        alpha, sigma = self.schedule.alpha[j], self.schedule.sigma[j]
        self.score = ((self.x - alpha * u) / sigma).square().mean(2)  # (B, P)
        self.change = (u - self.u).square().mean(2).sqrt()
        self.estimates[:, :, j] = u
        if population > 1:
            weight = torch.softmax(-self.score / self.sampler.temperature, 1).cumsum(1)
            parent = torch.searchsorted(weight, self.uniform[j]).clamp(max=population - 1)  # (B, P)
            if j + 1 == len(self.schedule):  # the last step takes the best member
                parent = self.score.argmin(1, keepdim=True).expand_as(parent)
            self.x, self.u, u = self.x[element, parent], self.u[element, parent], u[element, parent]
            self.estimates, self.score = self.estimates[element, parent], self.score[element, parent]
        flat = self.x.flatten(0, 1), u.flatten(0, 1), self.u.flatten(0, 1), self.noise[j + 1].flatten(0, 1)
        self.x = self.schedule.step(*flat, step).view_as(self.x)
        self.u, self.steps_taken = u, j + 1

    def result(self) -> Sample:
        element = torch.arange(len(self.x), device=self.x.device)
        best = torch.zeros_like(element) if self.done else self.score.argmin(1)
        u = self.estimates[element, best]
        u[:, self.steps_taken :] = self.u[element, best][:, None]
        rounds = torch.full_like(element, self.steps_taken)
        complete = torch.full_like(element, self.done, dtype=torch.bool)
        x = self.x[element, best] if self.done else self.u[element, best]
        residual = torch.where(complete, 0.0, self.change[element, best])
        return Sample(x, u, rounds, rounds * self.x.shape[1], residual, complete)


def population_noise(noise: Tensor, population: int) -> tuple[Tensor, Tensor]:
    """Noise of a population, (T + 1, B, P, S), and uniform numbers, (T, B, P), from noise (T + 1, B, S).

    Both come from :func:`parapolicy.samplers.speculative.element_generators`.
    """
    steps, batch, size = noise.shape
    members, uniform = torch.empty(steps, batch, population, size), torch.empty(steps - 1, batch, population)
    for b, generator in enumerate(element_generators(noise)):
        members[:, b] = torch.randn(steps, population, size, generator=generator)
        uniform[:, b] = torch.rand(steps - 1, population, generator=generator)
    members[:, :, 0] = noise
    return members.to(noise.device), uniform.to(noise.device)
