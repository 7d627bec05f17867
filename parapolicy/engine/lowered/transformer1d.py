"""The transformer with packed matrix products in its layers; the rest is the network's own code."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from parapolicy.engine.lowered.packed_linear import PackedLinear
from parapolicy.networks.transformer1d import Attention, Layer, TransformerForDiffusion


def lower_transformer1d(network: TransformerForDiffusion, dtype: torch.dtype) -> TransformerForDiffusion:
    """A copy whose layers multiply by packed weights.

    The few products before and after the layers stay as they are.

    Args:
        network: its present weights are copied.
        dtype: what the matrix products' factors are rounded to; everything else stays in the weights' precision.
    """
    lowered = copy.deepcopy(network, {id(network.obs_encoder): network.obs_encoder})  # shared, not copied
    for layer in [module for module in lowered.modules() if isinstance(module, Layer)]:
        parts: Any = layer
        for name in ("linear1", "linear2"):
            linear = getattr(parts, name)
            setattr(parts, name, _Linear(linear.weight, linear.bias, dtype))
        parts.self_attn = _Attention(parts.self_attn, ((0, 3),), dtype)
        if parts.multihead_attn is not None:
            parts.multihead_attn = _Attention(parts.multihead_attn, ((0, 1), (1, 3)), dtype)
    return lowered


class _Linear(nn.Module):
    """A linear layer of (N, L, E)."""

    def __init__(self, weight: Tensor, bias: Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        self.packed = PackedLinear(weight.detach().t().contiguous(), bias.detach().clone(), dtype)

    def forward(self, x: Tensor) -> Tensor:
        product: Tensor = self.packed(x.flatten(0, 1)).unflatten(0, x.shape[:2])
        return product


class _Attention(Attention):
    """Attention with a packed product for each projection that its layer uses.

    Args:
        source: its weights are copied.
        projections: the arguments of :meth:`project`.
        dtype: of the products' factors.
    """

    def __init__(self, source: Attention, projections: tuple[tuple[int, int], ...], dtype: torch.dtype) -> None:
        nn.Module.__init__(self)
        self.heads, dim = source.heads, source.in_proj_weight.shape[1]
        output: Any = _Linear(source.out_proj.weight, source.out_proj.bias, dtype)
        self.out_proj = output
        self.packed = nn.ModuleDict()
        for first, last in projections:
            part = slice(first * dim, last * dim)
            self.packed[f"{first} to {last}"] = _Linear(source.in_proj_weight[part], source.in_proj_bias[part], dtype)

    def project(self, x: Tensor, first: int, last: int) -> Tensor:
        """As :meth:`parapolicy.networks.transformer1d.Attention.project`."""
        product: Tensor = self.packed[f"{first} to {last}"](x)
        return product
