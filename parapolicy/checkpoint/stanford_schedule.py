"""The published schedule of a checkpoint of real-stanford/diffusion_policy."""

from typing import Any

from parapolicy.checkpoint.stanford_networks import Saved

# Arguments of every published policy class, and those that hydra adds.
POLICY_KEYS = frozenset(("noise_scheduler", "num_inference_steps"))
POLICY_KEYS |= {"_target_", "_convert_", "_recursive_", "_partial_"}
STEP_KEYS = frozenset(("horizon", "n_action_steps", "n_obs_steps"))
# Defaults of diffusers 0.11.1, to which the published code is pinned.
DEFAULTS: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "clip_sample": True,
    "prediction_type": "epsilon",
}
OWN_DEFAULTS: dict[str, dict[str, Any]] = {
    "DDPMScheduler": {"variance_type": "fixed_small"},
    "DDIMScheduler": {"set_alpha_to_one": True, "steps_offset": 0},
}
FORMER = {*DEFAULTS, "trained_betas"}  # settings that diffusers 0.11.1 has


def read_schedule(saved: Saved, keys: frozenset[str], former: bool = True) -> tuple[dict[str, Any], dict[str, Any]]:
    """The scheduler's config, and arguments of :func:`parapolicy.schedule.make_schedule`.

    Args:
        saved: the checkpoint.
        keys: arguments of the policy's class besides :data:`POLICY_KEYS`. All others reach the scheduler's step.
        former: True: diffusers 0.11.1 was used, unless the settings show a newer version. False: 0.18.2, to which UMI
            is pinned, and whose policy has no :data:`STEP_KEYS`.

    Raises:
        CheckpointError: another scheduler than DDPM and DDIM, or a setting that changes the answers in a way that is
            not supported.
    """
    config, error = saved.config, saved.archive.error
    target = config.text("policy.noise_scheduler._target_")
    name = target.rpartition(".")[2]
    if name not in OWN_DEFAULTS or not target.startswith("diffusers."):
        raise error(f"its scheduler is {target!r:.80}, expected diffusers' DDPMScheduler or DDIMScheduler")
    given = config.get("policy.noise_scheduler")
    settings = {key: value for key, value in given.items() if not key.startswith("_")}
    scheduler = {"_class_name": name, **DEFAULTS, **OWN_DEFAULTS[name], **settings}
    if former and name == "DDIMScheduler" and scheduler["prediction_type"] == "sample":
        raise error(
            "its scheduler is DDIM with prediction_type 'sample', which diffusers 0.11.1 treats as 'epsilon' in a part "
            "of its step, so that the result is not a sampler; take DDPM"
        )
    count = config.count("policy.noise_scheduler.num_train_timesteps", DEFAULTS["num_train_timesteps"])
    steps = config.get("policy.num_inference_steps", None)
    steps = count if steps is None else config.count("policy.num_inference_steps")
    if steps > count:
        raise error(f"policy.num_inference_steps is {steps}, expected at most {count}, num_train_timesteps")
    # A setting that 0.11.1 does not have shows a newer version, whose DDPM spaces its steps differently.
    newer = not former or settings.keys() - FORMER - OWN_DEFAULTS[name].keys()
    inference: dict[str, Any] = {"steps": steps, "spacing": "diffusers" if newer else "diffusers-0.11"}
    for key in sorted(set(config.keys("policy")) - POLICY_KEYS - (STEP_KEYS if former else set()) - keys):
        value = config.get(f"policy.{key}")
        if key == "eta" and name == "DDIMScheduler":
            inference["eta"] = value
        elif not (key == "predict_epsilon" and value == (scheduler["prediction_type"] == "epsilon")):
            raise error(
                f"policy.{key!s:.60} is {value!r:.60} in its config, which reaches the scheduler's step and is not "
                "supported there; train without it"
            )
    return scheduler, inference
