"""The network rewritten and compiled: fewer and larger pieces of work."""

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from parapolicy.engine.base import Evaluate
from parapolicy.engine.unet_gemm import GemmUnet1D
from parapolicy.networks import ConditionalUnet1D

ROWS = 4  # numbers of rows from here on are rounded up to its multiples


class Compiled:
    """The network as matrix products, compiled by torch for any number of rows; see :class:`GemmUnet1D`.

    The first call compiles, or finds the result in torch's own cache on disk. Where that fails, for want of a C++
    compiler, it warns once and goes on uncompiled.

    Args:
        network: whose function this is.
        products: ``torch.bfloat16`` multiplies faster where the device has instructions for it, and rounds more.
    """

    def __init__(self, network: ConditionalUnet1D, products: torch.dtype = torch.float32) -> None:
        self.name = "compiled_bfloat16" if products == torch.bfloat16 else "compiled"
        self.network = GemmUnet1D(network, products).requires_grad_(False)
        self._forward: Callable[[Tensor, Tensor], Tensor] = torch.compile(self.network)
        self._called = False
        self._timesteps: Tensor | None = None
        self._table: Tensor

    def bind(self, timesteps: Tensor, condition: Tensor) -> Evaluate:
        if timesteps is not self._timesteps:
            self._timesteps, self._table = timesteps, self.network.step_film(timesteps)  # (T, F)
        film = self.network.condition_film(condition)  # (B, F)
        return lambda x, step, element: self.run(x, self._table[step] + film[element])

    def run(self, x: Tensor, film: Tensor) -> Tensor:
        """The network's output at x (N, H, D) with FiLM values (N, F)."""
        # Filled up with copies: torch compiles anew for a single row, and oneDNN prepares for every number of them.
        fill = 1 if len(x) == 1 else -len(x) % ROWS if len(x) > 2 else 0
        if fill:
            filled = (torch.cat((value, value[:1].expand(fill, *value.shape[1:]))) for value in (x, film))
            return self.run(*filled)[:-fill]
        if not self._called:  # one graph for every number of rows, and only that varies
            self._called = True
            torch._dynamo.mark_dynamic(x, 0)
            torch._dynamo.mark_dynamic(film, 0)
        try:
            return self._forward(x, film)
        except torch._dynamo.exc.TorchDynamoException as error:
            warnings.warn(f"torch.compile does not work here, so the engine runs uncompiled: {error}", stacklevel=2)
            self._forward = self.network
            return self.network(x, film)
