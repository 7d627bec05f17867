"""Noise levels: the timesteps of a schedule, and the powers of signal and noise at both ends of each step.

A state at level (alpha, sigma) is ``x = alpha * x0 + sigma * epsilon``. The diffusers scheduler of the given config
supplies the levels of training and the spacing of the timesteps.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

# Solvers, and the names of their schedulers in diffusers.
SOLVERS = {
    "ddpm": "DDPMScheduler",
    "ddim": "DDIMScheduler",
    "dpmsolver++": "DPMSolverMultistepScheduler",
    "sde-dpmsolver++": "DPMSolverMultistepScheduler",
    "flow": "FlowMatchEulerDiscreteScheduler",
}
DPM_SOLVERS = ("dpmsolver++", "sde-dpmsolver++")
SPACINGS = ("even", "diffusers", "diffusers-0.11")


@dataclass(frozen=True, eq=False)
class Levels:
    """Where each of T steps starts and ends; every tensor is (T,).

    Attributes:
        timesteps: what the network is given, decreasing: int64, or float32 for flow matching.
        signal, noise: alpha² and sigma² at the start of each step.
        signal_next, noise_next: the same at its end. They equal the next step's start, except for diffusers' DDIM,
            whose steps all span the same number of timesteps.
    """

    timesteps: Tensor
    signal: Tensor
    noise: Tensor
    signal_next: Tensor
    noise_next: Tensor


def find_solver(config: Mapping[str, Any]) -> str | None:
    """The solver that a diffusers config names, or None for a scheduler that is not supported."""
    name = str(config.get("_class_name")).replace("Parallel", "")
    if name == "DPMSolverMultistepScheduler" and config.get("algorithm_type") == "sde-dpmsolver++":
        return "sde-dpmsolver++"
    return next((solver for solver, scheduler in SOLVERS.items() if scheduler == name), None)


def scheduler_class(solver: str) -> Any:
    """The diffusers class of a solver."""
    import diffusers  # slow to load, so only when a schedule is made

    return getattr(diffusers, SOLVERS[solver])


def make_scheduler(config: Mapping[str, Any], solver: str, order: int | None = None) -> Any:
    """The diffusers scheduler that takes the same steps, before its timesteps are set.

    Args:
        config: a diffusers scheduler's config.
        solver: one of ``SOLVERS``.
        order: ``solver_order`` of DPM-Solver++; None: the config's own.

    Raises:
        ValueError: settings that this solver's scheduler does not support.
    """
    settings = {key: value for key, value in config.items() if not key.startswith("_")}
    if solver in DPM_SOLVERS:
        if settings.get("algorithm_type") in (None, *DPM_SOLVERS):
            settings["algorithm_type"] = solver
        if order is not None:
            settings["solver_order"] = order
    try:
        return scheduler_class(solver).from_config(settings)
    except NotImplementedError as error:
        raise ValueError(f"{error}; take another solver") from error


def make_levels(scheduler: Any, solver: str, steps: int, spacing: str | None = "even") -> Levels:
    """The levels of ``steps`` steps; spacing ``diffusers-0.11`` may give a few more, as that version does.

    Args:
        scheduler: from :func:`make_scheduler`; its timesteps are set here.
        solver: one of ``SOLVERS``.
        steps: number of steps T.
        spacing: one of ``SPACINGS``, see :func:`parapolicy.schedule.make_schedule`. None: ignore the scheduler's
            ``timestep_spacing`` and spread the timesteps over the whole range.

    The spacing ``leading`` of diffusers (0, s, 2s, … with s = num_train_timesteps // steps) leaves out the noisiest
    timesteps where s does not divide the range, and all but timestep 0 with a single step. The network would then see
    pure noise at a timestep of much less noise. Where ``leading`` begins more than one stride and more than a tenth of
    the range below the end, or more than half of the range, the timesteps are spread like those of ``trailing``.

    Raises:
        ValueError: the spacing does not give that many distinct timesteps.
    """
    if solver == "flow":
        return _flow_levels(scheduler, steps)
    if spacing == "diffusers-0.11":
        return _former_levels(scheduler, solver, steps)
    scheduler.set_timesteps(steps)
    config, timesteps = scheduler.config, scheduler.timesteps.long()
    count = config.num_train_timesteps
    # The largest allowed distance of the first timestep from the end of the range.
    gap = min(max(count // steps, count // 10), count // 2)
    late = spacing == "even" and config.timestep_spacing == "leading" and timesteps[0] < count - gap
    spread = spacing is None or late
    if spread:
        timesteps = torch.tensor([round(count - i * count / steps) - 1 for i in range(steps)])
    if len(timesteps) != steps or timesteps[0] >= count or timesteps[-1] < 0 or (timesteps.diff() >= 0).any():
        raise ValueError(
            f"{steps} steps with timestep_spacing {config.timestep_spacing!r} and steps_offset "
            f"{config.get('steps_offset')} do not give {steps} distinct timesteps from {count - 1} to 0; "
            "take another number of steps or timestep_spacing"
        )
    if solver in DPM_SOLVERS:
        if spread:
            scheduler.set_timesteps(timesteps=timesteps.tolist())
        # sigma / alpha; not always that of an integer timestep (with Karras spacing, for example).
        ratio = scheduler.sigmas.double() ** 2  # (T + 1,)
        signal = 1 / (1 + ratio)
        noise = ratio * signal
        return Levels(timesteps, signal[:-1], noise[:-1], signal[1:], noise[1:])
    following = [*timesteps[1:].tolist(), -1]
    if solver == "ddim" and not spread:
        following = (timesteps - count // steps).tolist()  # as in diffusers, for every spacing
    return _integer_levels(scheduler, solver, timesteps, following)


def _former_levels(scheduler: Any, solver: str, steps: int) -> Levels:
    """The levels of diffusers 0.11.1. Its DDPM steps by a stride and takes more steps if the stride does not divide."""
    if solver not in ("ddpm", "ddim"):
        raise ValueError(f"spacing is 'diffusers-0.11', which only ddpm and ddim have; the solver is {solver}")
    count = scheduler.config.num_train_timesteps
    stride = count // steps
    if solver == "ddpm":
        timesteps = torch.arange(0, count, stride).flip(0)
        return _integer_levels(scheduler, solver, timesteps, (timesteps - 1).tolist())
    timesteps = (torch.arange(steps) * stride).flip(0) + scheduler.config.steps_offset
    if timesteps[0] >= count:
        raise ValueError(
            f"steps_offset is {scheduler.config.steps_offset}: the first timestep is beyond the {count} of training"
        )
    return _integer_levels(scheduler, solver, timesteps, (timesteps - stride).tolist())


def _integer_levels(scheduler: Any, solver: str, timesteps: Tensor, following: list[int]) -> Levels:
    """The levels of training timesteps, each step ending at its ``following`` timestep; below 0: without noise."""
    final = scheduler.final_alpha_cumprod if solver == "ddim" else scheduler.one
    # float32, as diffusers: the tables of DDPM and DDIM repeat its arithmetic.
    signal = scheduler.alphas_cumprod[timesteps]
    signal_next = torch.stack([scheduler.alphas_cumprod[t] if t >= 0 else final for t in following])
    return Levels(timesteps, signal, 1 - signal, signal_next, 1 - signal_next)


def _flow_levels(scheduler: Any, steps: int) -> Levels:
    """alpha = 1 - t, sigma = t, with t from 1 down to 0 in equal steps, shifted by diffusers as its config says.

    (Without explicit sigmas, diffusers spaces t from 1 to 1 / num_train_timesteps, and the last step has length 0.)
    """
    config = scheduler.config
    for name in ("use_dynamic_shifting", "stochastic_sampling", "invert_sigmas"):
        if config.get(name):
            raise ValueError(f"{name} is on, which is not supported; turn it off")
    scheduler.set_timesteps(sigmas=np.linspace(1, 0, steps + 1)[:-1])
    timesteps, time = scheduler.timesteps, scheduler.sigmas.double()  # (T,), (T + 1,)
    if len(timesteps) != steps or not (time.diff() < 0).all():
        raise ValueError(
            f"{steps} steps with shift {config.shift} and shift_terminal {config.shift_terminal} do not give {steps} "
            "distinct times from 1 to 0; take another number of steps or shift"
        )
    signal, noise = (1 - time) ** 2, time**2
    return Levels(timesteps, signal[:-1], noise[:-1], signal[1:], noise[1:])
