"""The effect of rounding to bfloat16 on the chunks of the shipped policies.

    python -m tools.measure_rounding [--chunks 200] [--observations 20] [--draws 150] [--output FILE]

Per policy, on made-up observations: the largest difference of the sequential chunk of ``fused_bfloat16`` from that of
``eager``, normalised (median and 95th percentile), and the energy distance of its chunks from those of ``fused``, with
the same noise and with other noise.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from parapolicy.evaluate.measure.chunk_error import normalized_error
from parapolicy.evaluate.measure.fidelity import draw_chunks, energy_distance, paired_energy_distance
from parapolicy.evaluate.measure.statistics import mean_interval
from parapolicy.loading import load_policy
from parapolicy.observation import stack_observations
from parapolicy.planner import made_up_observations

POLICIES = ("pusht", "lift", "can", "square")
OTHER = 1 << 32  # first seed of other noise


def measure(name: str, chunks: int, observations: int, draws: int) -> dict[str, Any]:
    """Errors and energy distances of one shipped policy."""
    ways = {
        engine: load_policy(f"checkpoints/{name}_lowdim", device="cpu", engine=engine, sampler="sequential")
        for engine in ("eager", "fused", "fused_bfloat16")
    }
    made_up = made_up_observations(ways["eager"], max(chunks, observations))
    batch, seeds = stack_observations(made_up[:chunks]), list(range(chunks))
    exact, rounded = (ways[engine].predict(batch, seed=seeds).trajectory for engine in ("eager", "fused_bfloat16"))
    errors = normalized_error(ways["eager"], rounded, exact)
    equal, own = [], []
    for i, observation in enumerate(made_up[:observations]):
        noise = [draws * i + k for k in range(draws)]
        target = draw_chunks(ways["fused"], observation, draws, noise)
        equal.append(paired_energy_distance(draw_chunks(ways["fused_bfloat16"], observation, draws, noise), target))
        other = draw_chunks(ways["fused_bfloat16"], observation, draws, [OTHER + seed for seed in noise])
        own.append(energy_distance(other, target))
    median, p95 = np.quantile(errors, [0.5, 0.95]).tolist()
    return {"env": name, "median": median, "p95": p95, "equal": mean_interval(equal), "own": mean_interval(own)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chunks", type=int, default=200)
    parser.add_argument("--observations", type=int, default=20)
    parser.add_argument("--draws", type=int, default=150)
    parser.add_argument("--output", type=Path, help="JSON")
    given = parser.parse_args()
    rows = []
    for name in POLICIES:
        rows.append(measure(name, given.chunks, given.observations, given.draws))
        print(rows[-1])
    if given.output:
        given.output.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
