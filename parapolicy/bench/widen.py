"""The same policy with a wider network, for timing sizes that were not trained here."""

import dataclasses

import torch
from torch import nn

from parapolicy.networks import build_network
from parapolicy.policy import Policy


@torch.no_grad()
def widen(policy: Policy, factor: int) -> Policy:
    """A policy of the same function, to rounding, whose network has ``factor`` times the channels (``down_dims``).

    Every channel is repeated ``factor`` times, side by side, so that GroupNorm sees the same groups, and weights on
    copies are divided by it (Chen et al., Net2Net, ICLR 2016). Work and rounds are those of a trained policy of that
    size with this policy's function. Of the published policies' sizes, [64, 128, 256] times 4 is the low-dimensional
    one, times 8 the image one.
    """
    down_dims = [factor * channels for channels in policy.spec.network["down_dims"]]
    spec = dataclasses.replace(policy.spec, network={**policy.spec.network, "down_dims": down_dims})
    wide = build_network(spec).to(policy.device)
    modules = dict(wide.named_modules())
    for name, parameter in policy.network.named_parameters():
        value, target = parameter.detach(), wide.get_parameter(name)
        owner = modules[name.rpartition(".")[0]]
        inputs = 0 if isinstance(owner, nn.ConvTranspose1d) else 1
        for dim in range(min(2, value.ndim)):
            if target.shape[dim] != value.shape[dim]:
                value = value.repeat_interleave(factor, dim)
                if value.ndim > 1 and dim == inputs:
                    value = value / factor
        target.copy_(value)
    return dataclasses.replace(policy, spec=spec, network=wide.requires_grad_(False).eval())
