"""What damaged checkpoints of other programs may answer.

Their files have no digest. So a mutant that is taken must be the original to the bit, or what its changed file says:
each part of the policy that differs is named by a setting that differs in the file, with values that stand there, and
the policy is the same after it was saved and loaded again. What no reader can notice, another finite number in the
place of a weight or two tensors of one shape in each other's place, is left out by construction.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.random import Generator
from torch import Tensor

import parapolicy
from parapolicy.checkpoint.inert import TensorRef
from parapolicy.checkpoint.stanford_schedule import DEFAULTS, OWN_DEFAULTS
from parapolicy.errors import CheckpointError
from parapolicy.planner import made_up_observations
from tests.fuzzing import checkpoints

CHARACTERS, NODES, DEPTH = 1000, 100_000, 400
WEIGHTS = "weights"  # stands for all tensors of a file
Facts = dict[tuple[Any, ...], Any]  # a file, flat: path of keys -> a type and a value, or the keys of a map

# Part of a policy -> names in a file that may change it.
EXPLAINED: dict[str, set[str]] = {
    "network": {"n_groups", "n_head", "crop_shape", "crop_ratio", "resize_shape", "use_separate_rgb_encoder_per_camera"}
    | {"vision_backbone", "use_group_norm", "input_features", "rename_map", "noise_scheduler", WEIGHTS},
    "observation": {"input_features", "rename_map", "all_shapes", "modalities"},
    "n_obs_steps": {"n_obs_steps", "observation_horizon"},
    "horizon": {"horizon", "prediction_horizon", "n_action_steps", "pred_action_steps_only"},
    "n_action_steps": {"n_action_steps", "action_horizon"},
    "first_action": {"oa_step_convention", "pred_action_steps_only", "n_obs_steps"},
    "control_hz": {"control_freq", "env_kwargs", "env_metadata"},
    "scheduler": {"noise_scheduler", "ddpm", "ddim", "beta_start", "beta_end", "beta_schedule", "clip_sample"}
    | {"clip_sample_range", "prediction_type", "num_train_timesteps", "noise_scheduler_type"},
    "inference": {"num_inference_steps", "num_inference_timesteps", "num_train_timesteps", "noise_scheduler", "eta"}
    | {"ddpm", "ddim"},
    "action_parts": {"action_keys", "action_config", "action_normalization_stats"},
    "normalizer": {"normalization_mapping", "norm_map", "normalize_observation_keys", "features", "eps", "rename_map"}
    | {"input_features", "action_normalization_stats", "hdf5_normalize_obs", "obs_normalization_stats", "all_shapes"}
    | {"input_normalization_modes", "output_normalization_modes", "state_file", WEIGHTS},
    "weights": {WEIGHTS},
}
# What real-stanford's pinned diffusers takes for a setting that its config lacks, and LeRobot's schedulers by name.
SAID_ELSEWHERE = {"'DDPMScheduler'", "'DDIMScheduler'"} | {
    repr(value) for known in (DEFAULTS, *OWN_DEFAULTS.values()) for value in known.values()
}
# Settings that never differ without a difference in the policy.
NOTICED = {"n_obs_steps", "observation_horizon", "horizon", "prediction_horizon", "n_action_steps", "action_horizon"}
NOTICED |= {"prediction_type", "beta_schedule", "clip_sample", "num_train_timesteps", "num_inference_steps"}
NOTICED |= {"num_inference_timesteps", "n_groups", "n_head", "oa_step_convention", "noise_scheduler_type"}
# Other values that some of these settings may have.
OTHERS: dict[str, list[Any]] = {
    "n_obs_steps": [1, 3],
    "observation_horizon": [1, 3],
    "horizon": [16, 12],
    "prediction_horizon": [16, 12],
    "n_action_steps": [3, 5],
    "action_horizon": [3, 5],
    "num_inference_steps": [3, 4],
    "num_inference_timesteps": [3, 4],
    "num_train_timesteps": [50],
    "prediction_type": ["sample"],
    "beta_schedule": ["linear", "scaled_linear"],
    "clip_sample": [False],
    "n_groups": [2, 4],
    "n_head": [1, 4],
    "oa_step_convention": [False],
    "noise_scheduler_type": ["DDPM"],
    "eps": [0.5],
    "normalization_mapping": [{"STATE": "MEAN_STD", "ACTION": "MEAN_STD"}],
    "norm_map": [{"STATE": "QUANTILES", "ACTION": "QUANTILE10"}],
}
# Parts whose values are derived from several settings, or stand in a file's tensors.
DERIVED = {"provenance", "inference", "first_action", "horizon", "action_parts", "normalizer", "weights", "network"}


def even(value: Tensor) -> Tensor:
    """Numbers that half precision holds, too, so that a tensor of another type has the same values."""
    return torch.where(value.abs() < 2.0**-8, 2.0**-8, value).bfloat16().float() if value.is_floating_point() else value


def flatten(value: Any) -> Facts:
    """Everything that a file says; tensors by their numbers.

    Raises:
        AssertionError: more than can be walked.
    """
    facts: Facts = {}
    stack: list[tuple[tuple[Any, ...], Any]] = [((), value)]
    while stack:
        path, node = stack.pop()
        assert len(facts) < NODES
        assert len(path) < DEPTH
        if isinstance(node, TensorRef):
            try:
                node = node.load()
            except CheckpointError as error:  # of weights that do not act
                node = str(error)
        if isinstance(node, Tensor):
            numbers = node.contiguous().flatten().view(torch.uint8).numpy().tobytes()
            place = *path, WEIGHTS
            facts[place] = str(node.dtype), tuple(node.shape), hashlib.sha256(numbers).hexdigest()
        elif isinstance(node, Mapping):
            facts[path] = "map", tuple(map(str, node))
            stack += [((*path, str(key)), inner) for key, inner in node.items()]
        elif isinstance(node, list | tuple):
            facts[path] = "list", len(node)
            stack += [((*path, i), inner) for i, inner in enumerate(node)]
        else:
            plain = isinstance(node, str | int | float | None)
            facts[path] = type(node).__name__, node if plain else repr(node)[:200]
    return facts


def changed_names(before: Facts, after: Facts) -> set[str]:
    """Every key on the way to something that differs."""
    paths = [path for path in before.keys() | after.keys() if repr(before.get(path)) != repr(after.get(path))]
    return {str(part) for path in paths for part in path}


def set_other(rng: Generator, config: Any) -> Any:
    """Give a setting in a configuration another value that it may have, in place."""
    nodes, found = [config], []
    for node in nodes:
        inner = node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
        nodes += inner
        found += [(node, key) for key in node if key in OTHERS] if isinstance(node, dict) else []
    if found:
        node, key = found[rng.integers(len(found))]
        node[key] = OTHERS[key][rng.integers(len(OTHERS[key]))]
    return config


def load(path: Path) -> parapolicy.Policy | None:
    """As :func:`tests.fuzzing.checkpoints.load`."""
    return checkpoints.load(path, CHARACTERS)


def judge(
    original: parapolicy.Policy, found: parapolicy.Policy, before: Facts, read: Callable[[], Facts], scratch: Path
) -> str:
    """Say "equal" of a mutant that was taken and is what it should be.

    Args:
        original, before: the whole checkpoint and what its file says.
        found: the mutant.
        read: gives what its file says.

    Raises:
        AssertionError: it answers something that its file does not say.
    """
    different, after = differences(original, found), read()
    if not different:
        assert np.array_equal(chunk(original), chunk(found)), "another chunk"
        passed = [path for path in before.keys() & after.keys() if path and path[-1] in NOTICED]
        passed = [path for path in passed if before[path][1] != after[path][1]]
        assert not passed, f"{passed} differ in the file, and nothing in the policy"
        return "equal"
    names = changed_names(before, after)
    leaves = {repr(fact[1]) for fact in after.values()} | SAID_ELSEWHERE
    for part in different - {"provenance"}:
        assert names & EXPLAINED.get(part, set()), f"{part} differs, where the file differs in {sorted(names)[:20]}"
        if part not in DERIVED:
            new = {repr(leaf) for _, leaf, *_ in flatten(getattr(found.spec, part)).values()}
            old = {repr(leaf) for _, leaf, *_ in flatten(getattr(original.spec, part)).values()}
            lost = [leaf for leaf in new - old - leaves if not leaf.startswith("(")]
            assert not lost, f"{part} has {lost[:5]}, which the file does not say"
    parapolicy.save_policy(found, scratch / "native")
    again = load(scratch / "native")
    assert again is not None, "what was loaded cannot be saved and loaded again"
    assert not differences(found, again), f"saved and loaded again, {differences(found, again)} differ"
    return "equal"


def differences(one: parapolicy.Policy, other: parapolicy.Policy) -> set[str]:
    """The parts in which two policies differ: fields of the spec, ``normalizer``, ``weights``."""
    first, second = (json.loads(json.dumps(policy.spec.to_dict())) for policy in (one, other))
    found = {key for key in first.keys() | second.keys() if repr(first.get(key)) != repr(second.get(key))}
    for name, ours, theirs in (
        ("weights", one.network.state_dict(), other.network.state_dict()),
        ("normalizer", one.normalizer.state_dict(), other.normalizer.state_dict()),
    ):
        same = ours.keys() == theirs.keys() and all(torch.equal(value, theirs[key]) for key, value in ours.items())
        found |= set() if same else {name}
    return found


def chunk(policy: parapolicy.Policy) -> np.ndarray:
    return policy.predict(made_up_observations(policy, 1)[0], seed=0).trajectory


def same_structure(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> bool:
    """Whether no reader can tell the second from the first: the same names, shapes and types, finite values."""
    return before.keys() == after.keys() and all(
        (value.shape, value.dtype) == (after[name].shape, after[name].dtype) and bool(torch.isfinite(after[name]).all())
        for name, value in before.items()
    )
