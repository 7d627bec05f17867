"""A linear model of the network at every step, fitted to the last rounds' evaluations."""

import torch
from torch import Tensor

REGULARIZATION = 1e-3  # of the least-squares fit, relative to the trace of its normal matrix


class SecantModel:
    """The last evaluations at every step, and the linear map that fits their differences.

    Args:
        x: (B, N, S), for its shape; N is larger than ``steps``.
        steps: T.
        history: differences to keep.
    """

    def __init__(self, x: Tensor, steps: int, history: int) -> None:
        # States and estimates of every step, newest first; a step evaluated once repeats its only value.
        self.pairs = x.new_zeros(*x.shape[:2], 2, history + 1, x.shape[2])
        self.seen = torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device)
        self.last = steps - 1

    def forget(self) -> None:
        """Discard all evaluations."""
        self.seen.zero_()
        self.pairs.zero_()

    def record(self, element: Tensor, step: Tensor, states: Tensor, estimates: Tensor) -> None:
        """Add evaluations at batch elements ``element`` (B, 1) and ``step`` (B, W): states and estimates (B, W, S)."""
        newest = torch.stack((states, estimates), 2)[:, :, :, None]
        past = torch.where(
            self.seen[element, step][..., None, None, None], self._at(element, step)[:, :, :, :-1], newest
        )
        new = torch.cat((newest, past), 3)
        self.pairs.flatten(0, 1).index_copy_(0, self._rows(element, step), new.flatten(0, 1))
        self.seen[element, step] = True

    def fit(self, element: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
        """The model J = du^T weights at each step of a window (B, W): weights and du, (B, W, m, S) each."""
        around = torch.cat((step[:, :1] - 1, step, step[:, -1:] + 1), 1).clamp(0, self.last)
        pairs = self._at(element, around)
        own = pairs[:, :, :, :-1] - pairs[:, :, :, 1:]  # (B, W + 2, 2, history, S)
        dx, du = torch.cat((own[:, 1:-1], own[:, :-2], own[:, 2:]), 3).unbind(2)  # with the neighbours': (B, W, m, S)
        normal = dx @ dx.mT  # (B, W, m, m)
        damping = REGULARIZATION * normal.diagonal(dim1=-2, dim2=-1).sum(-1) + 1e-12
        normal.diagonal(dim1=-2, dim2=-1).add_(damping[..., None])
        return eliminate(normal, dx), du

    def _at(self, element: Tensor, step: Tensor) -> Tensor:
        """``pairs[element, step]``, without torch's threads, which would then keep the cores from the engine's."""
        return self.pairs.flatten(0, 1).index_select(0, self._rows(element, step)).unflatten(0, step.shape)

    def _rows(self, element: Tensor, step: Tensor) -> Tensor:
        return (element * self.pairs.shape[1] + step).flatten()


def eliminate(matrix: Tensor, right: Tensor) -> Tensor:
    """M^-1 R for small positive definite M (..., m, m) and R (..., m, n), by elimination without pivots.

    LAPACK's solvers may wait for the host on a GPU, and torch cannot fuse them with other operations.
    """
    count = matrix.shape[-1]
    system = torch.cat((matrix, right), -1)
    for i in range(count):
        pivot = system[..., i : i + 1, :] / system[..., i : i + 1, i : i + 1]
        system = system - system[..., i : i + 1] * pivot
        system[..., i : i + 1, :] = pivot
    return system[..., count:]
