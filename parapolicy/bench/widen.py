"""The same policy with a wider network: for timing sizes that nobody has trained here."""

from typing import Any

import torch
from torch import nn

from parapolicy.networks import ConditionalUnet1D


@torch.no_grad()
def widen(network: ConditionalUnet1D, factor: int) -> ConditionalUnet1D:
    """A network with ``factor`` times the channels that computes the same function, to rounding.

    Every channel stands ``factor`` times, side by side, so that GroupNorm sees the same groups, and weights on copies
    are divided by it (Chen et al., Net2Net, ICLR 2016). Work and rounds are those of a trained policy of that size
    with this one's function. Of the published policies' sizes, [64, 128, 256] times 4 is the low-dimensional one, times
    8 the image one.
    """
    levels: Any = network.down_modules
    block: Any = network.mid_modules[0]
    encoder: Any = network.diffusion_step_encoder
    step_dim, condition = encoder[-1].out_features, block.cond_encoder[1]
    first = levels[0][0].blocks[0].block
    wide = ConditionalUnet1D(
        input_dim=first[0].in_channels,
        global_cond_dim=condition.in_features - step_dim,
        diffusion_step_embed_dim=step_dim,
        down_dims=[factor * level[0].blocks[0].block[0].out_channels for level in levels],
        kernel_size=first[0].kernel_size[0],
        n_groups=first[1].num_groups,
        cond_predict_scale=block.film_scale,
    ).to(next(network.parameters()).device)
    modules = dict(wide.named_modules())
    for name, parameter in network.named_parameters():
        value, target = parameter.detach(), wide.get_parameter(name)
        owner = modules[name.rpartition(".")[0]]
        inputs = 0 if isinstance(owner, nn.ConvTranspose1d) else 1
        for dim in range(min(2, value.ndim)):
            if target.shape[dim] != value.shape[dim]:
                value = value.repeat_interleave(factor, dim)
                if value.ndim > 1 and dim == inputs:
                    value = value / factor
        target.copy_(value)
    return wide.requires_grad_(False).eval()
