"""The distance of a sampler's distribution from the policy's own, which reward alone does not show."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from scipy.spatial.distance import cdist, pdist

from parapolicy.noise import mix_seeds
from parapolicy.policy import Policy


def energy_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Energy distance (Székely and Rizzo, 2013) of two samples (n, D) and (m, D).

    It is the unbiased estimate of 2 E|X - Y| - E|X - X'| - E|Y - Y'|: near 0 for equal distributions, and possibly
    slightly negative.
    """
    return float(2 * cdist(a, b).mean() - pdist(a).mean() - pdist(b).mean())


def paired_energy_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Energy distance of two samples (n, D) of which row i of both was drawn with the same noise.

    It is the unbiased estimate over pairs i != j only. What the two sets have in common cancels, which leaves far less
    noise than :func:`energy_distance` of two independent sets has.
    """
    n = len(a)
    between = cdist(a, b)
    across = (between.sum() - np.trace(between)) / (n * (n - 1))
    return float(2 * across - pdist(a).mean() - pdist(b).mean())


def draw_chunks(
    policy: Policy, observation: Mapping[str, np.ndarray], draws: int, seed: int | Sequence[int]
) -> np.ndarray:
    """Chunks at one observation {key: (To, …)}, normalised and flat, (draws, H Da); ``seed`` is that of ``predict``."""
    batch = {key: np.repeat(value[None], draws, axis=0) for key, value in observation.items()}
    trajectory = torch.from_numpy(policy.predict(batch, seed=seed).trajectory).to(policy.device)
    return policy.normalizer.normalize("action", trajectory).cpu().numpy().reshape(draws, -1)


def measure_fidelity(
    policies: Mapping[str, Policy],
    reference: Policy,
    observations: Sequence[Mapping[str, np.ndarray]],
    draws: int = 150,
    progress: Callable[[int], Any] = lambda sets: None,
) -> dict[str, list[float]]:
    """Energy distance of each policy's chunks from the reference's, one number per observation.

    Args:
        policies: label -> policy, with the reference's weights.
        reference: defines the distribution: the trained schedule with the sequential sampler.
        observations: {key: (To, ...)} each, unbatched.
        draws: chunks per set. Each set has its own noise: equal noise would give close chunks, not show equal
            distributions.
        progress: called with 1 after each set.

    Returns:
        label -> distances. ``"resampling"`` is the distance between two independent sets of the reference's chunks, as
        an exact sampler would have it.
    """
    sets = {"resampling": reference, **policies}
    distances: dict[str, list[float]] = {label: [] for label in sets}
    for i, observation in enumerate(observations):
        target = draw_chunks(reference, observation, draws, mix_seeds(i, 0))
        progress(1)
        for which, (label, policy) in enumerate(sets.items(), start=1):
            distances[label].append(
                energy_distance(draw_chunks(policy, observation, draws, mix_seeds(i, which)), target)
            )
            progress(1)
    return distances
