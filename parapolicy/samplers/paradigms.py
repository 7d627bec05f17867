"""ParaDiGMS: Picard iteration over a sliding window (Shih et al., NeurIPS 2023, Algorithm 1)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from parapolicy.samplers.base import DenoiserLike, Sample
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

    def sample(self, denoiser: DenoiserLike, schedule: Schedule, noise: Tensor) -> Sample:
        steps, batch = len(schedule), noise.shape[1]
        x = noise[0][:, None].repeat(1, steps + 1, 1, 1)  # (B, T + 1, H, D)
        u = torch.zeros_like(x)  # [:, j + 1] is u_j, [:, 0] stands before the first
        z = noise[1:].transpose(0, 1)  # (B, T, H, D)
        limit = self.tolerance**2 * torch.cat((schedule.variance, schedule.variance.new_zeros(1)))  # (T + 1,)
        residual = x.new_zeros(batch)
        windows = SlidingWindows(batch, steps, self.window, x.device)
        end = torch.zeros_like(windows.start)  # last state computed; those after it are still equal to it

        while (entries := windows.next_round()) is not None:
            row, step, valid = entries
            last = end[row]
            before = x[row, torch.minimum(step, last)]  # (A, W, H, D)
            u[row.expand_as(step)[valid], step[valid] + 1] = denoiser(
                before[valid], step[valid], row.expand_as(step)[valid]
            )
            drift = schedule.drive(u[row, step + 1], u[row, step], z[row, step], step)
            drift = drift + (schedule.A[step] - 1)[..., None, None] * before
            after = before[:, :1] + drift.cumsum(1)
            change = (after - x[row, torch.minimum(step + 1, last)]).square().mean((2, 3))  # (A, W)

            x[row.expand_as(step)[valid], step[valid] + 1] = after[valid]
            end[row[:, 0]] = step[:, -1] + 1
            residual[row[:, 0]] = change.gather(1, valid.sum(1, keepdim=True) - 1).sqrt()[:, 0]
            windows.advance(entries, change <= limit[step + 1])
        return Sample(x[:, -1], windows.rounds, windows.evaluations, residual)
