"""Checkpoints of the Universal Manipulation Interface (Chi et al., RSS 2024): ``DiffusionUnetTimmPolicy``.

They are files of real-stanford/diffusion_policy with another encoder: backbones of timm, a separate number of observed
steps for each key, and a condition ordered by key, then by step.
"""

from typing import Any

from parapolicy.checkpoint.stanford_encoders import FoundEncoder, read_shapes
from parapolicy.checkpoint.stanford_networks import FoundNetwork, Saved, find_unet
from parapolicy.checkpoint.stanford_schedule import read_schedule
from parapolicy.checkpoint.stanford_timm import AT, find_timm_encoder
from parapolicy.spec import Feature, PolicySpec

POLICY_KEYS = frozenset(("shape_meta", "obs_encoder", "obs_as_global_cond", "diffusion_step_embed_dim", "down_dims"))
POLICY_KEYS |= {"kernel_size", "n_groups", "cond_predict_scale", "input_pertub", "inpaint_fixed_action_prefix"}
POLICY_KEYS |= {"train_diffusion_n_samples"}
KNOWN_POSES = ("relative", "abs")  # of parapolicy.pose, which needs scipy


def describe(saved: Saved, provenance: dict[str, Any]) -> tuple[PolicySpec, FoundNetwork, FoundEncoder]:
    """The spec, network and encoder of a checkpoint.

    Raises:
        CheckpointError: a setting that is not supported, or that does not fit the tensors.
    """
    config, error = saved.config, saved.archive.error
    if not config.flag("policy.obs_as_global_cond", True):
        raise error("policy.obs_as_global_cond is off, which the published code refuses too; train with it on")
    observation, warnings = _find_observation(saved)
    n_obs_steps = max(feature.steps or 1 for feature in observation.values())
    horizon = config.count("policy.shape_meta.action.horizon")
    found = find_unet(saved, "policy", horizon, n_obs_steps)
    encoder = find_timm_encoder(saved, observation, warnings)
    found.settings["encoder"] = encoder.settings
    saved.agree("policy.shape_meta.action.shape", [found.width])
    scheduler, inference = read_schedule(saved, POLICY_KEYS, former=False)
    warnings += _frames(saved, observation, provenance)
    warnings.append(
        f"all {horizon} actions of a chunk count as executed; the published robot code requests the next chunk after 6"
    )
    spec = PolicySpec(
        observation=observation,
        n_obs_steps=n_obs_steps,
        horizon=horizon,
        n_action_steps=horizon,
        action_dim=found.width,
        network=found.settings,
        scheduler=scheduler,
        control_hz=None,
        provenance={
            "format": "real-stanford/universal_manipulation_interface",
            **provenance,
            "warnings": warnings,
        },
        first_action=0,
        inference=inference,
    )
    return spec, found, encoder


def _find_observation(saved: Saved) -> tuple[dict[str, Feature], list[str]]:
    """The policy's observations in the order of the features: the cameras sorted, then the other keys sorted."""
    meta = "policy.shape_meta"
    said = saved.config.known(f"{AT}.shape_meta.obs")
    if said is not None and said != saved.config.known(f"{meta}.obs"):
        raise saved.archive.error(f"{AT}.shape_meta and {meta} differ in its config, expected the same")
    shapes = read_shapes(saved, meta)
    ignored = [
        key
        for key, feature in shapes.items()
        if feature.kind == "state" and saved.config.flag(f"{meta}.obs.{key}.ignore_by_policy", False)
    ]
    seen = sorted(shapes.keys() - set(ignored), key=lambda key: (shapes[key].kind != "image", key))
    if not seen or shapes[seen[0]].kind != "image":
        raise saved.archive.error(f"{meta}.obs has no camera in its config, expected type 'rgb'")
    if len({shapes[key].shape[:2] for key in seen if shapes[key].kind == "image"}) > 1:
        raise saved.archive.error("its cameras differ in height or width, which the published code refuses too")
    found = {key: shapes[key]._replace(steps=saved.config.count(f"{meta}.obs.{key}.horizon")) for key in seen}
    return found, [f"the policy does not use {ignored} (ignore_by_policy); leave them out"] if ignored else []


def _frames(saved: Saved, observation: dict[str, Feature], provenance: dict[str, Any]) -> list[str]:
    """Add the file's timing and pose frames to provenance, and return warnings about them."""
    warnings = []
    spacing = {
        key: saved.config.known(f"policy.shape_meta.{at}.down_sample_steps")
        for key, at in {**{key: f"obs.{key}" for key in observation}, "action": "action"}.items()
    }
    numbers = {value for value in spacing.values() if isinstance(value, int | float)}
    if len(numbers) > 1:
        warnings.append(
            f"its keys are sampled at different rates, down_sample_steps {spacing}: give predict histories with these "
            "spacings; ObservationHistory, Controller and the server use one spacing for all keys"
        )
    elif numbers:
        provenance["down_sample_steps"] = numbers.pop()
    poses = {
        name: value
        for name in ("obs_pose_repr", "action_pose_repr")
        if isinstance(value := saved.config.known(f"task.pose_repr.{name}"), str) and len(value) < 40
    }
    if poses:
        provenance["pose_repr"] = poses
    if poses and set(poses.values()) <= set(KNOWN_POSES):
        warnings.append(
            f"its poses are {poses}: parapolicy.pose converts a robot's poses to observations, and actions to poses"
        )
    elif poses:
        warnings.append(
            f"its poses are {poses}, but parapolicy.pose supports only {KNOWN_POSES}; convert them yourself"
        )
    return warnings
