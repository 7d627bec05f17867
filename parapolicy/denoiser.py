"""The one function that samplers see: state and step in, estimate of the clean sample out."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from parapolicy.engine import Evaluate
from parapolicy.schedule import Schedule

# CPU and GPU libraries pick a kernel, and with it an order of summation, by batch size. Batches of a multiple of this
# size were all seen to take the same kernels, whose results for one row do not depend on the other rows.
REPRODUCIBLE_MULTIPLE = 4


class Denoiser:
    """Runs the network on any mixture of batch elements and steps.

    Args:
        evaluate: the network at (x (N, H, D), step (N,), element (N,)), as an engine's ``bind`` gives it.
        schedule: says what the network predicts.
        reproducible: pad every network call to a multiple of ``REPRODUCIBLE_MULTIPLE``, so that a row's result does
            not depend on how many rows share its call.
        max_batch: most rows per network call; None: no limit. Bounds the memory of the network's activations.
    """

    def __init__(
        self,
        evaluate: Evaluate,
        schedule: Schedule,
        reproducible: bool = False,
        max_batch: int | None = None,
    ) -> None:
        self.evaluate = evaluate
        self.schedule = schedule
        self.reproducible = reproducible
        self.max_batch = max_batch

    @property
    def keep(self) -> Callable[..., Any] | None:
        """(key, make, *arguments) -> ``make(*arguments)``, the same object for the same key, on an engine that captures
        rounds; None on others. See :class:`parapolicy.engine.CudaGraph`.
        """
        keep = getattr(self.evaluate, "keep", None)
        return keep and (lambda key, *call: keep((self.reproducible, self.max_batch, key), *call))

    @property
    def compiles(self) -> bool:
        """Whether a sampler should compile what it computes between two calls: with an engine that compiles, but not
        where results must be the same in a batch of any size.
        """
        return getattr(self.evaluate, "compiles", False) and not self.reproducible

    def __call__(self, x: Tensor, step: Tensor, element: Tensor) -> Tensor:
        """u_j at N states, in one network call or as few as ``max_batch`` allows.

        Args:
            x: states, (N, H, D).
            step: (N,) int64, the step index j of each.
            element: (N,) int64, the batch element of each.
        """
        inputs = (x, step, element)
        parts = zip(*(value.split(self.max_batch or len(x)) for value in inputs), strict=True)
        outputs = [self._run(*part) for part in parts]
        output = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        return self.schedule.estimate(output, x, step)

    def _run(self, *inputs: Tensor) -> Tensor:
        count = len(inputs[0])
        missing = -count % REPRODUCIBLE_MULTIPLE if self.reproducible else 0
        if missing:
            inputs = tuple(functional.pad(value, (0, 0) * (value.ndim - 1) + (0, missing)) for value in inputs)
        return self.evaluate(*inputs)[:count]


def check_finite(value: Tensor, name: str) -> None:
    """Raise ``FloatingPointError`` where a computed value is not finite."""
    if not torch.isfinite(value).all():
        raise FloatingPointError(f"the {name} holds a value that is not finite; check the weights and the observation")
