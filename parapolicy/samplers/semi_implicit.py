"""Semi-implicit Picard iteration: only the network term is iterated, the linear part is solved exactly.

This is the "order T" fixed-point system of ParaTAA (Tang et al., ICML 2024) without its acceleration, inside the
sliding window of ParaDiGMS (Shih et al., NeurIPS 2023).
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from parapolicy.samplers.base import DenoiserLike, Sample, never
from parapolicy.samplers.window import SlidingWindows, check_window, recurrence
from parapolicy.schedule import Schedule


@dataclass(frozen=True)
class SemiImplicit:
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
        check_window(self.window, self.tolerance)

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

        while (entries := windows.next_round()) is not None:
            row, step, valid = entries
            windows.extrapolate(row, step[:, -1] + 1)
            target = row.expand_as(step)[valid], step[valid] + 1
            u[target] = denoiser(x[target[0], step[valid]], step[valid], target[0])
            drive = schedule.drive(u[row, step + 1], u[row, step], z[row, step], step)
            after = recurrence(x[row[:, 0], step[:, 0]], schedule.A[step], drive)  # (A, W, H, D)
            change = (after - x[row, step + 1]).square().mean((2, 3))  # (A, W)
            x[target] = after[valid]
            windows.advance(entries, change <= limit[step])
            if stop():
                break
        return windows.result()


def settling_variance(schedule: Schedule) -> Tensor:
    """The variance that each step's result is judged by, (T,); the last step adds none and takes its neighbour's."""
    variance = schedule.variance.clone()
    if len(variance) > 1:
        variance[-1] = variance[-2]
    return variance
