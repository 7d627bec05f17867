"""The denoiser, the one function that samplers call: state and step in, estimate of the clean sample out."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from parapolicy.hold import HeldNumbers
from parapolicy.schedule import Schedule

# CPU and GPU libraries choose a kernel, and with it an order of summation, by batch size and number of threads. All
# multiples of this size were seen to use the same kernels, in which a row's result does not depend on the other rows.
# With one thread, 4, 8, 12 and 20 rows use other kernels.
REPRODUCIBLE_MULTIPLE = 16

# (x (N, *sample_shape), step (N,), element (N,)) -> network output, of x's shape
Evaluate = Callable[[Tensor, Tensor, Tensor], Tensor]


class Denoiser:
    """Runs the network on any mixture of batch elements and steps. States are flat: (N, S), S numbers per sample.

    Args:
        evaluate: the network, from an engine's ``bind``.
        schedule: says what the network predicts.
        sample_shape: shape of one sample as the network takes it.
        reproducible: pad every network call to a multiple of ``REPRODUCIBLE_MULTIPLE`` rows, so that a sample's result
            does not depend on the other samples of its call.
        max_batch: most samples per network call; None: no limit. Bounds the memory of the network's activations.
        held: numbers of the clean samples that are known beforehand. Samplers do not notice them.
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
        """u_j at N states, (N, S), in as few network calls as ``max_batch`` allows.

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
    """(N, …) padded with zeros to a multiple of ``REPRODUCIBLE_MULTIPLE`` rows."""
    return functional.pad(value, (0, 0) * (value.ndim - 1) + (0, -len(value) % REPRODUCIBLE_MULTIPLE))


def check_finite(value: Tensor, name: str) -> None:
    """Raise ``FloatingPointError`` if a computed value is not finite."""
    if not torch.isfinite(value).all():
        raise FloatingPointError(
            f"the {name} holds a value that is not finite; check the weights, the normalizer and the observation"
        )
