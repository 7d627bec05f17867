"""The conditional 1-D UNet of Diffusion Policy (Chi et al., RSS 2023, section III-A).

The module tree has the published code's names, so that a published state dict loads with ``strict=True``.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from parapolicy.networks.base import Embedding, Network, check_condition, overwrite_observed
from parapolicy.networks.vision import ObservationEncoder, build_encoder, encode
from parapolicy.spec import PolicySpec

MAX_LEVELS, MAX_SIZE = 12, 2**20  # more than any real network; a larger number means a damaged config
CONDITIONS = ("global", "local", "inpaint")


class SinusoidalPosEmb(nn.Module):
    """Timestep (N,) -> sine and cosine features (N, dim)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, timestep: Tensor) -> Tensor:
        half = self.dim // 2
        rate = math.log(10000) / (half - 1)
        frequency = torch.exp(torch.arange(half, device=timestep.device, dtype=torch.float32) * -rate)
        angle = timestep[:, None].to(torch.float32) * frequency
        return torch.cat((angle.sin(), angle.cos()), dim=-1)


class Downsample1d(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(dim, dim, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Upsample1d(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv = nn.ConvTranspose1d(dim, dim, 4, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Conv1dBlock(nn.Module):
    """Conv1d, then GroupNorm, then Mish."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, n_groups: int) -> None:
        super().__init__()
        self.block = nn.Sequential(
            nn.Conv1d(in_channels, out_channels, kernel_size, padding=kernel_size // 2),
            nn.GroupNorm(n_groups, out_channels),
            nn.Mish(),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)


class ConditionalResidualBlock1D(nn.Module):
    """Two convolution blocks with FiLM (Perez et al., 2018) between them, and a residual path."""

    def __init__(
        self, in_channels: int, out_channels: int, cond_dim: int, kernel_size: int, n_groups: int, film_scale: bool
    ) -> None:
        super().__init__()
        self.film_scale = film_scale
        self.blocks = nn.ModuleList(
            [
                Conv1dBlock(in_channels, out_channels, kernel_size, n_groups),
                Conv1dBlock(out_channels, out_channels, kernel_size, n_groups),
            ]
        )
        self.cond_encoder = nn.Sequential(nn.Mish(), nn.Linear(cond_dim, out_channels * (2 if film_scale else 1)))
        self.residual_conv = nn.Conv1d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:  # (N, C, H), (N, cond_dim) -> (N, C', H)
        hidden = self.blocks[0](x)
        embedding = self.cond_encoder(cond)[..., None]
        if self.film_scale:
            scale, bias = embedding.chunk(2, dim=1)
            hidden = scale * hidden + bias
        else:
            hidden = hidden + embedding
        return self.blocks[1](hidden) + self.residual_conv(x)


def _check_sizes(step_dim: Any, down_dims: Any, kernel_size: Any, n_groups: Any, final_groups: Any) -> None:
    if not isinstance(down_dims, Sequence) or isinstance(down_dims, str) or not 1 <= len(down_dims) <= MAX_LEVELS:
        raise ValueError(f"down_dims is {down_dims!r}, expected a list of 1 to {MAX_LEVELS} numbers of channels")
    named = {
        "diffusion_step_embed_dim": step_dim,
        "kernel_size": kernel_size,
        "n_groups": n_groups,
        "final_groups": final_groups,
    }
    for name, value in {**named, **{f"down_dims[{i}]": dim for i, dim in enumerate(down_dims)}}.items():
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= MAX_SIZE:
            raise ValueError(f"{name} is {value!r}, expected a whole number from 1 to {MAX_SIZE}")
    if kernel_size % 2 == 0:
        raise ValueError(f"kernel_size is {kernel_size}, expected an odd number: an even one changes the horizon")
    if step_dim < 4 or step_dim % 2:
        raise ValueError(f"diffusion_step_embed_dim is {step_dim}, expected an even number of at least 4")
    if any(dim % n_groups for dim in down_dims):
        raise ValueError(f"down_dims is {list(down_dims)}, expected multiples of n_groups, {n_groups}")
    if down_dims[0] % final_groups:
        raise ValueError(f"final_groups is {final_groups}, expected a divisor of down_dims[0], {down_dims[0]}")


class ConditionalUnet1D(Network):
    """Predicts noise (or sample, or velocity) from a noisy action sequence, its timestep and observed states.

    Args:
        input_dim: numbers of one step of the sequence, D.
        global_cond_dim: length C of the condition vector, To · Do.
        diffusion_step_embed_dim: length of the timestep embedding.
        down_dims: channels of each resolution level.
        kernel_size: of the main convolutions; odd.
        n_groups: groups of every GroupNorm.
        cond_predict_scale: FiLM with scale and bias (True) or bias only (False).
        encoder: computes the condition vector; None: it is the observed states, flattened.
        condition: ``global``: every step of the sequence sees the whole condition vector. ``local``: each of its first
            To steps sees one observed step. ``inpaint``: each of its first To steps has columns ``D - Do`` on replaced
            by an observed step (Janner et al., ICML 2022).
        n_obs_steps: observed steps To, for ``local`` and ``inpaint``.
        final_groups: groups of the last GroupNorm; None: ``n_groups``. The published code always has 8.

    Raises:
        ValueError: an argument of another kind or size.
    """

    def __init__(
        self,
        input_dim: int,
        global_cond_dim: int,
        diffusion_step_embed_dim: int = 256,
        down_dims: Sequence[int] = (256, 512, 1024),
        kernel_size: int = 5,
        n_groups: int = 8,
        cond_predict_scale: bool = True,
        encoder: ObservationEncoder | None = None,
        condition: str = "global",
        n_obs_steps: int = 1,
        final_groups: int | None = None,
    ) -> None:
        super().__init__()
        final_groups = n_groups if final_groups is None else final_groups
        _check_sizes(diffusion_step_embed_dim, down_dims, kernel_size, n_groups, final_groups)
        if not isinstance(cond_predict_scale, bool):
            raise ValueError(f"cond_predict_scale is {cond_predict_scale!r}, expected true or false")
        if condition not in CONDITIONS:
            raise ValueError(f"condition is {condition!r}, expected one of {CONDITIONS}")
        dims = [input_dim, *down_dims]
        levels = list(itertools.pairwise(dims))
        step_dim = diffusion_step_embed_dim
        film_dim = step_dim + (global_cond_dim if condition == "global" else 0)
        self.horizon_multiple = 2 ** (len(levels) - 1)
        self.encoder, self.condition, self.n_obs_steps = encoder, condition, n_obs_steps

        def residual(in_channels: int, out_channels: int) -> ConditionalResidualBlock1D:
            return ConditionalResidualBlock1D(
                in_channels, out_channels, film_dim, kernel_size, n_groups, cond_predict_scale
            )

        self.diffusion_step_encoder = nn.Sequential(
            SinusoidalPosEmb(step_dim), nn.Linear(step_dim, step_dim * 4), nn.Mish(), nn.Linear(step_dim * 4, step_dim)
        )
        # The second layer's output is unused in the published code too, but the files have its weights.
        local = [residual(global_cond_dim // n_obs_steps, dims[1]) for _ in range(2)] if condition == "local" else None
        self.local_cond_encoder = None if local is None else nn.ModuleList(local)
        self.mid_modules = nn.ModuleList([residual(dims[-1], dims[-1]), residual(dims[-1], dims[-1])])
        self.down_modules = nn.ModuleList(
            nn.ModuleList(
                [
                    residual(dim_in, dim_out),
                    residual(dim_out, dim_out),
                    nn.Identity() if i == len(levels) - 1 else Downsample1d(dim_out),
                ]
            )
            for i, (dim_in, dim_out) in enumerate(levels)
        )
        self.up_modules = nn.ModuleList(
            nn.ModuleList([residual(dim_out * 2, dim_in), residual(dim_in, dim_in), Upsample1d(dim_in)])
            for dim_in, dim_out in reversed(levels[1:])
        )
        self.final_conv = nn.Sequential(
            Conv1dBlock(down_dims[0], down_dims[0], kernel_size, final_groups), nn.Conv1d(down_dims[0], input_dim, 1)
        )

    @classmethod
    def build(cls, spec: PolicySpec, encoder: Mapping[str, Any] | None = None, **arguments: Any) -> "ConditionalUnet1D":
        """As :meth:`parapolicy.networks.Network.build`; ``encoder``: see :mod:`parapolicy.networks.vision`."""
        built = build_encoder(spec, encoder, by_step=arguments.get("condition", "global") != "global")
        condition_dim = spec.condition_dim if built is None else built.features
        check_condition(spec, condition_dim // spec.n_obs_steps, arguments.get("condition"))
        network = cls(spec.sample_shape[1], condition_dim, encoder=built, n_obs_steps=spec.n_obs_steps, **arguments)
        if spec.horizon % network.horizon_multiple:
            raise ValueError(
                f"horizon is {spec.horizon}, expected a multiple of {network.horizon_multiple} for 'unet1d'"
            )
        return network

    def embed_steps(self, timesteps: Tensor) -> Tensor:
        """(T,) -> (T, diffusion_step_embed_dim)."""
        embedding: Tensor = self.diffusion_step_encoder(timesteps)
        return embedding

    def encode_images(self, observation: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return observation if self.encoder is None else self.encoder.encode_images(observation)

    @property
    def image_margins(self) -> dict[str, tuple[int, int]]:
        return {} if self.encoder is None else self.encoder.margins

    def embed_condition(self, observation: Mapping[str, Tensor]) -> Tensor:
        """{key: (B, To, …)} -> the condition vector (B, C), or the observed steps (B, To, Do)."""
        condition = encode(self.encoder, observation)
        return condition if self.condition == "global" else condition.unflatten(1, (self.n_obs_steps, -1))

    def forward(self, x: Tensor, steps: Embedding, condition: Embedding, step: Tensor, element: Tensor) -> Tensor:
        """(N, H, D) -> (N, H, D). H must be a multiple of ``2 ** (levels - 1)``."""
        assert isinstance(steps, Tensor)
        assert isinstance(condition, Tensor)
        cond, observed = steps[step], condition[element]
        if self.condition == "global":
            cond = torch.cat((cond, observed), dim=-1)
        elif self.condition == "inpaint":
            x = overwrite_observed(x, observed)
        x = x.movedim(-1, -2)
        skips: list[Tensor] = []
        for i, level in enumerate(self.down_modules):
            first, second, downsample = level.children()
            hidden = first(x, cond)
            if i == 0 and self.local_cond_encoder is not None:
                local = functional.pad(observed.movedim(-1, -2), (0, x.shape[-1] - observed.shape[1]))
                hidden = hidden + self.local_cond_encoder[0](local, cond)
            x = second(hidden, cond)
            skips.append(x)
            x = downsample(x)
        for block in self.mid_modules:
            x = block(x, cond)
        for level in self.up_modules:
            first, second, upsample = level.children()
            x = second(first(torch.cat((x, skips.pop()), dim=1), cond), cond)
            x = upsample(x)
        return self.final_conv(x).movedim(-1, -2)
