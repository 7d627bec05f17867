"""Benchmark network calls and chunks on this machine against a roofline.

    parapolicy bench [CHECKPOINT] [--engines eager compiled] [--chunks 20] [--widen 4] [--scaling]

Writes bench.json and bench.png, and prints the tables. Calls alternate; percentiles are over ``--chunks`` chunks. The
observations are random, so the rounds differ slightly from closed loop. ``--widen 4`` multiplies the network's channels
by four without changing its function: the shipped policies then have the size of the published low-dimensional ones;
with 8, that of the published image policies.
"""

import argparse
import dataclasses
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from parapolicy.bench.benchmarks import (
    bench_chunks,
    bench_devices,
    bench_network,
    bench_robots,
    bench_scaling,
    peak_memory,
)
from parapolicy.bench.present import plot, print_tables
from parapolicy.bench.roofline import measure_machine
from parapolicy.bench.widen import widen
from parapolicy.engine import make_engine
from parapolicy.evaluate.measure.machine import describe_machine, describe_versions
from parapolicy.loading import load_policy, save_policy


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        "parapolicy bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", nargs="?", default="checkpoints/pusht_lowdim")
    parser.add_argument("--engines", nargs="+", default=["eager", "compiled"])
    parser.add_argument("--chunks", type=int, default=20)
    parser.add_argument("--widen", type=int, default=1, help="multiply the channels, with the same function")
    parser.add_argument(
        "--scaling", action="store_true", help="also measure by robots, window, steps, horizon and devices"
    )
    parser.add_argument("--device", default="auto")
    parser.add_argument("--output", type=Path, default=Path("outputs/bench"))
    arguments = parser.parse_args(given)
    for name in ("chunks", "widen"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name} is {getattr(arguments, name)}, expected at least 1")
    try:
        policy = load_policy(arguments.checkpoint, device=arguments.device, engine="eager")
        if arguments.widen > 1:
            policy = widen(policy, arguments.widen)
        engines = {name: make_engine(name, policy.device) for name in arguments.engines}
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error
    machine = measure_machine(policy.network) | describe_machine(policy.device)
    results: dict[str, Any] = {"machine": machine, "versions": describe_versions(), "checkpoint": arguments.checkpoint}
    results["parameters"] = sum(parameter.numel() for parameter in policy.network.parameters())
    arguments.output.mkdir(parents=True, exist_ok=True)

    def save() -> None:  # after each part: the next may be slow or fail
        results["peak_memory"] = peak_memory(policy.device)
        (arguments.output / "bench.json").write_text(json.dumps(results, indent=2) + "\n")

    results["network"] = bench_network(policy, engines, machine, 2 * arguments.chunks)
    results["chunks"] = bench_chunks(policy, engines, machine, arguments.chunks)
    save()
    if arguments.scaling:
        results["robots"] = bench_robots(policy, engines, max(1, arguments.chunks // 5))
        best = dataclasses.replace(policy, engine=engines[arguments.engines[-1]])
        results["scaling"] = bench_scaling(best, max(1, arguments.chunks // 2))
        save()
        if policy.device.type == "cpu" or torch.cuda.device_count() > 1:
            with tempfile.TemporaryDirectory() as folder:  # the other process loads it, also when widened
                save_policy(policy, folder)
                measured = bench_devices(Path(folder), arguments.engines[-1], policy.device, arguments.chunks)
            results["scaling"]["devices"] = measured
            save()
    plot(results, arguments.engines, arguments.output / "bench.png")
    print_tables(results, arguments.engines)
    print(f"wrote {arguments.output}")


if __name__ == "__main__":
    main()
