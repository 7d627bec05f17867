"""The sliding window of the fixed-point samplers: its position per batch element, and which states are settled."""

from typing import NamedTuple

import torch
from torch import Tensor

from parapolicy.samplers.base import Rounds, Sample, root_mean_square
from parapolicy.schedule import Schedule


class Entries(NamedTuple):
    """One round's window, for the A elements that are not done.

    Attributes:
        element: (A, 1) their batch indices.
        step: (A, W) step indices, at most T - 1.
        valid: (A, W) False where the window reaches past T - 1.
    """

    element: Tensor
    step: Tensor
    valid: Tensor

    @property
    def inside(self) -> tuple[Tensor, Tensor]:
        """Element and step of every valid entry, (N,) each."""
        return self.element.expand_as(self.step)[self.valid], self.step[self.valid]


class WindowRounds(Rounds):
    """The trajectories of a batch and one window on each; an element is done when its window has passed step T - 1.

    Args:
        schedule: the steps.
        window: most steps evaluated per round.

    Attributes:
        x: (B, T + 1, S) states, initialised with the first one.
        u: (B, T + 1, S) estimates; [:, j + 1] is u_j, and [:, 0] is 0.
        z: (B, T, S) noise.
        guess: (B, T + 1, S) estimates from the previous chunk, indexed as u. A cold start guesses 0: estimates then
            stay constant along the extrapolation.
        start: (B,) the first step of each element's window.
        end: (B,) the last state that a round has computed.
    """

    def __init__(self, schedule: Schedule, window: int) -> None:
        self.schedule, self.steps, self.width = schedule, len(schedule), min(window, len(schedule))

    def begin(self, noise: Tensor, guess: Tensor | None) -> None:
        self.x = noise[0][:, None].repeat(1, self.steps + 1, 1)
        self.u = torch.zeros_like(self.x)
        self.z = noise[1:].transpose(0, 1)
        self.guess = torch.zeros_like(self.x) if guess is None else torch.cat((self.u[:, :1], guess), 1)
        self.offsets = torch.arange(self.width, device=noise.device)
        self.start = torch.zeros(noise.shape[1], dtype=torch.int64, device=noise.device)
        self.end, self.rounds, self.evaluations = (torch.zeros_like(self.start) for _ in range(3))
        self.newest = torch.zeros_like(noise[0])  # (B, S) the last estimate of each element's last round
        self.residual = noise.new_zeros(noise.shape[1])

    @property
    def done(self) -> Tensor:
        return (self.start >= self.steps).all()

    def entries(self) -> Entries:
        """The entries of this round; counts their rounds and evaluations."""
        element = (self.start < self.steps).nonzero()
        step = self.start[element] + self.offsets
        valid = step < self.steps
        self.rounds[element[:, 0]] += 1
        self.evaluations[element[:, 0]] += valid.sum(1)
        return Entries(element, step.clamp(max=self.steps - 1), valid)

    def move(self, entries: Entries, settled: Tensor) -> None:
        """Move the window past every leading settled state and the one after it.

        The state after the first unsettled index depends on settled values only, so it is final too: at least one
        step per round. ``settled`` (A, W) refers to the states that follow each entry.
        """
        element = entries.element[:, 0]
        leading = (settled & entries.valid).long().cumprod(1).sum(1)
        self.start[element] += (leading + 1).clamp(max=self.width)
        self.start.clamp_(max=self.steps)
        self.end[element] = entries.step[:, -1] + 1
        newest = self.u[element, self.end[element]]
        self.residual[element] = root_mean_square(newest - self.newest[element])
        self.newest[element] = newest

    def extrapolate(self, element: Tensor, new_end: Tensor) -> None:
        """Fill states and estimates after ``end`` up to ``new_end`` (A,); ``element`` is (A, 1).

        The estimates are the guess plus the difference of the last computed estimate from its guess.
        """
        end = self.end[element[:, 0]]
        count = int((new_end - end).max())
        if count < 1:
            return
        step = end[:, None] + torch.arange(count, device=end.device)  # (A, K)
        # Elements that need fewer are filled further; their next round overwrites the excess.
        valid = step < self.steps
        step = step.clamp(max=self.steps - 1)
        last = self.u[element, end[:, None]]  # u_{end-1}, (A, 1, S)
        u = self.guess[element, step + 1] + (last - self.guess[element, end[:, None]])  # (A, K, S)
        previous_u = torch.cat((last, u[:, :-1]), 1)
        increment = self.schedule.increment(u, previous_u, self.z[element, step], step)
        states = recurrence(self.x[element[:, 0], end], self.schedule.A[step], increment)
        target = element.expand_as(step)[valid], step[valid] + 1
        self.x[target] = states[valid]
        self.u[target] = u[valid]

    def result(self) -> Sample:
        """The final states, extrapolated where sampling was stopped early."""
        complete = self.start >= self.steps
        if not complete.all():
            every = torch.arange(len(complete), device=complete.device)[:, None]
            self.extrapolate(every, torch.full_like(self.end, self.steps))
        return Sample(self.x[:, -1], self.u[:, 1:], self.rounds, self.evaluations, self.residual, complete)


def recurrence(state: Tensor, gain: Tensor, increment: Tensor) -> Tensor:
    """The K states after ``state`` (A, S) under x <- gain x + increment; gain (A, K), increment and result (A, K, S).

    The steps are rounded as by the sequential sampler, one after the other, so that equal estimates give equal bits.
    """
    states = []
    for factor, addend in zip(gain[..., None].unbind(1), increment.unbind(1), strict=True):
        state = factor * state + addend
        states.append(state)
    return torch.stack(states, 1)
