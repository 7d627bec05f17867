"""How a network call is computed: engines by name."""

import torch

from parapolicy.engine.base import Eager, Engine
from parapolicy.engine.compiled import Compiled
from parapolicy.engine.cuda_graph import CudaGraph
from parapolicy.engine.fused import Fused

__all__ = ["ENGINES", "Compiled", "CudaGraph", "Eager", "Engine", "Fused", "make_engine"]

ENGINES = ("auto", "eager", "compiled", "compiled_bfloat16", "fused", "cuda_graph", "sharded")


def make_engine(name: str, device: torch.device) -> Engine:
    """This process's engine by name; :func:`parapolicy.load_policy` joins those of several processes.

    ``auto`` is ``compiled_bfloat16`` on a CPU with instructions for it, ``fused`` on other CPUs, and else ``compiled``.

    Raises:
        ValueError: an unknown name, ``sharded``, which is of several processes, ``cuda_graph`` without CUDA, or
            ``fused`` with it.
    """
    if name not in ENGINES:
        raise ValueError(f"engine is {name!r}, expected one of {list(ENGINES)}")
    if name == "sharded":
        raise ValueError("engine 'sharded' joins several processes: load_policy(…, engine='sharded') under torchrun")
    if name == "auto" and device.type == "cpu" and not torch.cpu._is_avx512_bf16_supported():
        return Fused(told=True)
    if name == "auto":
        name = "compiled_bfloat16" if device.type == "cpu" else "compiled"
    if name == "eager":
        return Eager()
    if name == "fused":
        if device.type != "cpu":
            raise ValueError(f"engine 'fused' is for CPUs, and the policy is on {device}; take 'cuda_graph'")
        return Fused()
    if name == "cuda_graph":
        if device.type != "cuda":
            raise ValueError(f"engine 'cuda_graph' needs a CUDA device, and the policy is on {device}; take 'compiled'")
        return CudaGraph()
    return Compiled(torch.bfloat16 if name == "compiled_bfloat16" else torch.float32)
