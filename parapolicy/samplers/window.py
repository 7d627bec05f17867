"""The sliding window of the fixed-point samplers: where each batch element stands, and which states are settled."""

from typing import NamedTuple

import torch
from torch import Tensor


class Entries(NamedTuple):
    """One round's window, for the A elements that are still at work.

    Attributes:
        row: (A, 1) their batch indices.
        step: (A, W) step indices, cut off at T - 1.
        valid: (A, W) False where the window reaches past T - 1.
    """

    row: Tensor
    step: Tensor
    valid: Tensor


class SlidingWindows:
    """One window per batch element; an element stops when its window has passed step T - 1.

    Attributes:
        start: (B,) first step of each window; the state there is settled.
        rounds, evaluations: (B,) what each element has cost so far.
    """

    def __init__(self, batch: int, steps: int, window: int, device: torch.device) -> None:
        self.steps = steps
        self.offsets = torch.arange(min(window, steps), device=device)
        self.start = torch.zeros(batch, dtype=torch.int64, device=device)
        self.rounds = torch.zeros_like(self.start)
        self.evaluations = torch.zeros_like(self.start)

    def next_round(self) -> Entries | None:
        """The entries to evaluate, or None when every element is done."""
        row = (self.start < self.steps).nonzero()
        if len(row) == 0:
            return None
        step = self.start[row] + self.offsets
        valid = step < self.steps
        self.rounds[row[:, 0]] += 1
        self.evaluations[row[:, 0]] += valid.sum(1)
        return Entries(row, step.clamp(max=self.steps - 1), valid)

    def advance(self, entries: Entries, settled: Tensor) -> Tensor:
        """Move past every leading settled state and the one after it.

        The state after the first unsettled index depends on settled values only, so it is final too: at least one
        step per round. ``settled`` (A, W) speaks of the states that follow each entry. Returns the new starts, (A,).
        """
        leading = (settled & entries.valid).long().cumprod(1).sum(1)
        row = entries.row[:, 0]
        self.start[row] = (self.start[row] + (leading + 1).clamp(max=len(self.offsets))).clamp(max=self.steps)
        return self.start[row]


def check_window(window: int, tolerance: float) -> None:
    """Raise ``ValueError`` for a window or tolerance that no fixed-point sampler can take."""
    if isinstance(window, bool) or not isinstance(window, int) or window < 1:
        raise ValueError(f"window is {window!r}, expected a whole number of at least 1")
    if not 0 <= tolerance < float("inf"):
        raise ValueError(f"tolerance is {tolerance!r}, expected a number of at least 0 (0: exact)")
