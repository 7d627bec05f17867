"""One step after the other: the reference that every other sampler is measured against."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from parapolicy.samplers.base import DenoiserLike, Sample, never, root_mean_square
from parapolicy.schedule import Schedule


@dataclass(frozen=True)
class Sequential:
    """Ancestral sampling (Ho et al., 2020) or whichever solver the schedule holds; T rounds.

    Stopped early, it returns the last estimate of the clean sample. A guess is of no use to it.
    """

    def sample(
        self,
        denoiser: DenoiserLike,
        schedule: Schedule,
        noise: Tensor,
        stop: Callable[[], bool] = never,
        guess: Tensor | None = None,
    ) -> Sample:
        x = noise[0]
        u = torch.zeros_like(x)
        estimates = noise.new_zeros(noise.shape[1], len(schedule), *noise.shape[2:])
        element = torch.arange(len(x), device=x.device)
        for j in range(len(schedule)):
            step = torch.full_like(element, j)
            previous_u, u = u, denoiser(x, step, element)
            estimates[:, j:] = u[:, None]
            x = schedule.step(x, u, previous_u, noise[j + 1], step)
            if stop():
                break
        complete = torch.full_like(element, j + 1 == len(schedule), dtype=torch.bool)
        residual = torch.where(complete, 0.0, root_mean_square(u - previous_u))
        count = torch.full_like(element, j + 1)
        return Sample(x if j + 1 == len(schedule) else u, estimates, count, count, residual, complete)
