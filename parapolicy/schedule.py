"""Every solver as one table: linear in the state plus a network term.

With steps j = 0 … T-1 in sampling order, and u_j the network's (clipped) estimate of the clean sample at state x_j,

    x_{j+1} = A_j x_j + B_j u_j + C_j u_{j-1} + S_j z_j,     z_j ~ N(0, I) drawn before sampling starts.

DDPM (Ho et al., 2020) and DDIM (Song et al., 2021) have C = 0; second-order multistep DPM-Solver++ (Lu et al., 2022)
uses the previous estimate. The diffusers scheduler of the given config supplies timesteps and cumulative products, and
the tables repeat its float32 arithmetic, so that a step here equals its ``step`` to rounding.
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler
from torch import Tensor

SOLVERS = {
    "ddpm": DDPMScheduler,
    "ddim": DDIMScheduler,
    "dpmsolver++": DPMSolverMultistepScheduler,
}
MAX_TRAIN_TIMESTEPS = 10_000  # ten times the most in use; a larger number is a damaged config
PREDICTIONS = ("epsilon", "sample", "v_prediction")


@dataclass(frozen=True, eq=False)
class Schedule:
    """The coefficient tables of one solver; every tensor is (T,), float32 unless noted.

    Attributes:
        solver: ``ddpm``, ``ddim`` or ``dpmsolver++``.
        timesteps: int64, as the network expects them, decreasing.
        A, B, C, S: coefficients of state, estimate, previous estimate, and noise.
        variance: DDPM's posterior variance of each step: the scale of a step's noise, also for solvers without noise.
        alpha, sigma: signal and noise level at each timestep: ``x = alpha * x0 + sigma * epsilon``.
        overshoot: what part of the clipped-off excess stays in u. DDIM as diffusers runs it by default derives epsilon
            from the unclipped estimate; the excess is then part of the network term. 0 elsewhere.
        clip: u is clipped to [-clip, clip]; None for no clipping.
        prediction: what the network predicts: ``epsilon``, ``sample`` or ``v_prediction``.
        sample_shape: (H, Da) of the policy that this schedule belongs to, or None.
    """

    solver: str
    timesteps: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    S: Tensor
    variance: Tensor
    alpha: Tensor
    sigma: Tensor
    overshoot: Tensor
    clip: float | None
    prediction: str
    sample_shape: tuple[int, int] | None = None

    def __len__(self) -> int:
        return len(self.timesteps)

    def to(self, device: torch.device | str) -> "Schedule":
        """The same tables on another device."""
        moved = {
            f.name: getattr(self, f.name).to(device)
            for f in dataclasses.fields(self)
            if isinstance(getattr(self, f.name), Tensor)
        }
        return dataclasses.replace(self, **moved)

    def estimate(self, output: Tensor, x: Tensor, step: Tensor) -> Tensor:
        """u from the network's output.

        Args:
            output, x: network output and state, (N, H, D).
            step: (N,) int64 step indices.
        """
        alpha, sigma = self.alpha[step, None, None], self.sigma[step, None, None]
        if self.prediction == "epsilon":
            clean = (x - sigma * output) / alpha
        elif self.prediction == "sample":
            clean = output
        else:
            clean = alpha * x - sigma * output
        if self.clip is None:
            return clean
        clipped = clean.clamp(-self.clip, self.clip)
        if self.solver != "ddim":
            return clipped
        return clipped + self.overshoot[step, None, None] * (clean - clipped)

    def step(self, x: Tensor, u: Tensor, previous_u: Tensor, z: Tensor, step: Tensor) -> Tensor:
        """x_{j+1} from x_j, u_j, u_{j-1} and z_j, each (N, H, D), at step indices ``step`` (N,)."""
        return self.A[step, None, None] * x + self.drive(u, previous_u, z, step)

    def drive(self, u: Tensor, previous_u: Tensor, z: Tensor, step: Tensor) -> Tensor:
        """The part of :meth:`step` that does not depend on x_j: (..., H, D) with ``step`` (...)."""
        drive = self.B[step][..., None, None] * u + self.S[step][..., None, None] * z
        # Solvers of first order are the common case: spare them the multiplication by zero.
        return drive + self.C[step][..., None, None] * previous_u if self.solver == "dpmsolver++" else drive

    @cached_property
    def propagators(self) -> Tensor:
        """(2, T, T): what a unit of step i's drive, and of its estimate u_i, adds to the state after step k, [·, k, i].

        The states after W steps from step s on are therefore two products with blocks [s : s + W, s : s + W].
        """
        rows = self.A.new_zeros(len(self), len(self), dtype=torch.float64)
        for k, a in enumerate(self.A.tolist()):
            rows[k] = a * rows[k - 1]
            rows[k, k] = 1.0
        gain = rows * self.B
        gain[:, :-1] += rows[:, 1:] * self.C[1:]
        return torch.stack((rows, gain)).to(self.A)

    def transitions(self, step: Tensor, z: Tensor) -> Callable[[int, Tensor, Tensor, Tensor], Tensor]:
        """:meth:`step` along W steps (A, W) with noise (A, W, H, D), for loops: coefficients are looked up once.

        Returns:
            (k, x, u, previous_u), the last three (A, H, D), -> the state after the k-th step; to the bit as ``step``.
        """
        a, b, c = (table[step][..., None, None].unbind(1) for table in (self.A, self.B, self.C))
        kick = (self.S[step][..., None, None] * z).unbind(1)

        def move(k: int, x: Tensor, u: Tensor, previous_u: Tensor) -> Tensor:
            drive = b[k] * u + kick[k]
            return a[k] * x + (drive + c[k] * previous_u if self.solver == "dpmsolver++" else drive)

        return move


def make_schedule(
    config: Mapping[str, Any],
    solver: str | None = None,
    steps: int | None = None,
    eta: float = 0.0,
    order: int | None = None,
    use_clipped_model_output: bool = False,
    sample_shape: tuple[int, int] | None = None,
) -> Schedule:
    """Build the tables from a diffusers scheduler's config.

    Args:
        config: the scheduler's config, ``_class_name`` included.
        solver: ``ddpm``, ``ddim`` or ``dpmsolver++``; None: the one that the config names. ``dpmsolver++`` from another
            solver's config takes ``trailing`` timesteps.
        steps: number of inference steps T; None: as many as in training.
        eta: DDIM's noise, 0 (none) to 1 (DDPM-like). Only for ``ddim``.
        order: DPM-Solver++'s order, 1 or 2; None: the config's own. Only for ``dpmsolver++``.
        use_clipped_model_output: as the argument of that name of diffusers' ``DDIMScheduler.step``.
        sample_shape: (H, Da), remembered for :func:`parapolicy.draw_noise`.

    A config with ``clip_sample`` clips u under every solver. (diffusers' DPM-Solver++ has no such key and ignores it,
    which lets the first steps of a cosine schedule, where alpha is near 0, magnify the network's error without bound.)

    Raises:
        ValueError: an unknown solver, a number of steps that the config cannot give, or an unsupported setting.
    """
    named = {cls.__name__: name for name, cls in SOLVERS.items()}
    solver = solver or named.get(str(config.get("_class_name")).replace("Parallel", ""))
    if solver not in SOLVERS:
        raise ValueError(
            f"solver is {solver!r} (config: {config.get('_class_name')!r}), expected one of {sorted(SOLVERS)}"
        )
    if eta and solver != "ddim":
        raise ValueError(f"eta is {eta}, but only ddim takes it; the solver is {solver}")
    if not 0 <= eta <= 1:
        raise ValueError(f"eta is {eta}, expected a number from 0 to 1")
    if order is not None and solver != "dpmsolver++":
        raise ValueError(f"order is {order}, but only dpmsolver++ takes it; the solver is {solver}")

    count = config.get("num_train_timesteps", 1000)
    if not isinstance(count, int) or not 1 <= count <= MAX_TRAIN_TIMESTEPS:
        raise ValueError(f"num_train_timesteps is {count!r}, expected 1 to {MAX_TRAIN_TIMESTEPS}")
    settings = {key: value for key, value in config.items() if not key.startswith("_")}
    if solver == "dpmsolver++":
        settings |= {} if order is None else {"solver_order": order}
    scheduler = SOLVERS[solver].from_config(settings)
    settings = scheduler.config
    steps = count if steps is None else steps
    if not 1 <= steps <= count:
        raise ValueError(f"steps is {steps}, expected 1 to {count}, the config's num_train_timesteps")
    if settings["prediction_type"] not in PREDICTIONS:
        raise ValueError(f"prediction_type is {settings['prediction_type']!r}, expected one of {PREDICTIONS}")
    if settings.get("thresholding"):
        raise ValueError("thresholding is on, which is not linear in the state; turn it off and use clip_sample")

    if solver == "dpmsolver++" and named.get(str(config.get("_class_name"))) != solver:
        # Another solver's config: "leading" would skip the noisiest timesteps, "linspace" would repeat one at full T.
        scheduler.set_timesteps(timesteps=[round(count - i * count / steps) - 1 for i in range(steps)])
    else:
        scheduler.set_timesteps(steps)
    timesteps = scheduler.timesteps.long()
    if len(timesteps) != steps or timesteps[0] >= count or timesteps[-1] < 0 or (timesteps.diff() >= 0).any():
        raise ValueError(
            f"{steps} steps with timestep_spacing {settings['timestep_spacing']!r} and steps_offset "
            f"{settings.get('steps_offset')} do not give {steps} distinct timesteps from {count - 1} to 0; "
            "take another number of steps or timestep_spacing"
        )
    if solver == "dpmsolver++":
        # Its own config has no such key; a training config's clip_sample is honoured (see above).
        clip = config.get("clip_sample_range", 1.0) if config.get("clip_sample") else None
        tables = _dpmsolver_tables(scheduler)
    else:
        clip = settings["clip_sample_range"] if settings["clip_sample"] else None
        tables = _ddpm_tables(scheduler) if solver == "ddpm" else _ddim_tables(scheduler, eta, use_clipped_model_output)
    tables = {name: value.to(torch.float32) for name, value in tables.items()}
    for name, value in tables.items():
        if not torch.isfinite(value).all():
            raise ValueError(f"{solver} with {steps} steps has a coefficient {name} that is not finite")
    return Schedule(
        solver=solver,
        timesteps=timesteps,
        clip=clip,
        prediction=settings["prediction_type"],
        sample_shape=sample_shape,
        **{name: tables.get(name, torch.zeros(len(timesteps))) for name in ("C", "overshoot")} | tables,
    )


def _posterior_variance(alpha_bar: Tensor, alpha_bar_next: Tensor) -> Tensor:
    """DDPM's ``fixed_small`` variance, (1 - a') / (1 - a) * (1 - a / a'), bounded below as diffusers does."""
    return ((1 - alpha_bar_next) / (1 - alpha_bar) * (1 - alpha_bar / alpha_bar_next)).clamp(min=1e-20)


def _cumulative(scheduler: Any, following: list[int], final: Tensor) -> tuple[Tensor, Tensor]:
    """alpha_bar at each timestep and at the one after it (``final`` where that is negative)."""
    alpha_bar = scheduler.alphas_cumprod
    return alpha_bar[scheduler.timesteps], torch.stack([alpha_bar[t] if t >= 0 else final for t in following])


def _ddpm_tables(scheduler: Any) -> dict[str, Tensor]:
    timesteps = scheduler.timesteps
    a, a_next = _cumulative(scheduler, [int(scheduler.previous_timestep(t)) for t in timesteps], scheduler.one)
    step_alpha = a / a_next
    variance = _posterior_variance(a, a_next)
    match scheduler.config.variance_type:
        case "fixed_small" | "fixed_small_log":
            std = variance**0.5
        case "fixed_large":
            std = (1 - step_alpha) ** 0.5
        case other:
            raise ValueError(f"variance_type is {other!r}, expected fixed_small, fixed_small_log or fixed_large")
    return {
        "A": step_alpha**0.5 * (1 - a_next) / (1 - a),
        "B": a_next**0.5 * (1 - step_alpha) / (1 - a),
        "S": torch.where(timesteps > 0, std, 0.0),
        "variance": variance,
        "alpha": a**0.5,
        "sigma": (1 - a) ** 0.5,
    }


def _ddim_tables(scheduler: Any, eta: float, use_clipped_model_output: bool) -> dict[str, Tensor]:
    # As diffusers: the next timestep is a fixed stride away, whatever the spacing.
    stride = scheduler.config.num_train_timesteps // scheduler.num_inference_steps
    following = [int(t) - stride for t in scheduler.timesteps]
    a, a_next = _cumulative(scheduler, following, scheduler.final_alpha_cumprod)
    variance = _posterior_variance(a, a_next)
    std = eta * ((1 - a_next) / (1 - a) * (1 - a / a_next)) ** 0.5
    alpha, sigma = a**0.5, (1 - a) ** 0.5
    # x' = sqrt(a') u + direction * epsilon, with epsilon = (x - alpha * x0) / sigma.
    direction = (1 - a_next - std**2) ** 0.5
    carry = direction / sigma
    gain = a_next**0.5 - carry * alpha
    overshoot = torch.zeros_like(a)
    if scheduler.config.clip_sample and not use_clipped_model_output:
        # With set_alpha_to_one off, the last step may change nothing (gain 0), yet a clipped excess passes through it.
        gain = torch.where(gain.abs() < 1e-6, 1e-6, gain)
        overshoot = -carry * alpha / gain
    return {
        "A": carry,
        "B": gain,
        "S": std,
        "variance": variance,
        "alpha": alpha,
        "sigma": sigma,
        "overshoot": overshoot,
    }


def _dpmsolver_tables(scheduler: Any) -> dict[str, Tensor]:
    config = scheduler.config
    if config.algorithm_type != "dpmsolver++" or config.solver_order not in (1, 2) or config.use_flow_sigmas:
        raise ValueError(
            f"algorithm_type is {config.algorithm_type!r} with solver_order {config.solver_order}, expected "
            "'dpmsolver++' of order 1 or 2 on a variance-preserving schedule"
        )
    count = len(scheduler.timesteps)
    levels = [scheduler._sigma_to_alpha_sigma_t(sigma) for sigma in scheduler.sigmas]
    alpha = torch.stack([level[0] for level in levels])  # (T + 1,)
    sigma = torch.stack([level[1] for level in levels])
    log_snr = torch.log(alpha) - torch.log(sigma)
    h = log_snr[1:] - log_snr[:-1]
    gain = -(alpha[1:] * (torch.exp(-h) - 1.0))
    extrapolation = torch.zeros(count)
    if config.solver_order == 2:
        ratio = h[:-1] / h[1:]
        weight = 0.5 * gain if config.solver_type == "midpoint" else alpha[1:] * ((torch.exp(-h) - 1.0) / h + 1.0)
        extrapolation[1:] = weight[1:] / ratio
        short = config.lower_order_final and count < 15
        if config.euler_at_final or short or config.final_sigmas_type == "zero":
            extrapolation[-1] = 0.0
    a = alpha**2
    return {
        "A": sigma[1:] / sigma[:-1],
        "B": gain + extrapolation,
        "C": -extrapolation,
        "S": torch.zeros(count),
        "variance": _posterior_variance(a[:-1], a[1:]),
        "alpha": alpha[:-1],
        "sigma": sigma[:-1],
    }
