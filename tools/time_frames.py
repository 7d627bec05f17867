"""Time a camera's encoder for two new frames, and for one new frame if the other's features are cached.

    python -m tools.time_frames [--chunks 20] [--output FILE]

The shipped policy, and ResNet18 with made-up weights on two image sizes. Medians in ms, in rotating order.
"""

import argparse
import dataclasses
import json
import statistics
from pathlib import Path
from typing import Any

import torch

from parapolicy.frame_features import FrameFeatures
from parapolicy.loading import load_policy
from parapolicy.networks import build_network
from parapolicy.planner import made_up_observations
from parapolicy.policy import Policy
from parapolicy.spec import Feature

FOLDER = "checkpoints/pusht_image"
RESNETS = (((96, 96), (84, 84)), ((240, 320), (216, 288)))  # size and crop of the pictures


def resnet(policy: Policy, size: tuple[int, int], crop: tuple[int, int]) -> Policy:
    """The same policy with a ResNet18 with made-up weights on images of another size."""
    image = Feature((*size, 3), "image")
    camera = {"backbone": "resnet18", "norm": "group", "crop": list(crop)}
    network = {**policy.spec.network, "encoder": {"cameras": {"image": camera}}}
    spec = dataclasses.replace(policy.spec, observation={**policy.spec.observation, "image": image}, network=network)
    return dataclasses.replace(policy, spec=spec, network=build_network(spec).requires_grad_(False).eval())


def measure(policy: Policy, chunks: int) -> dict[str, float]:
    """Medians (ms) of encoding ``two`` new frames, and ``one`` new frame next to a cached one."""
    times: dict[str, list[float]] = {"two": [], "one": []}
    for i, observation in enumerate(made_up_observations(policy, chunks + 1)):
        for name in ("two", "one") if i % 2 else ("one", "two"):
            features = [FrameFeatures()] if name == "one" else None
            if features:  # the older frame was the newest of the previous chunk
                before = {key: value[[0, 0]] for key, value in observation.items()}
                policy.predict(before, deadline=lambda: True, features=features)
            stats = policy.predict(observation, seed=i, deadline=lambda: True, features=features).stats
            times[name].append(1e3 * stats.stages["encode"])
    return {name: statistics.median(values[1:]) for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chunks", type=int, default=20)
    parser.add_argument("--output", type=Path, help="JSON")
    given = parser.parse_args()
    torch.manual_seed(0)
    policy = load_policy(FOLDER, device="cpu", engine="eager").with_sampler("secant")
    policies = {f"`{FOLDER}`, 96×96": policy}
    for size, crop in RESNETS:
        sizes = ["×".join(map(str, pair)) for pair in (size, crop)]
        policies[f"ResNet18 with GroupNorm, {sizes[0]}, crop {sizes[1]}"] = resnet(policy, size, crop)
    rows: list[dict[str, Any]] = [{"encoder": name} | measure(way, given.chunks) for name, way in policies.items()]
    for row in rows:
        print(f"{row['encoder']:<50} two {row['two']:8.1f}  one {row['one']:8.1f}")
    if given.output:
        given.output.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
