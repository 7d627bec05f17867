"""Parareal sampling (SRDS, Selvam et al., NeurIPS 2024): a coarse chain over blocks, corrected by fine solves."""

import math
from collections.abc import Generator
from dataclasses import dataclass

import torch
from torch import Tensor

from parapolicy.samplers.base import (
    DenoiserLike,
    Rounds,
    Sample,
    Sampler,
    check_count,
    check_tolerance,
    root_mean_square,
)
from parapolicy.samplers.semi_implicit import settling_variance
from parapolicy.schedule import Schedule

# A part of the algorithm. It yields the arguments of a network call (active elements, states, steps, batch elements),
# is sent the estimates, and returns its result.
Script = Generator[tuple[Tensor, Tensor, Tensor, Tensor], Tensor, Tensor]


@dataclass(frozen=True)
class Parareal(Sampler):
    """Blocks of steps: solved finely in parallel and joined by a coarse solver. Every sweep sets x' = fine(x) +
    coarse(new x) - coarse(x) at every block's end.

    The coarse solver is the schedule's own recurrence over the block with a constant estimate. It costs one network
    call, which is also the fine solver's first. Every sweep makes one more block exact.

    Attributes:
        tolerance: sampling ends when a sweep changes the result by less than this many standard deviations of the
            last noisy step's noise, in the root mean square. 0: all sweeps, exact.
        blocks: number of blocks; None: the square root of the number of steps.
    """

    tolerance: float = 0.1
    blocks: int | None = None

    def __post_init__(self) -> None:
        check_tolerance(self.tolerance)
        if self.blocks is not None:
            check_count("blocks", self.blocks)

    def rounds(self, schedule: Schedule, noise: Tensor, compiled: bool = False) -> "PararealRounds":
        return PararealRounds(self, schedule)


class PararealRounds(Rounds):
    """Rounds of :class:`Parareal`. The algorithm is one generator that yields whenever it needs the network.

    A block's state is x and the previous estimate, which second-order solvers use: (2, S).

    Attributes:
        state: (B, K + 1, 2, S) at the bounds of the K blocks.
        coarse: (B, K, 2, S) the coarse solver's result for each block.
        u: (B, T, S) the estimates.
    """

    def __init__(self, sampler: Parareal, schedule: Schedule) -> None:
        self.schedule, steps = schedule, len(schedule)
        self.length = -(-steps // (sampler.blocks or math.ceil(steps**0.5)))
        self.blocks = -(-steps // self.length)
        self.limit = sampler.tolerance * float(settling_variance(schedule)[-1].sqrt())

    @property
    def done(self) -> bool:
        return self._call is None

    def begin(self, noise: Tensor, guess: Tensor | None) -> None:
        self.z = noise[1:].transpose(0, 1)
        steps, batch, size = noise[1:].shape
        self.u = noise.new_zeros(batch, steps, size) if guess is None else guess.clone()
        self.state = noise.new_zeros(batch, self.blocks + 1, 2, size)
        self.state[:, 0, 0] = noise[0]
        self.coarse = torch.zeros_like(self.state[:, 1:])
        self.evaluated = guess is None  # whether ``u`` at the blocks' starts belongs to ``state``
        self.chained = 0 if guess is None else self.blocks  # blocks that the first coarse chain has finished
        every = torch.arange(batch, device=noise.device)
        self.rounds, self.evaluations = (torch.zeros_like(every) for _ in range(2))
        self.residual = noise.new_zeros(batch)
        self.complete = torch.zeros_like(every, dtype=torch.bool)
        if guess is not None:
            for i in range(self.blocks):
                self.state[:, i + 1] = self._solve_block(every, i, self.state[:, i], guess[:, i * self.length :])
        self._script = self._sweep(every)
        self._call: tuple[Tensor, Tensor, Tensor, Tensor] | None = next(self._script)

    def advance(self, denoiser: DenoiserLike) -> None:
        assert self._call is not None
        active, x, step, element = self._call
        estimates = denoiser(x, step, element)
        self.rounds[active] += 1
        self.evaluations[active] += len(x) // len(active)
        try:
            self._call = self._script.send(estimates)
        except StopIteration:
            self._call = None

    def result(self) -> Sample:
        """If sampling was stopped within the first coarse chain, the chain continues with its last estimate."""
        every = torch.arange(len(self.state), device=self.state.device)
        held = self.u[:, (self.chained - 1) * self.length][:, None].expand(-1, self.length, -1)
        for i in range(self.chained, self.blocks):
            self.state[:, i + 1] = self._solve_block(every, i, self.state[:, i], held)
            self.u[:, i * self.length : (i + 1) * self.length] = held[:, : len(self.schedule) - i * self.length]
        return Sample(self.state[:, -1, 0], self.u, self.rounds, self.evaluations, self.residual, self.complete)

    def _sweep(self, active: Tensor) -> Script:
        """The whole algorithm, for the elements that are not done."""
        if self.evaluated:
            yield from self._chain(active, 0, None)
        for sweep in range(1, self.blocks + 1):
            last = self.state[active, -1, 0].clone()
            fine = yield from self._solve(active, sweep - 1)
            yield from self._chain(active, sweep, fine)
            self.residual[active] = root_mean_square(self.state[active, -1, 0] - last)
            self.complete[active] = (self.residual[active] < self.limit) | (sweep == self.blocks)
            if sweep == self.blocks:
                self.residual[active] = 0.0
            active = active[~self.complete[active]]
            if len(active) == 0:
                return active
        return active

    def _chain(self, active: Tensor, first: int, fine: Tensor | None) -> Script:
        """The coarse solver from block to block, corrected by the fine solutions (A, K, 2, S) if given."""
        if fine is not None:
            self.state[active, first] = fine[:, first - 1]
        for i in range(first, self.blocks):
            state, start = self.state[active, i], i * self.length
            estimate = yield active, state[:, 0], torch.full_like(active, start), active
            coarse = self._solve_block(active, i, state, estimate[:, None].expand(-1, self.length, -1))
            self.u[active, start : start + self.length] = estimate[:, None]
            self.state[active, i + 1] = coarse if fine is None else fine[:, i] + coarse - self.coarse[active, i]
            self.coarse[active, i] = coarse
            self.chained = max(self.chained, i + 1)
        return active

    def _solve(self, active: Tensor, first: int) -> Script:
        """The fine solutions of blocks ``first`` and later, in parallel, (A, K, 2, S)."""
        count = self.blocks - first
        block = torch.arange(first, self.blocks, device=active.device).repeat(len(active))
        element = active.repeat_interleave(count)  # (A K,)
        state, previous_u = self.state[element, block].unbind(1)
        for k in range(self.length):
            step = block * self.length + k
            inside = step < len(self.schedule)
            e, j = element[inside], step[inside]
            if len(j) == 0:
                break
            if k > 0 or not self.evaluated:
                self.u[e, j] = yield active, state[inside], j, e
            state, previous_u = state.clone(), previous_u.clone()
            state[inside] = self.schedule.step(state[inside], self.u[e, j], previous_u[inside], self.z[e, j], j)
            previous_u[inside] = self.u[e, j]
        if not self.evaluated:
            for i in range(self.blocks):
                held = self.u[active, i * self.length][:, None].expand(-1, self.length, -1)
                self.coarse[active, i] = self._solve_block(active, i, self.state[active, i], held)
            self.evaluated = True
        fine = self.state[active, 1:].clone()
        fine[:, first:] = torch.stack((state, previous_u), 1).view(len(active), count, *fine.shape[2:])
        return fine

    def _solve_block(self, active: Tensor, block: int, state: Tensor, u: Tensor) -> Tensor:
        """The steps of a block from state (A, 2, S) with estimates u (A, at least the block's length, S)."""
        x, previous_u = state.unbind(1)
        start = block * self.length
        for k in range(min(self.length, len(self.schedule) - start)):
            step = torch.full_like(active, start + k)
            x = self.schedule.step(x, u[:, k], previous_u, self.z[active, start + k], step)
            previous_u = u[:, k]
        return torch.stack((x, previous_u), 1)
