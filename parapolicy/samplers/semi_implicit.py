"""Semi-implicit Picard iteration: only the network term is iterated, the linear part is solved exactly.

This is the "order T" fixed-point system of ParaTAA (Tang et al., ICML 2024) without its acceleration, inside the
sliding window of ParaDiGMS (Shih et al., NeurIPS 2023).
"""

from dataclasses import dataclass

from torch import Tensor

from parapolicy.samplers.base import DenoiserLike, Sampler, check_count, check_tolerance
from parapolicy.samplers.window import WindowRounds, recurrence
from parapolicy.schedule import Schedule


@dataclass(frozen=True)
class SemiImplicit(Sampler):
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
        check_count("window", self.window)
        check_tolerance(self.tolerance)

    def rounds(self, schedule: Schedule, noise: Tensor, compiled: bool = False) -> "SemiImplicitRounds":
        return SemiImplicitRounds(self, schedule)


class SemiImplicitRounds(WindowRounds):
    """Rounds of :class:`SemiImplicit`."""

    def __init__(self, sampler: SemiImplicit, schedule: Schedule) -> None:
        super().__init__(schedule, sampler.window)
        self.limit = sampler.tolerance**2 * settling_variance(schedule)  # (T,)

    def advance(self, denoiser: DenoiserLike) -> None:
        entries, x, u = self.entries(), self.x, self.u
        element, step, valid = entries
        self.extrapolate(element, step[:, -1] + 1)
        elements, steps = entries.inside
        u[elements, steps + 1] = denoiser(x[elements, steps], steps, elements)
        increment = self.schedule.increment(u[element, step + 1], u[element, step], self.z[element, step], step)
        after = recurrence(x[element[:, 0], step[:, 0]], self.schedule.A[step], increment)  # (A, W, S)
        change = (after - x[element, step + 1]).square().mean(2)  # (A, W)
        x[elements, steps + 1] = after[valid]
        self.move(entries, change <= self.limit[step])


def settling_variance(schedule: Schedule) -> Tensor:
    """The variance that each step's change is compared with, (T,). The last step adds none and uses its neighbour's."""
    variance = schedule.variance.clone()
    if len(variance) > 1:
        variance[-1] = variance[-2]
    return variance
