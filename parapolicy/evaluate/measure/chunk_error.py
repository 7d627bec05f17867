"""The error of a chunk: its distance from the sequential chunk of the same observation, schedule and noise."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from parapolicy.noise import mix_seeds
from parapolicy.observation import stack_observations
from parapolicy.policy import Chunk, Policy
from parapolicy.warm import WarmState


def normalized_error(policy: Policy, trajectory: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Largest absolute difference of two trajectories (…, H, Da) in normalised units, (…)."""
    scale = policy.normalizer.maps["action"].scale.cpu().numpy()
    largest: np.ndarray = np.abs((trajectory - reference) * scale).max((-2, -1))
    return largest


class SequentialChunks:
    """Sequential trajectories for the chunks of one observation {key: ([B,] To, …)}, each sampled once."""

    def __init__(self, observation: Mapping[str, np.ndarray]) -> None:
        self.observation = observation
        # Warm starts shift the previous chunk's noise, so they need their own reference.
        self._trajectories: dict[tuple[int, bool], np.ndarray] = {}

    def find(self, policy: Policy, chunk: Chunk) -> np.ndarray:
        """The sequential trajectory for the schedule and noise of ``chunk``, which ``policy`` computed."""
        key = (id(policy.schedule), policy.warm_start)
        if key not in self._trajectories:
            if not policy.sampler.is_reference:
                chunk = policy.with_sampler("sequential").predict(self.observation, noise=chunk.warm_state.noise)
            self._trajectories[key] = chunk.trajectory
        return self._trajectories[key]


@dataclass
class ChunkErrors:
    """One entry per chunk.

    Attributes:
        errors: :func:`normalized_error` to the sequential chunk.
        action_errors: the same in the environment's units.
        rounds, evaluations: of the chunk.
    """

    errors: list[float] = field(default_factory=list)
    action_errors: list[float] = field(default_factory=list)
    rounds: list[int] = field(default_factory=list)
    evaluations: list[int] = field(default_factory=list)


def measure_errors(
    policies: Mapping[str, Policy],
    episodes: Sequence[Sequence[Mapping[str, np.ndarray]]],
    chunks: int,
    noise_seed: int = 0,
    progress: Callable[[int], Any] = lambda chunks: None,
) -> dict[str, ChunkErrors]:
    """Measure chunk errors along recorded episodes, all episodes in one batch.

    A policy with ``warm_start`` starts each chunk from its own previous chunk, with shifted noise; an episode's first
    chunk is not measured. Other chunks were executed in the recording, so a warm start may belong to another mode than
    the observation: this is harder than closed loop.

    Args:
        policies: label -> policy, all of the same weights.
        episodes: the observations {key: (To, ...)} of each, one per chunk.
        chunks: least number of chunks per policy; episodes are repeated with other noise to reach it.
        noise_seed: of the noise, the same for every policy.
        progress: called with the number of chunks measured since the last call.

    Raises:
        ValueError: no episode has two chunks.
    """
    results = {label: ChunkErrors() for label in policies}
    per_repeat = sum(len(episode) - 1 for episode in episodes)
    if per_repeat < 1:
        raise ValueError("no episode has two chunks, expected longer episodes")
    for repeat in range(-(-chunks // per_repeat)):
        states: dict[str, list[WarmState | None]] = {label: [None] * len(episodes) for label in policies}
        for j in range(max(len(episode) for episode in episodes)):
            active = [i for i, episode in enumerate(episodes) if len(episode) > j]
            batch = stack_observations([episodes[i][j] for i in active])
            seeds = [mix_seeds(noise_seed, repeat, i, j) for i in active]
            references = SequentialChunks(batch)
            for label, policy in policies.items():
                kept = [state for i in active if (state := states[label][i]) is not None]
                chunk = policy.predict(batch, seed=seeds, warm=WarmState.stack(kept) if kept else None)
                if policy.warm_start:
                    for k, i in enumerate(active):
                        states[label][i] = chunk.warm_state[k]
                if j == 0:
                    continue
                reference, measured = references.find(policy, chunk), results[label]
                measured.errors += normalized_error(policy, chunk.trajectory, reference).tolist()
                measured.action_errors += np.abs(chunk.trajectory - reference).max((1, 2)).tolist()
                measured.rounds += chunk.stats.rounds.tolist()
                measured.evaluations += chunk.stats.evaluations.tolist()
                progress(len(active))
    return results
