"""How long a chunk takes at batch 1, and how far it is from the sequential chunk with the same noise."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from parapolicy.policy import Policy
from parapolicy.samplers import Sequential


@dataclass
class ChunkMeasurements:
    """One entry per measured chunk.

    Attributes:
        seconds: wall time of ``predict``, noise drawing included.
        errors: largest absolute difference of the normalised chunk from the sequential one of the same schedule.
    """

    seconds: list[float] = field(default_factory=list)
    errors: list[float] = field(default_factory=list)


def measure_chunks(
    policies: Mapping[str, Policy],
    observations: Sequence[Mapping[str, np.ndarray]],
    noise_seed: int = 0,
    progress: Callable[[int], Any] = lambda chunks: None,
) -> dict[str, ChunkMeasurements]:
    """Time every policy on every observation, one chunk at a time, in an order that rotates from one to the next.

    Args:
        policies: label -> policy, all of the same weights.
        observations: {key: (To, ...)} each, unbatched.
        noise_seed: observation i is sampled with the noise of seed ``noise_seed + i`` by every policy.
        progress: called with 1 after each timed chunk.
    """
    labels = list(policies)
    results = {label: ChunkMeasurements() for label in labels}
    for label in labels:  # warm-up: first calls allocate and choose kernels
        policies[label].predict(observations[0], seed=noise_seed)
    for i, observation in enumerate(observations):
        trajectories = {}
        turn = i % len(labels)
        for label in labels[turn:] + labels[:turn]:
            chunk = policies[label].predict(observation, seed=noise_seed + i)
            results[label].seconds.append(chunk.stats.seconds)
            trajectories[label] = chunk.trajectory
            progress(1)
        references: dict[int, np.ndarray] = {
            id(policy.schedule): trajectories[label]
            for label, policy in policies.items()
            if isinstance(policy.sampler, Sequential)
        }
        for label, policy in policies.items():
            key = id(policy.schedule)
            if key not in references:
                sequential = policy.with_sampler("sequential")
                references[key] = sequential.predict(observation, seed=noise_seed + i).trajectory
            scale = policy.normalizer.maps["action"].scale.cpu().numpy()
            results[label].errors.append(float(np.abs((trajectories[label] - references[key]) * scale).max()))
    return results
