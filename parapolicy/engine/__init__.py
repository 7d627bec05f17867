"""How a network call is computed: engines by name."""

import torch

from parapolicy.engine.base import Eager, Engine, Evaluate
from parapolicy.engine.compiled import Compiled
from parapolicy.engine.cuda_graph import CudaGraph
from parapolicy.networks import ConditionalUnet1D

__all__ = ["ENGINES", "Compiled", "CudaGraph", "Eager", "Engine", "Evaluate", "make_engine"]

ENGINES = ("auto", "eager", "compiled", "compiled_bfloat16", "cuda_graph", "sharded")


def make_engine(name: str, network: ConditionalUnet1D) -> Engine:
    """This process's engine by name; :func:`parapolicy.load_policy` joins those of several processes.

    ``auto`` is ``compiled_bfloat16`` on a CPU with instructions for it, and else ``compiled``.

    Raises:
        ValueError: an unknown name, ``sharded``, which is of several processes, or ``cuda_graph`` without CUDA.
    """
    if name not in ENGINES:
        raise ValueError(f"engine is {name!r}, expected one of {list(ENGINES)}")
    if name == "sharded":
        raise ValueError("engine 'sharded' joins several processes: load_policy(…, engine='sharded') under torchrun")
    if name == "auto":
        on_cpu = next(network.parameters()).device.type == "cpu"
        name = "compiled_bfloat16" if on_cpu and torch.cpu._is_avx512_bf16_supported() else "compiled"
    if name == "eager":
        return Eager(network)
    if name == "cuda_graph":
        return CudaGraph(network)
    return Compiled(network, torch.bfloat16 if name == "compiled_bfloat16" else torch.float32)
