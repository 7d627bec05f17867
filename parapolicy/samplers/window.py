"""The sliding window of the fixed-point samplers: where each batch element stands, and which states are settled."""

from typing import NamedTuple

import torch
from torch import Tensor

from parapolicy.samplers.base import Sample, root_mean_square
from parapolicy.schedule import Schedule


class Entries(NamedTuple):
    """One round's window, for the A elements that are still at work.

    Attributes:
        row: (A, 1) their batch indices.
        step: (A, W) step indices, cut off at T - 1.
        valid: (A, W) False where the window reaches past T - 1.
    """

    row: Tensor
    step: Tensor
    valid: Tensor


class SlidingWindows:
    """The trajectories of a batch and one window on each; an element is done when its window has passed step T - 1.

    Args:
        schedule: the steps.
        noise: (T + 1, B, H, D) as samplers take it.
        window: most steps evaluated per round.
        guess: (B, T, H, D) estimates from the chunk before, or None.

    Attributes:
        x: (B, T + 1, H, D) states. All begin as the first one.
        u: (B, T + 1, H, D); [:, j + 1] is u_j, and [:, 0], before the first, is 0.
        z: (B, T, H, D) noise.
        end: (B,) the last state that a round has computed.
    """

    def __init__(self, schedule: Schedule, noise: Tensor, window: int, guess: Tensor | None = None) -> None:
        self.schedule, self.steps = schedule, len(schedule)
        self.x = noise[0][:, None].repeat(1, self.steps + 1, 1, 1)
        self.u = torch.zeros_like(self.x)
        self.z = noise[1:].transpose(0, 1)
        # Like u, one later; a cold start guesses that the estimates stay what they are.
        self.guess = torch.zeros_like(self.x) if guess is None else torch.cat((self.u[:, :1], guess), 1)
        self.offsets = torch.arange(min(window, self.steps), device=noise.device)
        self.start = torch.zeros(noise.shape[1], dtype=torch.int64, device=noise.device)
        self.end, self.rounds, self.evaluations = (torch.zeros_like(self.start) for _ in range(3))
        self.newest = torch.zeros_like(noise[0])  # (B, H, D) the estimate that each element's last round ended with
        self.residual = noise.new_zeros(noise.shape[1])

    def next_round(self) -> Entries | None:
        """The entries to evaluate, or None when every element is done."""
        row = (self.start < self.steps).nonzero()
        if len(row) == 0:
            return None
        step = self.start[row] + self.offsets
        valid = step < self.steps
        self.rounds[row[:, 0]] += 1
        self.evaluations[row[:, 0]] += valid.sum(1)
        return Entries(row, step.clamp(max=self.steps - 1), valid)

    def advance(self, entries: Entries, settled: Tensor) -> None:
        """Move past every leading settled state and the one after it.

        The state after the first unsettled index depends on settled values only, so it is final too: at least one
        step per round. ``settled`` (A, W) speaks of the states that follow each entry.
        """
        row = entries.row[:, 0]
        leading = (settled & entries.valid).long().cumprod(1).sum(1)
        self.start[row] += (leading + 1).clamp(max=len(self.offsets))
        self.start.clamp_(max=self.steps)
        self.end[row] = entries.step[:, -1] + 1
        newest = self.u[row, self.end[row]]
        self.residual[row] = root_mean_square(newest - self.newest[row])
        self.newest[row] = newest

    def extrapolate(self, row: Tensor, new_end: Tensor) -> None:
        """Fill states and estimates after ``end`` up to ``new_end`` (A,); ``row`` is (A, 1).

        The estimates follow the guess, moved by what the last computed one differs from it.
        """
        end = self.end[row[:, 0]]
        count = int((new_end - end).max())
        if count < 1:
            return
        step = end[:, None] + torch.arange(count, device=end.device)  # (A, K)
        # Rows that are asked for less are filled further; their next round overwrites that.
        valid = step < self.steps
        step = step.clamp(max=self.steps - 1)
        correction = self.u[row, end[:, None]] - self.guess[row, end[:, None]]  # of u_{end-1}, (A, 1, H, D)
        u = self.guess[row, step + 1] + correction  # (A, K, H, D)
        previous_u = torch.cat((self.u[row, end[:, None]], u[:, :-1]), 1)
        drive = self.schedule.drive(u, previous_u, self.z[row, step], step)
        states = recurrence(self.x[row[:, 0], end], self.schedule.A[step], drive)
        target = row.expand_as(step)[valid], step[valid] + 1
        self.x[target] = states[valid]
        self.u[target] = u[valid]

    def result(self) -> Sample:
        """The last states, extrapolated where sampling was stopped early."""
        complete = self.start >= self.steps
        if not complete.all():
            every = torch.arange(len(complete), device=complete.device)[:, None]
            self.extrapolate(every, torch.full_like(self.end, self.steps))
        return Sample(self.x[:, -1], self.u[:, 1:], self.rounds, self.evaluations, self.residual, complete)


def recurrence(state: Tensor, gain: Tensor, drive: Tensor) -> Tensor:
    """The K states after ``state`` (A, H, D) under x <- gain x + drive; gain (A, K), drive and result (A, K, H, D).

    One step after the other, as the sequential sampler rounds them, so that equal estimates give equal bits.
    """
    states = []
    for factor, addend in zip(gain[..., None, None].unbind(1), drive.unbind(1), strict=True):
        state = factor * state + addend
        states.append(state)
    return torch.stack(states, 1)


def check_window(window: int, tolerance: float) -> None:
    """Raise ``ValueError`` for a window or tolerance that no fixed-point sampler can take."""
    if isinstance(window, bool) or not isinstance(window, int) or window < 1:
        raise ValueError(f"window is {window!r}, expected a whole number of at least 1")
    if not 0 <= tolerance < float("inf"):
        raise ValueError(f"tolerance is {tolerance!r}, expected a number of at least 0 (0: exact)")
