"""Restarts from the previous chunk: few evaluations, but not the policy's distribution.

The previous chunk, shifted by the executed actions, is used as a state near the end of the schedule, so that only the
last steps remain. The result depends on that chunk and follows no distribution that the policy was trained for. Both
samplers are our own implementations of the papers' ideas and may differ from the papers' code in detail; only RTI-DP's
settings were compared with it. An episode's first chunk runs all steps.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from parapolicy.samplers.base import DenoiserLike, Rounds, Sample, Sampler, check_count
from parapolicy.samplers.sequential import SequentialRounds
from parapolicy.samplers.speculative import acceptance_uniforms
from parapolicy.schedule import Schedule


@dataclass(frozen=True)
class Restart(Sampler):
    """Real-time iteration for diffusion policies (RTI-DP, Duan et al., 2025): the shifted chunk itself is the state.

    Attributes:
        last: steps at the schedule's end that are run.
        renoise: treat the shifted chunk as a clean sample and noise it to the level where these steps begin. With a
            short schedule and ``last`` 2, this is a warm start of two evaluations.
    """

    keeps_distribution: ClassVar[bool] = False

    last: int = 3
    renoise: bool = False

    def __post_init__(self) -> None:
        check_count("last", self.last)
        if not isinstance(self.renoise, bool):
            raise ValueError(f"renoise is {self.renoise!r}, expected True or False")

    def rounds(self, schedule: Schedule, noise: Tensor, compiled: bool = False) -> "RestartRounds":
        return RestartRounds(self, schedule)


class RestartRounds(SequentialRounds):
    """Rounds of :class:`Restart`."""

    def __init__(self, sampler: Restart, schedule: Schedule) -> None:
        super().__init__(schedule)
        self.sampler = sampler

    def begin(self, noise: Tensor, guess: Tensor | None) -> None:
        super().begin(noise, None)
        if guess is None:
            return
        first = self.first = self.steps_taken = max(0, len(self.schedule) - self.sampler.last)
        self.estimates[:, :first] = guess[:, :first]
        self.x = self.u = guess[:, -1]
        if self.sampler.renoise:
            self.x = self.schedule.alpha[first] * self.x + self.schedule.sigma[first] * noise[0]


@dataclass(frozen=True)
class PartialDenoising(Sampler):
    """Partial denoising (Falcon, Chen et al., ICML 2025): continue from a state of the previous chunk that still fits.

    The previous chunk's states are recomputed from its estimates and noise. A first round estimates the clean sample
    at several of them for the new observation. The latest state whose estimate agrees with the previous chunk is taken;
    if none agrees, sampling starts from noise. Agreement is judged over the first half of the horizon, where the two
    chunks overlap.

    Attributes:
        levels: number of states tried, evenly spaced over the schedule.
        threshold: largest root mean square difference of an estimate that agrees, normalised.
        explore: probability of starting from noise although a state agrees.
    """

    keeps_distribution: ClassVar[bool] = False

    levels: int = 8
    threshold: float = 0.05
    explore: float = 0.1

    def __post_init__(self) -> None:
        check_count("levels", self.levels)
        for name in ("threshold", "explore"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 100:
                raise ValueError(f"{name} is {value!r}, expected a number of at least 0")

    def rounds(self, schedule: Schedule, noise: Tensor, compiled: bool = False) -> "PartialDenoisingRounds":
        return PartialDenoisingRounds(self, schedule)


class PartialDenoisingRounds(Rounds):
    """Rounds of :class:`PartialDenoising`; every element is at a step of its own."""

    def __init__(self, sampler: PartialDenoising, schedule: Schedule) -> None:
        self.sampler, self.schedule = sampler, schedule

    @property
    def done(self) -> bool:
        return bool((self.step == len(self.schedule)).all())

    def begin(self, noise: Tensor, guess: Tensor | None) -> None:
        batch, steps = noise.shape[1], len(self.schedule)
        self.noise, self.guess, self.x = noise, guess, noise[0].clone()
        self.element = torch.arange(batch, device=noise.device)
        self.step, self.rounds, self.evaluations = (torch.zeros_like(self.element) for _ in range(3))
        self.estimates = noise.new_zeros(batch, steps, noise.shape[2]) if guess is None else guess.clone()
        self.u = torch.zeros_like(self.x)
        self.residual = noise.new_zeros(batch)

    def advance(self, denoiser: DenoiserLike) -> None:
        if self.guess is not None:
            self._choose(denoiser, self.guess)
            self.guess = None
            return
        live = self.element[self.step < len(self.schedule)]
        self._move(live, denoiser(self.x[live], self.step[live], live))
        self.rounds[live] += 1
        self.evaluations[live] += 1

    def result(self) -> Sample:
        complete = self.step == len(self.schedule)
        x = torch.where(complete[:, None], self.x, self.u)
        u = self.estimates
        for i in self.element[~complete].tolist():
            u[i, self.step[i] :] = self.u[i]
        residual = torch.where(complete, 0.0, self.residual)
        return Sample(x, u, self.rounds, self.evaluations, residual, complete)

    def _choose(self, denoiser: DenoiserLike, guess: Tensor) -> None:
        """Each element's first step, and its state there."""
        batch, steps = guess.shape[:2]
        levels = torch.linspace(0, steps - 1, self.sampler.levels + 1, device=guess.device)[1:].long()
        x, previous, states = self.noise[0], torch.zeros_like(self.noise[0]), []
        for j in range(steps):
            states.append(x)
            step = torch.full_like(self.element, j)
            x, previous = self.schedule.step(x, guess[:, j], previous, self.noise[j + 1], step), guess[:, j]
        tried = torch.stack(states, 1)[:, levels]  # (B, L, S)
        element = self.element[:, None].expand(-1, len(levels))
        u = denoiser(tried.flatten(0, 1), levels.repeat(batch), element.flatten()).view_as(tried)
        shape = self.schedule.sample_shape or guess.shape[2:]
        shared = (u - guess[:, -1:]).unflatten(2, shape)[:, :, : max(1, shape[0] // 2)]
        agrees = shared.flatten(2).square().mean(2).sqrt() <= self.sampler.threshold  # (B, L)
        agrees &= acceptance_uniforms(self.noise)[:, :1] >= self.sampler.explore
        latest = (agrees * torch.arange(1, len(levels) + 1, device=guess.device)).amax(1) - 1  # -1: none
        self.rounds += 1
        self.evaluations += len(levels)
        self.u = guess[:, -1].clone()
        found = self.element[latest >= 0]
        self.step[found], self.x[found] = levels[latest[found]], tried[found, latest[found]]
        before = (self.step[found] - 1).clamp(min=0)
        self.u[found] = guess[found, before]
        self._move(found, u[found, latest[found]])

    def _move(self, element: Tensor, u: Tensor) -> None:
        """One step of these elements, from their estimates."""
        step = self.step[element]
        self.residual[element] = (u - self.u[element]).square().mean(-1).sqrt()
        noise = self.noise[step + 1, element]
        self.x[element] = self.schedule.step(self.x[element], u, self.u[element], noise, step)
        self.u[element], self.estimates[element, step] = u, u
        self.step[element] += 1
