"""Semi-implicit Picard iteration with a secant model of the network: fewer rounds for the same fixed point.

Anderson acceleration as ParaTAA (Tang et al., ICML 2024) applies it extrapolates the estimates before the recurrence.
Here the same differences of past rounds are used *inside* the recurrence, as a quasi-Newton method does (DEER, Lim et
al., ICLR 2024, with Broyden's multisecant approximation for the Jacobian).
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from parapolicy.compiling import Compiling
from parapolicy.samplers.base import DenoiserLike, Rounds, Sample, Sampler, check_count, check_tolerance
from parapolicy.samplers.secant_model import SecantModel
from parapolicy.samplers.semi_implicit import settling_variance
from parapolicy.schedule import Schedule

BLOCK = 25  # states solved at once; the cost grows with their square

# Settling thresholds, in standard deviations of the step's noise per unit of tolerance. They apply to the largest
# change among a state's numbers, because one number may change alone, such as when a gripper closes. A state leaves the
# window when it changes by less than SETTLED. Errors that are left behind can grow tenfold, and more in the last steps,
# where the threshold is FINAL. A result is accepted only while no state of the window moves by more than MOVING: near
# a bifurcation between modes, a single round can stand still.
SETTLED, FINAL, MOVING = 10.0, 3.0, 90.0


@dataclass(frozen=True)
class Secant(Sampler):
    """Quasi-Newton iteration on the estimates u, which stops by the estimated error of the final sample.

    A round evaluates u_j = F_j(x_j) at every state of the window, then recomputes the states one after the other with
    a linear model of F_j at the new state: u_j + J_j (x_j_new - x_j). J_j is the least-squares fit to the last rounds'
    evaluations at steps j - 1, j and j + 1. The correction is zero where a state has not moved, so the fixed point is
    that of :class:`parapolicy.samplers.SemiImplicit`.

    The error is estimated once the window reaches the last step: c r / (1 - r), where c is the final sample's last
    change and r the ratio of its last two.

    Attributes:
        window: states evaluated per round. The whole schedule for the fewest rounds, 20 to 40 for the fewest network
            evaluations.
        tolerance: largest estimated error of an element of the sample, in normalised units (of Push-T's 512 pixels,
            0.01 is 2.5). 0: exact.
        history: number of past differences in the fit; 0: plain semi-implicit iteration. More than one saves a few
            percent of the rounds where the window is the whole schedule, for three times the work of the fit.
    """

    window: int = 40
    tolerance: float = 0.01
    history: int = 1

    def __post_init__(self) -> None:
        check_count("window", self.window)
        check_tolerance(self.tolerance)
        check_count("history", self.history, least=0)

    @property
    def asked_error(self) -> float:
        return self.tolerance

    def rounds(self, schedule: Schedule, noise: Tensor, compiled: bool = False) -> "SecantRounds":
        return SecantRounds(self, schedule, noise, compiled)


def _remaining(ratio: Tensor) -> Tensor:
    """What the geometric series of changes still adds, relative to the last change; 1 where the ratio is unknown."""
    remaining = ratio.clamp(min=0.1) / (1 - ratio.clamp(max=0.9))
    return torch.where(ratio.isnan(), 1.0, remaining)


class SecantRounds(Rounds):
    """Rounds of :class:`Secant` on memory of fixed shapes: every round is the same work.

    All arrays extend one window past the last step. Windows that pass the end, and those of elements that are done,
    work on these extra entries, which influence nothing else.

    Args:
        sampler, schedule: parameters and steps.
        noise: (T + 1, B, S), for its shape and device.
        compiled: compile the work between two network calls, for a single sample.

    Attributes:
        sparse: leave entries past the end out of the network's calls; on a GPU, padding is cheaper than the
            synchronisation needed to count them.
    """

    fixed_shapes: ClassVar[bool] = True

    def __init__(self, sampler: Secant, schedule: Schedule, noise: Tensor, compiled: bool = False) -> None:
        self.sampler, self.schedule, self.steps = sampler, schedule, len(schedule)
        self.tolerance = noise.new_tensor(sampler.tolerance)  # a constant would be compiled in
        batch, size, device = noise.shape[1], noise.shape[2], noise.device
        window = min(sampler.window, self.steps)
        self.offsets = torch.arange(window, device=device)
        self.element = torch.arange(batch, device=device)[:, None]
        self.entry_element = self.element.flatten().repeat_interleave(window)
        # x_j, z_j and u_{j-1} at index j: the estimate before the first is 0.
        self.x, self.u, self.z, self.guess = (noise.new_zeros(batch, self.steps + window + 1, size) for _ in range(4))
        beyond = (0, window + 1)
        self.tables = torch.stack([functional.pad(t, beyond) for t in (schedule.A, schedule.C, schedule.S)])
        self.propagators = functional.pad(schedule.propagators, beyond + beyond)
        self.deviation = functional.pad(settling_variance(schedule).sqrt(), beyond, value=1.0)
        self.model = SecantModel(self.x, self.steps, sampler.history)
        self.start, self.end, self.rounds, self.evaluations = (torch.zeros_like(self.element[:, 0]) for _ in range(4))
        self.error, self.last_change, self.residual = (noise.new_zeros(batch) for _ in range(3))
        self._done = torch.zeros((), dtype=torch.bool, device=device)
        self.sparse = not noise.is_cuda
        # A robot waits for one sample at a time; compiling for every batch size would take longer than it saves.
        self.compiled = compiled and batch == 1
        self.bound = torch.inf if schedule.clip is None or schedule.overshoot.any() else schedule.clip

    @property
    def done(self) -> Tensor:
        return self._done

    def begin(self, noise: Tensor, guess: Tensor | None) -> None:
        for value in (self.x, self.u, self.z, self.guess, self.start, self.end, self.rounds, self.evaluations):
            value.zero_()
        self._done.fill_(False)
        self.x[:, 0] = noise[0]
        self.z[:, : self.steps] = noise[1:].transpose(0, 1)
        if guess is not None:
            self.guess[:, 1 : self.steps + 1] = guess
        self.error.fill_(torch.inf)
        self.last_change.fill_(torch.nan)
        self.residual.zero_()
        self.model.forget()

    def advance(self, denoiser: DenoiserLike) -> None:
        prepare, correct = COMPILED if self.compiled else (SecantRounds._prepare, SecantRounds._correct)
        step, before = prepare(self)
        correct(self, step, before, self._evaluate(denoiser, before, step))

    def _prepare(self) -> tuple[Tensor, Tensor]:
        """The steps (B, W) of the window and their states (B, W, S)."""
        self._extrapolate()
        step = self.start[:, None] + self.offsets
        return step, self.x[self.element, step]

    def _correct(self, step: Tensor, before: Tensor, estimates: Tensor) -> None:
        """Update states, errors and windows from the estimates at the window's states."""
        x, u, element, tolerance = self.x, self.u, self.element, self.tolerance
        active, valid = self.start < self.steps, step < self.steps
        newest_u = u[element[:, 0], self.end]
        self.model.record(element, step, before, estimates)
        u[element, step + 1] = estimates

        new = self._follow(step, before, estimates)
        moved = (new - x[element, step + 1]).abs().amax(2) / self.deviation[step]
        final = x[:, self.steps].clone()
        x[element, step + 1] = new

        reached = self.start + len(self.offsets) >= self.steps
        reaches_end = active & reached
        change = (x[:, self.steps] - final).abs().amax(1)
        estimated = change * _remaining(change / self.last_change)
        self.error.copy_(torch.where(reaches_end, estimated, self.error))
        self.last_change.copy_(torch.where(reaches_end, change, self.last_change))
        # Skip every leading settled state and the one after it, which depends on settled values only.
        allowed = tolerance * torch.where(reached, FINAL, SETTLED)
        leading = ((moved <= allowed[:, None]) & valid).long().cumprod(1).sum(1)
        passed = self.start + (leading + 1).clamp(max=len(self.offsets))
        still = ((moved <= MOVING * tolerance) | ~valid).all(1)
        passed = torch.where(reached & still & (self.error <= tolerance), self.steps, passed)
        self.end.copy_(torch.where(active, self.start + len(self.offsets), self.end).clamp(max=self.steps))
        change_u = (u[element[:, 0], self.end] - newest_u).square().mean(1).sqrt()
        self.residual.copy_(torch.where(active, change_u, self.residual))
        self.rounds.add_(active)
        self.evaluations.add_(valid.sum(1))
        self.start.copy_(torch.where(active, passed, self.start).clamp(max=self.steps))
        self._done.copy_((self.start >= self.steps).all())

    def result(self) -> Sample:
        """The final states, extrapolated where sampling was stopped early."""
        complete = self.start >= self.steps
        while not bool((self.end >= self.steps).all()):
            self._extrapolate()
            self.end.copy_((self.end + len(self.offsets)).clamp(max=self.steps))
        x, u = self.x[:, self.steps], self.u[:, 1 : self.steps + 1]
        error = torch.where(complete & (self.sampler.tolerance == 0), 0.0, self.error)
        costs = (self.rounds.clone(), self.evaluations.clone(), self.residual.clone())
        return Sample(x.clone(), u.clone(), *costs, complete, error)

    def _evaluate(self, denoiser: DenoiserLike, states: Tensor, step: Tensor) -> Tensor:
        """The estimates (B, W, S) at states (B, W, S) and steps (B, W)."""
        valid = step < self.steps
        inputs = states.flatten(0, 1), step.flatten().clamp(max=self.steps - 1), self.entry_element
        if not self.sparse or valid.all():
            return denoiser(*inputs).view_as(states)
        inside = valid.flatten().nonzero()[:, 0]
        estimates = torch.zeros_like(states).flatten(0, 1)
        estimates[inside] = denoiser(*(value[inside] for value in inputs))
        return estimates.view_as(states)

    def _extrapolate(self) -> None:
        """Fill a window after ``end``: estimates are the guess plus the last estimate's difference from its guess."""
        first = self.end[:, None]
        step = first + self.offsets
        correction = self.u[self.element, first] - self.guess[self.element, first]
        estimates = self.guess[self.element, step + 1] + correction
        self.u[self.element, step + 1] = estimates
        at = self.element[:, 0], self.end
        still, gain = self._propagate(step, self.x[at], self.u[at])
        self.x[self.element, step + 1] = torch.baddbmm(still, gain, estimates)

    def _follow(self, step: Tensor, before: Tensor, estimates: Tensor) -> Tensor:
        """The W states (B, W, S) after the window's first, by the recurrence with the model's estimates."""
        weights, du = self.model.fit(self.element, step)
        state, previous_u, states = before[:, 0], self.u[self.element[:, 0], self.start], []
        for entries in zip(*(v.split(BLOCK, 1) for v in (step, before, estimates, weights, du)), strict=True):
            block, previous_u = self._follow_block(state, previous_u, *entries)
            states.append(block)
            state = block[:, -1]
        return states[0] if len(states) == 1 else torch.cat(states, 1)

    def _follow_block(
        self,
        state: Tensor,
        previous_u: Tensor,
        step: Tensor,
        before: Tensor,
        estimates: Tensor,
        weights: Tensor,
        du: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """The states after ``state``, and the last estimate.

        The model depends on a state through a few numbers y, its products with past differences: the estimates are
        u + du^T y. The schedule is linear, so each y is a sum over those before it, y = r + L y with a strictly lower
        triangular L: one substitution instead of a loop. Estimates are clipped only afterwards. At the fixed point
        they are the network's own, so clipping changes nothing there.
        """
        still, gain = self._propagate(step, state, previous_u)
        free = torch.baddbmm(still, gain, estimates)  # the states, if the network repeated its estimates
        moved = torch.cat((state[:, None], free[:, :-1]), 1) - before
        r = weights @ moved[..., None]  # (B, K, m, 1)
        sizes = r.shape[1:3]  # (K, m)
        coupling = (weights.flatten(1, 2) @ du.flatten(1, 2).mT).unflatten(2, sizes).unflatten(1, sizes)
        later = functional.pad(gain[:, :-1], (0, 0, 1, 0))  # what each estimate adds to the state before each step
        system = (coupling * -later[:, :, None, :, None]).flatten(3, 4).flatten(1, 2)
        y = torch.linalg.solve_triangular(system, r.flatten(1, 2), upper=False, unitriangular=True)
        estimates = estimates + (y.unflatten(1, sizes).mT @ du)[:, :, 0]
        estimates = estimates.clamp_(-self.bound, self.bound)
        return torch.baddbmm(still, gain, estimates), estimates[:, -1]

    def _propagate(self, step: Tensor, state: Tensor, previous_u: Tensor) -> tuple[Tensor, Tensor]:
        """The states (B, K, S) after steps (B, K) without the contribution of their estimates, and each estimate's gain
        on each state, (B, K, K). ``state`` and ``previous_u`` are those before the first step, (B, S).
        """
        rows = step[:, :, None] * self.propagators.shape[-1] + step[:, None]  # not [:, i, j]: see SecantModel._at
        spread, gain = self.propagators.flatten(1).index_select(1, rows.flatten()).unflatten(1, rows.shape)
        a, c, s = self.tables[:, step][..., None]  # (B, K, 1) each
        increment = s * self.z[self.element, step]
        increment[:, 0] += torch.addcmul(a[:, 0] * state, c[:, 0], previous_u)
        return spread @ increment, gain


COMPILED = Compiling(SecantRounds._prepare, dynamic=False), Compiling(SecantRounds._correct, dynamic=False)
