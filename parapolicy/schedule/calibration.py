"""How a policy's estimates respond to the state along a schedule. The sampler ``collocation`` uses it."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Calibration:
    """The mean response of the clean estimate u to the state, and the steps at which to ask the network.

    In the modes v = Q^T x, the estimate at step j moves by ``response[j] / alpha_j`` per unit of the state.

    Attributes:
        modes: Q, (S, S), orthogonal, one mode per column.
        response: (T, S), from 0 (no response) to below 1.
        nodes: number of nodes -> their steps, increasing, the last one T - 1.
        distances: number of nodes -> measured distance of ``collocation`` from the policy's distribution on held-out
            chunks: the upper end of the energy distance's interval, in mean distances between two chunks.

    Raises:
        ValueError: the shapes do not fit, a value is out of range, or nodes do not increase up to T - 1.
    """

    modes: Tensor
    response: Tensor
    nodes: Mapping[int, tuple[int, ...]]
    distances: Mapping[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        steps, size = self.response.shape
        if self.modes.shape != (size, size):
            raise ValueError(f"modes have shape {tuple(self.modes.shape)}, expected {(size, size)}")
        if not torch.isfinite(self.modes).all() or not ((self.response >= 0) & (self.response < 1)).all():
            raise ValueError("modes must be finite and responses from 0 to below 1; calibrate again")
        for count, nodes in self.nodes.items():
            if len(nodes) != count or list(nodes) != sorted(set(nodes)) or nodes[0] < 0 or nodes[-1] != steps - 1:
                raise ValueError(f"nodes are {nodes}, expected {count} increasing steps up to {steps - 1}")

    def fewest_nodes(self, bound: float) -> int | None:
        """The fewest nodes whose measured distance is at most ``bound``; None if there are none."""
        return min((count for count, distance in self.distances.items() if distance <= bound), default=None)

    def to(self, device: torch.device | str) -> "Calibration":
        return Calibration(self.modes.to(device), self.response.to(device), self.nodes, self.distances)
