"""How a network call is computed: engines by name."""

import os
import warnings
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from parapolicy.engine.unet_gemm import GemmUnet1D
from parapolicy.networks import ConditionalUnet1D

ENGINES = ("auto", "eager", "compiled", "compiled_bfloat16", "sharded")

# (x (N, H, D), step (N,), element (N,)) -> network output (N, H, D)
Evaluate = Callable[[Tensor, Tensor, Tensor], Tensor]


class Engine(Protocol):
    """A network made ready for a device."""

    def bind(self, timesteps: Tensor, condition: Tensor) -> Evaluate:
        """The network at a schedule's timesteps (T,) and a batch's conditions (B, C); called once per chunk."""
        ...


class Eager:
    """The network as it was trained: the reference."""

    def __init__(self, network: ConditionalUnet1D) -> None:
        self.network = network

    def bind(self, timesteps: Tensor, condition: Tensor) -> Evaluate:
        return lambda x, step, element: self.network(x, timesteps[step], condition[element])


class Compiled:
    """The network as matrix products, compiled by torch for any number of rows; see :class:`GemmUnet1D`.

    The first call compiles, or finds the result in torch's own cache on disk. Where that fails, for want of a C++
    compiler, it warns once and goes on uncompiled.

    Args:
        network: whose function this is.
        products: ``torch.bfloat16`` multiplies faster where the device has instructions for it, and rounds more.
    """

    def __init__(self, network: ConditionalUnet1D, products: torch.dtype = torch.float32) -> None:
        self.network = GemmUnet1D(network, products).requires_grad_(False)
        self._forward: Callable[[Tensor, Tensor], Tensor] = torch.compile(self.network, dynamic=True)
        self._timesteps: Tensor | None = None
        self._table: Tensor

    def bind(self, timesteps: Tensor, condition: Tensor) -> Evaluate:
        if timesteps is not self._timesteps:
            self._timesteps, self._table = timesteps, self.network.step_film(timesteps)  # (T, F)
        film = self.network.condition_film(condition)  # (B, F)
        return lambda x, step, element: self._run(x, self._table[step] + film[element])

    def _run(self, x: Tensor, film: Tensor) -> Tensor:
        if len(x) == 1:  # torch would compile anew for a single row
            return self._run(x.expand(2, -1, -1), film.expand(2, -1))[:1]
        try:
            return self._forward(x, film)
        except torch._dynamo.exc.TorchDynamoException as error:
            warnings.warn(f"torch.compile does not work here, so the engine runs uncompiled: {error}", stacklevel=2)
            self._forward = self.network
            return self.network(x, film)


def make_engine(name: str, network: ConditionalUnet1D) -> Engine:
    """An engine by name; ``auto``: sharded under ``torchrun`` with several processes, else compiled.

    Raises:
        ValueError: an unknown name, or ``sharded`` outside of ``torchrun``.
    """
    if name not in ENGINES:
        raise ValueError(f"engine is {name!r}, expected one of {list(ENGINES)}")
    if name == "auto":
        name = "sharded" if int(os.environ.get("WORLD_SIZE", 1)) > 1 else "compiled"
    if name == "sharded":
        from parapolicy.engine.sharded import join

        return join(Eager(network), next(network.parameters()).device)
    if name == "eager":
        return Eager(network)
    return Compiled(network, torch.bfloat16 if name == "compiled_bfloat16" else torch.float32)
