"""Latency of a chunk at batch 1, its error, and its number of evaluations of each step of the schedule."""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from parapolicy.denoiser import Denoiser, Evaluate
from parapolicy.engine import Engine
from parapolicy.evaluate.measure.chunk_error import SequentialChunks, normalized_error
from parapolicy.evaluate.measure.upstream import upstream_chunk
from parapolicy.networks import Network
from parapolicy.noise import mix_seeds
from parapolicy.policy import Policy
from parapolicy.samplers import Rounds, Sampler


@dataclass
class ChunkMeasurements:
    """One entry per measured chunk.

    Attributes:
        seconds: wall time of ``predict``, including drawing noise.
        encode: the part of it before sampling, including the cameras' encoders; empty for the published code.
        errors: :func:`normalized_error` to the sequential chunk of the same schedule and noise; empty for the published
            code, which draws other noise.
    """

    seconds: list[float] = field(default_factory=list)
    encode: list[float] = field(default_factory=list)
    errors: list[float] = field(default_factory=list)


def measure_chunks(
    policies: Mapping[str, Policy],
    observations: Sequence[Mapping[str, np.ndarray]],
    noise_seed: int = 0,
    previous: Sequence[Mapping[str, np.ndarray]] | None = None,
    progress: Callable[[int], Any] = lambda chunks: None,
    upstream: Mapping[str, Policy] | None = None,
) -> dict[str, ChunkMeasurements]:
    """Time every policy on every observation, one chunk at a time, in an order that rotates.

    Args:
        policies: label -> policy, all of the same weights.
        observations: {key: (To, ...)} each, unbatched.
        noise_seed: observation i is sampled with the noise of seed ``noise_seed + i`` by every policy.
        previous: the observation one chunk before each, from which policies with ``warm_start`` start (untimed).
        progress: called with 1 after each timed chunk.
        upstream: label -> policy whose schedule :func:`upstream_chunk` also runs.
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
            else:  # one round: as in a control loop, the engine has just used this sampler's schedule
                policies[label].predict(observation, seed=noise_seed + i, deadline=lambda: True)
            chunks[label] = policies[label].predict(observation, seed=noise_seed + i, warm=warm)
            results[label].seconds.append(chunks[label].stats.seconds)
            results[label].encode.append(chunks[label].stats.stages["encode"])
            progress(1)
        references = SequentialChunks(observation)
        for label in sorted(policies, key=lambda label: not policies[label].sampler.is_reference):
            reference = references.find(policies[label], chunks[label])
            results[label].errors.append(float(normalized_error(policies[label], chunks[label].trajectory, reference)))
    return results


def select_observations(
    episodes: Sequence[list[dict[str, np.ndarray]]], count: int
) -> list[tuple[dict[str, np.ndarray], dict[str, np.ndarray]]]:
    """About ``count`` evenly spaced observations of recorded episodes, each as (previous chunk's, its own).

    An episode's first observation is its own predecessor.
    """
    pairs = [pair for steps in episodes for pair in zip(steps[:1] + steps, steps, strict=False)]
    return pairs[:: max(1, len(pairs) // count)][:count]


class CountingEngine(Engine):
    """Counts how often each step of the schedule is evaluated.

    engine: computes the network.
    steps: number of the schedule's steps.
    """

    def __init__(self, engine: Engine, steps: int) -> None:
        self.engine, self.name, self.counts = engine, engine.name, np.zeros(steps, dtype=np.int64)

    def exclusive(self) -> contextlib.AbstractContextManager[Any]:
        return self.engine.exclusive()

    def rounds(self, sampler: Sampler, denoiser: Denoiser, noise: Tensor) -> Rounds:
        return sampler.rounds(denoiser.schedule, noise)  # not captured: a graph would not count

    def bind(self, network: Network, timesteps: Tensor, observation: Mapping[str, Tensor]) -> Evaluate:
        evaluate = self.engine.bind(network, timesteps, observation)

        def counted(x: Tensor, step: Tensor, element: Tensor) -> Tensor:
            self.counts += np.bincount(step.cpu().numpy(), minlength=len(self.counts))
            return evaluate(x, step, element)

        return counted


def count_evaluations(
    policy: Policy, observations: Sequence[Mapping[str, np.ndarray]], noise_seed: int = 0
) -> tuple[list[int], list[float]]:
    """Timesteps of the policy's schedule, and how often a cold chunk evaluates each on average."""
    counting = CountingEngine(policy.engine, len(policy.schedule))
    counted = dataclasses.replace(policy, engine=counting)
    for i, observation in enumerate(observations):
        counted.predict(observation, seed=noise_seed + i)
    return policy.schedule.timesteps.tolist(), (counting.counts / len(observations)).tolist()
