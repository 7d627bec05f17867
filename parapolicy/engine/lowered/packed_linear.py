"""A matrix product with constant weights, which oneDNN packs once for the CPU at hand.

torch's own products call MKL, which uses only AVX2 on other makers' processors; oneDNN uses all available instructions.
Inductor finds the same kernel when it freezes a graph's weights, but then compiles again in every process, because such
graphs are not cached on disk. A graph with this operator is.
"""

import torch
from torch import Tensor, nn

_library = torch.library.Library("parapolicy", "DEF")
_library.define("product(Tensor x, Tensor weight, Tensor bias) -> Tensor")
_library.impl(
    "product",
    lambda x, weight, bias: torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], ""),
    "CompositeExplicitAutograd",
)
# Not len(), which would make a graph for every number of rows.
torch.library.register_fake("parapolicy::product", lambda x, w, b: x.new_empty(x.shape[0], b.shape[0]), lib=_library)


class PackedLinear(nn.Module):
    """x (M, K) -> x W + b (M, N), in b's precision.

    Args:
        weight, bias: (K, N) and (N,).
        dtype: what x and W are rounded to before they are multiplied.
    """

    weight: Tensor
    bias: Tensor

    def __init__(self, weight: Tensor, bias: Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.packed = weight.device.type == "cpu" and torch.backends.mkldnn.is_available()
        if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            self.packed = False  # torch's own product rounds in the same way, but is slower
        weight = weight.to(dtype)
        if self.packed:
            weight = torch.ops.mkldnn._reorder_linear_weight(weight.t().contiguous(), None)
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.packed:
            product = torch.ops.parapolicy.product(x.to(self.dtype), self.weight, self.bias.to(self.dtype))
            return product.to(self.bias.dtype)
        if self.dtype == self.bias.dtype:
            return torch.addmm(self.bias, x, self.weight)
        return torch.mm(x.to(self.dtype), self.weight).to(self.bias.dtype) + self.bias
