"""Every solver as one table: linear in the state plus a network term.

With steps j = 0 … T-1 in sampling order, and u_j the network's (clipped) estimate of the clean sample at state x_j,

    x_{j+1} = A_j x_j + B_j u_j + C_j u_{j-1} + S_j z_j,     z_j ~ N(0, I) drawn before sampling starts.

Solvers of first order (DDPM, DDIM, Euler) have C = 0; second-order multistep solvers use the previous estimate.
``levels.py`` gives the noise levels, ``tables.py`` the coefficients. A step equals that of the diffusers scheduler to
rounding.
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from parapolicy.schedule import tables
from parapolicy.schedule.calibration import Calibration
from parapolicy.schedule.config import MAX_TRAIN_TIMESTEPS, check_config
from parapolicy.schedule.levels import (
    DPM_SOLVERS,
    SOLVERS,
    SPACINGS,
    Levels,
    find_solver,
    make_levels,
    make_scheduler,
    scheduler_class,
)

PREDICTIONS = ("epsilon", "sample", "v_prediction")
FLOW_PREDICTIONS = ("flow_prediction", "sample")


@dataclass(frozen=True, eq=False)
class Schedule:
    """The coefficient tables of one solver; every tensor is (T,), float32 unless noted.

    States are flat: (..., S) with S the product of the sample's shape, and step indices (...).

    Attributes:
        solver: one of ``SOLVERS``.
        timesteps: what the network expects, decreasing: int64, or float32 for flow matching.
        A, B, C, S: coefficients of state, estimate, previous estimate, and noise.
        variance: DDPM's posterior variance of each step, also for solvers without noise: the scale of a step's noise.
        alpha, sigma: signal and noise level at each timestep: ``x = alpha * x0 + sigma * epsilon``.
        overshoot: the part of the clipped-off excess that stays in u. DDIM in diffusers by default derives epsilon
            from the unclipped estimate; the excess is then part of the network term. 0 for all other solvers.
        clip: u is clipped to [-clip, clip]; None for no clipping.
        prediction: what the network predicts: ``epsilon``, ``sample``, ``v_prediction`` or ``flow_prediction`` (the
            velocity epsilon - x0).
        sample_shape: the shape of one sample, (H, Da) for an action chunk, or None if unknown.
        calibration: how the policy's estimates respond to the state along the schedule, or None if unknown.
        multistep: whether any C is not 0.
        overshoots: whether any overshoot is not 0.
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
    sample_shape: tuple[int, ...] | None = None
    calibration: Calibration | None = None
    # Computed once, so that the methods need no synchronisation with the device.
    multistep: bool = dataclasses.field(init=False)
    overshoots: bool = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "multistep", bool(self.C.any()))
        object.__setattr__(self, "overshoots", bool(self.overshoot.any()))

    def __len__(self) -> int:
        return len(self.timesteps)

    def to(self, device: torch.device | str) -> "Schedule":
        """The same tables on another device."""
        moved = {
            f.name: getattr(self, f.name).to(device)
            for f in dataclasses.fields(self)
            if isinstance(getattr(self, f.name), Tensor | Calibration)
        }
        return dataclasses.replace(self, **moved)

    def estimate(self, output: Tensor, x: Tensor, step: Tensor) -> Tensor:
        """u from the network's output.

        Args:
            output, x: network output and state, (..., S).
            step: (...) int64 step indices.
        """
        alpha, sigma = self.alpha[step][..., None], self.sigma[step][..., None]
        match self.prediction:
            case "epsilon":
                clean = (x - sigma * output) / alpha
            case "sample":
                clean = output
            case "v_prediction":
                clean = alpha * x - sigma * output
            case _:
                clean = x - sigma * output
        if self.clip is None:
            return clean
        clipped = clean.clamp(-self.clip, self.clip)
        if not self.overshoots:
            return clipped
        return clipped + self.overshoot[step][..., None] * (clean - clipped)

    def step(self, x: Tensor, u: Tensor, previous_u: Tensor, z: Tensor, step: Tensor) -> Tensor:
        """x_{j+1} from x_j, u_j, u_{j-1} and z_j, each (..., S), at step indices ``step`` (...)."""
        return self.A[step][..., None] * x + self.increment(u, previous_u, z, step)

    def increment(self, u: Tensor, previous_u: Tensor, z: Tensor, step: Tensor) -> Tensor:
        """The part of :meth:`step` that does not depend on x_j: (..., S) with ``step`` (...)."""
        increment = self.B[step][..., None] * u + self.S[step][..., None] * z
        # Skips a multiplication by zero in the common case, first order.
        return increment + self.C[step][..., None] * previous_u if self.multistep else increment

    @cached_property
    def propagators(self) -> Tensor:
        """(2, T, T): what a unit of step i's increment, and of its estimate u_i, adds to the state after step k.

        Indexed [·, k, i]. The states after W steps from step s on are therefore two products with blocks
        [s : s + W, s : s + W].
        """
        of_increment = self.A.new_zeros(len(self), len(self), dtype=torch.float64)
        for k, a in enumerate(self.A.tolist()):
            of_increment[k] = a * of_increment[k - 1]
            of_increment[k, k] = 1.0
        of_estimate = of_increment * self.B
        of_estimate[:, :-1] += of_increment[:, 1:] * self.C[1:]
        return torch.stack((of_increment, of_estimate)).to(self.A)

    def transitions(self, step: Tensor, z: Tensor) -> Callable[[int, Tensor, Tensor, Tensor], Tensor]:
        """:meth:`step` along W steps (A, W) with noise (A, W, S), for loops: coefficients are looked up once.

        Returns:
            A function (k, x, u, previous_u) -> the state after the k-th step, equal to ``step`` to the bit. The last
            three arguments are (A, S).
        """
        a, b, c = (table[step][..., None].unbind(1) for table in (self.A, self.B, self.C))
        noise_term = (self.S[step][..., None] * z).unbind(1)

        def move(k: int, x: Tensor, u: Tensor, previous_u: Tensor) -> Tensor:
            increment = b[k] * u + noise_term[k]
            return a[k] * x + (increment + c[k] * previous_u if self.multistep else increment)

        return move


def make_schedule(
    config: Mapping[str, Any],
    solver: str | None = None,
    steps: int | None = None,
    eta: float = 0.0,
    order: int | None = None,
    use_clipped_model_output: bool = False,
    sample_shape: tuple[int, ...] | None = None,
    spacing: str = "even",
) -> Schedule:
    """Build the tables from a diffusers scheduler's config.

    Args:
        config: the scheduler's config, ``_class_name`` included.
        solver: one of ``SOLVERS``; None: the one that the config names. ``flow`` takes flow-matching configs only
            (``FlowMatchEulerDiscreteScheduler``), and these take no other solver.
        steps: number of inference steps T; None: as many as in training.
        eta: DDIM's noise, 0 (none) to 1 (DDPM-like). Only for ``ddim``.
        order: 1 or 2 (multistep). Only for ``dpmsolver++``, ``sde-dpmsolver++`` (None: the config's own) and ``flow``
            (None: 1, Euler).
        use_clipped_model_output: as in diffusers' ``DDIMScheduler.step``.
        sample_shape: shape of one sample, for :func:`parapolicy.draw_noise`.
        spacing: ``even``: as below. ``diffusers``: exactly the config's ``timestep_spacing``, even where that leaves
            out the noisiest timesteps. ``diffusers-0.11``: as diffusers 0.11, which published policies are pinned to;
            its DDPM with fewer steps than in training takes each step to the next lower training timestep.

    Timesteps follow the config's ``timestep_spacing``, with one exception: where ``leading`` would begin far below the
    last training timestep (60 of 100 steps begin at timestep 59, one step at 0), they are spread evenly over the whole
    range, and each step ends where the next one starts. DPM-Solver++ from another solver's config always spreads them.
    Flow matching takes equal steps of time, shifted as the config says.

    A config with ``clip_sample`` clips u under every solver. (diffusers' DPM-Solver++ ignores this key. The first steps
    of a cosine schedule, where alpha is near 0, then amplify the network's error without bound.)

    A step that ends without noise adds none. (diffusers' DDPM with ``fixed_large`` does, unless its timestep is 0.)

    Raises:
        ValueError: an unknown solver, a solver that does not fit the config, a number of steps that the config cannot
            give, or an unknown, missing, contradictory or unsupported setting.
    """
    named = find_solver(config)
    solver = solver or named
    if solver not in SOLVERS:
        raise ValueError(
            f"solver is {solver!r} (config: {config.get('_class_name')!r}), expected one of {sorted(SOLVERS)}"
        )
    _check_arguments(config, named, solver, eta, order)
    if spacing not in SPACINGS:
        raise ValueError(f"spacing is {spacing!r}, expected one of {SPACINGS}")
    check_config(config, scheduler_class(named or solver))
    scheduler = make_scheduler(config, solver, order)
    settings, count = scheduler.config, config["num_train_timesteps"]
    steps = count if steps is None else steps
    if solver == "flow":  # time is continuous
        if not 1 <= steps <= MAX_TRAIN_TIMESTEPS:
            raise ValueError(f"steps is {steps}, expected 1 to {MAX_TRAIN_TIMESTEPS}")
    elif not 1 <= steps <= count:
        raise ValueError(f"steps is {steps}, expected 1 to {count}, the config's num_train_timesteps")
    prediction = settings.get("prediction_type", config.get("prediction_type", "flow_prediction"))
    if prediction not in (expected := FLOW_PREDICTIONS if solver == "flow" else PREDICTIONS):
        raise ValueError(f"prediction_type is {prediction!r}, expected one of {expected}")
    if settings.get("thresholding"):
        raise ValueError("thresholding is on, which is not linear in the state; turn it off and use clip_sample")

    if solver in DPM_SOLVERS and named not in DPM_SOLVERS and spacing != "even":
        raise ValueError(f"spacing is {spacing!r}, but {config['_class_name']} has none for {solver}; take 'even'")
    own = solver not in DPM_SOLVERS or named in DPM_SOLVERS
    levels = make_levels(scheduler, solver, steps, spacing if own else None)
    steps = len(levels.timesteps)
    clip_settings = settings if solver in ("ddpm", "ddim") else config  # the other schedulers have no such setting
    clip = clip_settings.get("clip_sample_range", 1.0) if clip_settings.get("clip_sample") else None
    match solver:
        case "ddpm":
            found = _ddpm_tables(levels, settings["variance_type"])
        case "ddim":
            found = tables.coefficients(levels, eta)
            if clip is not None and not use_clipped_model_output:
                found["B"], found["overshoot"] = tables.clipping_overshoot(levels, found["A"], found["B"])
        case "flow":
            found = tables.coefficients(levels, order=1 if order is None else order)
        case _:
            found = _dpmsolver_tables(levels, settings)
    found |= {"alpha": levels.signal**0.5, "sigma": levels.noise**0.5}
    if prediction == "epsilon" and not found["alpha"].all():
        raise ValueError(
            "prediction_type is 'epsilon', but no signal is left at the first timestep; take smaller betas"
        )
    found = {"overshoot": torch.zeros(steps)} | {name: value.to(torch.float32) for name, value in found.items()}
    for name, value in found.items():
        if not torch.isfinite(value).all():
            raise ValueError(
                f"{solver} with {steps} steps has a coefficient {name} that is not finite; take other steps or betas"
            )
    return Schedule(
        solver=solver,
        timesteps=levels.timesteps,
        clip=clip,
        prediction=prediction,
        sample_shape=sample_shape,
        **found,  # type: ignore[arg-type]  # tensors only
    )


def _check_arguments(config: Mapping[str, Any], named: str | None, solver: str, eta: float, order: int | None) -> None:
    if "_class_name" in config and (named == "flow") != (solver == "flow"):
        family = {True: "flow matching", False: "variance-preserving diffusion"}
        raise ValueError(
            f"solver is {solver!r}, which is for {family[solver == 'flow']}, but the config "
            f"({config['_class_name']!r}) is of {family[named == 'flow']}; "
            "the network was not trained on this solver's noise levels"
        )
    if eta and solver != "ddim":
        raise ValueError(f"eta is {eta}, but only ddim takes it; the solver is {solver}")
    if not 0 <= eta <= 1:
        raise ValueError(f"eta is {eta}, expected a number from 0 to 1")
    if order is not None and solver in ("ddpm", "ddim"):
        raise ValueError(
            f"order is {order}, but only dpmsolver++, sde-dpmsolver++ and flow take it; the solver is {solver}"
        )
    if solver == "flow" and order not in (None, 1, 2):
        raise ValueError(f"order is {order}, expected 1 or 2")


def _ddpm_tables(levels: Levels, variance_type: str) -> dict[str, Tensor]:
    found = tables.coefficients(levels, eta=1.0, posterior_mean=True)
    match variance_type:
        case "fixed_small" | "fixed_small_log":
            return found
        case "fixed_large":
            return found | {"S": tables.fixed_large_noise(levels)}
        case other:
            raise ValueError(f"variance_type is {other!r}, expected fixed_small, fixed_small_log or fixed_large")


def _dpmsolver_tables(levels: Levels, settings: Mapping[str, Any]) -> dict[str, Tensor]:
    algorithm, order = settings["algorithm_type"], settings["solver_order"]
    if algorithm not in DPM_SOLVERS or order not in (1, 2) or settings["use_flow_sigmas"]:
        raise ValueError(
            f"algorithm_type is {algorithm!r} with solver_order {order}, expected one of {DPM_SOLVERS} of order 1 or 2 "
            "on a variance-preserving schedule"
        )
    short = settings["lower_order_final"] and len(levels.timesteps) < 15
    return tables.coefficients(
        levels,
        eta=1.0 if algorithm == "sde-dpmsolver++" else 0.0,
        order=order,
        solver_type=settings["solver_type"],
        euler_at_final=settings["euler_at_final"] or short,
    )
