"""The warm state that one chunk passes to the next: a guess that saves rounds and changes nothing else."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class WarmState:
    """The estimates and noise of a sampled batch, owned by the caller: pass it to the next ``predict`` or drop it.

    The first chunk of an episode has none.

    Attributes:
        estimates: u_j of every step, (B, T, H, Da).
        noise: the noise they were sampled with, (T + 1, B, H, Da).
    """

    estimates: Tensor
    noise: Tensor

    def __getitem__(self, element: int) -> "WarmState":
        """One element's state, as a batch of one."""
        return WarmState(self.estimates[element : element + 1], self.noise[:, element : element + 1])

    @staticmethod
    def stack(states: Sequence["WarmState"]) -> "WarmState":
        """Stack several states into one batch."""
        return WarmState(torch.cat([s.estimates for s in states]), torch.cat([s.noise for s in states], 1))

    def check(self, shape: tuple[int, ...]) -> None:
        """Raise ``ValueError`` unless the noise has this shape, (T + 1, B, H, Da), and the estimates fit it."""
        steps, batch, *rest = shape
        expected = (batch, steps - 1, *rest)
        if tuple(self.noise.shape) != shape or tuple(self.estimates.shape) != expected:
            raise ValueError(
                f"the warm state's estimates have shape {tuple(self.estimates.shape)} and its noise "
                f"{tuple(self.noise.shape)}, expected {expected} and {shape}; pass that of the previous chunk, of the "
                "same policy, schedule and batch"
            )

    def guess(self, executed: int) -> Tensor:
        """The estimates ``executed`` control steps later, (B, T, H, Da); the last one is repeated at the end."""
        late = self.estimates[:, :, executed:]
        return torch.cat((late, self.estimates[:, :, -1:].expand(-1, -1, executed, -1)), 2)

    def shift_noise(self, fresh: Tensor, executed: int) -> Tensor:
        """``fresh`` (T + 1, B, H, Da) with this chunk's noise kept for every control step where the two chunks overlap.

        Each number is used once per chunk, so that every chunk's noise is still independent and standard normal.
        """
        kept = self.noise[:, :, executed:].to(fresh)
        return torch.cat((kept, fresh[:, :, kept.shape[2] :]), 2)
