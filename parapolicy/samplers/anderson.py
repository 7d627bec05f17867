"""Semi-implicit Picard iteration with Anderson acceleration of the estimates (ParaTAA, Tang et al., ICML 2024)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from parapolicy.samplers.base import DenoiserLike, Sampler, check_count, check_tolerance
from parapolicy.samplers.semi_implicit import settling_variance
from parapolicy.samplers.window import Entries, WindowRounds
from parapolicy.schedule import Schedule

ROUNDING = 1e-6  # smaller residuals, of values of order 1, are float32 rounding errors and not extrapolated
REGULARIZATION = 1e-3  # of the least-squares fit, relative to the trace of its normal matrix


@dataclass(frozen=True)
class Anderson(Sampler):
    """Anderson acceleration on u, each batch element on its own.

    With R = F(u) - u the residuals of a round and d the differences between rounds, the next estimates are
    F(u) - dF(u) gamma, where gamma minimises |R - dR gamma|². Steps whose states have settled take F(u) itself, and an
    element whose residual has risen takes F(u) everywhere and forgets its history.

    Attributes:
        window: states evaluated per round.
        tolerance: as in :class:`parapolicy.samplers.SemiImplicit`. 0: exact.
        history: number of past differences in the fit.
        triangular: True: gamma at each step is fitted to the residuals up to that step only, which keeps the causal
            order of the steps. False: one gamma for the whole window.
    """

    window: int = 20
    tolerance: float = 0.1
    history: int = 3
    triangular: bool = True

    def __post_init__(self) -> None:
        check_count("window", self.window)
        check_tolerance(self.tolerance)
        check_count("history", self.history)
        if not isinstance(self.triangular, bool):
            raise ValueError(f"triangular is {self.triangular!r}, expected True or False")

    def rounds(self, schedule: Schedule, noise: Tensor, compiled: bool = False) -> "AndersonRounds":
        return AndersonRounds(self, schedule)


class AndersonRounds(WindowRounds):
    """Rounds of :class:`Anderson`.

    Attributes:
        last_f, last_r: (B, T, S) the last round's F(u) and residual at every step.
        df, dr: (history, B, T, S) their differences, newest first; zero where unknown.
        seen: (B, T) whether a step has been evaluated.
    """

    def __init__(self, sampler: Anderson, schedule: Schedule) -> None:
        super().__init__(schedule, sampler.window)
        self.sampler = sampler
        self.limit = sampler.tolerance**2 * settling_variance(schedule)  # (T,)

    def begin(self, noise: Tensor, guess: Tensor | None) -> None:
        super().begin(noise, guess)
        z = self.z
        self.last_f, self.last_r = torch.zeros_like(z), torch.zeros_like(z)
        self.df, self.dr = (z.new_zeros(self.sampler.history, *z.shape) for _ in range(2))
        self.seen = torch.zeros(z.shape[:2], dtype=torch.bool, device=z.device)

    def advance(self, denoiser: DenoiserLike) -> None:
        entries = self.entries()
        element, step, valid = entries
        self.extrapolate(element, step[:, -1] + 1)
        elements, steps = entries.inside
        used = self.u[element, step + 1]
        value = used.clone()
        value[valid] = denoiser(self.x[elements, steps], steps, elements)
        residual = value - used
        known = self._remember(entries, value, residual)
        accelerated = value - self._correction(residual * known, self.df[:, element, step], self.dr[:, element, step])
        self._follow(entries, value, residual, accelerated)

    def _remember(self, entries: Entries, value: Tensor, residual: Tensor) -> Tensor:
        """Record this round's differences. Returns (A, W, 1): whether an entry has any."""
        element, step, valid = entries
        known = (self.seen[element, step] & valid)[..., None]
        risen = _norm(residual * known) > _norm(self.last_r[element, step] * known)  # (A,)
        for differences, now, last in ((self.df, value, self.last_f), (self.dr, residual, self.last_r)):
            past = torch.cat(
                (torch.where(known, now - last[element, step], 0.0)[None], differences[:-1, element, step])
            )
            differences[:, element, step] = torch.where(risen[:, None, None], 0.0, past)
            last[element, step] = now
        self.seen[element, step] = True
        return known

    def _correction(self, residual: Tensor, df: Tensor, dr: Tensor) -> Tensor:
        """dF gamma at every entry, (A, W, S), from residuals (A, W, S) and differences (m, A, W, S)."""
        columns = dr.permute(1, 2, 0, 3)  # (A, W, m, S)
        normal = columns @ columns.transpose(-1, -2)  # (A, W, m, m)
        right = columns @ residual[..., None]  # (A, W, m, 1)
        normal, right = normal.cumsum(1), right.cumsum(1)
        if not self.sampler.triangular:
            normal, right = normal[:, -1:].expand_as(normal), right[:, -1:].expand_as(right)
        damping = REGULARIZATION * normal.diagonal(dim1=-2, dim2=-1).sum(-1) + 1e-12
        gamma = torch.linalg.solve(normal + damping[..., None, None] * torch.eye(len(df), device=df.device), right)
        return torch.einsum("maws,awm->aws", df, gamma[..., 0])

    def _follow(self, entries: Entries, value: Tensor, residual: Tensor, accelerated: Tensor) -> None:
        """Recompute the window's states from the accelerated estimates."""
        element, step, valid = entries
        before, move = self.x[element, step + 1], self.schedule.transitions(step, self.z[element, step])
        state, previous_u = self.x[element[:, 0], step[:, 0]], self.u[element[:, 0], step[:, 0]]
        settled = torch.ones_like(element[:, 0], dtype=torch.bool)
        rounded = residual.square().mean(2) <= ROUNDING**2  # (A, W)
        changes, states, estimates = [], [], []
        for k in range(step.shape[1]):
            # F(u) is final at a settled state: acceleration must not change what will be accepted.
            plain = (settled | rounded[:, k])[:, None]
            estimate = torch.where(plain, value[:, k], accelerated[:, k])
            state = move(k, state, estimate, previous_u)
            changes.append((state - before[:, k]).square().mean(1))
            settled = settled & (changes[-1] <= self.limit[step[:, k]])
            states.append(state)
            estimates.append(estimate)
            previous_u = estimate
        elements, steps = entries.inside
        target = elements, steps + 1
        self.x[target], self.u[target] = torch.stack(states, 1)[valid], torch.stack(estimates, 1)[valid]
        self.move(entries, torch.stack(changes, 1) <= self.limit[step])


def _norm(value: Tensor) -> Tensor:
    """(A, W, S) -> (A,)."""
    return value.square().sum((1, 2))
