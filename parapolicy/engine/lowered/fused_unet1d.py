"""The conditional UNet as calls of C++."""

import torch
from torch import Tensor

from parapolicy.engine.lowered.fused_network import FusedNetwork, dense
from parapolicy.engine.lowered.unet1d import FilmTables
from parapolicy.engine.lowered.unet1d_plan import UnetPlan
from parapolicy.networks.unet1d import ConditionalUnet1D


class FusedUnet1D(FilmTables, FusedNetwork):
    """The function of a :class:`ConditionalUnet1D` on a CPU, each call by one of C++.

    Args:
        network: its present weights are copied.
        dtype: what the factors of products are rounded to, float32 or bfloat16. Everything else is float32, and so are
            the first and the last layer.

    Raises:
        ValueError: its condition is local, or its weights are not float32 on a CPU.
        OSError: there is no C++ compiler.
    """

    condition_weight: Tensor

    def __init__(self, network: ConditionalUnet1D, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(network)
        if network.condition == "local":
            raise ValueError("its condition is 'local'")
        self._prepare(network, self.film_weight, dtype)
        self.inpaints, self.film = network.condition == "inpaint", len(self.film_bias)
        self.register_buffer("condition_weight", self.film_weight[:, self.step_dim :].T.contiguous())  # (C, F)

    def film_values(self, condition: Tensor) -> Tensor:
        """FiLM values (B, F) of condition vectors (B, C), equal to the bit to those computed without Python."""
        condition, (inputs, count) = dense(condition, torch.float32), self.condition_weight.shape
        if condition.shape[1] != inputs:
            raise ValueError(f"the condition has shape {tuple(condition.shape)}, expected (B, {inputs})")
        values = condition.new_empty(len(condition), count)
        pointers = self.condition_weight.data_ptr(), condition.data_ptr()
        self.library.parapolicy_film_values(*pointers, inputs, count, len(condition), values.data_ptr())
        return values

    def _make_plan(self, length: int, channels: int) -> UnetPlan:
        return UnetPlan(self._source[0], self.place, length, channels, self.dtype)
