"""The transformer as a list of layers: tokens are positions, and linear layers are convolutions with one tap."""

import math
from typing import Any

import torch
from torch import nn

from parapolicy.engine.lowered.plan import ATTENTION, LAYER_NORM, Layer, Place, Plan, norm_values
from parapolicy.networks.transformer1d import Attention, TransformerForDiffusion


class TransformerPlan(Plan):
    """The layers of a transformer's decoder; see :class:`Plan`. The memory's keys and values are its FiLM values.

    Args:
        network: its present weights are copied.
        memory: number of the memory's tokens.
        length, channels: of a sample.
        dtype: see :class:`Plan`.
    """

    def __init__(
        self, network: TransformerForDiffusion, memory: int, length: int, channels: int, dtype: torch.dtype
    ) -> None:
        super().__init__(dtype)
        decoder: Any = network.decoder
        source, far = network.input_emb, math.inf
        bias = source.bias + network.pos_emb[0]
        x = self._append(source.weight.T[None], bias, self._place(length, channels, multiple=2))
        width, dim = 2 * memory * x.channels, x.channels
        for i, layer in enumerate(decoder.layers):
            attention = layer.self_attn
            projected = self._project(attention, self._norm(layer.norm1, x), 0, 3)
            mixed = self._attend(projected, attention.heads, dim, seen=1 if network.causal else far)
            x = self._linear(attention.out_proj, mixed, past=x)
            attention = layer.multihead_attn
            query = self._project(attention, self._norm(layer.norm2, x), 0, 1)
            # The memory's token 0 is the timestep, and token s is the observed step s - 1.
            seen = 2 if network.causal and not network.inpaints else far
            mixed = self._attend(query, attention.heads, dim, seen, memory, film=i * width)
            x = self._linear(attention.out_proj, mixed, past=x)
            hidden = self._linear(layer.linear1, self._norm(layer.norm3, x), gelu=True)
            x = self._linear(layer.linear2, hidden, past=x)
        self._linear(network.head, self._norm(network.ln_f, x), exact=True)
        self._finish(length, channels, width * len(decoder.layers))

    def _linear(self, linear: Any, x: Place, **what: Any) -> Place:
        return self._append(linear.weight.T[None], linear.bias, x, **what)

    def _project(self, attention: Attention, x: Place, first: int, last: int) -> Place:
        """As :meth:`Attention.project`."""
        part = slice(first * x.channels, last * x.channels)
        return self._append(attention.in_proj_weight[part].T[None], attention.in_proj_bias[part], x)

    def _norm(self, norm: nn.LayerNorm, x: Place) -> Place:
        return self._mix(x, x.channels, kind=LAYER_NORM, norm=self._keep("values", norm_values(norm)))

    def _attend(self, x: Place, heads: int, dim: int, seen: float, memory: int = 0, film: int = -1) -> Place:
        among = int(min(seen, memory or x.length))
        return self._mix(x, dim, kind=ATTENTION, heads=heads, memory=memory, seen=among, film=film)

    def _mix(self, x: Place, outputs: int, norm: int = -1, film: int = -1, **what: int) -> Place:
        """Append a layer without products."""
        target = self._place(x.length, outputs)
        self._layers.append(
            Layer(
                transposed=0,
                taps=1,
                stride=1,
                padding=0,
                source=x.buffer,
                source_channel=x.channel,
                source_stride=x.stride,
                source_length=x.length,
                inputs=x.channels,
                target=target.buffer,
                target_channel=target.channel,
                target_stride=target.stride,
                target_length=target.length,
                outputs=outputs,
                padded=outputs,
                strip=outputs,
                unit=outputs,
                weight=0,
                bias=0,
                group=0,
                norm=norm,
                film=film,
                film_scale=0,
                residual=-1,
                residual_channel=0,
                residual_stride=0,
                exact=1,
                rounded=0,
                precision=0,
                **what,
            )
        )
        return target
