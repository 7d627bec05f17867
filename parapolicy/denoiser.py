"""The one function that samplers see: state and step in, estimate of the clean sample out."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from parapolicy.hold import HeldNumbers
from parapolicy.schedule import Schedule

# CPU and GPU libraries pick a kernel, and with it an order of summation, by batch size and number of threads. Batches
# of a multiple of this size were all seen to take the same kernels, whose results for one row do not depend on the
# other rows; with one thread, 4, 8, 12 and 20 rows take others.
REPRODUCIBLE_MULTIPLE = 16

# (x (N, *sample_shape), step (N,), element (N,)) -> network output, of x's shape
Evaluate = Callable[[Tensor, Tensor, Tensor], Tensor]


class Denoiser:
    """Runs the network on any mixture of batch elements and steps. States are flat: (N, S), S numbers per sample.

    Args:
        evaluate: the network, as an engine's ``bind`` gives it.
        schedule: says what the network predicts.
        sample_shape: of one sample, as the network takes it.
        reproducible: pad every network call to a multiple of ``REPRODUCIBLE_MULTIPLE``, so that a sample's result does
            not depend on how many share its call.
        max_batch: most samples per network call; None: no limit. Bounds the memory of the network's activations.
        held: what is known of the samples. Samplers need not know of it: an estimate that is held is an estimate.
    """

    def __init__(
        self,
        evaluate: Evaluate,
        schedule: Schedule,
        sample_shape: Sequence[int],
        reproducible: bool = False,
        max_batch: int | None = None,
        held: HeldNumbers | None = None,
    ) -> None:
        self.evaluate, self.schedule, self.sample_shape = evaluate, schedule, tuple(sample_shape)
        self.reproducible, self.max_batch, self.held = reproducible, max_batch, held

    def __call__(self, x: Tensor, step: Tensor, element: Tensor) -> Tensor:
        """u_j at N states, in one network call or as few as ``max_batch`` allows.

        Args:
            x: states, (N, S).
            step: (N,) int64, the step index j of each.
            element: (N,) int64, the batch element of each.
        """
        inputs = (x.unflatten(1, self.sample_shape), step, element)
        parts = zip(*(value.split(self.max_batch or len(x)) for value in inputs), strict=True)
        outputs = [self._run(*part) for part in parts]
        output = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        u = self.schedule.estimate(output.flatten(1), x, step)
        return u if self.held is None else self.held.estimate(u, element)

    def _run(self, *inputs: Tensor) -> Tensor:
        count = len(inputs[0])
        if self.reproducible:
            inputs = tuple(map(fill_rows, inputs))
        return self.evaluate(*inputs)[:count]


def fill_rows(value: Tensor) -> Tensor:
    """(N, …) filled up with zeros to a multiple of ``REPRODUCIBLE_MULTIPLE`` rows."""
    return functional.pad(value, (0, 0) * (value.ndim - 1) + (0, -len(value) % REPRODUCIBLE_MULTIPLE))


def check_finite(value: Tensor, name: str) -> None:
    """Raise ``FloatingPointError`` where a computed value is not finite."""
    if not torch.isfinite(value).all():
        raise FloatingPointError(
            f"the {name} holds a value that is not finite; check the weights, the normalizer and the observation"
        )
