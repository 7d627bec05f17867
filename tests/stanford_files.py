"""Small checkpoints as real-stanford/diffusion_policy saves them, made up from our own networks."""

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from parapolicy.networks import Network, build_network
from parapolicy.networks.transformer1d import TransformerForDiffusion
from parapolicy.spec import PolicySpec

DDPM = {
    "_target_": "diffusers.schedulers.scheduling_ddpm.DDPMScheduler", "num_train_timesteps": 100, "beta_start": 0.0001,
    "beta_end": 0.02, "beta_schedule": "squaredcos_cap_v2", "variance_type": "fixed_small", "clip_sample": True,
    "prediction_type": "epsilon",
}  # fmt: skip
DDIM = {k: v for k, v in DDPM.items() if k not in ("_target_", "variance_type")} | {
    "_target_": "diffusers.schedulers.scheduling_ddim.DDIMScheduler", "set_alpha_to_one": True, "steps_offset": 0,
}  # fmt: skip
UNET = {"name": "unet1d", "diffusion_step_embed_dim": 8, "down_dims": [8, 16], "kernel_size": 3, "n_groups": 8}
TRANSFORMER = {"name": "transformer1d", "n_layer": 2, "n_head": 2, "n_emb": 16}
SEQUENCE = {"conv1": "0", "bn1": "1", "layer1": "4", "layer2": "5", "layer3": "6", "layer4": "7"}


def network_of(network: dict[str, Any], observation: dict[str, Any], **spec: Any) -> tuple[PolicySpec, Network]:
    """A network with large random weights, and what it is for."""
    known = {"n_obs_steps": 2, "horizon": 8, "n_action_steps": 4, "action_dim": 2, "control_hz": None}
    described = PolicySpec(observation=observation, network=network, scheduler={}, **{**known, **spec})
    built = build_network(described).requires_grad_(False).eval()
    generator = torch.Generator().manual_seed(1)
    for value in built.state_dict().values():
        value.copy_(torch.randn(value.shape, generator=generator) * 0.2 + (value.ndim == 1))
    for name, value in built.state_dict().items():
        if name.endswith(("running_var", "temperature")):
            value.copy_(value.abs() + 0.5)
    return described, built


def model_state(network: Network) -> dict[str, Tensor]:
    """The network's tensors by their published names, without an encoder's."""
    state = {f"model.{k}": v for k, v in network.state_dict().items() if ".cameras." not in k}
    if isinstance(network, TransformerForDiffusion):
        masks = {"mask": network.mask, "memory_mask": network.memory_mask}
        state |= {
            f"model.{k}": torch.zeros(m.shape).masked_fill(~m, -torch.inf) for k, m in masks.items() if m is not None
        }
        state["model._dummy_variable"] = torch.zeros(0)
    return state


def robomimic_state(network: Network, cameras: list[str]) -> dict[str, Tensor]:
    """The tensors of a hybrid policy's encoders by their published names, each backbone and pool twice."""
    state = {}
    for name, value in network.state_dict().items():
        if ".cameras." not in name:
            continue
        _, _, rest = name.partition("cameras.")
        number, _, rest = rest.partition(".")
        at = f"obs_encoder.obs_nets.{cameras[int(number)]}."
        part, _, rest = rest.partition(".")
        if part == "backbone":
            layer, _, rest = rest.partition(".")
            state |= {f"{at}{to}.nets.{SEQUENCE[layer]}.{rest}": value.clone() for to in ("backbone", "nets.0")}
        elif part == "pool":
            rest = rest.replace("conv.", "nets.")
            state |= {f"{at}{to}.{rest}": value.clone().reshape(value.shape or (1,)) for to in ("pool", "nets.1")}
        else:
            state[f"{at}nets.3.{rest}"] = value
    return state


def image_state(network: Network, cameras: list[str]) -> dict[str, Tensor]:
    """The tensors of ``MultiImageObsEncoder`` by their published names."""
    state = {"obs_encoder._dummy_variable": torch.zeros(0)}
    for name, value in network.state_dict().items():
        if name.startswith("encoder.cameras."):
            number, _, rest = name.removeprefix("encoder.cameras.").partition(".backbone.")
            state[f"obs_encoder.key_model_map.{cameras[int(number)]}.{rest}"] = value
            if rest.endswith("running_var"):
                count = rest.replace("running_var", "num_batches_tracked")
                state[f"obs_encoder.key_model_map.{cameras[int(number)]}.{count}"] = torch.tensor(5)
    return state


def normaliser_state(**lengths: int) -> dict[str, Tensor]:
    """A normaliser: 0.5 x + 0.25 for every key, given the length of its tensors."""
    state = {"_dummy_variable": torch.zeros(0), "mask_generator._dummy_variable": torch.zeros(0)}
    for key, length in lengths.items():
        at = f"normalizer.params_dict.{key}"
        state |= {f"{at}.scale": torch.full((length,), 0.5), f"{at}.offset": torch.full((length,), 0.25)}
        state |= {f"{at}.input_stats.{name}": torch.ones(length) for name in ("min", "max", "mean", "std")}
    return state


def lowdim_config(unet: bool = True, **policy: Any) -> dict[str, Any]:
    """What the published configuration of a low-dim policy says of the parts that count."""
    name = "Unet" if unet else "Transformer"
    model = (
        {"_target_": "x.ConditionalUnet1D", "diffusion_step_embed_dim": 8, "down_dims": [8, 16], "kernel_size": 3}
        | {"n_groups": 8, "cond_predict_scale": True}
        if unet
        else {"_target_": "x.TransformerForDiffusion", "n_layer": 2, "n_head": 2, "n_emb": 16, "causal_attn": True}
    )
    values = {
        "_target_": f"diffusion_policy.policy.x.Diffusion{name}LowdimPolicy", "model": model, "noise_scheduler": DDPM,
        "horizon": 8, "obs_dim": 3, "action_dim": 2, "n_action_steps": 4, "n_obs_steps": 2, "num_inference_steps": 100,
        **({"obs_as_global_cond": True, "oa_step_convention": True} if unet else {"obs_as_cond": True}), **policy,
    }  # fmt: skip
    return {"policy": copy.deepcopy(values), "training": {"use_ema": True}, "n_latency_steps": 0}


def image_config(shapes: dict[str, list[int]], kind: str, **policy: Any) -> dict[str, Any]:
    """The same of an image policy: ``kind`` is ``UnetHybrid``, ``TransformerHybrid`` or ``Unet``."""
    entries = {k: {"shape": s, "type": "rgb" if len(s) == 3 else "low_dim"} for k, s in shapes.items()}
    values = {
        "_target_": f"diffusion_policy.policy.x.Diffusion{kind}ImagePolicy", "noise_scheduler": DDPM, "horizon": 8,
        "shape_meta": {"obs": entries, "action": {"shape": [2]}}, "n_action_steps": 4, "n_obs_steps": 2, **policy,
    }  # fmt: skip
    return {"policy": copy.deepcopy(values), "training": {"use_ema": True}}


def save(path: Path, config: Any, ema: dict[str, Tensor], model: dict[str, Tensor] | None = None) -> Path:
    """A checkpoint whose raw weights are zeros, unless given."""
    raw = {k: torch.zeros_like(v) for k, v in ema.items()} if model is None else model
    states = {"model": raw, "ema_model": ema, "optimizer": {"state": {}, "param_groups": []}}
    torch.save({"cfg": config, "state_dicts": states, "pickles": {"epoch": b"\x80\x04K\x05."}}, path)
    return path


def assert_same(found: Network, built: Network) -> None:
    assert type(found) is type(built)
    for (name, mine), (other, theirs) in zip(found.state_dict().items(), built.state_dict().items(), strict=True):
        assert name == other
        assert torch.equal(mine, theirs), name
