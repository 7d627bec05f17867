"""What this machine can do, and what a network call must therefore cost: the floor that measurements stand beside."""

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from parapolicy.engine.product import Product
from parapolicy.networks import ConditionalUnet1D


@torch.inference_mode()
def measure_machine(network: ConditionalUnet1D) -> dict[str, float]:
    """This machine's own float32 matrix rate (FLOP/s), and bandwidth (bytes/s) for reading as much as the weights.

    Best of several. Weights that fit into a cache are read from there, call after call.
    """
    device = next(network.parameters()).device
    a = torch.randn(2048, 2048, device=device)
    product = Product(torch.zeros_like(a), torch.zeros_like(a[0]), torch.float32)
    weights = torch.zeros(weight_bytes(network) // 4, device=device)
    rate = 2 * 2048**3 / min(seconds(lambda: product(a), device) for _ in range(10))
    bandwidth = 4 * weights.numel() / min(seconds(weights.sum, device) for _ in range(20))
    return {"flops_per_second": rate, "bytes_per_second": bandwidth}


def weight_bytes(network: ConditionalUnet1D) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in network.parameters())


@torch.inference_mode()
def row_flops(network: ConditionalUnet1D, horizon: int, action_dim: int, condition_dim: int) -> int:
    """Matrix FLOPs of one row of a call."""
    device = next(network.parameters()).device
    with FlopCounterMode(display=False) as counter:
        network(
            torch.zeros(1, horizon, action_dim, device=device),
            torch.zeros(1, dtype=torch.int64, device=device),
            torch.zeros(1, condition_dim, device=device),
        )
    return int(counter.get_total_flops())


def floor(calls: float, rows: float, flops: int, weights: int, machine: Mapping[str, Any]) -> float:
    """Seconds that ``calls`` calls of ``rows`` rows altogether must take: their FLOPs, or reading the weights."""
    return max(rows * flops / machine["flops_per_second"], calls * weights / machine["bytes_per_second"])


def seconds(call: Callable[[], Any], device: torch.device) -> float:
    """Wall time of a call, the device's work included."""
    begin = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begin
