"""Semi-implicit Picard iteration with a secant model of the network: fewer rounds for the same fixed point.

Anderson acceleration as ParaTAA (Tang et al., ICML 2024) applies it extrapolates the estimates before the recurrence.
Here the same differences of past rounds are used *inside* the recurrence, as a quasi-Newton method does (DEER, Lim et
al., ICLR 2024, with Broyden's multisecant approximation for the Jacobian).
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from parapolicy.samplers.base import DenoiserLike, Sample, never
from parapolicy.samplers.semi_implicit import settling_variance
from parapolicy.samplers.window import SlidingWindows, check_window
from parapolicy.schedule import Schedule

REGULARIZATION = 1e-3  # of the least-squares fit, as a part of the trace of its normal matrix


# What the tolerance asks of the path, in standard deviations of each step's noise per unit of tolerance. A state leaves
# the window when it changes by less than SETTLED times the tolerance; errors left behind can grow tenfold, in the last
# steps more, so that there only FINAL times the tolerance lets it go. A result is believed only while no state of the
# window still moves by more than MOVING times the tolerance: around a choice between modes, single rounds stand still.
SETTLED, FINAL, MOVING = 5.0, 1.0, 30.0


@dataclass(frozen=True)
class Secant:
    """Quasi-Newton iteration on the estimates u, which stops by the estimated error of the final sample.

    A round evaluates u_j = F_j(x_j) at every state of the window, then recomputes the states one after the other with
    a linear model of what F_j will say at the new state: u_j + J_j (x_j_new - x_j). J_j is the least-squares fit to
    what the last rounds saw at steps j - 1, j and j + 1. The correction is zero where a state has not moved, so the
    fixed point is that of :class:`parapolicy.samplers.SemiImplicit`.

    The error is estimated once the window reaches the last step: c r / (1 - r), where c is the final sample's last
    change and r the ratio of its last two.

    Attributes:
        window: states evaluated per round. The whole schedule for the fewest rounds, 20 to 40 for the fewest network
            evaluations.
        tolerance: largest estimated error of an element of the sample, in normalised units (of Push-T's 512 pixels,
            0.01 is 2.5). 0: exact.
        history: past rounds that the fit looks at; 0: plain semi-implicit iteration.
    """

    window: int = 40
    tolerance: float = 0.01
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
        deviation = settling_variance(schedule).sqrt()  # (T,)
        model = SecantModel(x, self.history)
        bound = float("inf") if schedule.clip is None or schedule.overshoot.any() else schedule.clip
        error, last_change = (torch.full_like(windows.residual, value) for value in (torch.inf, torch.nan))

        while (entries := windows.next_round()) is not None:
            row, step, valid = entries
            windows.extrapolate(row, step[:, -1] + 1)
            element, source, before = row[:, 0], (row.expand_as(step)[valid], step[valid]), x[row, step]
            states = before[valid]
            estimates = denoiser(states, source[1], source[0])
            model.record(source, states, estimates)
            u[source[0], source[1] + 1] = estimates

            predict = model.fit(row, step, before, u[row, step + 1])
            move = schedule.transitions(step, _columns(z[row, step]))
            state, previous_u = _columns(before)[:, 0], _columns(u[row, step[:, :1]])[:, 0]
            after = []
            for k in range(step.shape[1]):
                estimate = predict(k, state).clamp(-bound, bound)
                state = move(k, state, estimate, previous_u)
                after.append(state)
                previous_u = estimate
            new = torch.stack(after, 1).view_as(before)
            # Root mean square changes, in deviations.
            moved = (new - x[row, step + 1]).square().mean((2, 3)).sqrt() / deviation[step]
            final = x[element, -1]
            x[source[0], source[1] + 1] = new[valid]

            reaches_end = step[:, -1] + 1 >= len(schedule)
            change = (x[element, -1] - final).abs().amax((1, 2))
            estimated = change * _remaining(change / last_change[element])
            error[element] = torch.where(reaches_end, estimated, error[element])
            last_change[element] = torch.where(reaches_end, change, last_change[element])
            allowed = self.tolerance * torch.where(reaches_end, FINAL, SETTLED)
            windows.advance(entries, moved <= allowed[:, None])
            still = (moved <= MOVING * self.tolerance).masked_fill(~valid, True).all(1)
            windows.start[element[reaches_end & still & (error[element] <= self.tolerance)]] = len(schedule)
            if stop():
                break
        if self.tolerance == 0:
            error[windows.start >= len(schedule)] = 0.0
        return dataclasses.replace(windows.result(), error=error)


def _remaining(ratio: Tensor) -> Tensor:
    """What the geometric series of changes still adds, as a part of the last one; all of it where nothing is known."""
    remaining = ratio.clamp(min=0.1) / (1 - ratio.clamp(max=0.9))
    return torch.where(ratio.isnan(), 1.0, remaining)


class SecantModel:
    """The last evaluations at every step, and the linear map that fits their differences.

    Args:
        x: (B, T + 1, H, D), for its shape.
        history: differences to keep.
    """

    def __init__(self, x: Tensor, history: int) -> None:
        batch, states, *shape = x.shape
        # Pairs of state and estimate, newest first; all alike at a step that has been evaluated once.
        self.pairs = x.new_zeros(2, history + 1, batch, states - 1, *shape)
        self.seen = torch.zeros(batch, states - 1, dtype=torch.bool, device=x.device)
        self.neighbours = torch.tensor([0, -1, 1], device=x.device)

    def record(self, source: tuple[Tensor, Tensor], states: Tensor, estimates: Tensor) -> None:
        """Take N evaluations: ``states`` and ``estimates`` (N, H, D) at batch elements and steps ``source``."""
        row, step = source
        newest = torch.stack((states, estimates))[:, None]
        past = torch.where(self.seen[source][:, None, None], self.pairs[:, :-1, row, step], newest)
        self.pairs[:, :, row, step] = torch.cat((newest, past), 1)
        self.seen[source] = True

    def fit(self, row: Tensor, step: Tensor, x: Tensor, u: Tensor) -> Callable[[int, Tensor], Tensor]:
        """The model u + J (x_new - x) at each entry (A, W), around x and u (A, W, H, D).

        Returns:
            (k, x_new as columns (A, H D, 1)) -> the k-th entry's estimate, likewise.
        """
        old, seen = _columns(x).unbind(1), _columns(u).unbind(1)
        if self.pairs.shape[1] == 1:
            return lambda k, new: seen[k]
        steps = (step[..., None] + self.neighbours).clamp(0, self.pairs.shape[3] - 1)  # (A, W, 3)
        pairs = self.pairs[:, :, row[..., None], steps]
        differences = (pairs[:, :-1] - pairs[:, 1:]).permute(0, 2, 3, 4, 1, 5, 6)  # (2, A, W, 3, history, H, D)
        dx, du = differences.flatten(5).flatten(3, 4)  # (A, W, m, H D)
        normal = dx @ dx.mT  # (A, W, m, m)
        damping = REGULARIZATION * normal.diagonal(dim1=-2, dim2=-1).sum(-1) + 1e-12
        normal.diagonal(dim1=-2, dim2=-1).add_(damping[..., None])
        weights = torch.cholesky_solve(dx, torch.linalg.cholesky_ex(normal)[0]).unbind(1)  # W times (A, m, H D)
        outputs = du.mT.unbind(1)  # W times (A, H D, m)
        return lambda k, new: torch.baddbmm(seen[k], outputs[k], torch.bmm(weights[k], new - old[k]))


def _columns(values: Tensor) -> Tensor:
    """(A, W, H, D) -> (A, W, H D, 1)."""
    return values.flatten(2)[..., None]
