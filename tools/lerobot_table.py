"""LeRobot's own sampling compared with ours, on the shipped Push-T policy inside LeRobot's ``DiffusionPolicy``.

    python -m tools.lerobot_table [--chunks 20] [--threads 2] [--output FILE]

Run it with a Python that has LeRobot. Each line: median time of a chunk, network evaluations, and the largest
difference of an action from LeRobot's own DDPM-100 chunk of the same seed, normalised (median and 95th percentile).
Calls alternate.
"""

import argparse
import copy
import json
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lerobot.configs.types import FeatureType, PolicyFeature
from lerobot.policies.diffusion.configuration_diffusion import DiffusionConfig
from lerobot.policies.diffusion.modeling_diffusion import DiffusionPolicy

import parapolicy
from parapolicy.checkpoint.lerobot_config import UNET
from parapolicy.checkpoint.lerobot_folder import published_name
from parapolicy.observation import normalize_observation
from parapolicy.planner import made_up_observations

FOLDER = "checkpoints/pusht_lowdim"


def in_lerobot(shipped: parapolicy.Policy) -> DiffusionPolicy:
    """A LeRobot policy with the shipped weights. The shipped observation is split into LeRobot's two features."""
    spec = shipped.spec
    numbers = spec.condition_dim // spec.n_obs_steps
    network = {theirs: spec.network[ours] for ours, (theirs, _) in UNET.items() if ours in spec.network}
    names = ("num_train_timesteps", "beta_schedule", "beta_start", "beta_end", "prediction_type", "clip_sample")
    config = DiffusionConfig(
        input_features={
            "observation.state": PolicyFeature(FeatureType.STATE, (2,)),
            "observation.environment_state": PolicyFeature(FeatureType.ENV, (numbers - 2,)),
        },
        output_features={"action": PolicyFeature(FeatureType.ACTION, (spec.action_dim,))},
        n_obs_steps=spec.n_obs_steps,
        horizon=spec.horizon,
        n_action_steps=spec.n_action_steps,
        drop_n_last_frames=0,
        device="cpu",
        **network,
        **{name: spec.scheduler[name] for name in names if name in spec.scheduler},
    )
    policy = DiffusionPolicy(config).eval()
    weights = {published_name(name, False): value for name, value in shipped.network.state_dict().items()}
    unknown = policy.load_state_dict({str(name): value for name, value in weights.items()}, strict=False)
    assert not unknown.unexpected_keys, unknown
    return policy


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chunks", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, help="of the lines, JSON")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    shipped = parapolicy.load_policy(FOLDER, device="cpu", engine="eager")
    own = in_lerobot(shipped)
    short = copy.deepcopy(own)
    short.diffusion.num_inference_steps = 10
    ways: dict[str, Any] = {"LeRobot, DDPM-100": own, "LeRobot, DDPM-10": short}
    for sampler in ("sequential", "secant", "collocation"):
        ways[f"accelerated, {sampler}"] = parapolicy.accelerate(copy.deepcopy(own), sampler)
    observed = []
    for observation in made_up_observations(shipped, given.chunks):
        inputs, _ = normalize_observation(shipped.spec, shipped.normalizer, observation)
        steps = torch.cat([value.flatten(2) for value in inputs.values()], dim=2)
        observed.append({"observation.state": steps[..., :2], "observation.environment_state": steps[..., 2:]})
    chunks: dict[str, list[np.ndarray]] = {label: [] for label in ways}
    seconds: dict[str, list[float]] = {label: [] for label in ways}
    for way in ways.values():
        way.diffusion.generate_actions(observed[0])
    labels = list(ways)
    for i, batch in enumerate(observed):
        for label in labels[i % len(labels) :] + labels[: i % len(labels)]:
            torch.manual_seed(i)
            begin = time.perf_counter()
            chunks[label].append(ways[label].diffusion.generate_actions(batch).numpy())
            seconds[label].append(time.perf_counter() - begin)
    first, rows = chunks[labels[0]], list[dict[str, Any]]()
    print(f"{'':28} {'ms':>8} {'ratio':>6} {'evaluations':>12} {'difference':>11} {'p95':>8}")
    for label in labels:
        spent = 1e3 * statistics.median(seconds[label])
        ratio = 1e3 * statistics.median(seconds[labels[0]]) / spent
        errors = [float(np.abs(a - b).max()) for a, b in zip(chunks[label], first, strict=True)]
        model = ways[label].diffusion
        costs = [float(s.evaluations[0]) for s in model._parapolicy.recent] if hasattr(model, "_parapolicy") else []
        evaluations = statistics.fmean(costs) if costs else float(model.num_inference_steps)
        median, tail = np.quantile(errors, [0.5, 0.95]).tolist()
        rows.append({"way": label, "ms": spent, "evaluations": evaluations, "median": median, "p95": tail})
        print(f"{label:28} {spent:8.1f} {ratio:6.1f} {evaluations:12.1f} {median:11.1e} {tail:8.1e}")
    if given.output:
        given.output.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
