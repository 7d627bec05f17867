"""The coefficients of every solver from its noise levels.

With (alpha_t, sigma_t) where a step starts, (alpha_s, sigma_s) where it ends, and
r = (alpha_t sigma_s) / (alpha_s sigma_t), the step from x with the clean estimate u and noise z is A x + B u + S z:

    S = eta sigma_s sqrt(1 - r²),    A = sqrt(sigma_s² - S²) / sigma_t,    B = alpha_s - A alpha_t

(Song et al., *Denoising Diffusion Implicit Models*, ICLR 2021). The solvers differ in eta and order only:

    DDPM                eta 1    (Ho et al., NeurIPS 2020)
    DDIM                eta given
    DPM-Solver++        eta 0, order 1 or 2 (2M; Lu et al., 2022, arXiv:2211.01095)
    SDE-DPM-Solver++    eta 1, order 1 or 2 (2M; the same paper)
    flow matching       eta 0, order 1 (Euler) or 2 (2M); Lipman et al., ICLR 2023; Liu et al., ICLR 2023
"""

import torch
from torch import Tensor

from parapolicy.schedule.levels import Levels


def coefficients(
    levels: Levels,
    eta: float = 0.0,
    order: int = 1,
    solver_type: str = "midpoint",
    euler_at_final: bool = False,
    posterior_mean: bool = False,
) -> dict[str, Tensor]:
    """The tables ``A``, ``B``, ``C``, ``S`` and ``variance``, each (T,), in the precision of the levels.

    Args:
        levels: where the T steps start and end.
        eta: share of the ancestral noise, 0 (deterministic) to 1.
        order: 1, or 2: u is extrapolated from the last two estimates in log-SNR.
        solver_type: ``midpoint`` or ``heun``, two forms of order 2. They are defined for eta 0 and 1.
        euler_at_final: take order 1 in the last step. A step that ends without noise always has order 1.
        posterior_mean: for eta 1, write A and B as the coefficients of DDPM's posterior mean: the same numbers, rounded
            as diffusers' DDPM rounds them.
    """
    signal, noise, signal_next, noise_next = levels.signal, levels.noise, levels.signal_next, levels.noise_next
    added = added_noise(levels)
    posterior = noise_next / noise * added
    S = eta * posterior**0.5
    if posterior_mean:  # sqrt(sigma_s² - S²) is r sigma_s
        A = (signal / signal_next) ** 0.5 * noise_next / noise
        B = signal_next**0.5 * added / noise
    else:
        A = (noise_next - S**2) ** 0.5 / noise**0.5
        B = signal_next**0.5 - A * signal**0.5
    C = torch.zeros_like(A)
    if order == 2:
        # Infinite where a step starts without signal (flow matching at t = 1) or ends without noise.
        log_snr_step = 0.5 * torch.log(signal_next * noise / (signal * noise_next))
        weight = 0.5 * B if solver_type == "midpoint" else signal_next**0.5 - B / ((1 + eta**2) * log_snr_step)
        extrapolation = torch.zeros_like(A)
        extrapolation[1:] = weight[1:] * log_snr_step[1:] / log_snr_step[:-1]
        extrapolation[noise_next == 0] = 0.0
        if euler_at_final:
            extrapolation[-1] = 0.0
        B, C = B + extrapolation, -extrapolation
    # diffusers' lower bound, which keeps the logarithm of the last step's variance finite.
    return {"A": A, "B": B, "C": C, "S": S, "variance": posterior.clamp(min=1e-20)}


def added_noise(levels: Levels) -> Tensor:
    """sigma_t² (1 - r²), (T,): the variance that the forward process adds from the end of a step to its start.

    It is sigma_t² - (alpha_t / alpha_s)² sigma_s². With alpha² + sigma² factored in as below, it equals
    1 - (alpha_t / alpha_s)² to the bit where variance is preserved.
    """
    ratio = levels.signal / levels.signal_next
    return (levels.signal + levels.noise) - ratio * (levels.signal_next + levels.noise_next)


def fixed_large_noise(levels: Levels) -> Tensor:
    """S of DDPM with ``variance_type`` ``fixed_large``, (T,); 0 where a step ends without noise."""
    return torch.where(levels.noise_next > 0, added_noise(levels) ** 0.5, 0.0)


def clipping_overshoot(levels: Levels, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """B and the part of the clipped-off excess that stays in u, each (T,), for diffusers' default clipping in DDIM.

    diffusers clips the clean estimate but derives epsilon from the unclipped one:
    x' = alpha_s clip(x0) + A (x - alpha_t x0), so the excess has the coefficient -A alpha_t.
    """
    # With set_alpha_to_one off, the last step may have B = 0, but the clipped excess still passes through it.
    B = torch.where(B.abs() < 1e-6, 1e-6, B)
    return B, -A * levels.signal**0.5 / B
