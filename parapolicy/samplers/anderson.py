"""Semi-implicit Picard iteration with Anderson acceleration of the estimates (ParaTAA, Tang et al., ICML 2024)."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from parapolicy.samplers.base import DenoiserLike, Sample, never
from parapolicy.samplers.semi_implicit import settling_variance
from parapolicy.samplers.window import SlidingWindows, check_window
from parapolicy.schedule import Schedule

ROUNDING = 1e-6  # residuals this small, of values of order 1, are float32 roundings: nothing to extrapolate
REGULARIZATION = 1e-3  # of the least-squares fit, as a part of the trace of its normal matrix


@dataclass(frozen=True)
class Anderson:
    """Anderson acceleration on u, each batch element on its own.

    With R = F(u) - u the residuals of a round and d the differences between rounds, the next estimates are
    F(u) - dF(u) gamma, where gamma minimises |R - dR gamma|². Steps whose states have settled take F(u) itself, and an
    element whose residual has risen takes F(u) everywhere and forgets its history.

    Attributes:
        window: states evaluated per round.
        tolerance: as in :class:`parapolicy.samplers.SemiImplicit`. 0: exact.
        history: differences that the fit looks at.
        triangular: fit gamma at every step to the residuals up to that step only, which keeps the causal order of
            the steps; False: one gamma for the whole window.
    """

    window: int = 20
    tolerance: float = 0.1
    history: int = 3
    triangular: bool = True

    def __post_init__(self) -> None:
        check_window(self.window, self.tolerance)
        if isinstance(self.history, bool) or not isinstance(self.history, int) or self.history < 1:
            raise ValueError(f"history is {self.history!r}, expected a whole number of at least 1")

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
        limit = self.tolerance**2 * settling_variance(schedule)  # (T,)
        batch, steps, *shape = z.shape
        # Last round's F(u) and residual at every step, then their differences, newest first; zero where unknown.
        last_f, last_r = torch.zeros_like(z), torch.zeros_like(z)
        df, dr = (z.new_zeros(self.history, batch, steps, *shape) for _ in range(2))
        seen = torch.zeros(batch, steps, dtype=torch.bool, device=z.device)

        while (entries := windows.next_round()) is not None:
            row, step, valid = entries
            windows.extrapolate(row, step[:, -1] + 1)
            used = u[row, step + 1]
            value = used.clone()
            value[valid] = denoiser(x[row, step][valid], step[valid], row.expand_as(step)[valid])
            residual = value - used

            known = (seen[row, step] & valid)[..., None, None]
            risen = _norm(residual * known) > _norm(last_r[row, step] * known)  # (A,)
            for differences, now, last in ((df, value, last_f), (dr, residual, last_r)):
                past = torch.cat((torch.where(known, now - last[row, step], 0.0)[None], differences[:-1, row, step]))
                differences[:, row, step] = torch.where(risen[:, None, None, None], 0.0, past)
                last[row, step] = now
            seen[row, step] = True

            accelerated = value - self._correction(residual * known, df[:, row, step], dr[:, row, step])
            before, move = x[row, step + 1], schedule.transitions(step, z[row, step])
            state, previous_u = x[row[:, 0], step[:, 0]], u[row[:, 0], step[:, 0]]
            settled = torch.ones_like(row[:, 0], dtype=torch.bool)
            rounded = residual.square().mean((2, 3)) <= ROUNDING**2  # (A, W)
            changes, states, estimates = [], [], []
            for k in range(step.shape[1]):
                # At a state that stands still F(u) is final: acceleration never touches what will be accepted.
                plain = (settled | rounded[:, k])[:, None, None]
                estimate = torch.where(plain, value[:, k], accelerated[:, k])
                state = move(k, state, estimate, previous_u)
                changes.append((state - before[:, k]).square().mean((1, 2)))
                settled = settled & (changes[-1] <= limit[step[:, k]])
                states.append(state)
                estimates.append(estimate)
                previous_u = estimate
            change = torch.stack(changes, 1)  # (A, W)
            target = row.expand_as(step)[valid], step[valid] + 1
            x[target], u[target] = torch.stack(states, 1)[valid], torch.stack(estimates, 1)[valid]
            windows.advance(entries, change <= limit[step])
            if stop():
                break
        return windows.result()

    def _correction(self, residual: Tensor, df: Tensor, dr: Tensor) -> Tensor:
        """dF gamma at every entry, (A, W, H, D), from residuals (A, W, H, D) and differences (m, A, W, H, D)."""
        columns = dr.permute(1, 2, 0, 3, 4).flatten(3)  # (A, W, m, H D)
        normal = columns @ columns.transpose(-1, -2)  # (A, W, m, m)
        right = columns @ residual.flatten(2)[..., None]  # (A, W, m, 1)
        normal, right = normal.cumsum(1), right.cumsum(1)
        if not self.triangular:
            normal, right = normal[:, -1:].expand_as(normal), right[:, -1:].expand_as(right)
        damping = REGULARIZATION * normal.diagonal(dim1=-2, dim2=-1).sum(-1) + 1e-12
        gamma = torch.linalg.solve(normal + damping[..., None, None] * torch.eye(len(df), device=df.device), right)
        return torch.einsum("mawhd,awm->awhd", df, gamma[..., 0])


def _norm(value: Tensor) -> Tensor:
    """(A, W, H, D) -> (A,)."""
    return value.square().sum((1, 2, 3))
