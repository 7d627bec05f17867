"""The whole network as one native call, on a CPU."""

import threading
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from parapolicy.denoiser import Denoiser, Evaluate
from parapolicy.engine.base import Engine
from parapolicy.engine.compiled import Compiled
from parapolicy.engine.lowered.fused_network import FusedNetwork
from parapolicy.engine.lowered.fused_transformer1d import FusedTransformer1D
from parapolicy.engine.lowered.fused_unet1d import FusedUnet1D
from parapolicy.engine.native_library import load_library
from parapolicy.engine.native_loop import sample_natively
from parapolicy.networks import Network
from parapolicy.networks.transformer1d import TransformerForDiffusion
from parapolicy.networks.unet1d import ConditionalUnet1D
from parapolicy.samplers import Sample, Sampler

NATIVE: dict[type[Network], Callable[[Any, torch.dtype], FusedNetwork]] = {
    ConditionalUnet1D: FusedUnet1D,
    TransformerForDiffusion: FusedTransformer1D,
}
CACHED = 8  # schedules whose FiLM values are kept


@dataclass(frozen=True)
class Bound:
    """The network at a schedule's steps and a batch's condition."""

    network: FusedNetwork
    steps: Tensor
    condition: Tensor

    def __call__(self, x: Tensor, step: Tensor, element: Tensor) -> Tensor:
        return self.network(x, self.steps, self.condition, step, element)


class Fused(Engine):
    """The conditional UNet or the transformer in C++, from the wheel or compiled in seconds at the first use.

    See ``fused.cpp``. A call uses as many threads as torch; see ``work_sharing.h``. A row's result is the same to the
    bit for all numbers of rows and threads. For other networks, and without a library and a compiler, it uses
    :class:`parapolicy.engine.Compiled` instead and warns once.

    Args:
        dtype: what the factors of products are rounded to. ``torch.bfloat16`` needs a processor with bfloat16
            instructions; on others it uses float32 and warns once.
        told: suppress the warnings, for a caller who did not ask for this engine.
    """

    def __init__(self, dtype: torch.dtype = torch.float32, told: bool = False) -> None:
        self.name = "fused_bfloat16" if dtype == torch.bfloat16 else "fused"
        self.dtype, self.told = dtype, told
        self._fused: tuple[Network, FusedNetwork] | None = None  # of the newest network
        self._steps: dict[Tensor, Tensor] = {}  # timesteps -> their FiLM values, of the newest schedules
        self._fallback: Compiled | None = None
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        return Fused, (self.dtype, self.told)  # a copy, or another process, prepares its network anew

    def bind(self, network: Network, timesteps: Tensor, observation: Mapping[str, Tensor]) -> Evaluate:
        with self._lock:
            fused = self._find(network)
            if fused is None:
                assert self._fallback is not None
                return self._fallback.bind(network, timesteps, observation)
            steps = self._steps.get(timesteps)  # by identity
            if steps is None:
                if len(self._steps) == CACHED:
                    del self._steps[next(iter(self._steps))]
                steps = self._steps[timesteps] = fused.embed_steps(timesteps)
        return Bound(fused, steps, fused.embed_condition(observation))

    def run(
        self,
        sampler: Sampler,
        denoiser: Denoiser,
        noise: Tensor,
        stop: Callable[[], bool] | None = None,
        guess: Tensor | None = None,
    ) -> Sample:
        """As :meth:`parapolicy.engine.Engine.run`; entirely in C++ if the sampler has a native loop."""
        bound, sample = denoiser.evaluate, None
        if isinstance(bound, Bound):
            sample = sample_natively(bound.network, bound.steps, bound.condition, sampler, denoiser, noise, stop)
        return super().run(sampler, denoiser, noise, stop, guess) if sample is None else sample

    def _find(self, network: Network) -> FusedNetwork | None:
        """The network in C++, or None if it has no native form."""
        if self._fallback is not None:
            return None
        if self._fused is None or self._fused[0] is not network:
            try:
                if type(network) not in NATIVE:
                    raise ValueError(f"a {type(network).__name__} has no native form")
                self._fused, self._steps = (network, NATIVE[type(network)](network, self._find_dtype())), {}
            except (ValueError, OSError) as error:
                self._fallback = Compiled(self.dtype)
                self._warn(self._fallback.name, error)
                return None
        return self._fused[1]

    def _find_dtype(self) -> torch.dtype:
        if self.dtype == torch.bfloat16 and not load_library().parapolicy_multiplies_bfloat16():
            self._warn("fused", "this processor or the compiler has no bfloat16 product instructions")
            self.dtype = torch.float32
        return self.dtype

    def _warn(self, substitute: str, reason: object) -> None:
        if not self.told:
            told = f"engine {self.name!r} does not work here, so {substitute!r} is used instead: {reason}"
            warnings.warn(told, stacklevel=4)
