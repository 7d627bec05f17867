"""The measurements of ``python -m parapolicy.bench``, each a list of records."""

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

from parapolicy.bench import roofline
from parapolicy.engine import Engine
from parapolicy.evaluate.measure.chunk_error import normalized_error
from parapolicy.evaluate.measure.upstream import upstream_chunk
from parapolicy.launch import start_workers
from parapolicy.loading import load_policy
from parapolicy.observation import normalize_observation, stack_observations
from parapolicy.planner import made_up_observations, make_plan
from parapolicy.policy import Chunk, Policy
from parapolicy.schedule import make_schedule
from parapolicy.warm import WarmState

BATCHES = (1, 8, 16, 32, 40, 100)
ROBOTS = (1, 4, 16, 64)
ROBOT_SAMPLERS = ("secant", "collocation", "sequential")
WINDOWS = (5, 10, 20, 30, 40, 60, 100)
STEPS = (10, 20, 50, 100, 200, 1000)
HORIZONS = (8, 16, 32, 64)
PROCESSES = 2

Rows = list[dict[str, Any]]


def work(policy: Policy) -> tuple[int, int]:
    """Matrix FLOPs per network row, and bytes of the weights."""
    return roofline.row_flops(policy.network, policy.spec), roofline.weight_bytes(policy.network)


@torch.inference_mode()
def bench_network(policy: Policy, engines: Mapping[str, Engine], machine: Mapping[str, Any], repeats: int) -> Rows:
    """Median seconds of a network call by number of rows and engine."""
    rows = []
    for batch in BATCHES:
        x = torch.randn(batch, *policy.spec.sample_shape, device=policy.device)
        calls = {name: _call(policy, engine, x) for name, engine in engines.items()}
        seconds = alternate(calls, repeats, policy.device, leading=2)
        floor = roofline.floor(1, batch, *work(policy), machine)
        rows.append({"batch": batch, "floor": floor} | {k: statistics.median(v) for k, v in seconds.items()})
    return rows


def _call(policy: Policy, engine: Engine, x: Tensor) -> Callable[[], Tensor]:
    step = torch.arange(len(x), device=x.device) % len(policy.schedule)
    observation, _ = normalize_observation(policy.spec, policy.normalizer, made_up_observations(policy, 1)[0])
    evaluate = engine.bind(policy.network, policy.schedule.timesteps, observation)
    return partial(evaluate, x, step, torch.zeros_like(step))


def samplers_of(base: Policy) -> dict[str, Policy]:
    """The policies that :func:`bench_chunks` times, by name. Names that end in warm start from the previous chunk."""
    return {
        "sequential": base.with_sampler("sequential"),
        "DDIM-10": base.with_schedule("ddim", 10).with_sampler("sequential"),
        "DDIM-16": base.with_schedule("ddim", 16).with_sampler("sequential"),
        "collocation (15 nodes)": base.with_sampler("collocation", nodes=15),
        "collocation (19 nodes)": base.with_sampler("collocation", nodes=19),
        "collocation (24 nodes)": base.with_sampler("collocation", nodes=24),
        "paradigms": base.with_sampler("paradigms"),
        "semi_implicit": base.with_sampler("semi_implicit"),
        "speculative": base.with_sampler("speculative"),
        "secant (window 40)": base.with_sampler("secant"),
        "auto": make_plan(base).apply(base),
        "secant, window 100, warm": base.with_sampler("secant", window=100),
    }


def bench_chunks(
    policy: Policy,
    engines: Mapping[str, Engine],
    machine: Mapping[str, Any],
    chunks: int,
    samplers: Callable[[Policy], Mapping[str, Policy]] = samplers_of,
) -> Rows:
    """Latency (ms) of a chunk at batch 1: the published code, the sequential sampler, and the parallel ones.

    The error is the distance from the sequential chunk of the same engine and noise, see :func:`normalized_error`. The
    warm start has none: its noise differs.
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
        for way, candidate in samplers(dataclasses.replace(policy, engine=engine)).items():
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
            kept = made[label][1:]  # the first is the warm-up
            rounds = statistics.fmean(float(chunk.stats.rounds) for chunk in kept)
            evaluations = statistics.fmean(float(chunk.stats.evaluations) for chunk in kept)
            row |= {"rounds": rounds, "evaluations": evaluations}
            row["floor"] = 1e3 * roofline.floor(rounds, evaluations, flops, weights, machine)
            way, _, name = label.rpartition(", ")
            if way.startswith(("secant (", "collocation", "auto", "semi", "paradigms")) and not way.endswith("warm"):
                exact = made[f"sequential, {name}"][1:]
                pairs = zip(kept, exact, strict=True)
                errors = [normalized_error(policy, a.trajectory, b.trajectory) for a, b in pairs]
                row["error_p95"] = float(np.quantile(errors, 0.95))
        rows.append(row)
    return rows


def bench_robots(policy: Policy, engines: Mapping[str, Engine], repeats: int) -> Rows:
    """Median seconds of one ``predict`` for several robots by sampler and engine; rounds, and evaluations of all."""
    rows = []
    for robots in ROBOTS:
        batch = stack_observations(made_up_observations(policy, robots))
        for sampler in ROBOT_SAMPLERS:
            way = policy.with_sampler(sampler)
            ways = {name: dataclasses.replace(way, engine=engine) for name, engine in engines.items()}
            seconds = alternate({n: partial(w.predict, batch) for n, w in ways.items()}, repeats, policy.device)
            stats = next(iter(ways.values())).predict(batch).stats
            row: dict[str, Any] = {"robots": robots, "sampler": sampler}
            row |= {"rounds": float(np.mean(stats.rounds)), "evaluations": float(np.sum(stats.evaluations))}
            rows.append(row | {name: statistics.median(values) for name, values in seconds.items()})
    return rows


def bench_scaling(policy: Policy, repeats: int) -> dict[str, Rows]:
    """Median seconds and mean rounds of a chunk by window and by number of steps T, and of a network call by horizon.

    More steps than in training divide the same noise levels more finely: timesteps lie between trained ones, which the
    network's sinusoidal features accept.
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
    horizons: Rows = []
    with torch.inference_mode():
        for horizon in HORIZONS:
            row: dict[str, Any] = {"horizon": horizon}
            for batch in (1, 40):
                x = torch.randn(batch, horizon, policy.spec.action_dim, device=policy.device)
                call = {"call": _call(policy, policy.engine, x)}
                row[f"{batch} rows"] = statistics.median(alternate(call, repeats, policy.device)["call"])
            horizons.append(row)
    return {"windows": windows, "steps": steps, "horizons": horizons}


def bench_devices(folder: Path, engine: str, device: torch.device, repeats: int, processes: int = PROCESSES) -> Rows:
    """Median seconds of a chunk on one device, and split over several (GPUs, or processes that share the CPU).

    One process with the sharded engine, next to the plain engine, shows the cost of splitting itself.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, threads // processes))
    try:
        with start_workers(folder, processes, engine, device.type) as split:
            whole = load_policy(folder, device=str(split.device), engine=engine)
            observation = made_up_observations(whole, 1)[0]
            calls = {"whole": partial(whole.predict, observation), "split": partial(split.predict, observation)}
            seconds = alternate(calls, repeats, split.device)
    finally:
        torch.set_num_threads(threads)
    numbers = {"whole": 1, "split": processes}
    return [{"devices": numbers[name], "seconds": statistics.median(values)} for name, values in seconds.items()]


def _with_steps(policy: Policy, count: int) -> Policy:
    trained = policy.spec.scheduler["num_train_timesteps"]
    if count <= trained:
        return policy.with_schedule(steps=count)
    config = {**policy.spec.scheduler, "num_train_timesteps": count}
    schedule = make_schedule(config, sample_shape=policy.spec.sample_shape)
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
    """Seconds of every call, each once per repeat in a rotating order, after one untimed warm-up call each.

    Args:
        calls: by label.
        repeats: number of timed calls of each.
        device: to synchronise with.
        begin: called with the number of each repeat.
        leading: untimed calls before each timed one. They fill the caches with the call's own weights, as in a process
            that makes no other calls.
    """
    labels = list(calls)
    seconds: dict[str, list[float]] = {label: [] for label in labels}
    for label in tqdm(labels, "warm-up", unit="call", leave=False):  # engines compile
        calls[label]()
    for i in tqdm(range(repeats), unit="repeat", leave=False):
        begin(i)
        turn = i % len(labels)
        for label in labels[turn:] + labels[:turn]:
            for _ in range(leading):
                calls[label]()
            seconds[label].append(roofline.seconds(calls[label], device))
    return seconds


def peak_memory(device: torch.device) -> dict[str, float]:
    """Peak memory of the process, and of PyTorch on a GPU, MiB."""
    peak = {"process": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}
    return peak | ({"gpu": torch.cuda.max_memory_allocated(device) / 2**20} if device.type == "cuda" else {})
