"""Comparing another runtime's outputs with the network's on random rows before the runtime is used."""

from collections.abc import Callable, Sequence

from torch import Tensor

ROWS = (1, 3, 16)  # batch sizes that are compared: a conversion may have fixed the size of its example
TOLERANCE = 1e-4  # relative to an output's largest number, in float32

Function = Callable[..., Sequence[Tensor]]


def check_equal(name: str, expected: Function, found: Function, draw: Callable[[int], Sequence[Tensor]]) -> float:
    """Compare two functions of tensors on inputs of 1, 3 and 16 rows.

    Args:
        name: of ``found``, for the error.
        expected, found: the two functions.
        draw: number of rows -> inputs of both.

    Returns:
        The largest difference found, relative to the largest number of the same output.

    Raises:
        ValueError: an output of another shape, one that is not finite, or a difference beyond ``TOLERANCE``.
    """
    worst = 0.0
    for rows in ROWS:
        inputs = draw(rows)
        for ours, theirs in zip(expected(*inputs), found(*inputs), strict=True):
            if theirs.shape != ours.shape:
                raise ValueError(f"{name} gives {tuple(theirs.shape)} for {rows} rows, expected {tuple(ours.shape)}")
            difference = float((theirs - ours).abs().max() / ours.abs().max().clamp_min(1e-30))
            if not difference <= TOLERANCE:
                raise ValueError(
                    f"{name} differs from the network by {difference:.2g} of its largest number at {rows} rows, "
                    f"expected at most {TOLERANCE:g}; take another format or engine"
                )
            worst = max(worst, difference)
    return worst
