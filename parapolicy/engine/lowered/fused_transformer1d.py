"""The transformer as calls of C++."""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional

from parapolicy.engine.lowered.fused_network import FusedNetwork
from parapolicy.engine.lowered.plan import WIDTH
from parapolicy.engine.lowered.transformer1d_plan import TransformerPlan
from parapolicy.networks.transformer1d import TransformerForDiffusion

MOST_KEYS = 64  # as in attention.h


class FusedTransformer1D(FusedNetwork):
    """The function of a :class:`TransformerForDiffusion` on a CPU, each call by one of C++.

    The memory's keys and values take the place of a UNet's FiLM values: those of the timestep by step, those of the
    observed steps by element. Each table has zeros where the other has its values.

    Args:
        network: its present weights are copied.
        dtype: see :class:`FusedUnet1D`.

    Raises:
        ValueError: the network has no decoder, its layers mix the memory's tokens, the library does not support its
            sizes, or its weights are not float32 on a CPU.
        OSError: there is no C++ compiler.
    """

    def __init__(self, network: TransformerForDiffusion, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        if network.decoder is None or network.cond_pos_emb is None or (network.n_cond_layers and not network.inpaints):
            raise ValueError("only a decoder whose memory's tokens do not depend on each other has a native form")
        dim, self.memory = network.pos_emb.shape[2], network.cond_pos_emb.shape[1]
        longest = max(network.pos_emb.shape[1], self.memory)
        if dim % WIDTH or longest > MOST_KEYS:
            raise ValueError(
                f"its tokens have {dim} numbers, and there are up to {longest} of them; expected a multiple of {WIDTH} "
                f"numbers and at most {MOST_KEYS} tokens"
            )
        self._prepare(network, network.head.weight, dtype)
        self.inpaints, self.film = network.inpaints, len(network.decoder.layers) * self.memory * 2 * dim

    def embed_steps(self, timesteps: Tensor) -> Tensor:
        """Keys and values of the timesteps' tokens: (T,) -> (T, F)."""
        values: Tensor = self._source[0].embed_steps(timesteps)
        return functional.pad(values, (0, 0, 0, self.memory - 1)).flatten(1)  # (T, layers, memory, 2 E)

    def embed_condition(self, observation: Mapping[str, Tensor]) -> Tensor:
        """Keys and values of the observed steps' tokens: {key: (B, To, …)} -> (B, F). For inpainting: (B, To, Do)."""
        values: Tensor = self._source[0].embed_condition(observation)
        return values if self.inpaints else functional.pad(values, (0, 0, 1, 0)).flatten(1)

    def _make_plan(self, length: int, channels: int) -> TransformerPlan:
        return TransformerPlan(self._source[0], self.memory, length, channels, self.dtype)
