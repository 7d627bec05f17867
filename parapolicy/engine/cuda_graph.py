"""Whole sampling rounds as one CUDA graph: a round of small kernels costs one launch instead of a few hundred."""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, Protocol

import torch
from torch import Tensor

from parapolicy.engine.compiled import Compiled
from parapolicy.networks import ConditionalUnet1D

KEPT = 8  # schedules and batch sizes whose graphs are kept at a time


class Rounds(Protocol):
    """What can be captured: rounds on memory that stays where it is, such as a sampler's ``SecantRounds``."""

    done: Tensor

    def begin(self, noise: Tensor, guess: Tensor | None) -> None: ...

    def advance(self, denoiser: Any) -> None: ...

    def result(self) -> Any: ...


class CudaGraph:
    """The compiled network; samplers that work on fixed memory have their rounds captured and replayed.

    The first chunk of a batch size runs as it is, which also warms up what a capture must not do; the second one
    captures. Between rounds the host reads one flag. Graphs work on memory of their own: one chunk at a time, so that a
    policy with this engine belongs to one thread.

    Raises:
        ValueError: the network is not on a CUDA device.
    """

    name = "cuda_graph"

    def __init__(self, network: ConditionalUnet1D) -> None:
        device = next(network.parameters()).device
        if device.type != "cuda":
            raise ValueError(f"engine 'cuda_graph' needs a CUDA device, and the policy is on {device}; take 'compiled'")
        self.compiled = Compiled(network)
        self._bound: OrderedDict[tuple[int, int], Bound] = OrderedDict()

    def bind(self, timesteps: Tensor, condition: Tensor) -> "Bound":
        """As :meth:`parapolicy.engine.Engine.bind`; the same memory for every chunk of a schedule and batch size."""
        key = id(timesteps), len(condition)
        if key not in self._bound:
            self._bound[key] = Bound(self.compiled, timesteps, condition)
            if len(self._bound) > KEPT:
                self._bound.popitem(last=False)
        self._bound.move_to_end(key)
        self._bound[key].film.copy_(self.compiled.film(condition))
        return self._bound[key]


class Bound:
    """The network at one schedule and batch size, with the rounds captured on it."""

    def __init__(self, compiled: Compiled, timesteps: Tensor, condition: Tensor) -> None:
        self.compiled, self.timesteps = compiled, timesteps  # held, so that its id is not another's
        self.table, self.film = compiled.table(timesteps), compiled.film(condition).clone()
        self.kept: dict[Hashable, Captured] = {}

    def __call__(self, x: Tensor, step: Tensor, element: Tensor) -> Tensor:
        return self.compiled.run(x, self.table, step, self.film, element)

    def keep(self, key: Hashable, make: Callable[..., Rounds], *arguments: Any) -> "Captured":
        """The rounds that ``make`` makes, once for every key."""
        if key not in self.kept:
            self.kept[key] = Captured(make(*arguments))
        return self.kept[key]


class Captured:
    """Rounds, the second chunk's and later ones replayed from a graph."""

    def __init__(self, rounds: Rounds) -> None:
        self.rounds, self.done, self.result = rounds, rounds.done, rounds.result
        self.chunks = 0
        self.graph: torch.cuda.CUDAGraph | None = None

    def begin(self, noise: Tensor, guess: Tensor | None) -> None:
        self.chunks += 1
        self.rounds.begin(noise, guess)

    def advance(self, denoiser: Any) -> None:
        if self.chunks == 1:
            self.rounds.advance(denoiser)
            return
        if self.graph is None:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):  # records, and changes nothing
                self.rounds.advance(denoiser)
            self.graph = graph
        self.graph.replay()
