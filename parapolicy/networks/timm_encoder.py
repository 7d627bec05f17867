"""Image encoders with backbones of timm, as in the Universal Manipulation Interface (Chi et al., RSS 2024)."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from parapolicy.networks.checks import check_flag, check_size
from parapolicy.networks.resnet import ResNet
from parapolicy.networks.vit import VisionTransformer
from parapolicy.spec import Feature

HEAD_CHANNELS = 64  # per head of the attention that pools a feature map


class Mean(nn.Module):
    """The mean over the picture. Like all aggregations here: (N, C, h, w) -> (N, C)."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))


class Maximum(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.amax((2, 3))


class SoftAttention(nn.Module):
    """A weighted mean. The weights are a softmax over the picture of a linear map at each place."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.linear = nn.Linear(channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)  # (N, h · w, C)
        return (tokens * self.linear(tokens).softmax(1)).sum(1)


class SpatialEmbedding(nn.Module):
    """The mean over the picture with one factor for each place and channel."""

    def __init__(self, channels: int, places: int) -> None:
        super().__init__()
        self.factors = nn.Parameter(torch.randn(places, channels))

    def forward(self, x: Tensor) -> Tensor:
        return (x.flatten(2).transpose(1, 2) * self.factors).mean(1)


class AttentionPool(nn.Module):
    """Attention pooling: the mean attends to all places and to itself (Radford et al., ICML 2021)."""

    def __init__(self, channels: int, places: int) -> None:
        super().__init__()
        if channels % HEAD_CHANNELS:
            raise ValueError(f"attention_pool_2d has {channels} channels, expected a multiple of {HEAD_CHANNELS}")
        self.positional_embedding = nn.Parameter(torch.randn(places + 1, channels) / channels**0.5)
        self.q_proj, self.k_proj, self.v_proj, self.c_proj = (nn.Linear(channels, channels) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        tokens = torch.cat((tokens.mean(1, keepdim=True), tokens), 1) + self.positional_embedding
        query, key, value = (
            part.unflatten(2, (-1, HEAD_CHANNELS)).transpose(1, 2)
            for part in (self.q_proj(tokens[:, :1]), self.k_proj(tokens), self.v_proj(tokens))
        )
        attended = functional.scaled_dot_product_attention(query, key, value)  # (N, heads, 1, 64)
        pooled: Tensor = self.c_proj(attended.flatten(1))
        return pooled


AGGREGATIONS: dict[str, Any] = {
    "avg": lambda channels, places: Mean(),
    "max": lambda channels, places: Maximum(),
    "soft_attention": lambda channels, places: SoftAttention(channels),
    "spatial_embedding": SpatialEmbedding,
    "attention_pool_2d": AttentionPool,
}


class TimmEncoder(nn.Module):
    """One camera's pictures -> features.

    The published code crops, rotates and tints pictures at random, also at evaluation. Here the middle is cropped, and
    nothing else is changed.

    Args:
        image: shape and kind of the camera's image.
        backbone: ``name`` ``vit`` and arguments of :class:`parapolicy.networks.vit.VisionTransformer`, or ``name`` of a
            :class:`parapolicy.networks.resnet.ResNet`, ``norm`` and ``levels``.
        aggregation: of a ResNet's feature map, one of ``AGGREGATIONS``; None for a transformer: its class token.
        crop: (height, width) of the middle that is cropped first; None: no crop.
        resize: (height, width) to which the crop is scaled, bilinear; None: no scaling.
        antialias: when scaling down, average over the source pixels of each target pixel.

    Raises:
        ValueError: a setting of another kind or size.
    """

    def __init__(
        self,
        image: Feature,
        backbone: Mapping[str, Any],
        aggregation: str | None = None,
        crop: Sequence[int] | None = None,
        resize: Sequence[int] | None = None,
        antialias: bool = True,
    ) -> None:
        super().__init__()
        self.crop, self.resize, self.antialias = (
            check_size("crop", crop),
            check_size("resize", resize),
            check_flag("antialias", antialias),
        )
        height, width, channels = image.shape
        if self.crop and (self.crop[0] > height or self.crop[1] > width):
            raise ValueError(f"crop is {list(self.crop)}, expected at most the picture's ({height}, {width})")
        cropped = self.crop or (height, width)
        self.margin = (height - cropped[0]) // 2, (width - cropped[1]) // 2  # on each side, for training
        size = self.resize or cropped
        if not isinstance(backbone, Mapping):
            raise ValueError(f"backbone is {backbone!r:.80}, expected a name and arguments")
        settings = dict(backbone)
        self.backbone: VisionTransformer | ResNet
        self.aggregation: nn.Module
        if settings.get("name") == "vit":
            if aggregation is not None:
                raise ValueError(f"aggregation is {aggregation!r}, expected null: the backbone has a class token")
            self.backbone = VisionTransformer(channels, size, **{k: v for k, v in settings.items() if k != "name"})
            self.aggregation = nn.Identity()
        else:
            self.backbone = ResNet(settings.pop("name", None), channels, **settings)
            rows, columns = (-(-side // self.backbone.stride) for side in size)
            if aggregation not in AGGREGATIONS:
                raise ValueError(f"aggregation is {aggregation!r}, expected one of {[*AGGREGATIONS]}")
            self.aggregation = AGGREGATIONS[aggregation](self.backbone.channels, rows * columns)
        self.features = self.backbone.channels

    def forward(self, pictures: Tensor) -> Tensor:
        """(N, C, H, W), normalised -> (N, ``features``)."""
        x = pictures
        if self.crop:
            top, left = (round((int(have) - want) / 2) for have, want in zip(x.shape[2:], self.crop, strict=True))
            x = x[..., top : top + self.crop[0], left : left + self.crop[1]]
        if self.resize:
            x = functional.interpolate(x, self.resize, mode="bilinear", align_corners=False, antialias=self.antialias)
        features: Tensor = self.aggregation(self.backbone(x))
        return features
