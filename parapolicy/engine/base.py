"""The interface of engines, and the eager engine."""

import contextlib
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from parapolicy.denoiser import Denoiser, Evaluate
from parapolicy.networks import Embedding, Network
from parapolicy.samplers import Rounds, Sample, Sampler


@dataclass(frozen=True)
class Deadline:
    """A stop function: True from a time of ``time.monotonic()`` on. An engine may watch the time without calling it."""

    time: float

    def __call__(self) -> bool:
        return time.monotonic() >= self.time


class Engine(ABC):
    """How a network is computed and a sampler's rounds are run.

    Attributes:
        name: identifier, used in cache keys.
    """

    name: str

    def exclusive(self) -> contextlib.AbstractContextManager[Any]:
        """A context held from :meth:`bind` to a chunk's last round. Engines whose chunks share memory return a lock."""
        return contextlib.nullcontext()

    @abstractmethod
    def bind(self, network: Network, timesteps: Tensor, observation: Mapping[str, Tensor]) -> Evaluate:
        """The network at a schedule's timesteps (T,) and a batch's observations {key: (B, To, …)}, normalised.

        Called once per chunk.
        """

    def rounds(self, sampler: Sampler, denoiser: Denoiser, noise: Tensor) -> Rounds:
        """The sampler's rounds for noise (T + 1, B, S), in the form that this engine runs."""
        return sampler.rounds(denoiser.schedule, noise)

    def run(
        self,
        sampler: Sampler,
        denoiser: Denoiser,
        noise: Tensor,
        stop: Callable[[], bool] | None = None,
        guess: Tensor | None = None,
    ) -> Sample:
        """Draw a batch of samples: the one loop over rounds.

        Args:
            sampler: whose rounds are run.
            denoiser: on the result of :meth:`bind`.
            noise: (T + 1, B, S): [0] is the first state, [j + 1] the noise of step j.
            stop: called after every round. If it returns True, sampling ends with the best estimate so far. At least
                one round is always run. None: never stop.
            guess: (B, T, S) expected values of the estimates u_j, from the previous chunk; None: a cold start. It
                changes the cost of sampling, not the distribution of the result.
        """
        rounds = self.rounds(sampler, denoiser, noise)
        rounds.begin(noise, guess)
        while True:
            rounds.advance(denoiser)
            if (stop is not None and stop()) or bool(rounds.done):
                return rounds.result()


@dataclass(frozen=True)
class Bound:
    """A network at one schedule and batch of observations.

    Attributes:
        forward: as :meth:`parapolicy.networks.Network.forward`.
        steps, condition: the embeddings of the schedule's steps and of the batch.
    """

    forward: Callable[[Tensor, Embedding, Embedding, Tensor, Tensor], Tensor]
    steps: Embedding
    condition: Embedding

    def __call__(self, x: Tensor, step: Tensor, element: Tensor) -> Tensor:
        return self.forward(x, self.steps, self.condition, step, element)


class Eager(Engine):
    """Runs the network as it was trained; the reference for other engines."""

    name = "eager"

    def bind(self, network: Network, timesteps: Tensor, observation: Mapping[str, Tensor]) -> Evaluate:
        return Bound(network, network.embed_steps(timesteps), network.embed_condition(observation))
