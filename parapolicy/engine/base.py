"""What an engine is, and the plainest one."""

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from parapolicy.networks import ConditionalUnet1D

# (x (N, H, D), step (N,), element (N,)) -> network output (N, H, D)
Evaluate = Callable[[Tensor, Tensor, Tensor], Tensor]


class Engine(Protocol):
    """A network made ready for a device.

    Attributes:
        name: what it is called, for what is remembered about it.
    """

    name: str

    def bind(self, timesteps: Tensor, condition: Tensor) -> Evaluate:
        """The network at a schedule's timesteps (T,) and a batch's conditions (B, C); called once per chunk."""
        ...


class Eager:
    """The network as it was trained: the reference."""

    name = "eager"

    def __init__(self, network: ConditionalUnet1D) -> None:
        self.network = network

    def bind(self, timesteps: Tensor, condition: Tensor) -> Evaluate:
        return lambda x, step, element: self.network(x, timesteps[step], condition[element])
