"""One step after the other: the reference that every other sampler is measured against."""

from dataclasses import dataclass

import torch
from torch import Tensor

from parapolicy.samplers.base import DenoiserLike, Sample
from parapolicy.schedule import Schedule


@dataclass(frozen=True)
class Sequential:
    """Ancestral sampling (Ho et al., 2020) or whichever solver the schedule holds; T rounds."""

    def sample(self, denoiser: DenoiserLike, schedule: Schedule, noise: Tensor) -> Sample:
        x = noise[0]
        u = torch.zeros_like(x)
        element = torch.arange(len(x), device=x.device)
        for j in range(len(schedule)):
            step = torch.full_like(element, j)
            previous_u, u = u, denoiser(x, step, element)
            x = schedule.step(x, u, previous_u, noise[j + 1], step)
        count = torch.full_like(element, len(schedule))
        return Sample(x=x, rounds=count, evaluations=count, residual=x.new_zeros(len(x)))
