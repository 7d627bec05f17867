"""Many chunks in a row: does latency drift, does memory grow?

    python -m parapolicy.bench.soak [CHECKPOINT] [--chunks 20000] [--engine auto] [--output FILE]

Prints latency percentiles and resident memory for every tenth of the run, and for all of it; the file has them as JSON.
"""

import argparse
import gc
import json
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from parapolicy.loading import load_policy
from parapolicy.planner import made_up_observations

PERCENTILES = (50, 95, 99, 99.9, 100)


def resident_mib() -> float:
    """Memory that this process holds now (Linux)."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 2**20


def main() -> None:
    from rich.console import Console
    from rich.table import Table

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="?", default="checkpoints/pusht_lowdim")
    parser.add_argument("--chunks", type=int, default=20_000)
    parser.add_argument("--engine", default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    if arguments.chunks < 10:
        parser.error(f"--chunks is {arguments.chunks}, expected at least 10")
    try:
        policy = load_policy(arguments.checkpoint, device=arguments.device, engine=arguments.engine)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error
    observations = made_up_observations(policy, 100)
    for seed in range(5):
        policy.predict(observations[0], seed=seed)
    gc.freeze()  # as a control loop would
    seconds = np.empty(arguments.chunks)

    def row(label: str, times: np.ndarray) -> None:
        values, memory = np.percentile(1e3 * times, PERCENTILES).tolist(), resident_mib()
        table.add_row(label, *(f"{value:.2f}" for value in values), f"{memory:.0f}")
        rows.append({"chunks": label, "ms": values, "resident_mib": memory})

    table = Table("chunks", *(f"p{p:g} ms" for p in PERCENTILES), "resident MiB")
    rows: list[dict[str, Any]] = []
    done = 0
    for end in tqdm(np.linspace(0, arguments.chunks, 11, dtype=int)[1:].tolist(), unit="tenth", leave=False):
        for i in range(done, end):
            seconds[i] = policy.predict(observations[i % 100], seed=i).stats.seconds
        row(f"{done} to {end}", seconds[done:end])
        done = end
    row("all", seconds)
    Console(width=100).print(table)
    if arguments.output:
        arguments.output.write_text(json.dumps({"percentiles": PERCENTILES, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
