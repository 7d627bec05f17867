"""Held actions: those that the robot executes meanwhile, and that a new chunk must begin with or stay near."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from torch import Tensor

from parapolicy.schedule import Schedule


class HeldNumbers(NamedTuple):
    """The known numbers of a batch of clean samples, normalised; (B, S) each.

    Attributes:
        part: value times weight.
        free: 1 - weight, the share of the network's estimate: 0 where a number is held, 1 where it is free.
    """

    part: Tensor
    free: Tensor

    def estimate(self, u: Tensor, element: Tensor) -> Tensor:
        """The network's estimates u (N, S) of batch elements (N,), with the held numbers put in."""
        return u * self.free[element] + self.part[element]

    def first_state(self, noise: Tensor, schedule: Schedule) -> Tensor:
        """The first state (B, S): held numbers at the schedule's first noise level, pure noise (B, S) elsewhere."""
        noisy = schedule.alpha[0] * self.part + schedule.sigma[0] * (1 - self.free) * noise
        return self.free * noise + noisy


@dataclass(frozen=True)
class Hold:
    """Actions of a chunk that are known before it is sampled, in the environment's units.

    At every level of noise, the network's estimate u of the clean chunk is replaced by the known actions where the
    weight is 1, and mixed with them where it is between 0 and 1. A held number then follows the schedule's own
    recurrence from the chunk's own noise: at a step with levels alpha and sigma it is alpha times the action plus sigma
    times noise, as the network has seen it in training. Samplers need no change, and no network call is added.

    This is conditioning by replacement (Song et al., ICLR 2021; Janner et al., ICML 2022). It does not draw from the
    policy's distribution given the held actions; docs/latency.md says what it draws from.

    Attributes:
        actions: (H, Da) or (B, H, Da), one for every step of the horizon; ignored where the weight is 0.
        weights: (H,) or (B, H), from 0 (free) to 1 (held). The form without B holds for the whole batch.

    Raises:
        ValueError: the shapes do not fit each other, a weight is outside of 0 to 1, or an action with a weight is not
            finite.
    """

    actions: np.ndarray
    weights: np.ndarray

    def __post_init__(self) -> None:
        actions, weights = np.asarray(self.actions, np.float32), np.asarray(self.weights, np.float32)
        if actions.ndim not in (2, 3) or weights.shape not in (actions.shape[:-1], actions.shape[-2:-1]):
            raise ValueError(
                f"a hold has actions of shape {actions.shape} and weights of shape {weights.shape}, expected (H, Da) "
                "and (H,), or (B, H, Da) and (B, H) for a batch"
            )
        if not ((weights >= 0) & (weights <= 1)).all():
            raise ValueError(f"a hold's weights are {weights.tolist()}, expected numbers from 0 (free) to 1 (held)")
        weights = np.broadcast_to(weights, actions.shape[:-1])
        if not np.isfinite(actions[weights > 0]).all():
            raise ValueError("a held action is not finite; hold only actions that were sampled")
        object.__setattr__(self, "actions", np.where(weights[..., None] > 0, actions, np.float32(0)))
        object.__setattr__(self, "weights", weights)

    @staticmethod
    def stack(holds: Sequence["Hold"]) -> "Hold":
        """Stack holds of single chunks into one of a batch."""
        return Hold(np.stack([hold.actions for hold in holds]), np.stack([hold.weights for hold in holds]))

    @property
    def empty(self) -> bool:
        """Whether nothing is held."""
        return not self.weights.any()


def hold_weights(horizon: int, first: int, committed: int, overlap: int, soft: bool) -> np.ndarray:
    """The weight of every step of a chunk's horizon, (H,) float32.

    *Hard*: 1 on the committed steps, 0 after them. *Soft*: after the committed steps, weights decay over the overlap
    like the soft mask of real-time chunking (Black et al., NeurIPS 2025): c (e^c - 1) / (e - 1) with c from nearly 1 to
    nearly 0.

    Args:
        horizon: H.
        first: index of the present step in the horizon.
        committed: number of steps, from the present one on, that the old chunk will still execute.
        overlap: number of steps, from the present one on, for which the old chunk has actions.
        soft: give weights to the steps after the committed ones.
    """
    weights = np.zeros(horizon, np.float32)
    committed = max(0, min(committed, overlap))
    weights[first : first + committed] = 1.0
    for i in range(committed, overlap if soft else committed):
        c = (overlap - i) / (overlap - committed + 1)
        weights[first + i] = c * math.expm1(c) / math.expm1(1)
    return weights
