"""Small policies, denoisers, observations and configurations that tests share."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from torch import Tensor

from parapolicy.checkpoint.spec import PolicySpec
from parapolicy.normalizer import Affine, Normalizer
from parapolicy.policy import Policy
from parapolicy.samplers import make_sampler
from parapolicy.schedule import Schedule, make_schedule

DDPM_CONFIG: dict[str, Any] = {
    "_class_name": "DDPMScheduler",
    "num_train_timesteps": 100,
    "beta_schedule": "squaredcos_cap_v2",
    "variance_type": "fixed_small",
    "clip_sample": True,
    "prediction_type": "epsilon",
}


def small_spec(**changes: Any) -> PolicySpec:
    values: dict[str, Any] = {
        "observation": {"position": (2,), "points": (3, 2)},
        "n_obs_steps": 2,
        "horizon": 8,
        "n_action_steps": 4,
        "action_dim": 2,
        "network": {"name": "unet1d", "diffusion_step_embed_dim": 16, "down_dims": [16, 32], "n_groups": 4},
        "scheduler": {**DDPM_CONFIG, "num_train_timesteps": 20},
        "control_hz": 10,
    }
    return PolicySpec(**values | changes)


def small_policy(sampler: str = "sequential", **changes: Any) -> Policy:
    """Random weights; the output is made large enough to matter."""
    spec = small_spec(**changes)
    network = spec.build_network().requires_grad_(False).eval()
    shapes = {**spec.observation, "action": (spec.action_dim,)}
    normalizer = Normalizer({k: Affine(torch.full(s, 0.01), torch.full(s, -0.5)) for k, s in shapes.items()})
    schedule = make_schedule(spec.scheduler, sample_shape=(spec.horizon, spec.action_dim))
    return Policy(spec, network, normalizer, schedule, make_sampler(sampler), torch.device("cpu"))


def some_observation(spec: PolicySpec, batch: int | None = None, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    lead = (spec.n_obs_steps,) if batch is None else (batch, spec.n_obs_steps)
    return {key: rng.uniform(0, 100, (*lead, *shape)).astype(np.float32) for key, shape in spec.observation.items()}


def linear_denoiser(schedule: Schedule, batch: int, shape: tuple[int, int], gain: float, seed: int) -> Callable:
    """u_j = bounded linear map of x_j and its neighbour, different for each step and element.

    Only elementwise arithmetic, so that a result does not depend, to the bit, on what shares the call.
    """
    generator = torch.Generator().manual_seed(seed)
    own, neighbour = gain * (torch.rand(2, len(schedule), 1, shape[1], generator=generator) * 2 - 1)
    bias = torch.randn(batch, *shape, generator=generator)

    def denoiser(x: Tensor, step: Tensor, element: Tensor) -> Tensor:
        return own[step] * x + neighbour[step] * x.roll(1, dims=1) + bias[element]

    return denoiser


def configured(name: str, *overrides: str) -> DictConfig:
    """A configuration of ``conf/`` as a command with these overrides would have it."""
    with initialize_config_dir(str(Path(__file__).resolve().parent.parent / "conf"), version_base="1.3"):
        return compose(name, list(overrides))
