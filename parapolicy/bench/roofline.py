"""Roofline model: a lower bound of a network call's time, from the machine's measured FLOP rate and bandwidth."""

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from parapolicy.engine.lowered.packed_linear import PackedLinear
from parapolicy.networks import Network
from parapolicy.spec import PolicySpec


@torch.inference_mode()
def measure_machine(network: Network) -> dict[str, float]:
    """Measure float32 matrix FLOP/s, and the bandwidth (bytes/s) of reading as many bytes as the weights have.

    Each is the best of several trials. Weights that fit into a cache are read from the cache.
    """
    device = next(network.parameters()).device
    a = torch.randn(2048, 2048, device=device)
    product = PackedLinear(torch.zeros_like(a), torch.zeros_like(a[0]), torch.float32)
    weights = torch.zeros(weight_bytes(network) // 4, device=device)
    rate = 2 * 2048**3 / min(seconds(lambda: product(a), device) for _ in range(10))
    bandwidth = 4 * weights.numel() / min(seconds(weights.sum, device) for _ in range(20))
    return {"flops_per_second": rate, "bytes_per_second": bandwidth}


def weight_bytes(network: Network) -> int:
    """Bytes of all parameters."""
    return sum(parameter.numel() * parameter.element_size() for parameter in network.parameters())


@torch.inference_mode()
def row_flops(network: Network, spec: PolicySpec) -> int:
    """Matrix FLOPs per network row, with its share of the timestep's and observation's embeddings."""
    device = next(network.parameters()).device
    observation = {key: torch.zeros(1, *shape, device=device) for key, shape in spec.obs_shapes.items()}
    x, timestep = torch.zeros(1, *spec.sample_shape, device=device), torch.zeros(1, dtype=torch.int64, device=device)
    with FlopCounterMode(display=False) as counter:
        network.predict(x, timestep, observation)
    return int(counter.get_total_flops())


def floor(calls: float, rows: float, flops: int, weights: int, machine: Mapping[str, Any]) -> float:
    """Lower bound in seconds of ``calls`` calls with ``rows`` rows in total, from FLOPs or from reading the weights."""
    return max(rows * flops / machine["flops_per_second"], calls * weights / machine["bytes_per_second"])


def seconds(call: Callable[[], Any], device: torch.device) -> float:
    """Wall time of a call, including the device's work."""
    begin = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begin
