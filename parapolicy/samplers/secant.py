"""Semi-implicit Picard iteration with a secant model of the network: fewer rounds for the same fixed point.

Anderson acceleration as ParaTAA (Tang et al., ICML 2024) applies it extrapolates the estimates before the recurrence.
Here the same differences of past rounds are used *inside* the recurrence, as a quasi-Newton method does (DEER, Lim et
al., ICLR 2024, with Broyden's multisecant approximation for the Jacobian).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from parapolicy.samplers.base import DenoiserLike, Sample, never
from parapolicy.samplers.semi_implicit import settling_variance
from parapolicy.samplers.window import SlidingWindows, check_window
from parapolicy.schedule import Schedule

REGULARIZATION = 1e-3  # of the least-squares fit, as a part of the trace of its normal matrix


@dataclass(frozen=True)
class Secant:
    """Quasi-Newton iteration on the estimates u.

    A round evaluates u_j = F_j(x_j) at every state of the window, then recomputes the states one after the other with
    a linear model of what F_j will say at the new state: u_j + J_j (x_j_new - x_j). J_j is the least-squares fit to
    what the last rounds saw at step j. It is zero where a state has not moved, so settled states and the first
    unsettled one are computed as in :class:`parapolicy.samplers.SemiImplicit`, and the fixed point is the same.

    Attributes:
        window: states evaluated per round.
        tolerance: as in :class:`parapolicy.samplers.SemiImplicit`. 0: exact.
        history: past rounds that the fit looks at; 0: plain semi-implicit iteration.
    """

    window: int = 40
    tolerance: float = 0.1
    history: int = 3

    def __post_init__(self) -> None:
        check_window(self.window, self.tolerance)
        if isinstance(self.history, bool) or not isinstance(self.history, int) or self.history < 0:
            raise ValueError(f"history is {self.history!r}, expected a whole number of at least 0")

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
        model = SecantModel(x, self.history)
        bound = float("inf") if schedule.clip is None or schedule.overshoot.any() else schedule.clip

        while (entries := windows.next_round()) is not None:
            row, step, valid = entries
            windows.extrapolate(row, step[:, -1] + 1)
            source = row.expand_as(step)[valid], step[valid]
            states = x[source]
            estimates = denoiser(states, source[1], source[0])
            model.record(source, states, estimates)
            u[source[0], source[1] + 1] = estimates

            before, linear = x[row, step], model.fit(row, step)
            state, previous_u = before[:, 0], u[row[:, 0], step[:, 0]]
            change = torch.zeros_like(limit[step])
            for k in range(step.shape[1]):
                now = step[:, k]
                estimate = u[row[:, 0], now + 1] + linear(k, state - before[:, k])
                estimate = estimate.clamp(-bound, bound)
                drive = schedule.drive(estimate, previous_u, z[row[:, 0], now], now)
                state = schedule.A[now, None, None] * state + drive
                change[:, k] = (state - x[row[:, 0], now + 1]).square().mean((1, 2))
                target = row[valid[:, k], 0], now[valid[:, k]] + 1
                x[target] = state[valid[:, k]]
                previous_u = estimate
            windows.advance(entries, change <= limit[step])
            if stop():
                break
        return windows.result()


class SecantModel:
    """The last evaluations at every step, and the linear map that fits their differences.

    Args:
        x: (B, T + 1, H, D), for its shape.
        history: differences to keep.
    """

    def __init__(self, x: Tensor, history: int) -> None:
        batch, states, *shape = x.shape
        self.last_x, self.last_u = (x.new_zeros(batch, states - 1, *shape) for _ in range(2))
        # Differences of state and estimate, newest first; zero where a step has not been evaluated often enough.
        self.dx, self.du = (x.new_zeros(history, batch, states - 1, *shape) for _ in range(2))
        self.seen = torch.zeros(batch, states - 1, dtype=torch.bool, device=x.device)

    def record(self, source: tuple[Tensor, Tensor], states: Tensor, estimates: Tensor) -> None:
        """Take N evaluations: ``states`` and ``estimates`` (N, H, D) at batch elements and steps ``source``."""
        row, step = source
        seen = self.seen[source][:, None, None]
        for history, last, value in ((self.dx, self.last_x, states), (self.du, self.last_u, estimates)):
            if len(history):
                difference = torch.where(seen, value - last[source], 0.0)
                history[:, row, step] = torch.cat((difference[None], history[:-1, row, step]))
            last[source] = value
        self.seen[source] = True

    def fit(self, row: Tensor, step: Tensor) -> Callable[[int, Tensor], Tensor]:
        """J of each entry (A, W), as a function of the entry's index k and a difference of states (A, H, D)."""
        if not len(self.dx):
            return lambda k, difference: torch.zeros_like(difference)
        dx = self.dx[:, row, step].permute(1, 2, 0, 3, 4).flatten(3)  # (A, W, m, H D)
        du = self.du[:, row, step].permute(1, 2, 0, 3, 4).flatten(3)
        normal = dx @ dx.transpose(-1, -2)  # (A, W, m, m)
        damping = REGULARIZATION * normal.diagonal(dim1=-2, dim2=-1).sum(-1) + 1e-12
        normal.diagonal(dim1=-2, dim2=-1).add_(damping[..., None])
        weights = torch.linalg.solve(normal, dx)  # (A, W, m, H D)

        def linear(k: int, difference: Tensor) -> Tensor:
            coefficients = weights[:, k] @ difference.flatten(1)[..., None]  # (A, m, 1)
            return (du[:, k] * coefficients).sum(1).view_as(difference)

        return linear
