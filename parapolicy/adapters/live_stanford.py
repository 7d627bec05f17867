"""Sampling for a live policy of real-stanford/diffusion_policy.

``conditional_sample``, the loop over denoising steps, is replaced. Policies with a UNet or a transformer, of states or
images, all have it. Encoders, normalisers, training and ``state_dict`` stay the policy's.
"""

from typing import Any

import torch
from torch import Tensor, nn

from parapolicy.adapters.live import ATTRIBUTE, Accelerated, Method, arguments_of, remove, sample_checked
from parapolicy.adapters.live_loop import ChunkInLoop, Inpainted, View


def methods(policy: Any) -> list[Method]:
    """The methods to replace of a policy of real-stanford; none of other objects."""
    parts = isinstance(getattr(policy, "model", None), nn.Module) and hasattr(policy, "noise_scheduler")
    if not parts or not callable(getattr(policy, "conditional_sample", None)):
        return []
    return [Method(policy, "conditional_sample", conditional_sample)]


@torch.compiler.disable
def conditional_sample(self: Any, condition_data: Tensor, condition_mask: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Replaces the policy's method of that name on an instance."""
    accelerated: Accelerated = getattr(self, ATTRIBUTE)

    def original(policy: Any) -> Tensor:
        chunk: Tensor = type(self).conditional_sample(policy, condition_data, condition_mask, *args, **kwargs)
        return chunk

    def ours() -> Tensor:
        inpainted = Inpainted(condition_mask, condition_data) if bool(condition_mask.any()) else None
        loop = ChunkInLoop(accelerated, self.model, self.noise_scheduler, inpainted)
        chunk = original(View(self, model=loop.predict, noise_scheduler=loop))
        loop.finish()
        return chunk

    given = arguments_of(type(self).conditional_sample, self, condition_data, condition_mask, *args, **kwargs)
    generator, device = given.get("generator"), condition_data.device
    return sample_checked(accelerated, ours, lambda: original(self), lambda: remove(*methods(self)), generator, device)
