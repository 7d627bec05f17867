"""Policies with the interface of real-stanford's and robomimic's, around our own networks, for test_live_loops.py."""

from types import SimpleNamespace
from typing import Any

import torch
from diffusers import DDPMScheduler
from torch import Tensor, nn

from parapolicy.networks import unet1d

HORIZON, OBSERVED, ACTION, FIRST = 8, 3, 2, 2  # FIRST: observed steps
COSINE = {"num_train_timesteps": 12, "beta_schedule": "squaredcos_cap_v2"}


class ConditionalUnet1D(unet1d.ConditionalUnet1D):
    """Called as the published network is."""

    def forward(  # type: ignore[override]
        self, sample: Tensor, timestep: Tensor, local_cond: Tensor | None = None, global_cond: Tensor | None = None
    ) -> Tensor:
        entry = torch.arange(len(sample))
        given = {"global": global_cond, "local": local_cond, "inpaint": sample[:, :FIRST, ACTION:]}[self.condition]
        return super().forward(sample, self.embed_steps(timestep.expand(len(sample))), given, entry, entry)


def network(condition: str = "global", seed: int = 0) -> ConditionalUnet1D:
    torch.manual_seed(seed)
    width = ACTION + OBSERVED * (condition == "inpaint")
    steps = {"global": FIRST, "local": HORIZON, "inpaint": FIRST}[condition]
    sizes: Any = {"diffusion_step_embed_dim": 16, "down_dims": (16, 32), "kernel_size": 3}
    return ConditionalUnet1D(width, OBSERVED * steps, **sizes, condition=condition, n_obs_steps=steps)


class LoopPolicy(nn.Module):
    """As of real-stanford: ``conditional_sample``, and a call of it as ``predict_action`` makes it."""

    def __init__(self, condition: str = "global", scheduler: Any = None, steps: int = 12, **options: Any) -> None:
        super().__init__()
        self.model, self.condition, self.options = network(condition), condition, options
        self.noise_scheduler = scheduler or DDPMScheduler(**COSINE)
        self.num_inference_steps = steps

    def between_steps(self, state: Tensor) -> Tensor:
        return state

    def conditional_sample(
        self,
        condition_data: Tensor,
        condition_mask: Tensor,
        local_cond: Tensor | None = None,
        global_cond: Tensor | None = None,
        generator: torch.Generator | None = None,
        **kwargs: Any,
    ) -> Tensor:
        state = torch.randn(condition_data.shape, generator=generator)
        self.noise_scheduler.set_timesteps(self.num_inference_steps)
        for timestep in self.noise_scheduler.timesteps:
            state[condition_mask] = condition_data[condition_mask]
            output = self.model(state, timestep, local_cond=local_cond, global_cond=global_cond)
            state = self.noise_scheduler.step(output, timestep, state, generator=generator, **kwargs).prev_sample
            state = self.between_steps(state)
        state[condition_mask] = condition_data[condition_mask]
        return state

    def sample(self, generator: torch.Generator | None = None, batch: int = 2) -> Tensor:
        observed = torch.randn(batch, FIRST, OBSERVED, generator=torch.Generator().manual_seed(3))
        data = torch.zeros(batch, HORIZON, ACTION + OBSERVED * (self.condition == "inpaint"))
        mask, given = torch.zeros_like(data, dtype=torch.bool), {}
        if self.condition == "global":
            given["global_cond"] = observed.flatten(1)
        elif self.condition == "local":
            given["local_cond"] = torch.cat((observed, torch.zeros(batch, HORIZON - FIRST, OBSERVED)), 1)
        else:
            data[:, :FIRST, ACTION:], mask[:, :FIRST, ACTION:] = observed, True
        return self.conditional_sample(data, mask, generator=generator, **given, **self.options)


class Algo:
    """As of robomimic: ``_get_action_trajectory``, two sets of weights, and nothing of a torch module."""

    def __init__(self, averaged: bool) -> None:
        self.nets = self.weights(1).eval()
        self.ema = SimpleNamespace(averaged_model=self.weights(0).eval()) if averaged else None
        self.noise_scheduler, self.device = DDPMScheduler(**COSINE), torch.device("cpu")

    def weights(self, seed: int) -> nn.Module:
        parts = nn.ModuleDict({"obs_encoder": nn.Flatten(), "noise_pred_net": network(seed=seed)})
        return nn.ModuleDict({"policy": parts})

    def _get_action_trajectory(self, obs_dict: dict[str, Tensor], goal_dict: Any = None) -> Tensor:
        assert not self.nets.training
        acting: Any = (self.nets if self.ema is None else self.ema.averaged_model)["policy"]
        condition = acting["obs_encoder"](obs_dict["obs"])
        state = torch.randn(len(condition), HORIZON, ACTION)
        self.noise_scheduler.set_timesteps(12)
        for timestep in self.noise_scheduler.timesteps:
            output = acting["noise_pred_net"](sample=state, timestep=timestep, global_cond=condition)
            state = self.noise_scheduler.step(model_output=output, timestep=timestep, sample=state).prev_sample
        return state[:, FIRST - 1 : FIRST + 3]

    def sample(self) -> Tensor:
        return self._get_action_trajectory({"obs": torch.ones(1, FIRST, OBSERVED)})
