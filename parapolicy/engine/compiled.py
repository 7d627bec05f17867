"""The network rewritten and compiled: fewer and larger pieces of work."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from parapolicy.compiling import Compiling
from parapolicy.engine.unet_gemm import GemmUnet1D
from parapolicy.networks import ConditionalUnet1D

ROWS = 4  # numbers of rows from here on are rounded up to its multiples


class Compiled:
    """The network as matrix products, compiled by torch for any number of rows; see :class:`GemmUnet1D`.

    The first call compiles; see :class:`parapolicy.compiling.Compiling`.

    Args:
        network: whose function this is.
        products: ``torch.bfloat16`` multiplies faster where the device has instructions for it, and rounds more.
    """

    def __init__(self, network: ConditionalUnet1D, products: torch.dtype = torch.float32) -> None:
        self.name = "compiled_bfloat16" if products == torch.bfloat16 else "compiled"
        self.network = GemmUnet1D(network, products).requires_grad_(False)
        self._forward = Compiling(self.network)
        self._called = False
        self._timesteps: Tensor | None = None
        self._table: Tensor

    def bind(self, timesteps: Tensor, condition: Tensor) -> "Bound":
        """As :meth:`parapolicy.engine.Engine.bind`."""
        if timesteps is not self._timesteps:
            self._timesteps, self._table = timesteps, self.table(timesteps)
        return Bound(self, self._table, self.film(condition))

    def table(self, timesteps: Tensor) -> Tensor:
        """FiLM values by step, (T, F); see :meth:`run`."""
        return _twice(self.network.step_film(timesteps))

    def film(self, condition: Tensor) -> Tensor:
        """FiLM values by batch element, (B, F); see :meth:`run`."""
        return _twice(self.network.condition_film(condition))

    def run(self, x: Tensor, table: Tensor, step: Tensor, film: Tensor, element: Tensor) -> Tensor:
        """The network's output at x (N, H, D), with rows ``step`` of ``table`` and ``element`` of ``film``, (N,)."""
        # Filled up, because torch compiles anew for a single row, and oneDNN prepares for every number of them.
        fill = 1 if len(x) == 1 else -len(x) % ROWS if len(x) > 2 else 0
        if fill:
            x = functional.pad(x, (0, 0, 0, 0, 0, fill))
            step, element = functional.pad(step, (0, fill)), functional.pad(element, (0, fill))
            return self.run(x, table, step, film, element)[:-fill]
        inputs = (x, table, step, film, element)
        if not self._called:  # one graph for every number of rows, steps and elements, and only those vary
            self._called = True
            for value in inputs:
                torch._dynamo.mark_dynamic(value, 0)
        output: Tensor = self._forward(*inputs)
        return output


@dataclass(frozen=True)
class Bound:
    """The network at one schedule and batch of conditions.

    Attributes:
        compiles: samplers should compile their own part of a round, too; see :class:`parapolicy.denoiser.Denoiser`.
    """

    compiles: ClassVar[bool] = True
    engine: Compiled
    table: Tensor
    film: Tensor

    def __call__(self, x: Tensor, step: Tensor, element: Tensor) -> Tensor:
        return self.engine.run(x, self.table, step, self.film, element)


def _twice(values: Tensor) -> Tensor:
    """A single row two times over: torch compiles anew for it."""
    return values.expand(2, -1).contiguous() if len(values) == 1 else values
