"""A network as a list of layers for ``fused.cpp``, which computes it in one call."""

import contextlib
import dataclasses
import math
import mmap
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from parapolicy.engine.native_library import Network

WIDTH = 16  # channels of a buffer are a multiple of this: the widest vector
ALIGNMENT = 64  # of the buffers
CONVOLUTION, LAYER_NORM, ATTENTION = 0, 1, 2  # kinds of layers, in the order of fused.h


@dataclass(frozen=True)
class Place:
    """Activations (length, rows, stride): some channels of a buffer.

    Attributes:
        buffer: its number; 0 is the input.
        stride: channels of the buffer.
        parts: channels of each of the concatenated tensors there; each is padded with zeros.
        channel: offset of the first channel in the buffer.
    """

    buffer: int
    stride: int
    length: int
    parts: tuple[int, ...]
    channel: int = 0

    @property
    def channels(self) -> int:
        return sum(self.parts)


@dataclass(frozen=True)
class Layer:
    """The structure of that name in ``fused.h``, field by field. Buffers are numbers until they are placed."""

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
    strip: int
    unit: int
    weight: int
    bias: int
    group: int
    norm: int
    film: int
    film_scale: int
    residual: int
    residual_channel: int
    residual_stride: int
    exact: int
    rounded: int
    precision: int
    kind: int = CONVOLUTION
    gelu: int = 0
    bias_pitch: int = 0
    heads: int = 0
    memory: int = 0
    seen: int = 0


class Plan:
    """The layers of a network for one horizon, with their weights in the order of reading.

    A subclass appends the layers in ``__init__`` and ends with :meth:`_finish`.

    Args:
        dtype: of the weights and of their factors: float32 or bfloat16. The layers that read the sample and that give
            the result are always float32: they are small, and their rounding matters most.

    Attributes:
        network: for the library's functions. Its pointers are to tensors that the plan keeps.
    """

    network: Network

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._sizes: list[int] = []  # of the buffers, per row
        self._layers: list[Layer] = []
        self._weights: list[Tensor] = []
        self._values: list[Tensor] = []
        self._counts = {"weights": 0, "values": 0}

    def _finish(self, length: int, channels: int, film: int) -> None:
        """Place the appended layers' buffers, for samples (length, channels) and ``film`` FiLM values."""
        layers, memory = place_buffers(mark_forms(self._layers), self._sizes)
        self.layers = torch.tensor([dataclasses.astuple(layer) for layer in layers])
        self.weights, self.values = in_large_pages(self._weights), torch.cat(self._values)
        self.network = Network(
            layers=self.layers.data_ptr(),
            count=len(self.layers),
            weights=self.weights.data_ptr(),
            values=self.values.data_ptr(),
            memory=memory,
            length=length,
            channels=channels,
            film=film,
            precision=int(self.dtype == torch.bfloat16),
        )

    def _place(self, length: int, *parts: int, multiple: int = WIDTH) -> Place:
        stride = sum(filled(part, multiple) for part in parts)
        self._sizes.append(length * stride)
        return Place(len(self._sizes) - 1, stride, length, parts)

    def _keep(self, kind: str, values: Tensor) -> int:
        """Append values to the weights, or to the other values. Returns their offset in 32-bit words."""
        words = values.detach().contiguous().flatten().view(torch.int32 if kind == "weights" else torch.float32)
        at = self._counts[kind]
        (self._weights if kind == "weights" else self._values).append(words)
        self._counts[kind] += len(words)
        return at

    def _append(
        self,
        weight: Tensor,
        bias: Tensor | None,
        x: Place,
        target: Place | None = None,
        *,
        transposed: bool = False,
        stride: int = 1,
        padding: int = 0,
        exact: bool = False,
        norm: Any = None,
        gelu: bool = False,
        film: tuple[int, bool] | None = None,
        past: Place | None = None,
    ) -> Place:
        """Append one layer: a convolution, then norm and Mish or GELU, FiLM and residual, if given.

        Args:
            weight: (taps, inputs, outputs).
            bias: (outputs), or (positions, outputs); None: 0.
            exact: in float32, also where the network's dtype is bfloat16.
        """
        weight = weight.detach()
        taps, _, outputs = weight.shape
        length = stride * x.length if transposed else (x.length + 2 * padding - taps) // stride + 1
        padded, multiple = filled(outputs, WIDTH), 2 if x.buffer == 0 else WIDTH
        # At least two strips if possible: one for each of two threads.
        strip = next(width for width in (64, 32, 16) if padded % (2 * width) == 0 or padded == width or width == 16)
        group = 0 if norm is None else outputs // norm.num_groups
        unit = math.lcm(strip, group) if norm is not None else strip
        inputs = [
            functional.pad(part, (0, padded - outputs, 0, -part.shape[1] % multiple))
            for part in weight.split(x.parts, 1)
        ]
        # (strips, taps, inputs / pair, strip, pair): the order in which a register tile reads them
        dtype = torch.float32 if x.buffer == 0 or exact else self.dtype
        pair = 4 // dtype.itemsize
        packed = torch.cat(inputs, 1).unflatten(2, (-1, strip)).unflatten(1, (-1, pair)).permute(3, 0, 1, 4, 2)
        bias = weight.new_zeros(outputs) if bias is None else bias.detach()
        target = target or self._place(length, outputs)
        self._layers.append(
            Layer(
                transposed=int(transposed),
                taps=taps,
                stride=stride,
                padding=padding,
                source=x.buffer,
                source_channel=x.channel,
                source_stride=x.stride,
                source_length=x.length,
                inputs=pair * packed.shape[2],
                target=target.buffer,
                target_channel=target.channel,
                target_stride=target.stride,
                target_length=length,
                outputs=outputs,
                padded=padded,
                strip=strip,
                unit=unit if padded % unit == 0 and padded == outputs else padded,
                weight=self._keep("weights", packed.to(dtype)),
                bias=self._keep("values", functional.pad(bias, (0, padded - outputs))),
                group=group,
                norm=-1 if norm is None else self._keep("values", norm_values(norm)),
                film=-1 if film is None else film[0],
                film_scale=int(film is not None and film[1]),
                residual=-1 if past is None else past.buffer,
                residual_channel=0 if past is None else past.channel,
                residual_stride=0 if past is None else past.stride,
                exact=1,
                rounded=0,
                precision=int(dtype == torch.bfloat16),
                gelu=int(gelu),
                bias_pitch=padded if bias.ndim == 2 else 0,
            )
        )
        return dataclasses.replace(target, length=length, parts=(outputs,))


def in_large_pages(parts: list[Tensor]) -> Tensor:
    """The parts concatenated in large memory pages, if the system has them: they are read as one stream."""
    joined = torch.cat(parts)
    if not hasattr(mmap, "MADV_HUGEPAGE"):  # not Linux
        return joined
    memory = mmap.mmap(-1, joined.nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without large pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=joined.dtype).copy_(joined)


def mark_forms(layers: list[Layer]) -> list[Layer]:
    """Set which forms (float32, bfloat16) of each target are written: those that a layer or the caller reads."""
    rounded = {layer.source for layer in layers if layer.precision}
    exact = {layer.source for layer in layers if not layer.precision}
    exact |= {layer.residual for layer in layers} | {layers[-1].target}
    return [
        dataclasses.replace(layer, exact=int(layer.target in exact), rounded=int(layer.target in rounded))
        for layer in layers
    ]


def place_buffers(layers: list[Layer], sizes: list[int]) -> tuple[list[Layer], int]:
    """The layers with their buffers placed, and the size of all. Buffers that are not needed together share memory.

    Args:
        layers: with buffers as numbers.
        sizes: of the buffers, by number. The input's, 0, is placed at 0.
    """
    users = {number: [-1] if number == 0 else [] for number in range(len(sizes))}
    for i, layer in enumerate(layers):
        for number in (layer.source, layer.target, layer.residual):
            users.get(number, []).append(i)
    users[layers[-1].target].append(len(layers))
    spans = {number: (min(using), max(using)) for number, using in users.items() if using}
    placed: dict[int, int] = {}
    # The longest-lived first, each in the first gap between buffers that live at the same time.
    for number in sorted(spans, key=lambda number: (number > 0, spans[number][0] - spans[number][1], -sizes[number])):
        begin, end = spans[number]
        others = [other for other in placed if spans[other][0] <= end and begin <= spans[other][1]]
        at = 0
        for other in sorted(others, key=lambda other: placed[other]):
            if at + sizes[number] > placed[other]:
                at = max(at, placed[other] + filled(sizes[other], ALIGNMENT))
            else:
                break
        placed[number] = at
    memory = max(at + filled(sizes[number], ALIGNMENT) for number, at in placed.items())
    found = [
        dataclasses.replace(
            layer,
            source=placed[layer.source],
            target=placed[layer.target],
            residual=placed.get(layer.residual, -1),
        )
        for layer in layers
    ]
    return found, memory


def filled(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


def norm_values(norm: nn.GroupNorm | nn.LayerNorm) -> Tensor:
    return torch.cat((norm.weight, norm.bias, norm.weight.new_tensor([norm.eps])))
