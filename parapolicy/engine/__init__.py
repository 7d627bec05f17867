"""How a network call is computed: engines by name."""

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
    """This process's engine by name; :func:`parapolicy.load_policy` joins those of several processes.

    ``auto`` is ``fused_bfloat16`` on a CPU with instructions for it, ``fused`` on other CPUs, and else ``compiled``.

    Raises:
        ValueError: an unknown name, ``sharded``, which is of several processes, ``cuda_graph`` without CUDA, or
            ``fused`` or ``openvino`` with it, or ``openvino`` where it is not installed.
    """
    if name not in ENGINES:
        raise ValueError(f"engine is {name!r}, expected one of {list(ENGINES)}")
    if name == "sharded":
        raise ValueError("engine 'sharded' joins several processes: load_policy(…, engine='sharded') under torchrun")
    if name == "auto" and device.type == "cpu":
        return Fused(torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else torch.float32, told=True)
    if name == "eager":
        return Eager()
    dtype = torch.bfloat16 if name.endswith("_bfloat16") else torch.float32
    if name == "openvino" or name.startswith("fused"):
        if device.type != "cpu":
            raise ValueError(f"engine {name!r} is for CPUs, and the policy is on {device}; take 'cuda_graph'")
        return OpenVino() if name == "openvino" else Fused(dtype)
    if name == "cuda_graph":
        if device.type != "cuda":
            raise ValueError(f"engine 'cuda_graph' needs a CUDA device, and the policy is on {device}; take 'compiled'")
        return CudaGraph()
    return Compiled(dtype)
