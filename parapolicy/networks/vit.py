"""The vision transformers (Dosovitskiy et al., ICLR 2021) of CLIP and DINOv2, with timm's tensor names."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from parapolicy.networks.checks import check_count, check_flag

MAX_DEPTH = 256


class QuickGELU(nn.Module):
    """The GELU that CLIP was first trained with."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, type[nn.Module]] = {"gelu": nn.GELU, "quick_gelu": QuickGELU}


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = functional.scaled_dot_product_attention(query, key, value)  # (N, heads, L, W / heads)
        mixed: Tensor = self.proj(attended.transpose(1, 2).flatten(2))
        return mixed


class Mlp(nn.Module):
    def __init__(self, width: int, hidden: int, activation: str) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(width, hidden), ACTIVATIONS[activation](), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.fc2(self.act(self.fc1(x)))
        return result


class LayerScale(nn.Module):
    """One factor for each number of a token (Touvron et al., ICCV 2021)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Block(nn.Module):
    def __init__(self, width: int, heads: int, hidden: int, eps: float, activation: str, scaled: bool) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(width, eps), Attention(width, heads)
        self.norm2, self.mlp = nn.LayerNorm(width, eps), Mlp(width, hidden, activation)
        self.ls1, self.ls2 = (LayerScale(width) if scaled else nn.Identity() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class VisionTransformer(nn.Module):
    """Pictures (N, C, H, W) -> the class token after the last normalisation, (N, ``channels``).

    Args:
        in_channels: colour channels of a picture.
        size: (height, width) of the pictures.
        patch: side of a patch, pixels; a remainder at the right and at the bottom is ignored.
        width: length of a token.
        depth: blocks.
        heads: of every attention.
        hidden: of every block's two linear layers.
        eps: of every LayerNorm.
        activation: one of ``ACTIVATIONS``.
        norm_pre: a LayerNorm before the first block, as in CLIP; the patches then have no bias.
        layer_scale: factors at the end of every branch, as in DINOv2.
        registers: number of register tokens (Darcet et al., ICLR 2024).
        place_class: whether the class token has a position; with registers, it has none.

    Raises:
        ValueError: an argument of another kind or size, or arguments that do not go together.
    """

    def __init__(
        self,
        in_channels: int,
        size: tuple[int, int],
        patch: int = 16,
        width: int = 768,
        depth: int = 12,
        heads: int = 12,
        hidden: int = 3072,
        eps: float = 1e-6,
        activation: str = "gelu",
        norm_pre: bool = False,
        layer_scale: bool = False,
        registers: int = 0,
        place_class: bool = True,
    ) -> None:
        super().__init__()
        for name, count in {"patch": patch, "width": width, "heads": heads, "hidden": hidden}.items():
            check_count(name, count)
        check_count("depth", depth, MAX_DEPTH)
        for name, flag in {"norm_pre": norm_pre, "layer_scale": layer_scale, "place_class": place_class}.items():
            check_flag(name, flag)
        if registers != 0:
            check_count("registers", registers)
        _check_numbers(width, heads, eps, activation)
        rows, columns = (side // patch for side in size)
        if not rows or not columns:
            raise ValueError(f"size is {size}, expected at least one patch of {patch} × {patch}")
        self.place_class, self.channels = place_class, width
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(in_channels, width, patch, patch, bias=not norm_pre)})
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.reg_token = nn.Parameter(torch.zeros(1, registers, width)) if registers else None
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, rows * columns + place_class, width))
        self.norm_pre = nn.LayerNorm(width, eps) if norm_pre else nn.Identity()
        self.blocks = nn.Sequential(*(Block(width, heads, hidden, eps, activation, layer_scale) for _ in range(depth)))
        self.norm = nn.LayerNorm(width, eps)

    def forward(self, pictures: Tensor) -> Tensor:
        tokens = self.patch_embed["proj"](pictures).flatten(2).transpose(1, 2)  # (N, rows · columns, W)
        added = (self.cls_token, self.reg_token)
        first = [token.expand(tokens.shape[0], -1, -1) for token in added if token is not None]
        if self.place_class:
            placed = torch.cat((first[0], tokens), 1) + self.pos_embed
            first, tokens = [placed[:, :1], *first[1:]], placed[:, 1:]
        else:
            tokens = tokens + self.pos_embed
        x: Any = self.blocks(self.norm_pre(torch.cat((*first, tokens), 1)))
        result: Tensor = self.norm(x[:, 0])
        return result


def _check_numbers(width: int, heads: int, eps: Any, activation: Any) -> None:
    if width % heads:
        raise ValueError(f"width is {width}, expected a multiple of heads, {heads}")
    if not isinstance(eps, float) or not 0 < eps < 1:
        raise ValueError(f"eps is {eps!r}, expected a number above 0 and below 1")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation is {activation!r}, expected one of {[*ACTIVATIONS]}")
