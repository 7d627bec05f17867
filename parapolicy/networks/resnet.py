"""The residual networks of He et al. (CVPR 2016) up to the last feature map, with torchvision's tensor names."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from parapolicy.networks.checks import check_count

Norm = Callable[[int], nn.Module]
# Name -> whether blocks are bottlenecks, and the number of blocks at each of the four resolutions.
SIZES = {"resnet18": (False, (2, 2, 2, 2)), "resnet34": (False, (3, 4, 6, 3)), "resnet50": (True, (3, 4, 6, 3))}
LEVELS = 4
STRIDE = 32  # of the last feature map, in pixels
WIDTH, MAX_WIDTH = 64, 1024  # channels of the first level
GROUP = 16  # channels that GroupNorm normalises together


class FrozenBatchNorm(nn.Module):
    """BatchNorm2d at evaluation: its statistics are those of training and constant."""

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias)


def group_norm(channels: int) -> nn.Module:
    """GroupNorm over groups of 16 channels, which Diffusion Policy uses instead of BatchNorm."""
    return nn.GroupNorm(channels // GROUP, channels)


NORMS: dict[str, Norm] = {"group": group_norm, "batch": FrozenBatchNorm}


class BasicBlock(nn.Module):
    expansion = 1

    def __init__(self, in_channels: int, channels: int, stride: int, norm: Norm) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn1 = norm(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = norm(channels)
        self.downsample = _shortcut(in_channels, channels, stride, norm)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.bn1(self.conv1(x)).relu()
        return (self.bn2(self.conv2(hidden)) + self.downsample(x)).relu()


class Bottleneck(nn.Module):
    expansion = 4

    def __init__(self, in_channels: int, channels: int, stride: int, norm: Norm) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.bn1 = norm(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride, 1, bias=False)
        self.bn2 = norm(channels)
        self.conv3 = nn.Conv2d(channels, channels * 4, 1, bias=False)
        self.bn3 = norm(channels * 4)
        self.downsample = _shortcut(in_channels, channels * 4, stride, norm)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.bn1(self.conv1(x)).relu()
        hidden = self.bn2(self.conv2(hidden)).relu()
        return (self.bn3(self.conv3(hidden)) + self.downsample(x)).relu()


def _shortcut(in_channels: int, channels: int, stride: int, norm: Norm) -> nn.Module:
    if stride == 1 and in_channels == channels:
        return nn.Identity()
    return nn.Sequential(nn.Conv2d(in_channels, channels, 1, stride, bias=False), norm(channels))


class ResNet(nn.Module):
    """(N, C, h, w) -> the last feature map (N, ``channels``, h / ``stride``, w / ``stride``), each rounded up.

    Args:
        name: one of ``SIZES``.
        in_channels: of the pictures.
        norm: one of ``NORMS``.
        levels: number of resolutions, 1 to 4, with strides 4, 8, 16, 32 in this order.
        width: channels of the first level, a multiple of 16; 64 in the published networks.

    Raises:
        ValueError: an unknown name or norm, or a number of levels or a width out of range.
    """

    def __init__(self, name: str, in_channels: int, norm: str, levels: int = LEVELS, width: int = WIDTH) -> None:
        super().__init__()
        if name not in SIZES or norm not in NORMS:
            raise ValueError(
                f"backbone is {name!r} with norm {norm!r}, expected one of {[*SIZES]} with one of {[*NORMS]}"
            )
        check_count("levels", levels, LEVELS)
        if check_count("width", width, MAX_WIDTH) % GROUP:
            raise ValueError(f"width is {width}, expected a multiple of {GROUP}, the channels of a group")
        self.stride = STRIDE >> (LEVELS - levels)
        bottleneck, counts = SIZES[name]
        block = Bottleneck if bottleneck else BasicBlock
        self.conv1 = nn.Conv2d(in_channels, width, 7, 2, 3, bias=False)
        self.bn1 = NORMS[norm](width)
        first = width
        for level, count in enumerate(counts[:levels]):
            blocks = []
            for i in range(count):
                channels = first * 2**level
                blocks.append(block(width, channels, 2 if level and not i else 1, NORMS[norm]))
                width = channels * block.expansion
            self.add_module(f"layer{level + 1}", nn.Sequential(*blocks))
        self.channels, self.levels = width, levels

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(self.conv1(x)).relu()
        x = nn.functional.max_pool2d(x, 3, 2, 1)
        for level in range(self.levels):
            x = self.get_submodule(f"layer{level + 1}")(x)
        return x
