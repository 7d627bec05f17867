"""Does another runtime compute the same function? Compared on random rows before anything relies on it."""

from collections.abc import Callable, Sequence

from torch import Tensor

ROWS = (1, 3, 16)  # numbers of rows that are compared; those of the examples of a conversion are easily built into it
TOLERANCE = 1e-4  # of the largest number of an output, in float32

Function = Callable[..., Sequence[Tensor]]


def check_equal(name: str, expected: Function, found: Function, draw: Callable[[int], Sequence[Tensor]]) -> float:
    """Compare two functions of tensors on inputs of 1, 3 and 16 rows.

    Args:
        name: of ``found``, for the error.
        draw: number of rows -> inputs of both.

    Returns:
        The largest difference that was found, as a part of the largest number of the same output.

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
