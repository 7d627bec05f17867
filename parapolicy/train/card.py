"""The model card beside a trained policy's weights."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from parapolicy.networks import build_network
from parapolicy.spec import PolicySpec
from parapolicy.train.trainer import TrainResult

CARD = "README.md"
# For the Hugging Face hub. The owner adds the licence.
FRONT_MATTER = (
    "---",
    "library_name: parapolicy",
    "pipeline_tag: robotics",
    "tags: [diffusion-policy, imitation-learning]",
    "---",
)


def write_card(
    folder: Path,
    spec: PolicySpec,
    *,
    data_name: str,
    command: str,
    settings: Mapping[str, Any],
    result: TrainResult,
    machine: Mapping[str, Any],
    versions: Mapping[str, str],
    score: Mapping[str, Any] | None,
    first_seed: int,
    targets: Mapping[str, str] | None = None,
) -> None:
    """Write ``README.md`` into the policy's folder: its properties, training and score."""
    parameters = sum(value.numel() for value in build_network(spec).parameters())
    observed = ", ".join(
        f"{key} {list(feature.shape)}{' (image)' if feature.kind == 'image' else ''}"
        for key, feature in spec.observation.items()
    )
    network = spec.network["name"]
    if "down_dims" in spec.network:
        network += f", levels {list(spec.network['down_dims'])}"
    lines = [
        *FRONT_MATTER,
        f"# {folder.name}",
        "",
        f"Diffusion Policy, {parameters / 1e6:.2f} M parameters ({network}), "
        f"{spec.scheduler['num_train_timesteps']} denoising steps.",
        "",
        "| | |",
        "|---|---|",
        f"| data | {data_name} |",
        f"| observation | {observed}; {spec.n_obs_steps} steps at {spec.control_hz} Hz |",
        f"| action | {spec.action_dim} numbers; horizon {spec.horizon}, {spec.n_action_steps} executed |",
        f"| command | `{command.strip()}` |",
        f"| settings | {', '.join(f'{key} {value}' for key, value in settings.items())} |",
        f"| time | {result.seconds / 60:.0f} minutes; last loss {result.loss:.4f} |",
        f"| machine | {machine['cpu']}, {machine['cores']} cores, {machine['device']} |",
        f"| versions | {', '.join(f'{name} {version}' for name, version in versions.items())} |",
    ]
    if result.validation is not None:
        lines.append(f"| held-out episodes | denoising error {result.validation:.4f} of the averaged weights |")
    if targets:
        taught = ", ".join(f"{key} to the camera {camera}" for key, camera in targets.items())
        lines.append(f"| recorded numbers that the cameras were trained on, not observed by the policy | {taught} |")
    if score is not None:
        low, high = score["mean_max_reward_ci95"]
        success_low, success_high = score["success_rate_ci95"]
        lines += [
            f"| score | mean maximum reward **{score['mean_max_reward']:.3f}** [{low:.3f}, {high:.3f}], success rate "
            f"**{score['success_rate']:.2f}** [{success_low:.2f}, {success_high:.2f}] (95 % intervals) over "
            f"{score['overall']['n_episodes']} episodes, seeds from {first_seed}, all steps one after the other |",
        ]
    (folder / CARD).write_text("\n".join(lines) + "\n")
