"""Measure what a network call and a chunk cost on this machine, beside the floor.

    python -m parapolicy.bench [CHECKPOINT] [--engines eager compiled] [--chunks 20] [--large] [--output outputs/bench]

Writes bench.json and bench.png, and prints the tables. Orders alternate, medians are over ``--chunks`` chunks. The
observations are made up; rounds differ a little from those of a closed loop.
"""

import argparse
import dataclasses
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from parapolicy.engine import Engine, make_engine
from parapolicy.evaluate.upstream import upstream_chunk
from parapolicy.networks import ConditionalUnet1D
from parapolicy.planner import made_up_observations
from parapolicy.policy import Policy, load_policy

BATCHES = (1, 8, 16, 32, 40, 100)
ROBOTS = (1, 4, 16, 64)


def measure_machine(device: torch.device) -> dict[str, float]:
    """This machine's own matrix rate (FLOP/s) and bandwidth (bytes/s), float32, best of several."""
    a = torch.randn(2048, 2048, device=device)
    b = torch.empty(64 * 2**20, device=device)
    rate = 2 * 2048**3 / min(_time(lambda: a @ a, device) for _ in range(5))
    bandwidth = 2 * 4 * b.numel() / min(_time(lambda: b.clone(), device) for _ in range(5))
    return {"flops_per_second": rate, "bytes_per_second": bandwidth}


def network_floor(network: ConditionalUnet1D, inputs: Sequence[torch.Tensor], machine: Mapping[str, float]) -> float:
    """Seconds that one call must take: its matrix FLOPs at the machine's rate, or reading its weights once."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        network(*inputs)
    weights = sum(parameter.numel() * parameter.element_size() for parameter in network.parameters())
    return max(counter.get_total_flops() / machine["flops_per_second"], weights / machine["bytes_per_second"])


@torch.inference_mode()
def bench_network(
    policy: Policy, engines: Mapping[str, Engine], machine: Mapping[str, float], repeats: int
) -> list[dict[str, Any]]:
    """Median seconds of one call by batch size and engine, orders alternating."""
    rows = []
    spec, device = policy.spec, policy.device
    for batch in BATCHES:
        x = torch.randn(batch, spec.horizon, spec.action_dim, device=device)
        step = torch.arange(batch, device=device) % len(policy.schedule)
        element = torch.zeros_like(step)
        condition = torch.randn(1, spec.condition_dim, device=device)
        calls = {name: engine.bind(policy.schedule.timesteps, condition) for name, engine in engines.items()}
        seconds = alternate({name: partial(call, x, step, element) for name, call in calls.items()}, repeats)
        inputs = (x, policy.schedule.timesteps[step], condition.expand(batch, -1))
        floor = network_floor(policy.network, inputs, machine)
        rows.append({"batch": batch, "floor": floor} | {k: statistics.median(v) for k, v in seconds.items()})
    return rows


def bench_chunks(policy: Policy, engines: Mapping[str, Engine], chunks: int) -> dict[str, dict[str, float]]:
    """Latency percentiles (ms) at batch 1 of upstream's way, of ours sequentially, and of ours in parallel."""
    observations = made_up_observations(policy, chunks)
    current = {"i": 0}

    def observation() -> Mapping[str, Any]:
        return observations[current["i"] % chunks]

    def sample(policy: Policy) -> None:
        policy.predict(observation(), seed=current["i"])

    short = policy.with_schedule("ddim", 10)
    variants: dict[str, Callable[[], Any]] = {
        "upstream, DDPM-100": lambda: upstream_chunk(policy, observation(), current["i"]),
        "upstream, DDIM-10": lambda: upstream_chunk(short, observation(), current["i"]),
    }
    for name, engine in engines.items():
        base = dataclasses.replace(policy, engine=engine)
        ways = {
            "sequential": base.with_sampler("sequential"),
            "DDIM-10 sequential": base.with_schedule("ddim", 10).with_sampler("sequential"),
            "paradigms": base.with_sampler("paradigms"),
            "secant 20": base.with_sampler("secant", window=20),
            "secant": base.with_sampler("secant"),
        }
        for label, way in ways.items():
            variants[f"{label}, {name}"] = partial(sample, way)
    seconds = alternate(variants, chunks, lambda i: current.update(i=i))
    rows = {}
    for label, measured in seconds.items():
        p50, p95, p99 = np.percentile(np.asarray(measured) * 1e3, [50, 95, 99])
        rows[label] = {"p50": float(p50), "p95": float(p95), "p99": float(p99), "max": 1e3 * max(measured)}
    return rows


def bench_robots(policy: Policy, engines: Mapping[str, Engine], repeats: int) -> list[dict[str, Any]]:
    """Median seconds of one ``predict`` for several robots at once, with the default sampler."""
    rows = []
    for robots in ROBOTS:
        observations = made_up_observations(policy, robots)
        batch = {key: np.stack([observation[key] for observation in observations]) for key in observations[0]}
        policies = {name: dataclasses.replace(policy, engine=engine) for name, engine in engines.items()}
        seconds = alternate({name: partial(way.predict, batch) for name, way in policies.items()}, repeats)
        rows.append({"robots": robots} | {name: statistics.median(values) for name, values in seconds.items()})
    return rows


def alternate(
    calls: Mapping[str, Callable[[], Any]], repeats: int, begin: Callable[[int], Any] = lambda i: None
) -> dict[str, list[float]]:
    """Seconds of every call, each once per repeat, in an order that rotates; one untimed call each before."""
    labels = list(calls)
    seconds: dict[str, list[float]] = {label: [] for label in labels}
    for label in labels:
        calls[label]()
    for i in tqdm(range(repeats), unit="repeat", leave=False):
        begin(i)
        turn = i % len(labels)
        for label in labels[turn:] + labels[:turn]:
            seconds[label].append(_time(calls[label], None))
    return seconds


def _time(call: Callable[[], Any], device: torch.device | None) -> float:
    begin = time.perf_counter()
    call()
    if torch.cuda.is_available() and (device is None or device.type == "cuda"):
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def print_tables(results: Mapping[str, Any], engines: Sequence[str]) -> None:
    from rich.console import Console
    from rich.table import Table

    machine = results["machine"]
    title = (
        f"{results['parameters'] / 1e6:.2f} M parameters, "
        + "one network call, ms; floor: {:.0f} GFLOP/s, {:.1f} GB/s".format(
            machine["flops_per_second"] / 1e9, machine["bytes_per_second"] / 1e9
        )
    )
    network = Table("batch", "floor", *(f"{name} (× floor)" for name in engines), title=title)
    for row in results["network"]:
        cells = (f"{1e3 * row[name]:.2f} ({row[name] / row['floor']:.1f}×)" for name in engines)
        network.add_row(str(row["batch"]), f"{1e3 * row['floor']:.2f}", *cells)
    tables = [network]
    if "chunks" in results:
        chunk = Table("chunk", "p50", "p95", "p99", "max", "upstream / p50", title="one chunk, ms at batch 1")
        baseline = results["chunks"]["upstream, DDPM-100"]["p50"]
        for label, row in results["chunks"].items():
            cells = (f"{row[key]:.1f}" for key in ("p50", "p95", "p99", "max"))
            chunk.add_row(label, *cells, f"{baseline / row['p50']:.1f}×")
        robots = Table("robots", *engines, title="one call for several robots, default sampler, ms")
        for row in results["robots"]:
            robots.add_row(str(row["robots"]), *(f"{1e3 * row[name]:.0f}" for name in engines))
        tables += [chunk, robots]
    console = Console()
    for table in tables:
        console.print(table)


def plot(results: Mapping[str, Any], engines: Sequence[str], path: Path) -> None:
    """Cost of a network call against batch, with the floor."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 4.0), layout="constrained")
    batches = [row["batch"] for row in results["network"]]
    for name in (*engines, "floor"):
        style = "k--" if name == "floor" else "o-"
        axes.plot(batches, [1e3 * row[name] for row in results["network"]], style, label=name)
    axes.set(xscale="log", yscale="log", xlabel="rows per network call", ylabel="ms")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="?", default="checkpoints/pusht_lowdim")
    parser.add_argument("--engines", nargs="+", default=["eager", "compiled"])
    parser.add_argument("--chunks", type=int, default=20)
    parser.add_argument("--large", action="store_true", help="network calls only, of the published 65 M-parameter size")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--output", type=Path, default=Path("outputs/bench"))
    arguments = parser.parse_args()
    if arguments.chunks < 1:
        parser.error(f"--chunks is {arguments.chunks}, expected at least 1")
    try:
        policy = load_policy(arguments.checkpoint, device=arguments.device)
        if arguments.large:
            network = ConditionalUnet1D(policy.spec.action_dim, policy.spec.condition_dim)
            policy = dataclasses.replace(policy, network=network.requires_grad_(False).to(policy.device), engine=None)
        engines = {name: make_engine(name, policy.network) for name in arguments.engines}
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error
    from parapolicy.evaluate.report import describe_machine, describe_versions

    machine = measure_machine(policy.device) | describe_machine(policy.device)
    results: dict[str, Any] = {"machine": machine, "versions": describe_versions(), "checkpoint": arguments.checkpoint}
    results["parameters"] = sum(parameter.numel() for parameter in policy.network.parameters())
    results["network"] = bench_network(policy, engines, machine, 3 * arguments.chunks)
    if not arguments.large:  # an untrained network's rounds mean nothing
        results["chunks"] = bench_chunks(policy, engines, arguments.chunks)
        results["robots"] = bench_robots(policy, engines, max(1, arguments.chunks // 5))
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "bench.json").write_text(json.dumps(results, indent=2) + "\n")
    plot(results, arguments.engines, arguments.output / "bench.png")
    print_tables(results, arguments.engines)
    print(f"wrote {arguments.output}")


if __name__ == "__main__":
    main()
