"""Parareal sampling (SRDS, Selvam et al., NeurIPS 2024): a coarse chain over blocks, corrected by fine solves."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from parapolicy.samplers.base import DenoiserLike, Sample, never, root_mean_square
from parapolicy.samplers.semi_implicit import settling_variance
from parapolicy.samplers.window import check_window
from parapolicy.schedule import Schedule


@dataclass(frozen=True)
class Parareal:
    """Blocks of steps, solved finely side by side and joined by a coarse solver: x' = fine(x) + coarse(new x) -
    coarse(x) at every block's end, sweep after sweep.

    The coarse solver is the schedule's own recurrence over the block with the estimate held, so that it costs one
    network call, which is also the fine solver's first. Every sweep makes one more block exact.

    Attributes:
        tolerance: sampling ends when a sweep changes the result by less than this many standard deviations of the
            last noisy step's noise, in the root mean square. 0: all sweeps, exact.
        blocks: how many; None: the square root of the number of steps.
    """

    tolerance: float = 0.1
    blocks: int | None = None

    def __post_init__(self) -> None:
        check_window(1 if self.blocks is None else self.blocks, self.tolerance)

    def sample(
        self,
        denoiser: DenoiserLike,
        schedule: Schedule,
        noise: Tensor,
        stop: Callable[[], bool] = never,
        guess: Tensor | None = None,
    ) -> Sample:
        run = _Run(denoiser, schedule, noise, stop, self.blocks or math.ceil(len(schedule) ** 0.5), guess)
        limit = self.tolerance * float(settling_variance(schedule)[-1].sqrt())
        row = torch.arange(noise.shape[1], device=noise.device)
        if guess is None:
            run.chain(row, 0, None)
        for sweep in range(1, run.blocks + 1):
            last = run.state[row, -1, 0].clone()
            fine = run.solve(row, sweep - 1)
            if fine is None:
                break
            run.chain(row, sweep, fine)
            run.residual[row] = root_mean_square(run.state[row, -1, 0] - last)
            if run.stopped:
                break
            run.complete[row] = (run.residual[row] < limit) | (sweep == run.blocks)
            if sweep == run.blocks:
                run.residual[row] = 0.0
            row = row[~run.complete[row]]
            if len(row) == 0:
                break
        return Sample(run.state[:, -1, 0], run.u, run.rounds, run.evaluations, run.residual, run.complete)


class _Run:
    """The blocks' states of a batch, and the two solvers.

    A state is x and the estimate before it, which second-order solvers look at: (2, H, D). ``state`` (B, K + 1, 2, H,
    D) are those at the blocks' bounds, ``coarse`` (B, K, 2, H, D) what the coarse solver makes of them, ``u``
    (B, T, H, D) the estimates.
    """

    def __init__(
        self,
        denoiser: DenoiserLike,
        schedule: Schedule,
        noise: Tensor,
        stop: Callable[[], bool],
        blocks: int,
        guess: Tensor | None,
    ) -> None:
        self.denoiser, self.schedule, self.stop, self.stopped = denoiser, schedule, stop, False
        self.z = noise[1:].transpose(0, 1)
        steps, batch, *shape = noise[1:].shape
        self.length = -(-steps // blocks)
        self.blocks = -(-steps // self.length)
        self.u = noise.new_zeros(batch, steps, *shape) if guess is None else guess.clone()
        self.state = noise.new_zeros(batch, self.blocks + 1, 2, *shape)
        self.state[:, 0, 0] = noise[0]
        self.coarse = torch.zeros_like(self.state[:, 1:])
        self.evaluated = guess is None  # whether ``u`` at the blocks' starts belongs to ``state``
        self.rounds, self.evaluations = (torch.zeros(batch, dtype=torch.int64, device=noise.device) for _ in range(2))
        self.residual = noise.new_zeros(batch)
        self.complete = torch.zeros(batch, dtype=torch.bool, device=noise.device)
        every = torch.arange(batch, device=noise.device)
        if guess is not None:
            for i in range(self.blocks):
                self.state[:, i + 1] = self._advance(every, i, self.state[:, i], guess[:, i * self.length :])

    def chain(self, row: Tensor, first: int, fine: Tensor | None) -> None:
        """The coarse solver from block to block, corrected by the fine solutions (A, K, 2, H, D) where there are any.

        Stopped early, it goes on with the last estimate.
        """
        if fine is not None:
            self.state[row, first] = fine[:, first - 1]
        for i in range(first, self.blocks):
            state, start = self.state[row, i], i * self.length
            if not self.stopped:
                estimate = self._evaluate(row, state[:, 0], torch.full_like(row, start), row)
            elif fine is not None:
                return
            coarse = self._advance(row, i, state, estimate[:, None].expand(-1, self.length, -1, -1))
            self.u[row, start : start + self.length] = estimate[:, None]
            self.state[row, i + 1] = coarse if fine is None else fine[:, i] + coarse - self.coarse[row, i]
            self.coarse[row, i] = coarse

    def solve(self, row: Tensor, first: int) -> Tensor | None:
        """The fine solutions of blocks ``first`` and later, side by side, (A, K, 2, H, D); None when time is up."""
        if self.stopped:
            return None
        count = self.blocks - first
        block = torch.arange(first, self.blocks, device=row.device).repeat(len(row))
        element = row.repeat_interleave(count)  # (A K,)
        state, previous_u = self.state[element, block].unbind(1)
        for k in range(self.length):
            step = block * self.length + k
            inside = step < len(self.schedule)
            e, j = element[inside], step[inside]
            if len(j) == 0:
                break
            if k > 0 or not self.evaluated:
                self.u[e, j] = self._evaluate(row, state[inside], j, e)
                if self.stopped:
                    return None
            state, previous_u = state.clone(), previous_u.clone()
            state[inside] = self.schedule.step(state[inside], self.u[e, j], previous_u[inside], self.z[e, j], j)
            previous_u[inside] = self.u[e, j]
        if not self.evaluated:
            for i in range(self.blocks):
                held = self.u[row, i * self.length][:, None].expand(-1, self.length, -1, -1)
                self.coarse[row, i] = self._advance(row, i, self.state[row, i], held)
            self.evaluated = True
        fine = self.state[row, 1:].clone()
        fine[:, first:] = torch.stack((state, previous_u), 1).view(len(row), count, *fine.shape[2:])
        return fine

    def _evaluate(self, row: Tensor, x: Tensor, step: Tensor, element: Tensor) -> Tensor:
        """One network call, counted for the elements ``row``."""
        value = self.denoiser(x, step, element)
        self.rounds[row] += 1
        self.evaluations[row] += len(x) // len(row)
        self.stopped = self.stop()
        return value

    def _advance(self, row: Tensor, block: int, state: Tensor, u: Tensor) -> Tensor:
        """A block's steps from state (A, 2, H, D) with estimates (A, at least as many, H, D), without the network."""
        x, previous_u = state.unbind(1)
        start = block * self.length
        for k in range(min(self.length, len(self.schedule) - start)):
            step = torch.full_like(row, start + k)
            x = self.schedule.step(x, u[:, k], previous_u, self.z[row, start + k], step)
            previous_u = u[:, k]
        return torch.stack((x, previous_u), 1)
