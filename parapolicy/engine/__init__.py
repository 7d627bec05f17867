"""How a network call is computed: engines by name."""

import os

import torch

from parapolicy.engine.base import Eager, Engine, Evaluate
from parapolicy.engine.compiled import Compiled
from parapolicy.engine.cuda_graph import CudaGraph
from parapolicy.networks import ConditionalUnet1D

__all__ = ["ENGINES", "Compiled", "CudaGraph", "Eager", "Engine", "Evaluate", "make_engine"]

ENGINES = ("auto", "eager", "compiled", "compiled_bfloat16", "cuda_graph", "sharded")


def make_engine(name: str, network: ConditionalUnet1D) -> Engine:
    """An engine by name.

    ``auto`` is ``sharded`` under ``torchrun`` with several processes, ``compiled_bfloat16`` on a CPU with instructions
    for it, and else ``compiled``.

    Raises:
        ValueError: an unknown name, ``sharded`` outside of ``torchrun``, or ``cuda_graph`` without a CUDA device.
    """
    if name not in ENGINES:
        raise ValueError(f"engine is {name!r}, expected one of {list(ENGINES)}")
    if name == "auto":
        on_cpu = next(network.parameters()).device.type == "cpu"
        alone = "compiled_bfloat16" if on_cpu and torch.cpu._is_avx512_bf16_supported() else "compiled"
        name = "sharded" if int(os.environ.get("WORLD_SIZE", 1)) > 1 else alone
    if name == "sharded":
        from parapolicy.engine.sharded import join

        return join(Eager(network), next(network.parameters()).device)
    if name == "eager":
        return Eager(network)
    if name == "cuda_graph":
        return CudaGraph(network)
    return Compiled(network, torch.bfloat16 if name == "compiled_bfloat16" else torch.float32)
