"""What policies of real-stanford/diffusion_policy do with and without acceleration, as JSON; see test_live_loops.py.

python tests/stanford_live.py      with that repository and this one on PYTHONPATH
"""

import copy
import json
import warnings
from collections.abc import Callable
from typing import Any

import torch
from diffusers import DDIMScheduler, DDPMScheduler
from diffusion_policy.model.common.normalizer import LinearNormalizer
from diffusion_policy.model.diffusion.conditional_unet1d import ConditionalUnet1D
from diffusion_policy.model.diffusion.transformer_for_diffusion import TransformerForDiffusion
from diffusion_policy.policy.diffusion_transformer_lowdim_policy import DiffusionTransformerLowdimPolicy
from diffusion_policy.policy.diffusion_unet_lowdim_policy import DiffusionUnetLowdimPolicy

import parapolicy

OBS, ACTION = 5, 3
SIZES = {"horizon": 16, "obs_dim": OBS, "action_dim": ACTION, "n_action_steps": 8, "n_obs_steps": 2}
COSINE = {"num_train_timesteps": 20, "beta_schedule": "squaredcos_cap_v2"}


def unet(condition: str, scheduler: Any = None, **options: Any) -> DiffusionUnetLowdimPolicy:
    torch.manual_seed(0)
    model = ConditionalUnet1D(
        input_dim=ACTION + (OBS if condition == "inpaint" else 0),
        local_cond_dim=OBS if condition == "local" else None,
        global_cond_dim=2 * OBS if condition == "global" else None,
        diffusion_step_embed_dim=32,
        down_dims=[32, 64],
        cond_predict_scale=True,
    )
    given = {f"obs_as_{condition}_cond": True} if condition != "inpaint" else {}
    return ready(DiffusionUnetLowdimPolicy(model, scheduler or DDPMScheduler(**COSINE), **SIZES, **given, **options))


def transformer(crosses: bool = True, **options: Any) -> DiffusionTransformerLowdimPolicy:
    torch.manual_seed(0)
    width = ACTION + (0 if crosses else OBS)
    only = {"pred_action_steps_only": True} if options.pop("only", False) else {}
    model = TransformerForDiffusion(
        input_dim=width,
        output_dim=width,
        horizon=8 if only and options.get("causal_attn") else 16,
        n_obs_steps=2,
        cond_dim=OBS if crosses else 0,
        n_layer=2,
        n_head=2,
        n_emb=32,
        **options,
    )
    for value in model.parameters():
        value.data.mul_(3)  # published initial weights hardly look at anything
    scheduler = DDPMScheduler(**COSINE)
    return ready(DiffusionTransformerLowdimPolicy(model, scheduler, **SIZES, obs_as_cond=crosses, **only))


def ready(policy: Any) -> Any:
    normalizer = LinearNormalizer()
    normalizer.fit({"obs": torch.randn(100, OBS), "action": torch.randn(100, ACTION)})
    policy.set_normalizer(normalizer)
    return policy.eval()


POLICIES: dict[str, Callable[[], Any]] = {
    "unet": lambda: unet("global"),
    "unet, local": lambda: unet("local"),
    "unet, inpainting": lambda: unet("inpaint"),
    "unet, executed actions only": lambda: unet("global", pred_action_steps_only=True),
    "unet, DDPM 7": lambda: unet("global", num_inference_steps=7),
    "unet, DDIM 5": lambda: unet("global", DDIMScheduler(**COSINE), num_inference_steps=5),
    "unet, DDIM 5 with noise": lambda: unet("global", DDIMScheduler(**COSINE), num_inference_steps=5, eta=0.7),
    "unet, sample": lambda: unet("global", DDPMScheduler(**COSINE, prediction_type="sample")),
    "transformer": lambda: transformer(causal_attn=True),
    "transformer, not causal, executed actions only": lambda: transformer(only=True),
    "transformer, condition layers": lambda: transformer(n_cond_layers=1),
    "transformer, inpainting": lambda: transformer(crosses=False, causal_attn=True),
    "transformer, encoder only": lambda: transformer(crosses=False, time_as_cond=False),
}


@torch.no_grad()
def act(policy: Any, batch: int = 2) -> torch.Tensor:
    """Everything that two calls give, and the random number that would be drawn next."""
    torch.manual_seed(1)
    parts = []
    for seed in range(2):
        obs = torch.randn(batch, 2, OBS, generator=torch.Generator().manual_seed(seed))
        parts += [value.flatten() for value in policy.predict_action({"obs": obs}).values()]
    return torch.cat([*parts, torch.rand(1)])


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max())


def refusal(policy: Any) -> str:
    try:
        act(policy)
    except ValueError as error:
        return str(error)
    return "nothing"


class Guided(DiffusionUnetLowdimPolicy):
    """A loop that does something between its steps."""

    def conditional_sample(self, condition_data: Any, condition_mask: Any, local_cond: Any, global_cond: Any) -> Any:
        state = torch.randn_like(condition_data)
        self.noise_scheduler.set_timesteps(self.num_inference_steps)
        for t in self.noise_scheduler.timesteps:
            output = self.model(state, t, local_cond=local_cond, global_cond=global_cond)
            state = self.noise_scheduler.step(output, t, state).prev_sample
            state = state - 0.01 * state
        return state


def main() -> dict[str, Any]:
    torch.set_num_threads(1)
    found: dict[str, Any] = {"sequential": {}, "secant": {}, "evaluations": {}}
    for name, make in POLICIES.items():
        policy = make()
        own = act(policy)
        assert parapolicy.accelerate(policy, "sequential", "eager") is policy
        found["sequential"][name] = difference(act(policy), own)
        parapolicy.accelerate(policy, "secant", "eager", tolerance=1e-4)
        found["secant"][name] = difference(act(policy), own)
        found["evaluations"][name] = int(policy._parapolicy.recent[-1].evaluations[0])
        assert difference(act(parapolicy.restore(policy)), own) == 0

    policy = unet("global")
    own, before = act(policy), sorted(policy.state_dict())
    parapolicy.accelerate(policy, "sequential", "auto")
    found["auto"] = difference(act(policy), own)
    found["state_dict_kept"] = sorted(policy.state_dict()) == before
    twin = copy.deepcopy(policy)
    for value in twin.model.parameters():
        value.data.mul_(0.9)
    changed = act(twin)
    found["copy_changed"] = difference(changed, own)
    found["copy_equals_its_original"] = difference(changed, act(parapolicy.restore(twin)))
    policy.num_inference_steps = 5
    found["overridden"] = difference(act(policy), act(parapolicy.restore(copy.deepcopy(policy))))
    policy.num_inference_steps = 20

    for label, settings in (("verified", ("sequential", {})), ("stepped_aside", ("collocation", {"nodes": 2}))):
        parapolicy.accelerate(policy, settings[0], "eager", verify=True, **settings[1])
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            found[label] = difference(act(policy), own)
        found[f"{label}_warnings"] = [str(w.message) for w in warned if "uses its own sampling" in str(w.message)]
    found["instance_clean"] = not {"conditional_sample", "_parapolicy"} & set(vars(policy))

    found["refused"] = {
        "guided": refusal(parapolicy.accelerate(changed_class(unet("global"), Guided))),
        "double": refusal(parapolicy.accelerate(unet("global").to(torch.float64))),
        "training": refusal(parapolicy.accelerate(transformer().train())),
        "option": refusal(parapolicy.accelerate(unet("global", return_dict=True))),
        "scheduler": refusal(parapolicy.accelerate(unet("global", OtherDDPM(**COSINE)))),
        "network": refusal(parapolicy.accelerate(other_network())),
    }
    return found


def changed_class(policy: Any, kind: type) -> Any:
    policy.__class__ = kind
    return policy


class OtherDDPM(DDPMScheduler):
    def step(self, model_output: Any, *args: Any, **kwargs: Any) -> Any:
        return super().step(1.01 * model_output, *args, **kwargs)


OtherDDPM.__name__ = "DDPMScheduler"


def other_network() -> Any:
    policy = unet("global")
    policy.model.mid_modules[0].blocks[0].block[2] = torch.nn.SiLU()
    return policy


if __name__ == "__main__":
    print(json.dumps(main()))
