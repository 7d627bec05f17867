"""Semi-implicit Picard iteration: only the network term is iterated, the linear part is solved exactly.

This is the "order T" fixed-point system of ParaTAA (Tang et al., ICML 2024) without its acceleration, inside the
sliding window of ParaDiGMS (Shih et al., NeurIPS 2023).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from parapolicy.samplers.base import DenoiserLike, Sample
from parapolicy.samplers.window import SlidingWindows, check_window
from parapolicy.schedule import Schedule


@dataclass(frozen=True)
class SemiImplicit:
    """Fixed-point iteration on the estimates u.

    A round evaluates u at every state of the window, then recomputes the states from the window's start by the
    schedule's own recurrence. States that enter the window are extrapolated with the last u.

    Attributes:
        window: states evaluated per round.
        tolerance: a state is settled when its root mean square change is at most this many standard deviations of
            the noise that the step to it adds (of the last noisy step, for the last state). 0: exact.
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
        limit = self.tolerance**2 * _settling_variance(schedule)
        residual = x.new_zeros(batch)
        windows = SlidingWindows(batch, steps, self.window, x.device)
        every = torch.arange(batch, device=x.device)[:, None]
        _extrapolate(x, u, z, schedule, every, torch.zeros_like(every), len(windows.offsets))

        while (entries := windows.next_round()) is not None:
            row, step, valid = entries
            flat = row.expand_as(step)[valid], step[valid]
            u[flat[0], flat[1] + 1] = denoiser(x[flat], flat[1], flat[0])
            drive = schedule.drive(u[row, step + 1], u[row, step], z[row, step], step)
            gain = schedule.A[step][..., None, None]
            state = x[row[:, 0], step[:, 0]]
            states = []
            for k in range(step.shape[1]):
                state = gain[:, k] * state + drive[:, k]
                states.append(state)
            after = torch.stack(states, 1)  # (A, W, H, D)
            change = (after - x[row, step + 1]).square().mean((2, 3))  # (A, W)

            x[flat[0], flat[1] + 1] = after[valid]
            residual[row[:, 0]] = change.gather(1, valid.sum(1, keepdim=True) - 1).sqrt()[:, 0]
            end = step[:, -1:] + 1
            start = windows.advance(entries, change <= limit[step])
            new_end = (start[:, None] + step.shape[1]).clamp(max=steps)
            _extrapolate(x, u, z, schedule, row, end, int((new_end - end).max()))
        return Sample(x[:, -1], windows.rounds, windows.evaluations, residual)


def _extrapolate(x: Tensor, u: Tensor, z: Tensor, schedule: Schedule, row: Tensor, end: Tensor, count: int) -> None:
    """Fill ``count`` states after each row's state ``end`` (A, 1), as far as there are states, holding the last u."""
    unfinished = end[:, 0] < len(schedule)
    row, end = row[unfinished], end[unfinished]
    last_u = u[row, end]  # u_{end-1}
    for i in range(count):
        step = (end + i).clamp(max=len(schedule) - 1)
        x[row, step + 1] = schedule.A[step][..., None, None] * x[row, step] + schedule.drive(
            last_u, last_u, z[row, step], step
        )


def _settling_variance(schedule: Schedule) -> Tensor:
    """The variance that each step's result is judged by, (T,); the last step adds none and takes its neighbour's."""
    variance = schedule.variance.clone()
    if len(variance) > 1:
        variance[-1] = variance[-2]
    return variance
