"""Networks rewritten for speed. Each computes the same function as a trained network."""

from collections.abc import Callable
from typing import Any

import torch

from parapolicy.engine.lowered.transformer1d import lower_transformer1d
from parapolicy.engine.lowered.unet1d import LoweredUnet1D
from parapolicy.networks import Network
from parapolicy.networks.transformer1d import TransformerForDiffusion
from parapolicy.networks.unet1d import ConditionalUnet1D

LOWERED: dict[type[Network], Callable[[Any, torch.dtype], Network]] = {
    ConditionalUnet1D: LoweredUnet1D,
    TransformerForDiffusion: lower_transformer1d,
}


def lower(network: Network, dtype: torch.dtype) -> Network:
    """The network in its lowered form, or the network itself if it has none.

    Args:
        network: as it was trained.
        dtype: what the factors of matrix products are rounded to.

    Raises:
        ValueError: the network has no lowered form, and ``dtype`` is not float32.
    """
    if type(network) in LOWERED:
        return LOWERED[type(network)](network, dtype)
    if dtype != torch.float32:
        raise ValueError(f"{type(network).__name__} has no form with {dtype} products; take engine 'compiled'")
    return network
