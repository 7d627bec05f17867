"""The distance of a sampler's distribution from the policy's own, which reward alone does not show."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.spatial.distance import cdist, pdist

from parapolicy.noise import mix_seeds
from parapolicy.policy import Policy

PREVIOUS = 1 << 40  # in the seeds of chunks that warm starts begin from


def energy_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Energy distance (Székely and Rizzo, 2013) of two samples (n, D) and (m, D).

    It is the unbiased estimate of 2 E|X - Y| - E|X - X'| - E|Y - Y'|: near 0 for equal distributions, and possibly
    slightly negative.
    """
    return float(2 * cdist(a, b).mean() - pdist(a).mean() - pdist(b).mean())


def paired_energy_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Energy distance of two samples (n, D), where row i of both was drawn with the same noise.

    It is the estimate over pairs i != j only. These are independent for every relation between row i of one set and
    row i of the other, so the estimate is unbiased for every pair of sets. The randomness that the sets share cancels:
    chunks with the same noise give far less variance than the independent sets of :func:`energy_distance`.
    """
    n = len(a)
    between = cdist(a, b)
    across = (between.sum() - np.trace(between)) / (n * (n - 1))
    return float(2 * across - pdist(a).mean() - pdist(b).mean())


def draw_chunks(
    policy: Policy,
    observation: Mapping[str, np.ndarray],
    draws: int,
    seed: int | Sequence[int],
    previous: Mapping[str, np.ndarray] | None = None,
) -> np.ndarray:
    """Chunks at one observation {key: (To, …)}, normalised and flat, (draws, H Da); ``seed`` as in ``predict``.

    If the observation one chunk earlier is given, each chunk starts from a cold chunk of the same policy at it.
    """
    batch = {key: np.repeat(value[None], draws, axis=0) for key, value in observation.items()}
    warm = None
    if previous is not None:
        before = {key: np.repeat(value[None], draws, axis=0) for key, value in previous.items()}
        seeds = [seed] if isinstance(seed, int) else seed
        warm = policy.predict(before, seed=[mix_seeds(*seeds, PREVIOUS, b) for b in range(draws)]).warm_state
    trajectory = torch.from_numpy(policy.predict(batch, seed=seed, warm=warm).trajectory).to(policy.device)
    return policy.normalizer.normalize("action", trajectory).cpu().numpy().reshape(draws, -1)


@dataclass(frozen=True)
class ReferenceChunks:
    """Two independent sets of the reference's chunks at each observation, (draws, H Da) each.

    Attributes:
        other: with noise that no other sampler gets.
        same: with the seeds that the measured samplers also get.
    """

    other: list[np.ndarray]
    same: list[np.ndarray]

    @property
    def resampling(self) -> list[float]:
        """Energy distance between the two sets at each observation: that of an exact sampler."""
        return [energy_distance(*sets) for sets in zip(self.same, self.other, strict=True)]

    @property
    def spread(self) -> float:
        """Mean distance between two chunks of one observation: the scale of energy distances."""
        return float(np.mean([pdist(chunks).mean() for chunks in (*self.other, *self.same)]))


def draw_reference(
    reference: Policy,
    observations: Sequence[Mapping[str, np.ndarray]],
    draws: int,
    progress: Callable[[int], Any] = lambda sets: None,
) -> ReferenceChunks:
    """The reference's chunks at observations {key: (To, …)}; ``progress`` is called with 1 after each set."""
    sets = ReferenceChunks([], [])
    for i, observation in enumerate(observations):
        for which, chunks in enumerate((sets.other, sets.same)):
            chunks.append(draw_chunks(reference, observation, draws, mix_seeds(i, which)))
            progress(1)
    return sets


def measure_fidelity(
    policy: Policy,
    reference: ReferenceChunks,
    observations: Sequence[Mapping[str, np.ndarray]],
    previous: Sequence[Mapping[str, np.ndarray]] | None = None,
    progress: Callable[[int], Any] = lambda sets: None,
) -> tuple[list[float], list[float]]:
    """The distance in distribution of a policy's chunks from the reference's, at each observation.

    Args:
        policy: with the reference's weights.
        reference: its chunks at these observations: the trained schedule with the sequential sampler.
        observations: {key: (To, ...)} each, unbatched.
        previous: for policies with ``warm_start``, the observation one chunk before each, where the chunk is drawn that
            they start from.
        progress: called with 1 after each set.

    Returns:
        :func:`energy_distance` to chunks of other noise, and :func:`paired_energy_distance` to chunks of the same
        seeds. With the same seeds, a schedule with the same number of steps has the same noise, one with another number
        has the same first state, and a warm start has the same noise where its chunk does not overlap the previous one.
        The less two samplers share, the larger is the variance of the second number.
    """
    independent, paired = [], []
    for i, (observation, other, same) in enumerate(zip(observations, reference.other, reference.same, strict=True)):
        before = previous[i] if policy.warm_start and previous is not None else None
        chunks = draw_chunks(policy, observation, len(same), mix_seeds(i, 1), before)
        independent.append(energy_distance(chunks, other))
        paired.append(paired_energy_distance(chunks, same))
        progress(1)
    return independent, paired
