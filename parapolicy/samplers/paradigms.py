"""ParaDiGMS: Picard iteration over a sliding window (Shih et al., NeurIPS 2023, Algorithm 1)."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from parapolicy.samplers.base import DenoiserLike, Sample, never
from parapolicy.samplers.window import SlidingWindows, check_window
from parapolicy.schedule import Schedule


@dataclass(frozen=True)
class ParaDiGMS:
    """Picard iteration on the states.

    A round evaluates the network at every state of the window and sums the increments from the window's start:
    x_{i+1} = x_start + sum_{j=start..i} (step(x_j) - x_j), with the noise drawn beforehand.

    Attributes:
        window: states evaluated per round.
        tolerance: a state is settled when its mean squared change is at most tolerance² times the variance of the
            noise that the *next* step adds (the published rule; it makes the last two states wait until they no
            longer change at all). 0: exact.
    """

    window: int = 20
    tolerance: float = 0.1

    def __post_init__(self) -> None:
        check_window(self.window, self.tolerance)

    def sample(
        self,
        denoiser: DenoiserLike,
        schedule: Schedule,
        noise: Tensor,
        stop: Callable[[], bool] = never,
        guess: Tensor | None = None,
    ) -> Sample:
        windows = SlidingWindows(schedule, noise, self.window, guess)
        x, u, z = windows.x, windows.u, windows.z
        limit = self.tolerance**2 * torch.cat((schedule.variance, schedule.variance.new_zeros(1)))  # (T + 1,)

        while (entries := windows.next_round()) is not None:
            row, step, valid = entries
            if guess is None:
                end = windows.end[row]  # states after it are still equal to it
            else:
                windows.extrapolate(row, step[:, -1] + 1)
                end = torch.full_like(row, len(schedule))
            before = x[row, torch.minimum(step, end)]  # (A, W, H, D)
            target = row.expand_as(step)[valid], step[valid] + 1
            u[target] = denoiser(before[valid], step[valid], target[0])
            drift = schedule.drive(u[row, step + 1], u[row, step], z[row, step], step)
            drift = drift + (schedule.A[step] - 1)[..., None, None] * before
            after = before[:, :1] + drift.cumsum(1)
            change = (after - x[row, torch.minimum(step + 1, end)]).square().mean((2, 3))  # (A, W)
            x[target] = after[valid]
            windows.advance(entries, change <= limit[step + 1])
            if stop():
                break
        return windows.result()
