"""The conditional UNet as a list of layers for ``fused.cpp``, which computes it in one call."""

import concurrent.futures
import dataclasses
import functools
import os
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from parapolicy.engine.lowered.unet1d import FilmTables
from parapolicy.engine.native_library import Films, Network, load_library
from parapolicy.networks import Embedding
from parapolicy.networks.base import overwrite_observed
from parapolicy.networks.unet1d import ConditionalUnet1D

ROWS = 8  # of a part that one thread computes


@dataclass(frozen=True)
class Place:
    """Activations (length, rows, channels): some channels of a buffer that begins at ``at`` with ``stride`` of them."""

    at: int
    stride: int
    length: int
    channels: int
    channel: int = 0


@dataclass(frozen=True)
class Layer:
    """As the structure of that name in ``fused.cpp``, field by field."""

    transposed: int
    taps: int
    stride: int
    padding: int
    source: int
    source_channel: int
    source_stride: int
    source_length: int
    inputs: int
    target: int
    target_channel: int
    target_stride: int
    target_length: int
    outputs: int
    padded: int
    weight: int
    bias: int
    groups: int
    norm: int
    film: int
    film_scale: int
    residual: int
    residual_channel: int
    residual_stride: int


class Plan:
    """The layers of a UNet for one horizon, with their weights in the order in which they are read.

    Args:
        network: whose weights are taken, as they are now.
        films: residual block -> where its FiLM values stand.
        length, channels: of a sample.
        tile: output channels that ``fused.cpp`` computes at a time.
    """

    def __init__(
        self, network: ConditionalUnet1D, films: dict[Any, slice], length: int, channels: int, tile: int
    ) -> None:
        self.films, self.tile, self.memory = films, tile, 0
        self._layers: list[Layer] = []
        self._weights: list[Tensor] = []
        self._values: list[Tensor] = []
        self._sizes = {"weights": 0, "values": 0}
        x, skips = self._place(length, channels), []
        for first, second, sample in (level.children() for level in network.down_modules):
            x = self._residual(first, x)
            # The skip stands behind what comes up again, as their concatenation is read there.
            both = self._place(x.length, 2 * x.channels)
            skips.append(both)
            x = self._residual(second, x, dataclasses.replace(both, channels=x.channels, channel=x.channels))
            x = x if isinstance(sample, nn.Identity) else self._convolution(sample.conv, x)
        first, second = network.mid_modules.children()
        up = [level.children() for level in network.up_modules]
        x = self._residual(second, self._residual(first, x), self._front(skips) if up else None)
        for first, second, sample in up:
            x = self._residual(second, self._residual(first, skips.pop()))
            # The first level's skip has no reader, in the published network.
            x = self._convolution(sample.conv, x, self._front(skips) if len(skips) > 1 else None)
        block, last = network.final_conv.children()
        conv, norm, _ = block.get_submodule("block").children()
        self._convolution(last, self._convolution(conv, x, norm=norm))
        self.layers = torch.tensor([dataclasses.astuple(layer) for layer in self._layers])
        self.weights, self.values = torch.cat(self._weights), torch.cat(self._values)
        self.network = Network(
            layers=self.layers.data_ptr(),
            count=len(self.layers),
            weights=self.weights.data_ptr(),
            values=self.values.data_ptr(),
            memory=self.memory,
            length=length,
            channels=channels,
            film=max(place.stop for place in films.values()),
            precision=0,
        )

    @staticmethod
    def _front(skips: list[Place]) -> Place:
        return dataclasses.replace(skips[-1], channels=skips[-1].channels // 2)

    def _place(self, length: int, channels: int) -> Place:
        at = self.memory
        self.memory += length * channels
        return Place(at, channels, length, channels)

    def _keep(self, kind: str, values: Tensor) -> int:
        """Where the values stand among the weights, or among the other values."""
        at = self._sizes[kind]
        (self._weights if kind == "weights" else self._values).append(values.detach().float().flatten())
        self._sizes[kind] += values.numel()
        return at

    def _residual(self, block: Any, x: Place, target: Place | None = None) -> Place:
        shortcut = block.residual_conv
        past = x if isinstance(shortcut, nn.Identity) else self._convolution(shortcut, x)
        (conv, norm, _), (second, second_norm, _) = block.blocks[0].block, block.blocks[1].block
        film = (self.films[block].start, block.film_scale)
        hidden = self._convolution(conv, x, norm=norm, film=film)
        return self._convolution(second, hidden, target, norm=second_norm, past=past)

    def _convolution(
        self,
        conv: Any,
        x: Place,
        target: Place | None = None,
        norm: Any = None,
        film: tuple[int, bool] | None = None,
        past: Place | None = None,
    ) -> Place:
        """One layer: a convolution, then norm and Mish, FiLM and residual where they are given."""
        transposed, stride, padding = isinstance(conv, nn.ConvTranspose1d), conv.stride[0], conv.padding[0]
        # (taps, inputs, outputs)
        weight = conv.weight.detach().permute(2, 0, 1) if transposed else conv.weight.detach().permute(2, 1, 0)
        taps, inputs, outputs = weight.shape
        length = stride * x.length if transposed else (x.length + 2 * padding - taps) // stride + 1
        more = -outputs % self.tile
        tiles = functional.pad(weight, (0, more)).unflatten(2, (-1, self.tile)).permute(2, 0, 1, 3)
        bias = conv.weight.new_zeros(outputs) if conv.bias is None else conv.bias.detach()
        target = target or self._place(length, outputs)
        self._layers.append(
            Layer(
                transposed=int(transposed),
                taps=taps,
                stride=stride,
                padding=padding,
                source=x.at,
                source_channel=x.channel,
                source_stride=x.stride,
                source_length=x.length,
                inputs=inputs,
                target=target.at,
                target_channel=target.channel,
                target_stride=target.stride,
                target_length=length,
                outputs=outputs,
                padded=outputs + more,
                weight=self._keep("weights", tiles),
                bias=self._keep("values", functional.pad(bias, (0, more))),
                groups=0 if norm is None else norm.num_groups,
                norm=-1 if norm is None else self._keep("values", _norm_values(norm)),
                film=-1 if film is None else film[0],
                film_scale=int(film is not None and film[1]),
                residual=-1 if past is None else past.at,
                residual_channel=0 if past is None else past.channel,
                residual_stride=0 if past is None else past.stride,
            )
        )
        return dataclasses.replace(target, length=length, channels=outputs)


def share_out(parts: Sequence[slice], compute: Callable[[slice], None], threads: int) -> None:
    """``compute`` of each part, by this thread and, where they get to run, by others.

    The caller does what no other has begun, and waits only for what is under way: a core that others keep busy delays
    nothing else.
    """
    left = deque(parts)

    def work() -> None:
        while left:
            try:
                part = left.popleft()
            except IndexError:  # another thread took the last one
                return
            compute(part)

    helpers = [_pool(os.getpid()).submit(work) for _ in range(min(threads, len(parts)) - 1)]
    try:
        work()
    finally:
        under_way = [helper for helper in helpers if not helper.cancel()]
        concurrent.futures.wait(under_way)
    for helper in under_way:
        helper.result()


@functools.cache
def _pool(process: int) -> concurrent.futures.ThreadPoolExecutor:
    """The helpers of a process: a fork leaves none behind."""
    return concurrent.futures.ThreadPoolExecutor(os.cpu_count() or 1, "parapolicy-fused")


def _norm_values(norm: nn.GroupNorm) -> Tensor:
    return torch.cat((norm.weight, norm.bias, norm.weight.new_tensor([norm.eps])))


class FusedUnet1D(FilmTables):
    """The function of a :class:`ConditionalUnet1D` on a CPU, by calls of C++, each of a few rows on one core.

    Args:
        network: whose weights are taken, as they are now.

    Raises:
        ValueError: it is conditioned locally, not on a CPU, or not of float32.
        OSError: there is no compiler.
    """

    def __init__(self, network: ConditionalUnet1D) -> None:
        super().__init__(network)
        weight = network.final_conv[1].weight
        if network.condition == "local" or weight.device.type != "cpu" or weight.dtype != torch.float32:
            raise ValueError(f"its condition is {network.condition!r}, on {weight.device}, of {weight.dtype}")
        self._library = load_library()
        self._source = (network,)  # not a module of this one
        self._plans: dict[tuple[int, ...], Plan] = {}  # by the shape of a sample
        self._lock = threading.Lock()

    def forward(self, x: Tensor, steps: Embedding, condition: Embedding, step: Tensor, element: Tensor) -> Tensor:
        """(N, H, D) -> the same."""
        assert isinstance(steps, Tensor)
        assert isinstance(condition, Tensor)
        inpaints = self.condition == "inpaint"
        if inpaints:
            x = overwrite_observed(x, condition[element])
        x, steps = _dense(x, torch.float32), _dense(steps, torch.float32)
        step, element, condition = _dense(step, torch.int64), _dense(element, torch.int64), _dense(condition)
        rows, length, channels = x.shape
        if step.shape != (rows,) or element.shape != (rows,):
            raise ValueError(f"step and element have shapes {step.shape} and {element.shape}, expected ({rows},)")
        plan, y = self._plan(length, channels), torch.empty_like(x)
        films = Films(steps.data_ptr(), len(steps), None if inpaints else condition.data_ptr(), len(condition))

        def compute(rows: slice) -> None:
            some, steps_of, elements_of, results = x[rows], step[rows], element[rows], y[rows]
            pointers = some.data_ptr(), steps_of.data_ptr(), elements_of.data_ptr()
            wrong = self._library.parapolicy_compute(plan.network, films, *pointers, len(some), results.data_ptr(), 1)
            if wrong >= 0:
                raise IndexError(
                    f"row {rows.start + wrong} has step {int(steps_of[wrong])} and element {int(elements_of[wrong])}, "
                    f"expected below {len(steps)} and {len(condition)}"
                )

        share_out([slice(i, min(i + ROWS, rows)) for i in range(0, rows, ROWS)], compute, torch.get_num_threads())
        return y

    def _plan(self, length: int, channels: int) -> Plan:
        with self._lock:
            if (length, channels) not in self._plans:
                tile = self._library.parapolicy_tile()
                with torch.inference_mode(False), torch.no_grad():
                    self._plans[length, channels] = Plan(self._source[0], self.place, length, channels, tile)
            return self._plans[length, channels]


def _dense(value: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return value.to(torch.device("cpu"), dtype).contiguous()
