"""The common part of networks in C++: the native call, and the plans of the layers."""

import threading
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from parapolicy.engine.lowered.plan import Plan
from parapolicy.engine.native_library import Films, load_library
from parapolicy.networks import Embedding, Network
from parapolicy.networks.base import overwrite_observed


class FusedNetwork(Network):
    """A network on a CPU whose forward pass is one call of C++. Its embeddings are FiLM values by step and by element.

    Attributes:
        library: the native library.
        dtype: what the factors of products are rounded to.
        inpaints: the condition replaces a part of the sample, and there are no FiLM values by element.
        film: number of FiLM values, F.
    """

    inpaints: bool
    film: int

    def _prepare(self, source: Any, weight: Tensor, dtype: torch.dtype) -> None:
        """Remember the source network, and check its weights by one of them.

        Raises:
            ValueError: the weights are not float32 on a CPU.
            OSError: there is no C++ compiler.
        """
        if weight.device.type != "cpu" or weight.dtype != torch.float32:
            raise ValueError(f"its weights are {weight.dtype} on {weight.device}, expected float32 on a CPU")
        self.library, self.dtype = load_library(), dtype
        self._source = (source,)  # in a tuple, so that it is not a submodule
        self._plans: dict[tuple[int, ...], Plan] = {}  # by the shape of a sample
        self._lock = threading.Lock()

    @abstractmethod
    def embed_steps(self, timesteps: Tensor) -> Tensor:
        """FiLM values by step: (T,) -> (T, F)."""

    @abstractmethod
    def embed_condition(self, observation: Mapping[str, Tensor]) -> Tensor:
        """FiLM values by element: {key: (B, To, …)} -> (B, F). For inpainting: the observed steps (B, To, Do)."""

    @abstractmethod
    def _make_plan(self, length: int, channels: int) -> Plan:
        """The layers for samples of this shape."""

    def forward(self, x: Tensor, steps: Embedding, condition: Embedding, step: Tensor, element: Tensor) -> Tensor:
        """(N, H, D) -> the same."""
        assert isinstance(steps, Tensor)
        assert isinstance(condition, Tensor)
        if self.inpaints:
            x = overwrite_observed(x, condition[element])
        x, steps = dense(x, torch.float32), dense(steps, torch.float32)
        step, element, condition = dense(step, torch.int64), dense(element, torch.int64), dense(condition)
        rows, length, channels = x.shape
        if step.shape != (rows,) or element.shape != (rows,):
            raise ValueError(f"step and element have shapes {step.shape} and {element.shape}, expected ({rows},)")
        plan, y = self.plan(length, channels), torch.empty_like(x)
        films = self.films(steps, condition)
        pointers = x.data_ptr(), step.data_ptr(), element.data_ptr()
        threads = torch.get_num_threads()
        wrong = self.library.parapolicy_compute(plan.network, films, *pointers, rows, y.data_ptr(), threads)
        if wrong >= 0:
            raise IndexError(
                f"network row {wrong} has step {int(step[wrong])} and element {int(element[wrong])}, "
                f"expected below {len(steps)} and {len(condition)}"
            )
        if wrong != -1:
            raise MemoryError(f"there is not enough memory for the activations of {rows} rows")
        return y

    def films(self, steps: Tensor, condition: Tensor) -> Films:
        """Pointers to FiLM values by step and, except for inpainting, by element. The dense tensors must stay alive."""
        inpaints, film = self.inpaints, self.film
        if steps.shape[1:] != (film,) or (not inpaints and condition.shape[1:] != (film,)):
            raise ValueError(f"FiLM values have shapes {steps.shape} and {condition.shape}, expected (…, {film})")
        by_element = None if inpaints else condition.data_ptr()
        return Films(steps.data_ptr(), len(steps), by_element, len(condition))

    def plan(self, length: int, channels: int) -> Plan:
        """The layers for samples (length, channels), made once per shape."""
        with self._lock:
            if (length, channels) not in self._plans:
                with torch.inference_mode(False), torch.no_grad():
                    self._plans[length, channels] = self._make_plan(length, channels)
            return self._plans[length, channels]


def dense(value: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The value on the CPU, contiguous."""
    return value.to(torch.device("cpu"), dtype).contiguous()
