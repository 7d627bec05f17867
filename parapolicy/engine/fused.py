"""The whole network as one native call, on a CPU."""

import threading
import warnings
from collections.abc import Mapping

from torch import Tensor

from parapolicy.denoiser import Evaluate
from parapolicy.engine.base import Engine
from parapolicy.engine.compiled import Compiled
from parapolicy.engine.lowered.fused_unet1d import FusedUnet1D
from parapolicy.networks import Embedding, Network
from parapolicy.networks.unet1d import ConditionalUnet1D


class Fused(Engine):
    """The conditional UNet in C++, compiled in seconds at the first use on a machine; see ``fused.cpp``.

    It computes in float32: up to eight rows on one core, and more on as many as torch has threads. A row's result is
    the same to the bit whatever the number of rows and threads. For other networks, and without a C++ compiler,
    :class:`parapolicy.engine.Compiled` takes its place, with one warning.

    Args:
        told: leave the warning out, for a caller who did not ask for this engine.
    """

    name = "fused"

    def __init__(self, told: bool = False) -> None:
        self.told = told
        self._fused: tuple[Network, FusedUnet1D] | None = None  # of the newest network
        self._steps: tuple[Tensor, Embedding] | None = None  # of the newest schedule
        self._fallback: Compiled | None = None
        self._lock = threading.Lock()

    def bind(self, network: Network, timesteps: Tensor, observation: Mapping[str, Tensor]) -> Evaluate:
        with self._lock:
            fused = self._find(network)
            if fused is not None and (self._steps is None or self._steps[0] is not timesteps):
                self._steps = timesteps, fused.embed_steps(timesteps)
            steps = self._steps
        if fused is None or steps is None:
            assert self._fallback is not None
            return self._fallback.bind(network, timesteps, observation)
        condition, table = fused.embed_condition(observation), steps[1]
        return lambda x, step, element: fused(x, table, condition, step, element)

    def _find(self, network: Network) -> FusedUnet1D | None:
        """The network in C++; None where there is none."""
        if self._fallback is not None:
            return None
        if self._fused is None or self._fused[0] is not network:
            try:
                if not isinstance(network, ConditionalUnet1D):
                    raise ValueError(f"a {type(network).__name__} has no native form")
                self._fused, self._steps = (network, FusedUnet1D(network)), None
            except (ValueError, OSError) as error:
                if not self.told:
                    warnings.warn(
                        f"engine 'fused' does not work here, so 'compiled' takes its place: {error}", stacklevel=3
                    )
                self._fallback = Compiled()
                return None
        return self._fused[1]
