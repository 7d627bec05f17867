"""Backbones of timm and what UMI does around them, against their definitions."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from parapolicy.networks.resnet import ResNet
from parapolicy.networks.timm_encoder import AGGREGATIONS, TimmEncoder
from parapolicy.networks.vit import VisionTransformer
from parapolicy.spec import Feature

VIT = {"name": "vit", "patch": 8, "width": 24, "depth": 2, "heads": 3, "hidden": 40}
RESNET = {"name": "resnet18", "norm": "group", "levels": 3}


def randomised(module: nn.Module) -> Any:
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, value in module.state_dict().items():
            value.copy_(torch.randn(value.shape, generator=generator) * 0.2 + name.endswith(("norm.weight", "gamma")))
    return module.eval()


def pictures(height: int, width: int, count: int = 2) -> Tensor:
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(3))


def blocks_by_torch(vit: VisionTransformer, tokens: Tensor, activation: Any) -> Tensor:
    """The blocks as torch's own multi-head attention computes them."""
    for block in vit.blocks:
        normed: Any = block.norm1(tokens)
        qkv, proj, heads = block.attn.qkv, block.attn.proj, block.attn.heads
        arguments = (normed.transpose(0, 1),) * 3
        attended, _ = functional.multi_head_attention_forward(
            *arguments, tokens.shape[2], heads, qkv.weight, qkv.bias, None, None, False, 0.0, proj.weight, proj.bias,
            training=False,
        )  # fmt: skip
        tokens = tokens + block.ls1(attended.transpose(0, 1))
        hidden = block.mlp.fc1(block.norm2(tokens))
        tokens = tokens + block.ls2(block.mlp.fc2(activation(hidden)))
    return vit.norm(tokens)


@pytest.mark.parametrize(
    "kind",
    [
        {},
        {"norm_pre": True, "eps": 1e-5},
        {"norm_pre": True, "activation": "quick_gelu"},
        {"layer_scale": True},
        {"layer_scale": True, "registers": 4, "place_class": False},
    ],
)
@torch.inference_mode()
def test_the_class_token_of_a_transformer(kind: dict[str, Any]) -> None:
    vit = randomised(VisionTransformer(3, (16, 24), **{k: v for k, v in VIT.items() if k != "name"}, **kind))
    shown = pictures(16, 24)
    patches = functional.unfold(shown, 8, stride=8).transpose(1, 2)  # (N, 2 · 3, 3 · 8 · 8)
    tokens = patches @ vit.patch_embed["proj"].weight.flatten(1).T
    if not kind.get("norm_pre"):
        tokens = tokens + vit.patch_embed["proj"].bias
    else:
        assert vit.patch_embed["proj"].bias is None
    if kind.get("registers"):
        tokens = torch.cat(
            [vit.cls_token.expand(2, -1, -1), vit.reg_token.expand(2, -1, -1), tokens + vit.pos_embed], 1
        )
    else:
        tokens = torch.cat([vit.cls_token.expand(2, -1, -1), tokens], 1) + vit.pos_embed
    if kind.get("norm_pre"):
        norm = vit.norm_pre
        tokens = functional.layer_norm(tokens, (24,), norm.weight, norm.bias, kind.get("eps", 1e-6))
    gelu = functional.gelu if "activation" not in kind else lambda x: x * (1.702 * x).sigmoid()
    expected = blocks_by_torch(vit, tokens, gelu)[:, 0]
    torch.testing.assert_close(vit(shown), expected, rtol=1e-4, atol=1e-5)


def aggregate(name: str, head: Any, x: Tensor) -> Tensor:
    tokens = x.flatten(2).transpose(1, 2)  # (N, h · w, C)
    match name:
        case "avg":
            return tokens.mean(1)
        case "max":
            return tokens.max(1).values
        case "soft_attention":
            return (tokens.transpose(1, 2) @ (tokens @ head.linear.weight.T).softmax(1))[..., 0]
        case "spatial_embedding":
            return torch.stack([tokens[:, i] * head.factors[i] for i in range(tokens.shape[1])]).mean(0)
    tokens = torch.cat([tokens.mean(1, keepdim=True), tokens], 1) + head.positional_embedding
    given = tokens.transpose(0, 1)
    bias = torch.cat([head.q_proj.bias, head.k_proj.bias, head.v_proj.bias])
    pooled, _ = functional.multi_head_attention_forward(
        given[:1], given, given, x.shape[1], x.shape[1] // 64, None, bias, None, None, False, 0.0, head.c_proj.weight,
        head.c_proj.bias, training=False, use_separate_proj_weight=True, q_proj_weight=head.q_proj.weight,
        k_proj_weight=head.k_proj.weight, v_proj_weight=head.v_proj.weight,
    )  # fmt: skip
    return pooled[0]


@pytest.mark.parametrize("name", AGGREGATIONS)
@torch.inference_mode()
def test_aggregations_of_a_feature_map(name: str) -> None:
    head = randomised(AGGREGATIONS[name](128, 15))
    x = torch.randn(2, 128, 3, 5, generator=torch.Generator().manual_seed(4))
    torch.testing.assert_close(head(x), aggregate(name, head, x), rtol=1e-5, atol=1e-5)


@torch.inference_mode()
def test_the_middle_is_cut_out_and_scaled_back() -> None:
    """An odd margin of 7 begins at 4, as round does to 3.5."""
    encoder = TimmEncoder(Feature((40, 48, 3), "image"), VIT, crop=[33, 33], resize=[40, 40])
    encoder.backbone = nn.Identity()  # type: ignore[assignment]
    shown = pictures(40, 48)
    middle = shown[..., 4:37, 8:41]
    expected = functional.interpolate(middle, (40, 40), mode="bilinear", antialias=True)
    torch.testing.assert_close(encoder(shown), expected)


@torch.inference_mode()
def test_smaller_pictures_are_averaged() -> None:
    image = Feature((40, 40, 3), "image")
    ragged, smooth = (TimmEncoder(image, VIT, resize=[8, 8], antialias=flag) for flag in (False, True))
    for encoder in (ragged, smooth):
        encoder.backbone = nn.Identity()  # type: ignore[assignment]
    shown = pictures(40, 40)
    assert smooth(shown).std() < 0.5 * ragged(shown).std()


@torch.inference_mode()
def test_a_resnet_without_its_last_layer() -> None:
    whole, part = ResNet("resnet18", 3, "group"), ResNet("resnet18", 3, "group", levels=3)
    part.load_state_dict({k: v for k, v in whole.state_dict().items() if not k.startswith("layer4")})
    shown = pictures(33, 48)
    assert part(shown).shape == (2, part.channels, 3, 3)
    assert (part.stride, part.channels, whole.stride) == (16, 256, 32)
    torch.testing.assert_close(whole.layer4(part(shown)), whole(shown))


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@torch.inference_mode()
def test_resnets_with_each_aggregation(aggregation: str) -> None:
    encoder = TimmEncoder(Feature((36, 52, 3), "image"), RESNET, aggregation, crop=[33, 33], resize=[36, 36]).eval()
    assert encoder(pictures(36, 52)).shape == (2, encoder.features) == (2, 256)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"backbone": VIT, "aggregation": "avg"}, "aggregation is 'avg', expected null"),
        ({"backbone": RESNET, "aggregation": "transformer"}, "aggregation is 'transformer', expected one of"),
        ({"backbone": {**VIT, "heads": 5}}, "width is 24, expected a multiple of heads, 5"),
        ({"backbone": {**VIT, "eps": 0}}, "eps is 0"),
        ({"backbone": {**VIT, "activation": "relu"}}, "activation is 'relu'"),
        ({"backbone": {**VIT, "patch": 64}}, "at least one patch of 64"),
        ({"backbone": {**VIT, "depth": 10**6}}, "depth is 1000000"),
        ({"backbone": {**VIT, "registers": -1}}, "registers is -1"),
        ({"backbone": {**VIT, "norm_pre": 1}}, "norm_pre is 1, expected true or false"),
        (
            {"backbone": {**RESNET, "levels": 5}, "aggregation": "avg"},
            "levels is 5, expected a whole number",
        ),
        ({"backbone": {**RESNET, "name": "vgg"}, "aggregation": "avg"}, "backbone is 'vgg'"),
        ({"backbone": "resnet18"}, "backbone is 'resnet18', expected a name and arguments"),
        ({"backbone": VIT, "crop": [64, 8]}, "crop is"),
        ({"backbone": VIT, "antialias": "yes"}, "antialias is 'yes'"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message), torch.device("meta"):
        TimmEncoder(Feature((32, 32, 3), "image"), **settings)
