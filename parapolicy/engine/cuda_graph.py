"""Whole sampling rounds as one CUDA graph: one launch per round instead of a few hundred small kernels."""

import dataclasses
import threading
from collections import OrderedDict
from collections.abc import Hashable, Mapping
from typing import Any

import torch
from torch import Tensor

from parapolicy.denoiser import Denoiser
from parapolicy.engine import base
from parapolicy.engine.base import Engine
from parapolicy.engine.compiled import Compiled
from parapolicy.networks import Embedding, Network, embedding_tensors, map_embedding
from parapolicy.samplers import DenoiserLike, Rounds, Sample, Sampler

CACHED = 8  # schedules and batch sizes whose graphs are cached at a time


class CudaGraph(Engine):
    """The compiled network; rounds of samplers that work on fixed memory are captured and replayed.

    The first chunk of a batch size runs eagerly: warm-up must not be captured. The second one is captured. Between
    rounds the host reads one flag. A graph has its own memory, so one chunk is sampled at a time and other threads
    wait.
    """

    name = "cuda_graph"

    def __init__(self) -> None:
        self.compiled = Compiled()
        self._bound: OrderedDict[Hashable, Bound] = OrderedDict()
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        return CudaGraph, ()  # a copy, or another process, captures anew

    def exclusive(self) -> threading.Lock:
        return self._lock

    def bind(self, network: Network, timesteps: Tensor, observation: Mapping[str, Tensor]) -> "Bound":
        """As :meth:`parapolicy.engine.Engine.bind`; chunks of the same schedule and batch size share memory.

        Raises:
            ValueError: the network is not on a CUDA device.
        """
        if timesteps.device.type != "cuda":
            raise ValueError(
                f"engine 'cuda_graph' needs a CUDA device, but the policy is on {timesteps.device}; take 'compiled'"
            )
        bound = self.compiled.bind(network, timesteps, observation)
        key = id(network), id(timesteps), tuple(len(value) for value in observation.values())
        if key not in self._bound:
            self._bound[key] = Bound((network, timesteps), bound)
            if len(self._bound) > CACHED:
                self._bound.popitem(last=False)
        self._bound.move_to_end(key)
        self._bound[key].update(bound.condition)
        return self._bound[key]

    def rounds(self, sampler: Sampler, denoiser: Denoiser, noise: Tensor) -> Rounds:
        bound = denoiser.evaluate
        assert isinstance(bound, Bound)
        if denoiser.held is not None:  # a graph would keep reading this chunk's held numbers
            return sampler.rounds(denoiser.schedule, noise)
        key = sampler, denoiser.reproducible, denoiser.max_batch, noise.shape
        if key not in bound.cached:
            rounds = sampler.rounds(denoiser.schedule, noise)
            bound.cached[key] = Captured(rounds) if rounds.fixed_shapes else rounds
        return bound.cached[key]


class Bound:
    """The network at one schedule and batch size, with its captured rounds.

    Args:
        key: kept alive, so that no other object gets its id.
        bound: computes the network; its condition is copied.
    """

    def __init__(self, key: Any, bound: base.Bound) -> None:
        self.key = key
        self.bound = dataclasses.replace(bound, condition=map_embedding(torch.clone, bound.condition))
        self.cached: dict[Hashable, Rounds] = {}

    def update(self, condition: Embedding) -> None:
        """Copy a new chunk's condition into the memory that graphs read."""
        for mine, value in zip(embedding_tensors(self.bound.condition), embedding_tensors(condition), strict=True):
            mine.copy_(value)

    def __call__(self, x: Tensor, step: Tensor, element: Tensor) -> Tensor:
        return self.bound(x, step, element)


class Captured(Rounds):
    """Rounds that are replayed from a graph from the second chunk on."""

    def __init__(self, rounds: Rounds) -> None:
        self.rounds, self.chunks = rounds, 0
        self.graph: torch.cuda.CUDAGraph | None = None

    @property
    def done(self) -> bool | Tensor:
        return self.rounds.done

    def begin(self, noise: Tensor, guess: Tensor | None) -> None:
        self.chunks += 1
        self.rounds.begin(noise, guess)

    def advance(self, denoiser: DenoiserLike) -> None:
        if self.chunks == 1:
            self.rounds.advance(denoiser)
            return
        if self.graph is None:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):  # records only; no value changes
                self.rounds.advance(denoiser)
            self.graph = graph
        self.graph.replay()

    def result(self) -> Sample:
        return self.rounds.result()
