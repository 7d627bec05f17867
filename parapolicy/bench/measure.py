"""The measurements of ``python -m parapolicy.bench``, each a list of rows."""

import dataclasses
import resource
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from parapolicy.bench import machine as machines
from parapolicy.engine import Engine
from parapolicy.engine.sharded import start_workers
from parapolicy.evaluate.upstream import upstream_chunk
from parapolicy.planner import made_up_observations, make_plan
from parapolicy.policy import Chunk, Policy, load_policy
from parapolicy.schedule import make_schedule
from parapolicy.warm import WarmState

BATCHES = (1, 8, 16, 32, 40, 100)
ROBOTS = (1, 4, 16, 64)
WINDOWS = (5, 10, 20, 30, 40, 60, 100)
STEPS = (10, 20, 50, 100, 200, 1000)
HORIZONS = (8, 16, 32, 64)
PROCESSES = 2

Rows = list[dict[str, Any]]


def work(policy: Policy) -> tuple[int, int]:
    """Matrix FLOPs of one row, and bytes of the weights."""
    spec = policy.spec
    flops = machines.row_flops(policy.network, spec.horizon, spec.action_dim, spec.condition_dim)
    return flops, machines.weight_bytes(policy.network)


@torch.inference_mode()
def bench_network(policy: Policy, engines: Mapping[str, Engine], machine: Mapping[str, Any], repeats: int) -> Rows:
    """Median seconds of one call by number of rows and engine."""
    rows = []
    for batch in BATCHES:
        x = torch.randn(batch, policy.spec.horizon, policy.spec.action_dim, device=policy.device)
        calls = {name: _call(policy, engine, x) for name, engine in engines.items()}
        seconds = alternate(calls, repeats, policy.device, leading=2)
        floor = machines.floor(1, batch, *work(policy), machine)
        rows.append({"batch": batch, "floor": floor} | {k: statistics.median(v) for k, v in seconds.items()})
    return rows


def _call(policy: Policy, engine: Engine, x: Tensor) -> Callable[[], Tensor]:
    step = torch.arange(len(x), device=x.device) % len(policy.schedule)
    condition = torch.randn(1, policy.spec.condition_dim, device=x.device)
    return partial(engine.bind(policy.schedule.timesteps, condition), x, step, torch.zeros_like(step))


def bench_chunks(policy: Policy, engines: Mapping[str, Engine], machine: Mapping[str, Any], chunks: int) -> Rows:
    """Latency (ms) of one chunk at batch 1: upstream's way, ours step by step, and ours in parallel.

    The error is the largest absolute difference from the sequential chunk of the same engine and noise, normalised;
    for the warm start, whose noise is another, it is left out.
    """
    observations = made_up_observations(policy, chunks)
    turn = {"i": 0}
    flops, weights = work(policy)
    short = policy.with_schedule("ddim", 10)
    variants: dict[str, Callable[[], Any]] = {
        "upstream, DDPM-100": lambda: upstream_chunk(policy, observations[turn["i"] % chunks], turn["i"]),
        "upstream, DDIM-10": lambda: upstream_chunk(short, observations[turn["i"] % chunks], turn["i"]),
    }
    made: dict[str, list[Chunk]] = {}

    def sample(label: str, policy: Policy, warm: WarmState | None = None) -> None:
        i = turn["i"]
        made[label].append(policy.predict(observations[i % chunks], seed=i, warm=warm))

    def sample_warm(label: str, policy: Policy) -> None:
        sample(label, policy, made[label][-1].warm_state if made[label] else None)

    for name, engine in engines.items():
        base = dataclasses.replace(policy, engine=engine)
        ways = {
            "sequential": base.with_sampler("sequential"),
            "DDIM-10": base.with_schedule("ddim", 10).with_sampler("sequential"),
            "paradigms": base.with_sampler("paradigms"),
            "semi_implicit": base.with_sampler("semi_implicit"),
            "speculative": base.with_sampler("speculative"),
            "secant (default)": base.with_sampler("secant"),
            "auto": make_plan(base).apply(base),
            "secant, window 100, warm": base.with_sampler("secant", window=100),
        }
        for way, candidate in ways.items():
            label = f"{way}, {name}"
            made[label] = []
            variants[label] = partial(sample_warm if way.endswith("warm") else sample, label, candidate)
    seconds = alternate(variants, chunks, policy.device, lambda i: turn.update(i=i))
    rows = []
    for label, measured in seconds.items():
        p50, p95, p99 = np.percentile(np.asarray(measured) * 1e3, [50, 95, 99])
        row: dict[str, Any] = {"chunk": label}
        row |= {"p50": float(p50), "p95": float(p95), "p99": float(p99), "max": 1e3 * max(measured)}
        if label in made:
            kept = made[label][1:]  # the first was not timed
            rounds = statistics.fmean(float(chunk.stats.rounds) for chunk in kept)
            evaluations = statistics.fmean(float(chunk.stats.evaluations) for chunk in kept)
            row |= {"rounds": rounds, "evaluations": evaluations}
            row["floor"] = 1e3 * machines.floor(rounds, evaluations, flops, weights, machine)
            if label.startswith(("secant (", "auto", "semi", "paradigms")):
                exact = made["sequential, " + label.rpartition(", ")[2]][1:]
                pairs = zip(kept, exact, strict=True)
                row["error_p95"] = float(np.quantile([_error(policy, a, b) for a, b in pairs], 0.95))
        rows.append(row)
    return rows


def _error(policy: Policy, chunk: Chunk, exact: Chunk) -> float:
    a, b = (
        policy.normalizer.normalize("action", torch.as_tensor(c.trajectory, device=policy.device))
        for c in (chunk, exact)
    )
    return float((a - b).abs().max())


def bench_robots(policy: Policy, engines: Mapping[str, Engine], repeats: int) -> Rows:
    """Median seconds of one ``predict`` for several robots at once, with the default sampler."""
    rows = []
    for robots in ROBOTS:
        observations = made_up_observations(policy, robots)
        batch = {key: np.stack([observation[key] for observation in observations]) for key in observations[0]}
        policies = {name: dataclasses.replace(policy, engine=engine) for name, engine in engines.items()}
        calls = {name: partial(way.predict, batch) for name, way in policies.items()}
        seconds = alternate(calls, repeats, policy.device)
        rows.append({"robots": robots} | {name: statistics.median(values) for name, values in seconds.items()})
    return rows


def bench_scaling(policy: Policy, repeats: int) -> dict[str, Rows]:
    """Median seconds and mean rounds of a chunk by window and by number of steps T, and of a call by horizon.

    More than the trained number of steps are the same noise levels, more finely divided: timesteps between two trained
    ones, which the network's sinusoidal features take as they are.
    """
    observations = made_up_observations(policy, repeats)
    secant = policy.with_sampler("secant")
    windows: Rows = []
    for window in WINDOWS:
        windows.append({"window": window} | _chunks(policy.with_sampler("secant", window=window), observations))
    steps: Rows = []
    for count in STEPS:
        finer = _with_steps(secant, count)
        sequential = _chunks(finer.with_sampler("sequential"), observations[: max(1, min(5, repeats))])
        steps.append({"T": count, "sequential": sequential["seconds"]} | _chunks(finer, observations))
    engine = policy.engine
    assert engine is not None
    horizons: Rows = []
    with torch.inference_mode():
        for horizon in HORIZONS:
            row: dict[str, Any] = {"horizon": horizon}
            for batch in (1, 40):
                x = torch.randn(batch, horizon, policy.spec.action_dim, device=policy.device)
                call = {"call": _call(policy, engine, x)}
                row[f"{batch} rows"] = statistics.median(alternate(call, repeats, policy.device)["call"])
            horizons.append(row)
    return {"windows": windows, "steps": steps, "horizons": horizons}


def bench_devices(folder: Path, engine: str, device: torch.device, repeats: int) -> Rows:
    """Median seconds of a chunk on one device and split over two: GPUs, or processes of half the CPU's threads each."""
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, threads // PROCESSES))
    try:
        with start_workers(folder, PROCESSES, engine, device.type) as split:
            whole = load_policy(folder, device=str(split.device), engine=engine)
            observation = made_up_observations(whole, 1)[0]
            calls = {name: partial(way.predict, observation) for name, way in (("1", whole), (str(PROCESSES), split))}
            seconds = alternate(calls, repeats, split.device)
    finally:
        torch.set_num_threads(threads)
    return [{"devices": int(name), "seconds": statistics.median(values)} for name, values in seconds.items()]


def _with_steps(policy: Policy, count: int) -> Policy:
    trained = policy.spec.scheduler["num_train_timesteps"]
    if count <= trained:
        return policy.with_schedule(steps=count)
    shape = (policy.spec.horizon, policy.spec.action_dim)
    schedule = make_schedule({**policy.spec.scheduler, "num_train_timesteps": count}, sample_shape=shape)
    between = (schedule.timesteps + 1) * (trained / count) - 1
    return dataclasses.replace(policy, schedule=dataclasses.replace(schedule, timesteps=between).to(policy.device))


def _chunks(policy: Policy, observations: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    policy.predict(observations[0])
    stats = [policy.predict(observation, seed=seed).stats for seed, observation in enumerate(observations)]
    return {
        "seconds": statistics.median(s.seconds for s in stats),
        "rounds": statistics.fmean(float(s.rounds) for s in stats),
    }


def alternate(
    calls: Mapping[str, Callable[[], Any]],
    repeats: int,
    device: torch.device,
    begin: Callable[[int], Any] = lambda i: None,
    leading: int = 0,
) -> dict[str, list[float]]:
    """Seconds of every call, each once per repeat, in an order that rotates; one untimed call each before.

    Args:
        begin: called with the number of each repeat.
        leading: untimed calls before each timed one. A short call then finds its own weights in the caches, as it does
            in a process that has nothing else to do, and not those of the call before, which was another's.
    """
    labels = list(calls)
    seconds: dict[str, list[float]] = {label: [] for label in labels}
    for label in labels:
        calls[label]()
    for i in tqdm(range(repeats), unit="repeat", leave=False):
        begin(i)
        turn = i % len(labels)
        for label in labels[turn:] + labels[:turn]:
            for _ in range(leading):
                calls[label]()
            seconds[label].append(machines.seconds(calls[label], device))
    return seconds


def peak_memory(device: torch.device) -> dict[str, float]:
    """MiB that the process, and PyTorch on a GPU, have held at most."""
    peak = {"process": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}
    return peak | ({"gpu": torch.cuda.max_memory_allocated(device) / 2**20} if device.type == "cuda" else {})
