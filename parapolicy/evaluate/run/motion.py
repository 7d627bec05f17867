"""Smoothness of the executed actions: jumps between chunks, steps inside them, and jerk."""

from collections.abc import Sequence

import numpy as np


def seam_jumps(actions: np.ndarray, chunks: Sequence[int]) -> list[float]:
    """Distances from the last action of a chunk to the first one of the next, in the actions' own units.

    Args:
        actions: executed, (N, Da).
        chunks: number of each action's chunk, N of them.
    """
    return [float(d) for d, a, b in zip(_distances(actions), chunks, chunks[1:], strict=False) if a != b]


def chunk_motion(actions: np.ndarray, chunks: Sequence[int]) -> list[float]:
    """Mean distance between successive actions inside a chunk, one per chunk with two actions or more."""
    inside: dict[int, list[float]] = {}
    for d, a, b in zip(_distances(actions), chunks, chunks[1:], strict=False):
        if a == b:
            inside.setdefault(a, []).append(float(d))
    return [float(np.mean(distances)) for distances in inside.values()]


def jerks(actions: np.ndarray) -> list[float]:
    """The N - 3 norms of the third differences of successive actions (N, Da), in units per control step cubed."""
    return [float(norm) for norm in np.linalg.norm(np.diff(actions, 3, axis=0), axis=1)] if len(actions) > 3 else []


def _distances(actions: np.ndarray) -> np.ndarray:
    """(N, Da) -> (N - 1,)."""
    return np.linalg.norm(np.diff(actions, axis=0), axis=1) if len(actions) > 1 else np.empty(0)
