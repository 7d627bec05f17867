"""Sampling for a live ``DiffusionPolicyUNet`` of robomimic.

``_get_action_trajectory`` goes from the observation to the executed actions. It is replaced, but runs as before except
for its loop over denoising steps. Queues, encoders, statistics and training stay robomimic's.
"""

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from parapolicy.adapters.live import ATTRIBUTE, Accelerated, Method, remove, sample_checked
from parapolicy.adapters.live_loop import ChunkInLoop, View

NETWORK = "noise_pred_net"


def methods(policy: Any) -> list[Method]:
    """The methods to replace of a robomimic diffusion policy, or of the one in a ``RolloutPolicy``; none of others."""
    algo = getattr(policy, "policy", policy)
    if not callable(getattr(algo, "_get_action_trajectory", None)) or not hasattr(algo, "noise_scheduler"):
        return []
    return [Method(algo, "_get_action_trajectory", get_action_trajectory)]


@torch.compiler.disable
def get_action_trajectory(self: Any, obs_dict: dict[str, Tensor], goal_dict: Any = None) -> Tensor:
    """Replaces the method ``_get_action_trajectory`` on an instance."""
    accelerated: Accelerated = getattr(self, ATTRIBUTE)
    original = type(self)._get_action_trajectory

    def ours() -> Tensor:
        # The averaged weights are used if there are any.
        acting = (self.nets if self.ema is None else self.ema.averaged_model)["policy"]
        loop = ChunkInLoop(accelerated, acting[NETWORK], self.noise_scheduler)
        seen = {"policy": {**acting, NETWORK: loop.predict}}
        view = View(self, ema=SimpleNamespace(averaged_model=seen), noise_scheduler=loop)
        actions: Tensor = original(view, obs_dict=obs_dict, goal_dict=goal_dict)
        loop.finish()
        return actions

    def theirs() -> Tensor:
        actions: Tensor = original(self, obs_dict, goal_dict)
        return actions

    return sample_checked(accelerated, ours, theirs, lambda: remove(*methods(self)), None, torch.device(self.device))
