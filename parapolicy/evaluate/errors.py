"""How far chunks are from the sequential ones of the same noise, cold and along whole episodes of warm starts."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from parapolicy.noise import mix_seeds
from parapolicy.policy import Policy
from parapolicy.warm import WarmState


@dataclass
class ChunkErrors:
    """One entry per chunk.

    Attributes:
        errors: largest absolute difference from the sequential chunk, normalised.
        action_errors: the same in the environment's units.
        rounds, evaluations: what the chunk cost.
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
    """Sample recorded episodes' observations again, all episodes side by side.

    A policy with ``warm_start`` starts each chunk but an episode's first from its own chunk before, with its noise
    shifted; the first chunk is left out. The recorded actions were others, so a warm start is sometimes of another
    mode than the observation speaks of: a harder test than a closed loop.

    Args:
        policies: label -> policy, all of the same weights.
        episodes: the observations {key: (To, ...)} of each, one per chunk.
        chunks: how many chunks to measure per policy, at least; episodes are repeated with other noise where needed.
        noise_seed: of the noise, the same for every policy.
        progress: called with the number of chunks measured since the last call.
    """
    results = {label: ChunkErrors() for label in policies}
    per_repeat = sum(len(episode) - 1 for episode in episodes)
    if per_repeat < 1:
        raise ValueError("no episode has two chunks, expected longer episodes")
    for repeat in range(-(-chunks // per_repeat)):
        states: dict[str, list[WarmState | None]] = {label: [None] * len(episodes) for label in policies}
        for j in range(max(len(episode) for episode in episodes)):
            active = [i for i, episode in enumerate(episodes) if len(episode) > j]
            batch = {key: np.stack([episodes[i][j][key] for i in active]) for key in episodes[active[0]][j]}
            seeds = [mix_seeds(noise_seed, repeat, i, j) for i in active]
            references: dict[tuple[int, bool], np.ndarray] = {}
            for label, policy in policies.items():
                kept = [state for i in active if (state := states[label][i]) is not None]
                chunk = policy.predict(batch, seed=seeds, warm=WarmState.stack(kept) if kept else None)
                if policy.warm_start:
                    for k, i in enumerate(active):
                        states[label][i] = chunk.warm_state[k]
                if j == 0:
                    continue
                # By schedule and kind of noise, which warm starts shift.
                key = (id(policy.schedule), policy.warm_start)
                if key not in references:
                    sequential = policy.with_sampler("sequential")
                    references[key] = sequential.predict(batch, noise=chunk.warm_state.noise).trajectory
                difference = np.abs(chunk.trajectory - references[key])
                scale = policy.normalizer.maps["action"].scale.cpu().numpy()
                row = results[label]
                row.errors += (difference * scale).max((1, 2)).tolist()
                row.action_errors += difference.max((1, 2)).tolist()
                row.rounds += chunk.stats.rounds.tolist()
                row.evaluations += chunk.stats.evaluations.tolist()
                progress(len(active))
    return results
