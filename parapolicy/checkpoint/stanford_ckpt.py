"""Checkpoints of real-stanford/diffusion_policy (Chi et al., RSS 2023): the ``.ckpt`` files of its ``train.py``.

A file holds the configuration, state dicts (``model``, and ``ema_model`` if averaged weights are in use), and the
optimiser's state, which is not read. The published code's behaviour at evaluation is reproduced, also where it is odd:
see the comments. Settings that would change the chunks and are not supported are refused.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from parapolicy.checkpoint import stanford_umi
from parapolicy.checkpoint.archive import Archive, holds
from parapolicy.checkpoint.folder_files import some
from parapolicy.checkpoint.hydra_config import Config
from parapolicy.checkpoint.inert import TensorRef
from parapolicy.checkpoint.pickles import unpickle
from parapolicy.checkpoint.stand_ins import OMEGACONF
from parapolicy.checkpoint.stanford_encoders import (
    FoundEncoder,
    check_places,
    find_image_encoder,
    find_robomimic_encoder,
)
from parapolicy.checkpoint.stanford_networks import (
    FoundNetwork,
    Saved,
    check_masks,
    find_transformer,
    find_unet,
)
from parapolicy.checkpoint.stanford_schedule import read_schedule
from parapolicy.errors import CheckpointError
from parapolicy.networks import Network, build_network
from parapolicy.normalizer import Affine, Normalizer
from parapolicy.spec import Feature, PolicySpec

NORMALIZER = "normalizer.params_dict."
STATISTICS = ("min", "max", "mean", "std")  # of the data; not needed
MODEL_CLASSES = {"ConditionalUnet1D", "TransformerForDiffusion"}


class _Family(NamedTuple):
    """One published policy class: how to find its network and encoder, and its additional arguments."""

    find_network: Any
    find_encoder: Any
    keys: frozenset[str]


UMI = "DiffusionUnetTimmPolicy"

_IMAGE_KEYS = {"shape_meta", "obs_as_global_cond", "diffusion_step_embed_dim", "down_dims", "kernel_size", "n_groups"}
_IMAGE_KEYS |= {"cond_predict_scale"}
_ROBOMIMIC_KEYS = {"crop_shape", "obs_encoder_group_norm", "eval_fixed_crop"}
_LAYER_KEYS = {"n_layer", "n_cond_layers", "n_head", "n_emb", "p_drop_emb", "p_drop_attn", "causal_attn"}
_LAYER_KEYS |= {"time_as_cond", "obs_as_cond", "pred_action_steps_only", "shape_meta"}
_LOWDIM_KEYS = {"model", "obs_dim", "action_dim", "pred_action_steps_only"}

FAMILIES = {
    "DiffusionUnetLowdimPolicy": _Family(
        find_unet, None, frozenset(_LOWDIM_KEYS | {"obs_as_local_cond", "obs_as_global_cond", "oa_step_convention"})
    ),
    "DiffusionTransformerLowdimPolicy": _Family(find_transformer, None, frozenset(_LOWDIM_KEYS | {"obs_as_cond"})),
    "DiffusionUnetHybridImagePolicy": _Family(
        find_unet, find_robomimic_encoder, frozenset(_IMAGE_KEYS | _ROBOMIMIC_KEYS)
    ),
    "DiffusionTransformerHybridImagePolicy": _Family(
        find_transformer, find_robomimic_encoder, frozenset(_LAYER_KEYS | _ROBOMIMIC_KEYS)
    ),
    "DiffusionUnetImagePolicy": _Family(find_unet, find_image_encoder, frozenset(_IMAGE_KEYS | {"obs_encoder"})),
}


def recognises(path: Path) -> bool:
    """Whether a file is of torch.save and names the state dicts of a workspace."""
    return holds(path, b"state_dicts", b"cfg")


def read(path: Path) -> tuple[PolicySpec, Network, Normalizer]:
    """Read a file onto the CPU.

    Raises:
        CheckpointError: a damaged or hostile file, not a diffusion policy, or a policy whose chunks cannot be
            reproduced.
    """
    with Archive(path) as archive:
        saved, weights = _open(archive)
        policy_class = saved.config.text("policy._target_").rpartition(".")[2]
        spec, found, encoder = _describe(saved, policy_class, {"policy": policy_class, "weights": weights})
        try:
            with torch.device("meta"):
                network = build_network(spec)
        except (ValueError, TypeError, AttributeError, RuntimeError, ArithmeticError) as error:
            raise archive.error(f"its config does not describe a network: {error}") from error
        normalizer = _read_normalizer(saved, spec)
        if saved.tensors:
            raise archive.error(
                f"{weights} has unknown tensors {sorted(saved.tensors)[:4]}; the policy's class was changed, so its "
                "chunks would be wrong here"
            )
        _fill(archive, network, found, encoder)
        check_masks(saved, found, network)
        if encoder is not None:
            check_places(saved, encoder, network.get_submodule(_encoder_name(spec.network)))
    return spec, network.requires_grad_(False).eval(), normalizer


def _open(archive: Archive) -> tuple[Saved, str]:
    """The configuration and the state dict in use, with its name."""
    payload = unpickle(archive, OMEGACONF)
    states = payload.get("state_dicts") if isinstance(payload, dict) else None
    if not isinstance(states, dict) or "cfg" not in payload:
        keys = list(payload)[:6] if isinstance(payload, dict) else type(payload).__name__
        raise archive.error(
            f"it holds {keys!r:.100}, expected 'cfg' and 'state_dicts' of real-stanford/diffusion_policy"
        )
    config = Config(payload["cfg"], archive.error)
    weights = "ema_model" if config.flag("training.use_ema") else "model"
    tensors = states.get(weights)
    if not isinstance(tensors, dict):
        raise archive.error(
            f"training.use_ema asks for {weights}, but the file has only {list(states)[:4]!r:.100}; save it again"
        )
    for name, ref in tensors.items():
        if not isinstance(name, str) or not isinstance(ref, TensorRef):
            raise archive.error(f"{weights} holds {name!r:.80}, which is not a tensor; save it again")
    return Saved(archive, config, dict(tensors)), weights


def _find_family(saved: Saved, policy_class: str) -> _Family:
    family = FAMILIES.get(policy_class)
    if family is None:
        raise saved.archive.error(
            f"its policy is {policy_class!r:.80}, expected one of the diffusion policies {sorted([*FAMILIES, UMI])}"
        )
    model = saved.config.known("policy.model._target_")
    if model is not None and str(model).rpartition(".")[2] not in MODEL_CLASSES:
        raise saved.archive.error(f"policy.model._target_ is {model!r:.80}, expected one of {sorted(MODEL_CLASSES)}")
    return family


def _describe(
    saved: Saved, policy_class: str, provenance: dict[str, Any]
) -> tuple[PolicySpec, FoundNetwork, FoundEncoder | None]:
    task = saved.config.known("task.name")
    if isinstance(task, str):
        provenance["task"] = task[:100]
    try:
        if policy_class == UMI:
            return stanford_umi.describe(saved, provenance)
        return _describe_family(saved, _find_family(saved, policy_class), provenance)
    except CheckpointError:
        raise
    except (ValueError, TypeError) as error:
        raise saved.archive.error(f"its config does not describe a policy: {error}") from error


def _describe_family(
    saved: Saved, family: _Family, provenance: dict[str, Any]
) -> tuple[PolicySpec, FoundNetwork, FoundEncoder | None]:
    config, archive = saved.config, saved.archive
    lowdim = family.find_encoder is None
    n_obs_steps, n_action_steps = config.count("policy.n_obs_steps"), config.count("policy.n_action_steps")
    alone = lowdim or family.find_network is find_transformer
    only_executed = alone and config.flag("policy.pred_action_steps_only", False)
    horizon = n_action_steps if only_executed else config.count("policy.horizon")
    found = family.find_network(saved, "policy.model" if lowdim else "policy", horizon, n_obs_steps)
    encoder = None if lowdim else family.find_encoder(saved)
    inpaints = found.settings.get("condition") == "inpaint"
    if encoder is None:
        observed = _vector_length(saved, "obs", "policy.obs_dim")
        observation = {"obs": Feature((observed,))}
        if parts := _parts_of_observation(config):
            provenance["obs"] = parts
        action_dim = found.width - observed * inpaints
        saved.agree("policy.action_dim", action_dim)
    else:
        observation = encoder.observation
        action_dim = config.count("policy.shape_meta.action.shape.0")
        saved.agree("policy.shape_meta.action.shape", [action_dim])
        found.settings["encoder"] = encoder.settings
    if not inpaints and action_dim != found.width:
        raise archive.error(
            f"its config has actions of {action_dim} numbers, but its network's tensors are for {found.width}"
        )
    scheduler, inference = read_schedule(saved, family.keys)
    first = 0 if only_executed else n_obs_steps - 1
    if family.find_network is find_unet and lowdim and not only_executed:
        first += not config.flag("policy.oa_step_convention", False)
    latency = config.known("n_latency_steps")
    if type(latency) is int and latency:  # the published runners drop that many executed actions
        provenance["n_latency_steps"] = latency
    spec = PolicySpec(
        observation=observation,
        n_obs_steps=n_obs_steps,
        horizon=horizon,
        n_action_steps=n_action_steps,
        action_dim=action_dim,
        network=found.settings,
        scheduler=scheduler,
        control_hz=None,
        provenance={"format": "real-stanford/diffusion_policy", **provenance},
        first_action=None if first == n_obs_steps - 1 else first,
        observed_dim=found.width - action_dim if inpaints else 0,
        inference=inference,
    )
    return spec, found, encoder


def _parts_of_observation(config: Config) -> list[str]:
    """Names of what the published data sets concatenate as ``obs``; empty if the file does not say it."""
    data = str(config.known("task.dataset._target_")).rpartition(".")[2]
    names = [config.known(f"task.dataset.{name}") for name in ("obs_key", "state_key")]
    if data == "PushTLowdimDataset" and names in ([None, None], ["keypoint", "state"]):  # its defaults
        return ["keypoint", "agent_pos"]
    keys = config.known("task.dataset.obs_keys") if data == "RobomimicReplayLowdimDataset" else None
    return keys if isinstance(keys, list) and all(isinstance(key, str) for key in keys) else []


def _vector_length(saved: Saved, key: str, path: str) -> int:
    """Size of a key, from the normaliser's tensors, or from the configuration if one pair serves all numbers."""
    scale = saved.tensors.get(f"{NORMALIZER}{key}.scale")
    length = scale.shape[0] if scale is not None and len(scale.shape) == 1 else 1
    if length == 1:
        return saved.config.count(path)
    saved.agree(path, length)
    return length


def _read_normalizer(saved: Saved, spec: PolicySpec) -> Normalizer:
    maps, unknown = {}, dict[str, TensorRef]()
    for name in [name for name in saved.tensors if name.endswith("_dummy_variable") and name.count(".") < 2]:
        saved.tensors.pop(name)
    for key, shape in spec.normalizer_shapes.items():
        found = saved.take(f"{NORMALIZER}{key}.")
        if not {"scale", "offset"} <= found.keys():
            raise saved.archive.error(
                f"it has no normaliser of {key!r:.60}: it was saved before set_normalizer; save it after training began"
            )
        maps[key] = Affine(*(_spread(saved, f"{key}.{name}", found.pop(name), shape) for name in ("scale", "offset")))
        for name in STATISTICS:
            found.pop(f"input_stats.{name}", None)
        unknown |= {f"{NORMALIZER}{key}.{name}": ref for name, ref in found.items()}
    saved.take(NORMALIZER)  # for keys of the data set that the policy does not observe
    saved.tensors.update(unknown)
    try:
        return Normalizer(maps)
    except ValueError as error:
        raise saved.archive.error(str(error)) from error


def _spread(saved: Saved, name: str, ref: TensorRef, shape: tuple[int, ...]) -> Tensor:
    """Expand one number per number of the key, or one for all: (D,) or (1,) -> the key's shape."""
    lengths = {1} if len(shape) == 3 else {1, shape[0]}
    if ref.dtype is not torch.float32 or len(ref.shape) != 1 or ref.shape[0] not in lengths:
        raise saved.archive.error(
            f"the normaliser's {name} has shape {ref.shape} and type {ref.dtype}, expected float32 for {shape}"
        )
    value = ref.load()
    return (value[:, None, None] if len(shape) == 3 else value).expand(shape).contiguous()


def _encoder_name(settings: Mapping[str, Any]) -> str:
    # The published transformer also has an "encoder".
    return "obs_encoder" if settings["name"] == "transformer1d" else "encoder"


def _fill(archive: Archive, network: Network, found: FoundNetwork, encoder: FoundEncoder | None) -> None:
    """Load the network's tensors, after comparing all names, shapes and types."""
    refs = dict(found.tensors)
    if encoder is not None:
        refs |= {f"{_encoder_name(found.settings)}.{name}": ref for name, ref in encoder.tensors.items()}
    expected = network.state_dict()
    missing, unknown = sorted(expected.keys() - refs.keys()), sorted(refs.keys() - expected.keys())
    if missing or unknown:
        raise archive.error(
            f"its tensors do not match its config: missing {some(missing)}, unexpected {some(unknown)}; save it again"
        )
    for name, ref in refs.items():
        shape, given = tuple(expected[name].shape), ref.shape
        if name in found.lengths and len(given) == 3:
            given = (given[0], min(given[1], found.lengths[name]), given[2])
        if name.endswith("pool.temperature") and given == (1,):
            given = ()
        if given != shape or ref.dtype is not torch.float32:
            raise archive.error(
                f"{name} has shape {ref.shape} and type {ref.dtype}, expected {shape} and torch.float32 from its "
                "config; copy it again"
            )
    tensors = {}
    for name, ref in refs.items():
        value = ref.load()
        if not torch.isfinite(value).all():
            raise archive.error(f"{name} holds a value that is not finite: the training run diverged")
        if name in found.lengths:
            value = value[:, : found.lengths[name]].contiguous()
        tensors[name] = value.reshape(expected[name].shape)
    network.load_state_dict(tensors, assign=True)
