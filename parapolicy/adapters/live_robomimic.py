"""A ``DiffusionPolicyUNet`` of robomimic in memory: its chunks are sampled here, all else stays its own.

One method decides what it samples: ``_get_action_trajectory``, from the observation to the executed actions. It runs as
ever but for its loop over denoising steps. Queues, encoders, statistics and training are not touched.
"""

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from parapolicy.adapters.live import ATTRIBUTE, Accelerated, Method, remove, sample_checked
from parapolicy.adapters.live_loop import ChunkInLoop, View

NETWORK = "noise_pred_net"


def methods(policy: Any) -> list[Method]:
    """What is replaced of a diffusion policy of robomimic, or of that in a ``RolloutPolicy``; nothing of others."""
    algo = getattr(policy, "policy", policy)
    if not callable(getattr(algo, "_get_action_trajectory", None)) or not hasattr(algo, "noise_scheduler"):
        return []
    return [Method(algo, "_get_action_trajectory", get_action_trajectory)]


@torch.compiler.disable
def get_action_trajectory(self: Any, obs_dict: dict[str, Tensor], goal_dict: Any = None) -> Tensor:
    """Takes the place of the method ``_get_action_trajectory``, on an instance."""
    accelerated: Accelerated = getattr(self, ATTRIBUTE)
    original = type(self)._get_action_trajectory

    def ours() -> Tensor:
        # The averaged weights act where there are any.
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
