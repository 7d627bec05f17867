"""What a policy's estimates do along a schedule, measured once; the sampler ``collocation`` works better with it."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Calibration:
    """The mean response of the clean estimate u to the state, and at which steps to ask the network.

    In the modes v = Q^T x, the estimate at step j moves by ``response[j] / alpha_j`` where the state moves by one.

    Attributes:
        modes: Q, (S, S), orthogonal, one mode in each column.
        response: (T, S), from 0 (the state tells nothing) to below 1.
        nodes: number of nodes -> their steps, increasing, the last one T - 1.
        distances: number of nodes -> how far ``collocation`` may be from the policy's distribution, as measured on
            other chunks: the upper end of the energy distance's interval, in mean distances of two chunks.
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
            raise ValueError("modes must be finite, and responses from 0 to below 1; calibrate anew")
        for count, nodes in self.nodes.items():
            if len(nodes) != count or list(nodes) != sorted(set(nodes)) or nodes[0] < 0 or nodes[-1] != steps - 1:
                raise ValueError(f"nodes are {nodes}, expected {count} increasing steps up to {steps - 1}")

    def fewest_nodes(self, bound: float) -> int | None:
        """The fewest nodes whose measured distance is at most the bound; None where no number of nodes is."""
        return min((count for count, distance in self.distances.items() if distance <= bound), default=None)

    def to(self, device: torch.device | str) -> "Calibration":
        return Calibration(self.modes.to(device), self.response.to(device), self.nodes, self.distances)
