"""How long a chunk takes at batch 1, and how far it is from the sequential chunk with the same noise."""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from parapolicy.engine import Eager, Engine, Evaluate
from parapolicy.evaluate.upstream import upstream_chunk
from parapolicy.noise import mix_seeds
from parapolicy.policy import Policy
from parapolicy.samplers import Sequential


@dataclass
class ChunkMeasurements:
    """One entry per measured chunk.

    Attributes:
        seconds: wall time of ``predict``, noise drawing included.
        errors: largest absolute difference of the normalised chunk from the sequential one of the same schedule; empty
            for upstream's way, which draws other noise.
    """

    seconds: list[float] = field(default_factory=list)
    errors: list[float] = field(default_factory=list)


def measure_chunks(
    policies: Mapping[str, Policy],
    observations: Sequence[Mapping[str, np.ndarray]],
    noise_seed: int = 0,
    previous: Sequence[Mapping[str, np.ndarray]] | None = None,
    progress: Callable[[int], Any] = lambda chunks: None,
    upstream: Mapping[str, Policy] | None = None,
) -> dict[str, ChunkMeasurements]:
    """Time every policy on every observation, one chunk at a time, in an order that rotates from one to the next.

    Args:
        policies: label -> policy, all of the same weights.
        observations: {key: (To, ...)} each, unbatched.
        noise_seed: observation i is sampled with the noise of seed ``noise_seed + i`` by every policy.
        previous: the observation one chunk before each, from which policies with ``warm_start`` start (untimed).
        progress: called with 1 after each timed chunk.
        upstream: label -> policy whose schedule is also run by :func:`parapolicy.evaluate.upstream.upstream_chunk`.
    """
    upstream = upstream or {}
    labels = [*policies, *upstream]
    results = {label: ChunkMeasurements() for label in labels}
    for label in labels:  # warm-up: first calls allocate and choose kernels
        if label in upstream:
            upstream_chunk(upstream[label], observations[0], noise_seed)
        else:
            policies[label].predict(observations[0], seed=noise_seed)
    for i, observation in enumerate(observations):
        chunks = {}
        turn = i % len(labels)
        for label in labels[turn:] + labels[:turn]:
            if label in upstream:
                begin = time.perf_counter()
                upstream_chunk(upstream[label], observation, noise_seed + i)
                results[label].seconds.append(time.perf_counter() - begin)
                progress(1)
                continue
            warm = None
            if previous is not None and policies[label].warm_start:
                warm = policies[label].predict(previous[i], seed=mix_seeds(noise_seed, i)).warm_state
            chunks[label] = policies[label].predict(observation, seed=noise_seed + i, warm=warm)
            results[label].seconds.append(chunks[label].stats.seconds)
            progress(1)
        # By schedule and kind of noise: a warm start shifts the noise of the chunk before.
        references: dict[tuple[int, bool], np.ndarray] = {
            (id(policy.schedule), policy.warm_start): chunks[label].trajectory
            for label, policy in policies.items()
            if isinstance(policy.sampler, Sequential)
        }
        for label, policy in policies.items():
            key = (id(policy.schedule), policy.warm_start)
            if key not in references:
                noise = chunks[label].warm_state.noise
                references[key] = policy.with_sampler("sequential").predict(observation, noise=noise).trajectory
            scale = policy.normalizer.maps["action"].scale.cpu().numpy()
            results[label].errors.append(float(np.abs((chunks[label].trajectory - references[key]) * scale).max()))
    return results


class CountingEngine:
    """Counts how often each step of the schedule is evaluated.

    Args:
        engine: that computes.
        steps: of the schedule.
    """

    def __init__(self, engine: Engine, steps: int) -> None:
        self.engine, self.name, self.counts = engine, engine.name, np.zeros(steps, dtype=np.int64)

    def bind(self, timesteps: Tensor, condition: Tensor) -> Evaluate:
        """As :meth:`parapolicy.engine.Engine.bind`."""
        evaluate = self.engine.bind(timesteps, condition)

        def counted(x: Tensor, step: Tensor, element: Tensor) -> Tensor:
            self.counts += np.bincount(step.cpu().numpy(), minlength=len(self.counts))
            return evaluate(x, step, element)

        return counted


def count_evaluations(
    policy: Policy, observations: Sequence[Mapping[str, np.ndarray]], noise_seed: int = 0
) -> tuple[list[int], list[float]]:
    """Timesteps of the policy's schedule, and how often a chunk evaluates each on average, started cold."""
    counting = CountingEngine(policy.engine or Eager(policy.network), len(policy.schedule))
    counted = dataclasses.replace(policy, engine=counting)
    for i, observation in enumerate(observations):
        counted.predict(observation, seed=noise_seed + i)
    return policy.schedule.timesteps.tolist(), (counting.counts / len(observations)).tolist()
