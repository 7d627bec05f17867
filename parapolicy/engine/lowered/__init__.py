"""Networks rewritten for speed, each computing the function of a trained one."""

from collections.abc import Callable

import torch

from parapolicy.engine.lowered.unet1d import LoweredUnet1D
from parapolicy.networks import Network
from parapolicy.networks.unet1d import ConditionalUnet1D

LOWERED: dict[type[Network], Callable[[ConditionalUnet1D, torch.dtype], Network]] = {ConditionalUnet1D: LoweredUnet1D}


def lower(network: Network, dtype: torch.dtype) -> Network:
    """The network in its lowered form; itself where it has none.

    Args:
        dtype: what the factors of matrix products are rounded to.

    Raises:
        ValueError: the network has no lowered form, and ``dtype`` is not float32.
    """
    if type(network) in LOWERED:
        return LOWERED[type(network)](network, dtype)  # type: ignore[arg-type]  # of its own key's type
    if dtype != torch.float32:
        raise ValueError(f"{type(network).__name__} has no form with {dtype} products; take engine 'compiled'")
    return network
