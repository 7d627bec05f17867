"""The conditional UNet's forward pass rewritten for small batches: matrix products, and no work done twice.

A convolution over (N, H, C) becomes one matrix product of its patches (N H, k C). At the sizes of an action chunk this
is faster than convolution kernels, and compilers fuse the operations between the products. FiLM's linear layers read
the concatenated features of a timestep and an observation through an elementwise function. They split into a part per
timestep, computed once per schedule, and a part per observation, computed once per chunk.
"""

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from parapolicy.engine.lowered.packed_linear import PackedLinear
from parapolicy.networks import Embedding, Network
from parapolicy.networks.base import overwrite_observed
from parapolicy.networks.unet1d import ConditionalResidualBlock1D, ConditionalUnet1D
from parapolicy.networks.vision import encode


class FilmTables(Network):
    """The embeddings of a :class:`ConditionalUnet1D` as FiLM values by step and by batch element.

    Args:
        network: its present weights are copied.

    Attributes:
        place: residual block -> slice of its values among all F.
    """

    film_weight: Tensor
    film_bias: Tensor

    def __init__(self, network: ConditionalUnet1D) -> None:
        super().__init__()
        encoder: Any = network.diffusion_step_encoder
        self.step_dim = encoder[-1].out_features
        self.step_encoder, self.encoder = network.diffusion_step_encoder, network.encoder
        self.condition, self.n_obs_steps = network.condition, network.n_obs_steps
        blocks = [module for module in network.modules() if isinstance(module, ConditionalResidualBlock1D)]
        linears: list[Any] = [block.cond_encoder[1] for block in blocks]
        self.register_buffer("film_weight", torch.cat([linear.weight.detach() for linear in linears]))  # (F, S + C)
        self.register_buffer("film_bias", torch.cat([linear.bias.detach() for linear in linears]))
        starts = torch.tensor([0, *(linear.out_features for linear in linears)]).cumsum(0).tolist()
        self.place = {block: slice(a, b) for block, a, b in zip(blocks, starts[:-1], starts[1:], strict=True)}

    def embed_steps(self, timesteps: Tensor) -> Tensor:
        """The timesteps' part of the FiLM values, bias included: (T,) -> (T, F)."""
        features = functional.mish(self.step_encoder(timesteps))
        return functional.linear(features, self.film_weight[:, : self.step_dim], self.film_bias)

    def embed_condition(self, observation: Mapping[str, Tensor]) -> Tensor:
        """The observations' part: {key: (B, To, …)} -> (B, F); the observed steps (B, To, Do) if FiLM sees none."""
        condition = encode(self.encoder, observation)
        if self.condition != "global":
            return condition.unflatten(1, (self.n_obs_steps, -1))
        return self.film_values(condition)

    def film_values(self, condition: Tensor) -> Tensor:
        """FiLM values of condition vectors, (B, C) -> (B, F)."""
        return functional.linear(functional.mish(condition), self.film_weight[:, self.step_dim :])


class LoweredUnet1D(FilmTables):
    """The function of a :class:`ConditionalUnet1D`, from (N, H, Da) and FiLM values by step and by batch element.

    Args:
        network: its present weights are copied.
        dtype: what the matrix products' factors are rounded to; everything else stays in the weights' precision.
    """

    def __init__(self, network: ConditionalUnet1D, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(network)

        def residual(block: Any) -> _Residual:
            return _Residual(block, self.place[block], dtype)

        def level(first: Any, second: Any, sample: Any) -> tuple[nn.Module, nn.Module, nn.Module]:
            return residual(first), residual(second), _resampling(sample, dtype)

        def levels(modules: Any) -> list[tuple[nn.Module, nn.Module, nn.Module]]:
            return [level(*part.children()) for part in modules]

        self.down, self.up = levels(network.down_modules), levels(network.up_modules)
        self.mid = [residual(block) for block in network.mid_modules]
        self.local = None if network.local_cond_encoder is None else residual(network.local_cond_encoder[0])
        self.parts = nn.ModuleList(
            [*itertools.chain(*self.down, *self.up), *self.mid]
        )  # registered, so that ``to`` moves them
        final: Any = network.final_conv
        self.final, self.last = _Block(final[0], dtype), _Convolution(final[1], dtype)

    def forward(self, x: Tensor, steps: Embedding, condition: Embedding, step: Tensor, element: Tensor) -> Tensor:
        """(N, H, D) -> the same."""
        assert isinstance(steps, Tensor)
        assert isinstance(condition, Tensor)

        def values(place: slice) -> Tensor:  # per block, so that a compiler fuses the look-up with its use
            film = steps[:, place][step]
            return (film + condition[:, place][element] if self.condition == "global" else film)[:, None]

        if self.condition == "inpaint":
            x = overwrite_observed(x, condition[element])
        skips: list[Tensor] = []
        for i, (first, second, sample) in enumerate(self.down):
            hidden = first(x, values)
            if i == 0 and self.local is not None:
                local = functional.pad(condition[element], (0, 0, 0, x.shape[1] - condition.shape[1]))
                hidden = hidden + self.local(local, values)
            x = second(hidden, values)
            skips.append(x)
            x = sample(x)
        for block in self.mid:
            x = block(x, values)
        for first, second, sample in self.up:
            x = sample(second(first(torch.cat((x, skips.pop()), -1), values), values))
        return self.last(self.final(x))


def _mish(x: Tensor) -> Tensor:
    """x tanh(log(1 + exp x)) with one exponential: tanh(log(1 + e)) = e (e + 2) / (e (e + 2) + 2)."""
    e = torch.exp(x.clamp(max=20.0))  # above that, the quotient is 1
    n = e * (e + 2)
    return x * (n / (n + 2))


class _Convolution(nn.Module):
    """Conv1d over (N, H, C) as one product with the patches' weights (k C, C')."""

    def __init__(self, conv: nn.Conv1d, dtype: torch.dtype) -> None:
        super().__init__()
        self.kernel, self.stride, self.padding = conv.kernel_size[0], conv.stride[0], int(conv.padding[0])
        weight = conv.weight.detach().permute(2, 1, 0).flatten(0, 1).contiguous()
        bias = torch.zeros_like(weight[0]) if conv.bias is None else conv.bias.detach().clone()
        self.linear = PackedLinear(weight, bias, dtype)

    def forward(self, x: Tensor) -> Tensor:
        count = (x.shape[1] + 2 * self.padding - self.kernel) // self.stride + 1
        if self.kernel > 1:
            x = functional.pad(x, (0, 0, self.padding, self.padding))
            stop = self.stride * (count - 1) + 1
            x = torch.cat([x[:, k : k + stop : self.stride] for k in range(self.kernel)], -1)
        return self.linear(x.reshape(len(x) * count, -1)).unflatten(0, (len(x), count))


class _Doubling(nn.Module):
    """ConvTranspose1d of kernel 4, stride 2, padding 1, as one product with three neighbours.

    Output 2 i sees x_i by tap 1 and x_{i-1} by tap 3, output 2 i + 1 sees x_i by tap 2 and x_{i+1} by tap 0.
    """

    def __init__(self, conv: nn.ConvTranspose1d, dtype: torch.dtype) -> None:
        super().__init__()
        taps = conv.weight.detach().permute(2, 0, 1)  # (4, C, C')
        none = torch.zeros_like(taps[0])
        even, odd = torch.cat((taps[3], taps[1], none)), torch.cat((none, taps[2], taps[0]))
        bias = torch.zeros_like(taps[0, 0]) if conv.bias is None else conv.bias.detach()
        self.linear = PackedLinear(torch.cat((even, odd), 1), torch.cat((bias, bias)), dtype)  # (3 C, 2 C')

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        x = functional.pad(x, (0, 0, 1, 1))
        patches = torch.cat((x[:, :-2], x[:, 1:-1], x[:, 2:]), -1).reshape(batch * length, -1)
        return self.linear(patches).view(batch, 2 * length, -1)


class _Block(nn.Module):
    """Convolution, GroupNorm and Mish."""

    weight: Tensor
    bias: Tensor

    def __init__(self, block: Any, dtype: torch.dtype) -> None:
        super().__init__()
        conv, norm, _ = block.block
        self.conv = _Convolution(conv, dtype)
        self.groups, self.eps = norm.num_groups, norm.eps
        self.register_buffer("weight", norm.weight.detach().clone())
        self.register_buffer("bias", norm.bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        grouped = x.unflatten(-1, (self.groups, -1))  # (N, H, G, C / G)
        # Two sums: var_mean compiles to Welford's recurrence, which does not vectorise as well.
        centred = grouped - grouped.mean((1, 3), keepdim=True)
        scale = torch.rsqrt(centred.square().mean((1, 3), keepdim=True) + self.eps)
        return _mish((centred * scale).flatten(2) * self.weight + self.bias)


class _Residual(nn.Module):
    """Two blocks with FiLM between them, and a residual path."""

    def __init__(self, block: ConditionalResidualBlock1D, place: slice, dtype: torch.dtype) -> None:
        super().__init__()
        first, second = block.blocks
        self.first, self.second = _Block(first, dtype), _Block(second, dtype)
        self.film_scale, self.place = block.film_scale, place
        shortcut = block.residual_conv
        self.shortcut = _Convolution(shortcut, dtype) if isinstance(shortcut, nn.Conv1d) else nn.Identity()

    def forward(self, x: Tensor, values: Callable[[slice], Tensor]) -> Tensor:
        hidden, film = self.first(x), values(self.place)
        if self.film_scale:
            scale, bias = film.chunk(2, -1)
            hidden = scale * hidden + bias
        else:
            hidden = hidden + film
        return self.second(hidden) + self.shortcut(x)


def _resampling(module: Any, dtype: torch.dtype) -> nn.Module:
    if isinstance(module, nn.Identity):
        return nn.Identity()
    return (_Convolution if isinstance(module.conv, nn.Conv1d) else _Doubling)(module.conv, dtype)
