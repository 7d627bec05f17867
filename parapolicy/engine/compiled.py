"""The network rewritten and compiled into fewer and larger kernels."""

import threading
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from parapolicy.compiling import Compiling
from parapolicy.denoiser import Denoiser
from parapolicy.engine.base import Bound, Engine
from parapolicy.engine.lowered import lower
from parapolicy.networks import Embedding, Network, map_embedding
from parapolicy.samplers import Rounds, Sampler

ROWS = 4  # larger batches are padded to a multiple of this many rows


class Compiled(Engine):
    """The network in its lowered form, compiled by torch for any number of rows; see :mod:`parapolicy.engine.lowered`.

    The first call compiles; see :class:`parapolicy.compiling.Compiling`. Threads may share the engine: a bound chunk
    holds all data that it is computed from.

    Args:
        dtype: what the factors of matrix products are rounded to. ``torch.bfloat16`` is faster on devices with
            bfloat16 instructions, and less exact.
    """

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        self.name = "compiled_bfloat16" if dtype == torch.bfloat16 else "compiled"
        self.dtype = dtype
        self._lowered: Lowered | None = None  # of the newest network
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        return Compiled, (self.dtype,)  # a copy, or another process, prepares its network anew

    def bind(self, network: Network, timesteps: Tensor, observation: Mapping[str, Tensor]) -> Bound:
        with self._lock:
            if self._lowered is None or self._lowered.source is not network:
                self._lowered = Lowered(network, self.dtype)
            lowered = self._lowered
            steps = lowered.embed_steps(timesteps)
        return Bound(lowered.forward, steps, map_embedding(_twice, lowered.network.embed_condition(observation)))

    def rounds(self, sampler: Sampler, denoiser: Denoiser, noise: Tensor) -> Rounds:
        # Compiled rounds differ from uncompiled ones, which larger batches use, by rounding errors.
        return sampler.rounds(denoiser.schedule, noise, compiled=not denoiser.reproducible)


class Lowered:
    """A network in its lowered form, with the embedding of the newest schedule.

    Args:
        source: the network as it was trained.
        dtype: see :class:`Compiled`.
    """

    def __init__(self, source: Network, dtype: torch.dtype) -> None:
        self.source = source
        with (
            torch.inference_mode(False),
            torch.no_grad(),
        ):  # weights must outlive the first call's inference mode
            self.network = lower(source, dtype).requires_grad_(False)
        self._forward, self._called = Compiling(self.network), False
        self._timesteps: Tensor | None = None

    def embed_steps(self, timesteps: Tensor) -> Embedding:
        if timesteps is not self._timesteps:
            self._steps = map_embedding(_twice, self.network.embed_steps(timesteps))
            self._timesteps = timesteps
        return self._steps

    def forward(self, x: Tensor, steps: Embedding, condition: Embedding, step: Tensor, element: Tensor) -> Tensor:
        """The network's forward pass; see :meth:`parapolicy.networks.Network.forward`."""
        # Padded: torch would compile again for a single row, and oneDNN prepares for every batch size.
        fill = 1 if len(x) == 1 else -len(x) % ROWS if len(x) > 2 else 0
        if fill:
            x = functional.pad(x, (0, 0) * (x.ndim - 1) + (0, fill))
            step, element = functional.pad(step, (0, fill)), functional.pad(element, (0, fill))
            return self.forward(x, steps, condition, step, element)[:-fill]
        if not self._called:  # one graph for all numbers of rows, steps and elements; other sizes are constant
            self._called = True
            for value in (x, step, element):
                torch._dynamo.mark_dynamic(value, 0)
            for embedding in (steps, condition):
                map_embedding(_mark_dynamic, embedding)
        output: Tensor = self._forward(x, steps, condition, step, element)
        return output


def _mark_dynamic(value: Tensor) -> Tensor:
    torch._dynamo.mark_dynamic(value, 0)
    return value


def _twice(values: Tensor) -> Tensor:
    """Repeat a single entry: torch would compile again for a size of 1."""
    return torch.cat((values, values)) if len(values) == 1 else values
