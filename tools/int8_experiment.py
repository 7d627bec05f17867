"""Experiment: do int8 weights keep the policy? Rounds like int8 kernels, but computes in float32.

  python -m tools.int8_experiment [CHECKPOINT] [--observations 16] [--draws 100]

Rounds weights to int8 with a scale per output channel; in a second pass also the inputs of every product, with a scale
per row, as a kernel with vpdpbusd would. Computes whole sequential chunks and compares them with float32 chunks of the
same noise. ``tools.measure_rounding`` does the same for bfloat16.
"""

import argparse

import numpy as np
from rich.console import Console
from rich.table import Table
from scipy.spatial.distance import pdist
from torch import Tensor, nn

from parapolicy import Policy, load_policy
from parapolicy.evaluate.measure.fidelity import draw_chunks, paired_energy_distance
from parapolicy.evaluate.measure.statistics import mean_interval
from parapolicy.noise import mix_seeds
from parapolicy.planner import made_up_observations


def rounded(value: Tensor, over: tuple[int, ...]) -> Tensor:
    """The nearest of 255 multiples of a scale, which is the largest magnitude over the dimensions ``over``."""
    scale = value.abs().amax(over, keepdim=True).clamp(min=1e-12) / 127
    return (value / scale).round() * scale


def quantise(policy: Policy, inputs: bool) -> Policy:
    """Round the weights of all products in place and, with ``inputs``, also their inputs."""
    for module in policy.network.modules():
        if not isinstance(module, nn.Linear | nn.Conv1d | nn.ConvTranspose1d):
            continue
        out = 1 if isinstance(module, nn.ConvTranspose1d) else 0
        over = tuple(d for d in range(module.weight.dim()) if d != out)
        module.weight.data = rounded(module.weight.data, over)
        if inputs:
            module.register_forward_pre_hook(lambda _, x: rounded(x[0], tuple(range(1, x[0].dim()))))
    return policy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="?", default="checkpoints/pusht_lowdim")
    parser.add_argument("--observations", type=int, default=16)
    parser.add_argument("--draws", type=int, default=100)
    parsed = parser.parse_args()

    def load(engine: str) -> Policy:
        return load_policy(parsed.checkpoint, sampler="sequential", engine=engine)

    observations = made_up_observations(load("fused"), parsed.observations)

    def draw(policy: Policy) -> list[np.ndarray]:
        return [draw_chunks(policy, o, parsed.draws, mix_seeds(i, 1)) for i, o in enumerate(observations)]

    reference = draw(load("fused"))
    spread = float(np.mean([pdist(chunks).mean() for chunks in reference]))
    table = Table("int8", "error p50", "p95", "energy distance, part of the spread")
    for name, inputs in {"weights": False, "weights and inputs": True}.items():
        chunks = draw(quantise(load("eager"), inputs))
        errors = np.concatenate([abs(a - b).max(1) for a, b in zip(chunks, reference, strict=True)])
        distances = [paired_energy_distance(a, b) / spread for a, b in zip(chunks, reference, strict=True)]
        low, high = mean_interval(distances)
        mean = f"{np.mean(distances):.1e} [{low:.1e}, {high:.1e}]"
        table.add_row(name, f"{np.median(errors):.1e}", f"{np.quantile(errors, 0.95):.1e}", mean)
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
