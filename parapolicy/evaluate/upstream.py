"""What users have without parapolicy: the published code's way of sampling (Chi et al., RSS 2023), to compare with."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from parapolicy.observation import encode
from parapolicy.policy import Policy
from parapolicy.schedule import SOLVERS


@torch.inference_mode()
def upstream_chunk(policy: Policy, observation: Mapping[str, Any], seed: int) -> np.ndarray:
    """A chunk by the eager network and diffusers' own scheduler, step by step, along ``policy.schedule``.

    With the same noise it is the chunk of ``sequential``, to rounding: rewards are the same, only the time differs.

    Returns:
        The trajectory, (H, Da), in the environment's units.
    """
    condition, _ = encode(policy.spec, policy.normalizer, observation)
    config = {key: value for key, value in policy.spec.scheduler.items() if not key.startswith("_")}
    scheduler: Any = SOLVERS[policy.schedule.solver].from_config(config)
    scheduler.set_timesteps(len(policy.schedule))
    generator = torch.Generator(policy.device).manual_seed(seed)
    shape = (1, policy.spec.horizon, policy.spec.action_dim)
    x = torch.randn(shape, generator=generator, device=policy.device)
    for timestep in scheduler.timesteps:
        output = policy.network(x, timestep[None].to(policy.device), condition)
        x = scheduler.step(output, timestep, x, generator=generator).prev_sample
    trajectory: np.ndarray = policy.normalizer.unnormalize("action", x).cpu().numpy()[0]
    return trajectory
