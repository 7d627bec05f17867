"""Sampling like the published code (Chi et al., RSS 2023), for comparison."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from parapolicy.observation import normalize_observation
from parapolicy.policy import Policy
from parapolicy.schedule import make_scheduler


@torch.inference_mode()
def upstream_chunk(policy: Policy, observation: Mapping[str, Any], seed: int) -> np.ndarray:
    """Sample a chunk with the eager network and diffusers' scheduler, along ``policy.schedule``.

    With the same noise, it equals the chunk of ``sequential`` up to rounding: same rewards, another time.

    Args:
        policy: its network, schedule and normalizer are used.
        observation: {key: (To, …)}.
        seed: of the noise.

    Returns:
        The trajectory, (H, Da), in the environment's units.

    Raises:
        ValueError: diffusers' scheduler does not give the timesteps of ``policy.schedule``.
    """
    inputs, _ = normalize_observation(policy.spec, policy.normalizer, observation)
    solver, timesteps = policy.schedule.solver, policy.schedule.timesteps.tolist()
    scheduler = make_scheduler(policy.spec.scheduler, solver)
    if solver in ("ddim", "flow"):  # these do not accept a list of timesteps
        scheduler.set_timesteps(len(timesteps))
    else:
        scheduler.set_timesteps(timesteps=timesteps)
    if scheduler.timesteps.tolist() != timesteps:
        raise ValueError(
            f"diffusers' {type(scheduler).__name__} with {len(timesteps)} steps begins at timestep "
            f"{scheduler.timesteps[0]}, this schedule at {timesteps[0]}; take a number of steps that divides the "
            "training timesteps"
        )
    generator = torch.Generator(policy.device).manual_seed(seed)
    x = torch.randn(1, *policy.spec.sample_shape, generator=generator, device=policy.device)
    for timestep in scheduler.timesteps:
        output = policy.network.predict(x, timestep[None].to(policy.device), inputs)
        x = scheduler.step(output, timestep, x, generator=generator).prev_sample
    trajectory: np.ndarray = policy.normalizer.unnormalize("action", x).cpu().numpy()[0]
    return trajectory
