"""The networks in checkpoints of real-stanford/diffusion_policy: their arguments and their tensors by our names.

Every size is read from the tensors; if the configuration has it too, both must agree.
"""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import torch

from parapolicy.checkpoint.archive import Archive
from parapolicy.checkpoint.hydra_config import Config
from parapolicy.checkpoint.inert import TensorRef

FINAL_GROUPS = 8  # of the UNet's last GroupNorm, for every configuration


class Saved(NamedTuple):
    """An open checkpoint.

    Attributes:
        archive: the open file, for errors.
        config: its configuration.
        tensors: the state dict in use. Names are removed when they are used; those left at the end are unknown.
    """

    archive: Archive
    config: Config
    tensors: dict[str, TensorRef]

    def take(self, prefix: str) -> dict[str, TensorRef]:
        """Remove and return the tensors whose names begin with a prefix, by their names without it."""
        names = [name for name in self.tensors if name.startswith(prefix)]
        return {name[len(prefix) :]: self.tensors.pop(name) for name in names}

    def agree(self, path: str, value: Any) -> None:
        """Raise CheckpointError if the configuration's value differs from that of the tensors."""
        said = self.config.known(path)
        if said is not None and said != value:
            raise self.archive.error(
                f"{path} is {said!r:.80} in its config, but its tensors are for {value}: file and config do not match; "
                "copy the checkpoint again"
            )


class FoundNetwork(NamedTuple):
    """A network, as read from the tensors.

    Attributes:
        settings: for ``PolicySpec.network``, without an encoder.
        width: numbers of one step of the sequence.
        tensors: by our network's names.
        lengths: name of a table -> number of its positions that are used.
        masks: tensors that must follow from the settings: name -> expected (True where not minus infinity).
    """

    settings: dict[str, Any]
    width: int
    tensors: dict[str, TensorRef]
    lengths: Mapping[str, int] = {}
    masks: Mapping[str, TensorRef] = {}


class Finder(Protocol):
    """Finds a network's settings from its tensors."""

    def __call__(self, saved: Saved, at: str, horizon: int, n_obs_steps: int) -> FoundNetwork: ...


def find_unet(saved: Saved, at: str, horizon: int, n_obs_steps: int) -> FoundNetwork:
    """``ConditionalUnet1D``.

    Args:
        saved: the checkpoint.
        at: path of its arguments in the configuration.
        horizon, n_obs_steps: of the policy.
    """
    tensors = saved.take("model.")
    tensors.pop("_dummy_variable", None)
    levels = 0
    while f"down_modules.{levels}.0.blocks.0.block.0.weight" in tensors:
        levels += 1
    dims = [size_of(saved, tensors, f"down_modules.{i}.0.blocks.0.block.0.weight", 0, 3) for i in range(max(levels, 1))]
    first = "down_modules.0.0.blocks.0.block.0.weight"
    film = size_of(saved, tensors, "down_modules.0.0.cond_encoder.1.weight", 0, 2)
    settings: dict[str, Any] = {
        "name": "unet1d",
        "diffusion_step_embed_dim": size_of(saved, tensors, "diffusion_step_encoder.3.weight", 0, 2),
        "down_dims": dims,
        "kernel_size": size_of(saved, tensors, first, 2, 3),
        "n_groups": saved.config.count(f"{at}.n_groups", 8),
        "cond_predict_scale": film == 2 * dims[0],
    }
    for name in ("diffusion_step_embed_dim", "down_dims", "kernel_size", "cond_predict_scale"):
        saved.agree(f"{at}.{name}", settings[name])
    if settings["n_groups"] != FINAL_GROUPS:
        settings["final_groups"] = FINAL_GROUPS
    condition = _unet_condition(saved, at)
    settings |= {"condition": condition} if condition != "global" else {}
    has_local = any(name.startswith("local_cond_encoder.") for name in tensors)
    if has_local != (condition == "local"):
        raise saved.archive.error(
            f"policy.obs_as_local_cond is {condition == 'local'} in its config, but its tensors "
            f"{'have a' if has_local else 'have no'} local_cond_encoder; copy the checkpoint again"
        )
    return FoundNetwork(settings, size_of(saved, tensors, first, 1, 3), tensors)


def _unet_condition(saved: Saved, at: str) -> str:
    lowdim = at == "policy.model"
    local = lowdim and saved.config.flag("policy.obs_as_local_cond", False)
    everywhere = saved.config.flag("policy.obs_as_global_cond", not lowdim)
    if local and everywhere:
        raise saved.archive.error("obs_as_local_cond and obs_as_global_cond are both on in its config, expected one")
    return "local" if local else "global" if everywhere else "inpaint"


def find_transformer(saved: Saved, at: str, horizon: int, n_obs_steps: int) -> FoundNetwork:
    """``TransformerForDiffusion``; arguments as for :func:`find_unet`."""
    tensors = saved.take("model.")
    tensors.pop("_dummy_variable", None)
    lowdim = at == "policy.model"
    crosses = saved.config.flag("policy.obs_as_cond", not lowdim)
    if crosses != ("cond_obs_emb.weight" in tensors):
        raise saved.archive.error(
            f"policy.obs_as_cond is {crosses} in its config, but its tensors have {'no' if crosses else 'a'} "
            "cond_obs_emb; copy the checkpoint again"
        )
    has_decoder = "decoder.layers.0.norm1.weight" in tensors
    mixing = _count_layers(tensors, "encoder.layers")
    settings: dict[str, Any] = {
        "name": "transformer1d",
        "n_layer": _count_layers(tensors, "decoder.layers") if has_decoder else mixing,
        "n_head": saved.config.count(f"{at}.n_head", 12 if lowdim else 4),
        "n_emb": size_of(saved, tensors, "input_emb.weight", 0, 2),
        "n_cond_layers": mixing if has_decoder else 0,  # an encoder-only network ignores it
        "causal_attn": "mask" in tensors,
        "time_as_condition": has_decoder,
        "condition": "cross" if crosses else "inpaint",
    }
    for name in ("n_layer", "n_emb", "causal_attn", *(["n_cond_layers"] if has_decoder else [])):
        saved.agree(f"{at}.{name}", settings[name])
    saved.agree(f"{at}.time_as_cond", has_decoder)
    lengths = {"pos_emb": horizon + (not has_decoder)}
    if has_decoder:
        lengths["cond_pos_emb"] = 1 + n_obs_steps * crosses
    for name, length in lengths.items():
        there = size_of(saved, tensors, name, 1, 3)
        # Without masks, the published network uses the first positions of a longer table; masks would not fit.
        if there < length or (there > length and settings["causal_attn"]):
            raise saved.archive.error(
                f"{name} has {there} positions, but its config (horizon, n_obs_steps, pred_action_steps_only) needs "
                f"{length}, which the published code cannot run either; copy the checkpoint again"
            )
    masks: dict[str, TensorRef] = {name: tensors.pop(name) for name in ("mask", "memory_mask") if name in tensors}
    return FoundNetwork(settings, size_of(saved, tensors, "input_emb.weight", 1, 2), tensors, lengths, masks)


def check_masks(saved: Saved, found: FoundNetwork, network: Any) -> None:
    """Raise CheckpointError unless the file's masks follow from the settings."""
    for name in ("mask", "memory_mask"):
        seen = getattr(network, name, None)
        ref = found.masks.get(name)
        expected = None if seen is None else torch.zeros(seen.shape).masked_fill(~seen, -torch.inf)
        if ref is None and expected is None:
            continue
        if ref is None or expected is None or ref.shape != expected.shape or not torch.equal(ref.load(), expected):
            raise saved.archive.error(f"model.{name} is not the causal mask of its config; copy the checkpoint again")


def _count_layers(tensors: Mapping[str, TensorRef], prefix: str) -> int:
    pattern = re.compile(rf"{re.escape(prefix)}\.(\d{{1,4}})\.")
    numbers = {int(match[1]) for match in map(pattern.match, tensors) if match}
    return max(numbers) + 1 if numbers else 0


def size_of(saved: Saved, tensors: Mapping[str, TensorRef], name: str, axis: int, rank: int) -> int:
    """The length of one axis of a tensor, whose rank is checked."""
    if name not in tensors:
        raise saved.archive.error(f"it lacks the tensor {name!r} of its network; save the checkpoint again")
    shape = tensors[name].shape
    if len(shape) != rank:
        raise saved.archive.error(f"{name} has shape {shape}, expected {rank} axes; save the checkpoint again")
    return shape[axis]
