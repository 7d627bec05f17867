"""Soak test: many chunks in a row, to see whether latency drifts or memory grows.

    python -m parapolicy.bench.soak [CHECKPOINT] [--chunks 20000] [--engine auto] [--sampler SAMPLER] [--output FILE]
    python -m parapolicy.bench.soak [CHECKPOINT] --control-hz 10 --seconds 1800 [--executed 1] [...]

Prints latency percentiles and resident memory for every tenth of the run, and for all of it. With a control rate, it
times an asynchronous controller by the real clock, with a new observation at each control step (images of noise): the
time of ``act`` in each tick, the missed ticks, and how long the process was ready to run while the machine gave its
cores to others. With ``--executed 1`` each control step begins a chunk. A sampler is a name or, as in eval.py, settings
such as '{name: collocation, nodes: 15, window: 1}'.
"""

import argparse
import dataclasses
import gc
import json
import os
from collections.abc import Iterable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from tqdm import tqdm

from parapolicy.control import Controller, Pacer
from parapolicy.loading import load_policy
from parapolicy.planner import made_up_observations
from parapolicy.policy import Policy

PERCENTILES = (50, 95, 99, 99.9, 100)


def resident_mib() -> float:
    """Resident memory of this process, MiB (Linux)."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 2**20


def waited_s() -> float:
    """Total time that this process's threads were ready to run but had no core, s (Linux)."""
    counts = (path.read_text() for path in Path("/proc/self/task").glob("*/schedstat"))
    return sum(int(count.split()[1]) for count in counts) / 1e9


class Table:
    """A row for each tenth of a run."""

    def __init__(self, unit: str, *columns: str) -> None:
        from rich.table import Table as RichTable

        self._table = RichTable(unit, *(f"p{p:g} ms" for p in PERCENTILES), *columns, "resident MiB")
        self.rows: list[dict[str, Any]] = []

    def row(self, label: str, seconds: np.ndarray, **numbers: float) -> None:
        values, memory = np.percentile(1e3 * seconds, PERCENTILES).tolist(), resident_mib()
        shown = [f"{value:.2f}" for value in values] + [f"{value:.4g}" for value in numbers.values()]
        self._table.add_row(label, *shown, f"{memory:.0f}")
        self.rows.append({"chunks": label, "ms": values, **numbers, "resident_mib": memory})

    def print(self) -> None:
        from rich.console import Console

        Console(width=120).print(self._table)


def tenths(count: int) -> Iterable[tuple[int, int]]:
    """Begin and end of each tenth, with a progress bar."""
    bar: Iterable[tuple[int, int]] = tqdm(
        list(pairwise(np.linspace(0, count, 11, dtype=int).tolist())), unit="tenth", leave=False
    )
    return bar


def soak_chunks(policy: Policy, observations: list[dict[str, np.ndarray]], chunks: int) -> list[dict[str, Any]]:
    """Time one chunk after the other."""
    seconds, table = np.empty(chunks), Table("chunks")
    for begin, end in tenths(chunks):
        for i in range(begin, end):
            seconds[i] = policy.predict(observations[i % len(observations)], seed=i).stats.seconds
        table.row(f"{begin} to {end}", seconds[begin:end])
    table.row("all", seconds)
    table.print()
    return table.rows


def soak_controller(
    policy: Policy, observations: list[dict[str, np.ndarray]], ticks: int, control_hz: float, priority: int = 0
) -> list[dict[str, Any]]:
    """Time a controller's ticks by the real clock."""
    seconds, late, waits, missed = np.zeros(ticks), np.zeros(ticks), np.zeros(ticks), np.zeros(ticks, int)
    table, rng = Table("ticks", "missed", "own", "waited for a core, s"), np.random.default_rng(0)

    def numbers(part: slice) -> dict[str, float]:
        # The previous tick may cause a miss, and may itself have begun late: two ticks of waiting can explain it.
        explained = waits + np.concatenate(([0.0], waits[:-1]))
        own = missed[part][late[part] > explained[part]]
        return {"missed": int(missed[part].sum()), "own": int(own.sum()), "waited_s": float(waits[part].sum())}

    with Controller(policy, control_hz, asynchronous=True) as controller:
        if priority:  # of this thread only: the chunk thread exists already
            try:
                os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(priority))
            except PermissionError as error:
                raise SystemExit(
                    f"error: --priority {priority} takes root, or rtprio in limits.conf: {error}"
                ) from None
        controller.act(observed(observations[0], rng))  # waits for the first chunk, with the robot at rest
        pacer, waited = Pacer(control_hz), waited_s()
        for begin, end in tenths(ticks):
            for i in range(begin, end):
                observation = observed(observations[i % len(observations)], rng)
                before = pacer.missed
                late[i], missed[i] = -pacer.wait(), pacer.missed - before
                before_s, waited = waited, waited_s()  # waiting since the last tick
                waits[i] = waited - before_s
                start = pacer.clock()
                controller.act(observation)
                seconds[i] = pacer.clock() - start
            part = slice(begin, end)
            table.row(f"{begin} to {end}", seconds[part], **numbers(part))
        table.row("all", seconds, **numbers(slice(None)))
        table.print()
        latency = controller.latency
    print("own: missed by more than the process waited for a core in the last two ticks")
    print({name: latency[name] for name in ("steps", "misses", "failures", "late", "stale", "continued", "held")})
    print("chunk ms", {name: round(value, 1) for name, value in latency["times"]["chunk"].items()})
    table.rows[-1]["chunk_ms"] = latency["times"]["chunk"]
    return table.rows


def observed(history: Mapping[str, np.ndarray], rng: np.random.Generator) -> dict[str, np.ndarray]:
    """One control step's observation: the history's newest state, and a new image of noise."""
    step = {key: value[-1] for key, value in history.items()}
    return {
        key: rng.integers(0, 256, value.shape, dtype=np.uint8) if value.dtype == np.uint8 else value
        for key, value in step.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="?", default="checkpoints/pusht_lowdim")
    parser.add_argument("--chunks", type=int, default=20_000)
    parser.add_argument("--control-hz", type=float, help="time a controller at this rate, for --seconds")
    parser.add_argument("--seconds", type=float, default=1800)
    parser.add_argument("--executed", type=int, help="control steps of each chunk; left out: the policy's own number")
    parser.add_argument("--priority", type=int, default=0, help="SCHED_FIFO priority of the loop, 1 to 99 (Linux)")
    parser.add_argument("--sampler", help="its name, or its settings")
    parser.add_argument("--engine", default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--output", type=Path, help="a file for the rows, as JSON")
    arguments = parser.parse_args()
    if arguments.chunks < 10:
        parser.error(f"--chunks is {arguments.chunks}, expected at least 10")
    ticks = round(arguments.seconds * (arguments.control_hz or 1))
    if not 0 <= arguments.priority <= 99:
        parser.error(f"--priority is {arguments.priority}, expected 1 to 99, or 0 for none")
    if not ticks >= 10:
        parser.error(f"--seconds {arguments.seconds:g} are {ticks} ticks, expected at least 10")
    try:
        sampler = yaml.safe_load(arguments.sampler or "null")
        settings = sampler if isinstance(sampler, dict) else {"name": sampler}
        name = settings.pop("name", None)
        policy = load_policy(arguments.checkpoint, name, arguments.device, arguments.engine, **settings)
        if arguments.executed is not None:
            spec = dataclasses.replace(policy.spec, n_action_steps=arguments.executed)
            policy = dataclasses.replace(policy, spec=spec)
    except (ValueError, OSError, yaml.YAMLError) as error:
        raise SystemExit(f"error: {error}") from error
    observations = made_up_observations(policy, 100)
    for seed in range(5):
        policy.predict(observations[0], seed=seed)
    gc.freeze()  # as a control loop should
    if arguments.control_hz is None:
        rows = soak_chunks(policy, observations, arguments.chunks)
    else:
        rows = soak_controller(policy, observations, ticks, arguments.control_hz, arguments.priority)
    if arguments.output:
        arguments.output.write_text(json.dumps({"percentiles": PERCENTILES, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
