"""Engines by name: how a network call is computed."""

import torch

from parapolicy.engine.base import Deadline, Eager, Engine
from parapolicy.engine.compiled import Compiled
from parapolicy.engine.cuda_graph import CudaGraph
from parapolicy.engine.fused import Fused
from parapolicy.engine.openvino import OpenVino

__all__ = ["ENGINES", "Compiled", "CudaGraph", "Deadline", "Eager", "Engine", "Fused", "OpenVino", "make_engine"]

ENGINES = (
    "auto",
    "eager",
    "compiled",
    "compiled_bfloat16",
    "fused",
    "fused_bfloat16",
    "openvino",
    "cuda_graph",
    "sharded",
)


def make_engine(name: str, device: torch.device) -> Engine:
    """An engine of this process by name; :func:`parapolicy.load_policy` makes the one of several processes.

    ``auto`` is ``fused_bfloat16`` on a CPU with bfloat16 instructions, ``fused`` on other CPUs, and ``compiled``
    elsewhere.

    Raises:
        ValueError: an unknown name; ``sharded``, which needs several processes; ``cuda_graph`` without CUDA; ``fused``
            or ``openvino`` with CUDA; or ``openvino`` if it is not installed.
    """
    if name not in ENGINES:
        raise ValueError(f"engine is {name!r}, expected one of {list(ENGINES)}")
    if name == "sharded":
        raise ValueError("engine 'sharded' needs several processes: load_policy(…, engine='sharded') under torchrun")
    if name == "auto" and device.type == "cpu":
        return Fused(torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else torch.float32, told=True)
    if name == "eager":
        return Eager()
    dtype = torch.bfloat16 if name.endswith("_bfloat16") else torch.float32
    if name == "openvino" or name.startswith("fused"):
        if device.type != "cpu":
            raise ValueError(f"engine {name!r} needs a CPU, but the policy is on {device}; take 'cuda_graph'")
        return OpenVino() if name == "openvino" else Fused(dtype)
    if name == "cuda_graph":
        if device.type != "cuda":
            raise ValueError(f"engine 'cuda_graph' needs a CUDA device, but the policy is on {device}; take 'compiled'")
        return CudaGraph()
    return Compiled(dtype)
