"""The conditional UNet by calls of C++."""

import threading

import torch
from torch import Tensor

from parapolicy.engine.lowered.unet1d import FilmTables
from parapolicy.engine.lowered.unet1d_plan import Plan
from parapolicy.engine.native_library import Films, load_library
from parapolicy.networks import Embedding
from parapolicy.networks.base import overwrite_observed
from parapolicy.networks.unet1d import ConditionalUnet1D


class FusedUnet1D(FilmTables):
    """The function of a :class:`ConditionalUnet1D` on a CPU, each call by one of C++.

    Args:
        network: whose weights are taken, as they are now.
        dtype: what the factors of products are rounded to, float32 or bfloat16; all else is float32, and so are the
            layers that read the sample and give the result.

    Raises:
        ValueError: it is conditioned locally, not on a CPU, or not of float32.
        OSError: there is no compiler.
    """

    condition_weight: Tensor

    def __init__(self, network: ConditionalUnet1D, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(network)
        weight = network.final_conv[1].weight
        if network.condition == "local" or weight.device.type != "cpu" or weight.dtype != torch.float32:
            raise ValueError(f"its condition is {network.condition!r}, on {weight.device}, of {weight.dtype}")
        self.library, self.dtype = load_library(), dtype
        self.register_buffer("condition_weight", self.film_weight[:, self.step_dim :].T.contiguous())  # (C, F)
        self._source = (network,)  # not a module of this one
        self._plans: dict[tuple[int, ...], Plan] = {}  # by the shape of a sample
        self._lock = threading.Lock()

    def forward(self, x: Tensor, steps: Embedding, condition: Embedding, step: Tensor, element: Tensor) -> Tensor:
        """(N, H, D) -> the same."""
        assert isinstance(steps, Tensor)
        assert isinstance(condition, Tensor)
        inpaints = self.condition == "inpaint"
        if inpaints:
            x = overwrite_observed(x, condition[element])
        x, steps = _dense(x, torch.float32), _dense(steps, torch.float32)
        step, element, condition = _dense(step, torch.int64), _dense(element, torch.int64), _dense(condition)
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
                f"row {wrong} has step {int(step[wrong])} and element {int(element[wrong])}, "
                f"expected below {len(steps)} and {len(condition)}"
            )
        if wrong != -1:
            raise MemoryError(f"there is not enough memory for the activations of {rows} rows")
        return y

    def film_values(self, condition: Tensor) -> Tensor:
        """As embedded without Python, to the bit."""
        condition, (inputs, count) = _dense(condition, torch.float32), self.condition_weight.shape
        if condition.shape[1] != inputs:
            raise ValueError(f"the condition has shape {tuple(condition.shape)}, expected (B, {inputs})")
        values = condition.new_empty(len(condition), count)
        pointers = self.condition_weight.data_ptr(), condition.data_ptr()
        self.library.parapolicy_film_values(*pointers, inputs, count, len(condition), values.data_ptr())
        return values

    def films(self, steps: Tensor, condition: Tensor) -> Films:
        """Where FiLM values by step and, but for inpainting, by element stand; of dense tensors that outlive it."""
        inpaints, film = self.condition == "inpaint", len(self.film_bias)
        if steps.shape[1:] != (film,) or (not inpaints and condition.shape[1:] != (film,)):
            raise ValueError(f"FiLM values have shapes {steps.shape} and {condition.shape}, expected (…, {film})")
        by_element = None if inpaints else condition.data_ptr()
        return Films(steps.data_ptr(), len(steps), by_element, len(condition))

    def plan(self, length: int, channels: int) -> Plan:
        with self._lock:
            if (length, channels) not in self._plans:
                with torch.inference_mode(False), torch.no_grad():
                    self._plans[length, channels] = Plan(self._source[0], self.place, length, channels, self.dtype)
            return self._plans[length, channels]


def _dense(value: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return value.to(torch.device("cpu"), dtype).contiguous()
