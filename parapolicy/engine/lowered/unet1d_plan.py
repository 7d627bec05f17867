"""The conditional UNet as a list of layers."""

import dataclasses
from typing import Any

import torch
from torch import nn

from parapolicy.engine.lowered.plan import Place, Plan
from parapolicy.networks.unet1d import ConditionalUnet1D


class UnetPlan(Plan):
    """The layers of a UNet; see :class:`Plan`.

    Args:
        network: its present weights are copied.
        films: residual block -> slice of its FiLM values.
        length, channels: of a sample.
        dtype: see :class:`Plan`.
    """

    def __init__(
        self, network: ConditionalUnet1D, films: dict[Any, slice], length: int, channels: int, dtype: torch.dtype
    ) -> None:
        super().__init__(dtype)
        self.films = films
        self._last = network.final_conv[1]
        x, skips = self._place(length, channels, multiple=2), []
        for first, second, sample in (level.children() for level in network.down_modules):
            x = self._residual(first, x)
            # The skip is placed behind the upsampled channels, because the next layer reads their concatenation.
            skips.append(self._place(x.length, x.channels, x.channels))
            x = self._residual(second, x, _half(skips[-1], 1))
            x = x if isinstance(sample, nn.Identity) else self._convolution(sample.conv, x)
        first, second = network.mid_modules.children()
        up = [level.children() for level in network.up_modules]
        x = self._residual(second, self._residual(first, x), _half(skips[-1], 0) if up else None)
        for first, second, sample in up:
            x = self._residual(second, self._residual(first, skips.pop()))
            # The published network does not use the first level's skip.
            x = self._convolution(sample.conv, x, _half(skips[-1], 0) if len(skips) > 1 else None)
        block, last = network.final_conv.children()
        conv, norm, _ = block.get_submodule("block").children()
        self._convolution(last, self._convolution(conv, x, norm=norm))
        self._finish(length, channels, max(place.stop for place in films.values()))

    def _residual(self, block: Any, x: Place, target: Place | None = None) -> Place:
        shortcut = block.residual_conv
        past = x if isinstance(shortcut, nn.Identity) else self._convolution(shortcut, x)
        (conv, norm, _), (second, second_norm, _) = block.blocks[0].block, block.blocks[1].block
        film = (self.films[block].start, block.film_scale)
        hidden = self._convolution(conv, x, norm=norm, film=film)
        return self._convolution(second, hidden, target, norm=second_norm, past=past)

    def _convolution(self, conv: Any, x: Place, target: Place | None = None, **what: Any) -> Place:
        """Append one layer: a convolution and the operations after it; see :meth:`Plan._append`."""
        transposed = isinstance(conv, nn.ConvTranspose1d)
        weight = conv.weight.permute(2, 0, 1) if transposed else conv.weight.permute(2, 1, 0)
        what |= {"transposed": transposed, "stride": conv.stride[0], "padding": conv.padding[0]}
        return self._append(weight, conv.bias, x, target, exact=conv is self._last, **what)


def _half(both: Place, which: int) -> Place:
    return dataclasses.replace(both, parts=both.parts[:1], channel=which * both.stride // 2)
