"""What robomimic's diffusion policies do with and without acceleration, as JSON; see test_live_loops.py.

python tests/robomimic_live.py      with that repository and this one on PYTHONPATH

robomimic is pinned to diffusers 0.11.1, whose average of weights has other arguments than today's; it stands here as an
object with the attribute that robomimic samples from.
"""

import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import robomimic.models.diffusion_policy_nets as networks
import robomimic.utils.obs_utils as obs_utils
import torch
from robomimic.algo import RolloutPolicy, algo_factory
from robomimic.config import config_factory

import parapolicy

SHAPES = {"robot0_eef_pos": [3], "object": [10]}
networks.ConditionalUnet1D.__init__.__defaults__ = (32, [16, 32, 64], 5, 8)  # robomimic has no setting for them


def algo(kind: str) -> Any:
    config = config_factory("diffusion_policy")
    with config.unlocked():
        # As robomimic's training script does.
        config.algo.optim_params.policy.num_train_batches = config.algo.optim_params.policy.num_epochs = 1
        config.observation.modalities.obs.low_dim = list(SHAPES)
        config.algo.ema.enabled = False
        config.algo.ddpm.enabled, config.algo.ddim.enabled = kind == "ddpm", kind == "ddim"
        config.algo.ddpm.num_train_timesteps = config.algo.ddpm.num_inference_timesteps = 20
    obs_utils.initialize_obs_utils_with_config(config)
    return algo_factory("diffusion_policy", config, SHAPES, ac_dim=7, device=torch.device("cpu"))


def policy(kind: str, averaged: bool) -> RolloutPolicy:
    torch.manual_seed(0)
    built = algo(kind)
    if averaged:
        built.ema = SimpleNamespace(averaged_model=algo(kind).nets.eval())
    return RolloutPolicy(built)


def act(rollout: RolloutPolicy) -> np.ndarray:
    """Actions of two chunks, and the random number that would be drawn next."""
    rollout.start_episode()
    torch.manual_seed(1)
    rng = np.random.default_rng(2)
    steps = [{key: rng.normal(size=(2, *shape)) for key, shape in SHAPES.items()} for _ in range(9)]
    return np.concatenate([*(rollout(step) for step in steps), torch.rand(1).numpy()])


def main() -> dict[str, Any]:
    torch.set_num_threads(1)
    found: dict[str, Any] = {"sequential": {}, "secant": {}, "clean": True}
    for kind, averaged in (("ddpm", True), ("ddpm", False), ("ddim", True)):
        rollout = policy(kind, averaged)
        name = f"{kind}, averaged" if averaged else kind
        own = act(rollout)
        assert parapolicy.accelerate(rollout, "sequential", "eager") is rollout
        found["sequential"][name] = float(np.abs(act(rollout) - own).max())
        parapolicy.accelerate(rollout, "secant", "eager", verify=True, tolerance=1e-4)
        found["secant"][name] = float(np.abs(act(rollout) - own).max())
        assert len(rollout.policy._parapolicy.recent) == 2
        found["clean"] &= np.array_equal(act(parapolicy.restore(rollout)), own)
        found["clean"] &= not {"_get_action_trajectory", "_parapolicy"} & set(vars(rollout.policy))
    return found


if __name__ == "__main__":
    print(json.dumps(main()))
