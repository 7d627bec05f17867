"""All measurements for a GPU, in at most nine minutes and without a network.

    python -m tools.results_gpu [--output outputs/gpu] [--minutes 7] [--dry]
    python -m tools.results_gpu --packages

Writes ``gpu.json``, complete after every part; `make results ARGS=--fill` makes the block of docs/performance.md from
it. A failed part is named in it and the others continue; parts that do not start in time are left out. ``--dry`` runs
tiny sizes on the CPU. ``--packages`` prints the packages needed besides torch and its own, for ``pip wheel``.
"""

import argparse
import dataclasses
import json
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from parapolicy.bench import benchmarks
from parapolicy.bench.roofline import measure_machine
from parapolicy.bench.widen import widen
from parapolicy.engine import Engine, make_engine
from parapolicy.evaluate.measure.chunk_error import normalized_error
from parapolicy.evaluate.measure.machine import describe_git, describe_machine, describe_versions
from parapolicy.loading import load_policy, save_policy
from parapolicy.networks import build_network
from parapolicy.planner import made_up_observations
from parapolicy.policy import Policy

ROOT = Path(__file__).resolve().parent.parent
NEEDED = ("numpy", "safetensors", "diffusers", "tqdm", "pytest", "pytest-timeout", "hypothesis", "hydra-core")
CUDA_TESTS = (
    "tests/test_engine.py::test_captured_rounds_give_the_same_chunks",
    "tests/test_policy.py::test_cuda_agrees_with_the_cpu",
)
SIZES = {"pusht": ("pusht_lowdim", 1), "published": ("pusht_lowdim", 4), "image": ("pusht_image", 8)}  # times channels
CHUNKS = {"pusht": 20, "published": 12, "image": 6}
TINY = {"BATCHES": (1, 4), "ROBOTS": (1, 2), "WINDOWS": (20,), "STEPS": (5,), "HORIZONS": (8,)}  # of a dry run
TINY_STEPS, TINY_MACHINE = 30, {"flops_per_second": 1e11, "bytes_per_second": 1e10}


def packages() -> list[str]:
    """``name==version`` of :data:`NEEDED` and its requirements, without those of torch."""
    from importlib.metadata import PackageNotFoundError, distribution

    from packaging.requirements import Requirement

    def closure(names: tuple[str, ...]) -> dict[str, str]:
        found: dict[str, str] = {}
        waiting = list(names)
        while waiting:
            name = waiting.pop().lower().replace("_", "-")
            try:
                about = None if name in found else distribution(name)
            except PackageNotFoundError:  # for another system or Python
                about = None
            if about is not None:
                found[name] = about.version
                wanted = [Requirement(text) for text in about.requires or ()]
                waiting += [one.name for one in wanted if one.marker is None or one.marker.evaluate({"extra": ""})]
        return found

    needed, brought = closure(NEEDED), closure(("torch",))
    return sorted(f"{name}=={version}" for name, version in needed.items() if name not in brought)


def samplers(base: Policy) -> dict[str, Policy]:
    """The timed samplers: cold, and also warm if a sampler gains by it."""
    return {
        "sequential": base.with_sampler("sequential"),
        "DDIM-10": base.with_schedule("ddim", 10).with_sampler("sequential"),
        "DDIM-16": base.with_schedule("ddim", 16).with_sampler("sequential"),
        "secant (window 40)": base.with_sampler("secant"),
        "secant (window 100)": base.with_sampler("secant", window=100),
        "secant, window 100, warm": base.with_sampler("secant", window=100),
        "collocation (19 nodes)": base.with_sampler("collocation", nodes=19),
        "collocation (24 nodes)": base.with_sampler("collocation", nodes=24),
        "collocation, 19 nodes, warm": base.with_sampler("collocation", nodes=19),
    }


def make_policy(size: str, device: torch.device, dry: bool) -> Policy:
    """The shipped policy, or the same function in a published size; in a dry run a tiny policy with few steps."""
    name, factor = SIZES[size]
    policy = load_policy(ROOT / "checkpoints" / name, device=str(device), engine="eager")
    if dry:
        torch.manual_seed(0)
        scheduler = {**policy.spec.scheduler, "num_train_timesteps": TINY_STEPS}
        network = {**policy.spec.network, "down_dims": [8, 16]}
        spec = dataclasses.replace(policy.spec, network=network, scheduler=scheduler, inference={})
        built = build_network(spec).requires_grad_(False).eval()
        return dataclasses.replace(policy, spec=spec, network=built).with_schedule("ddpm")
    return widen(policy, factor) if factor > 1 else policy


def measure_size(size: str, device: torch.device, dry: bool) -> dict[str, Any]:
    """Calls and chunks of one size, as in ``parapolicy bench``. TF32 is off, torch's default."""
    policy, engines = make_policy(size, device, dry), make_engines(device, dry)
    machine = (TINY_MACHINE if dry else measure_machine(policy.network)) | describe_machine(device)
    chunks = 1 if dry else CHUNKS[size]
    captured = [name for name in engines if name == "cuda_graph"]  # rounds, not single calls
    called = {name: engine for name, engine in engines.items() if name not in captured}
    result: dict[str, Any] = {
        "parameters": sum(parameter.numel() for parameter in policy.network.parameters()),
        "machine": machine,
        "network": benchmarks.bench_network(policy, called, machine, 2 * chunks),
        "chunks": benchmarks.bench_chunks(policy, engines, machine, chunks, samplers),
    }
    return result | {"peak_memory": benchmarks.peak_memory(device)}


def make_engines(device: torch.device, dry: bool) -> dict[str, Engine]:
    names = ("eager",) if dry else ("eager", "compiled", "cuda_graph")
    return {name: make_engine(name, device) for name in names}


def measure_scaling(device: torch.device, dry: bool) -> dict[str, Any]:
    """Times by robots, and by window, steps and horizon, of the smallest size."""
    policy, engines = make_policy("pusht", device, dry), make_engines(device, dry)
    last = dataclasses.replace(policy, engine=list(engines.values())[-1])
    repeats = 1 if dry else 5
    return {
        "robots": benchmarks.bench_robots(policy, {last.engine.name: last.engine}, repeats),
        "scaling": benchmarks.bench_scaling(last, repeats),
    }


def measure_devices(device: torch.device, dry: bool) -> dict[str, Any]:
    """A chunk on one device, and split over all of them by NCCL (on a CPU by gloo)."""
    count = torch.cuda.device_count() if device.type == "cuda" else 1
    engine = "eager" if dry else "compiled"
    with tempfile.TemporaryDirectory() as folder:
        save_policy(make_policy("pusht", device, dry), folder)
        rows = benchmarks.bench_devices(Path(folder), engine, device, 1 if dry else 10, count)
    return {"engine": engine, "backend": "nccl" if device.type == "cuda" else "gloo", "devices": rows}


def measure_agreement(device: torch.device, dry: bool) -> dict[str, float]:
    """Engine -> largest difference of the sequential chunk from the CPU's, normalised, over a few seeds."""
    policy = make_policy("pusht", device, dry).with_sampler("sequential")
    cpu = torch.device("cpu")
    exact = dataclasses.replace(
        make_policy("pusht", cpu, dry).with_sampler("sequential"), engine=make_engine("eager", cpu)
    )
    observations = made_up_observations(exact, 1 if dry else 4)
    found = {}
    for name, engine in make_engines(device, dry).items():
        way = dataclasses.replace(policy, engine=engine)
        pairs = [(way.predict(o, seed=i), exact.predict(o, seed=i)) for i, o in enumerate(observations)]
        found[name] = max(float(normalized_error(exact, a.trajectory, b.trajectory)) for a, b in pairs)
    return found


def run_tests(device: torch.device, dry: bool) -> dict[str, Any]:
    """The tests that need CUDA; a dry run only says so."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short", *CUDA_TESTS]
    if dry:
        return {"passed": None, "output": f"not run on the {device}"}
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=180)
    return {"passed": ended.returncode == 0, "output": ended.stdout[-4000:] + ended.stderr[-1000:]}


def measure(output: Path, device: torch.device, minutes: float, dry: bool) -> dict[str, Any]:
    """Run the parts that fit into the time; returns the content of ``gpu.json``."""
    first, *others = (partial(measure_size, size) for size in SIZES)
    parts: dict[str, Callable[[torch.device, bool], Mapping[str, Any]]] = {
        next(iter(SIZES)): first,
        "tests": run_tests,
        "agreement": measure_agreement,
        "scaling": measure_scaling,
        "devices": measure_devices,
        **dict(zip(list(SIZES)[1:], others, strict=True)),
    }
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if device.type == "cuda" else []
    results: dict[str, Any] = {
        "dry": dry,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "git": describe_git(ROOT),
        "devices": devices,
        "machine": describe_machine(device),
        "versions": describe_versions(),
        "parts": {},
        "left_out": [],
    }
    output.mkdir(parents=True, exist_ok=True)
    begin = time.monotonic()
    for name, part in parts.items():
        started = time.monotonic()
        if started - begin > 60 * minutes:
            results["left_out"].append(name)
            continue
        try:
            results["parts"][name] = dict(part(device, dry))
        except Exception:  # any error: continue with the other parts
            results["parts"][name] = {"error": traceback.format_exc()}
        results["parts"][name]["seconds"] = time.monotonic() - started
        print(
            f"{name}: {'failed' if 'error' in results['parts'][name] else 'done'}, {time.monotonic() - started:.0f} s"
        )
        (output / "gpu.json").write_text(json.dumps(results, indent=2) + "\n")
        if device.type == "cuda":
            torch.cuda.empty_cache()
    (output / "gpu.json").write_text(json.dumps(results, indent=2) + "\n")
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("outputs/gpu"))
    parser.add_argument("--minutes", type=float, default=7.0, help="time after which no further part starts")
    parser.add_argument("--dry", action="store_true", help="tiny sizes on the CPU")
    parser.add_argument("--packages", action="store_true", help="print what is needed besides torch")
    given = parser.parse_args()
    if given.packages:
        print("\n".join(packages()))
        return
    if not given.dry and not torch.cuda.is_available():
        raise SystemExit("error: no CUDA device is available; --dry runs tiny sizes on the CPU")
    if given.dry:
        for name, value in TINY.items():
            setattr(benchmarks, name, value)
    results = measure(given.output, torch.device("cpu" if given.dry else "cuda:0"), given.minutes, given.dry)
    failed = [name for name, part in results["parts"].items() if "error" in part or part.get("passed") is False]
    print(f"wrote {given.output / 'gpu.json'}; left out: {', '.join(results['left_out']) or 'nothing'}")
    if failed:
        raise SystemExit(f"error: {', '.join(failed)} failed; see gpu.json")


if __name__ == "__main__":
    main()
