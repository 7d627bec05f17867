"""Sampling for a live ``DiffusionPolicy`` of LeRobot 0.3 or newer.

``conditional_sample`` of its ``diffusion`` model decides what it samples, and is replaced. Queues, encoders,
processors, training, ``state_dict`` and ``to`` stay LeRobot's.
"""

import inspect
import types
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from parapolicy.adapters.live import (
    ATTRIBUTE,
    CONDITION,
    Accelerated,
    Built,
    Method,
    adopt,
    draw_noise_after,
    read_schedule,
    remove,
    sample_checked,
)
from parapolicy.checkpoint.lerobot_config import FINAL_GROUPS, UNET
from parapolicy.checkpoint.lerobot_folder import COMPILED, published_name
from parapolicy.networks import build_network
from parapolicy.spec import Feature, PolicySpec


def methods(policy: Any) -> list[Method]:
    """The methods to replace of a ``DiffusionPolicy``; none of other objects."""
    model = getattr(policy, "diffusion", None)
    if not callable(getattr(model, "conditional_sample", None)) or not hasattr(model, "unet"):
        return []
    return [
        Method(model, "conditional_sample", conditional_sample),
        Method(policy, "predict_action_chunk", predict_action_chunk),
    ]


def _sample(
    accelerated: Accelerated,
    model: Any,
    condition: Tensor,
    generator: torch.Generator | None,
    noise: Tensor | None,
) -> Tensor:
    """Chunks (B, H, Da), normalised, for condition vectors (B, C)."""
    scheduler, device = model.noise_scheduler, condition.device
    steps = int(model.num_inference_steps)
    key = steps, type(scheduler), sorted(map(str, scheduler.config.items())), condition.shape[1], device
    with accelerated.built(key, model.unet, lambda: _build(accelerated, model, steps, condition)) as built:
        shape = (len(condition), *built.policy.spec.sample_shape)
        first = torch.randn(shape, device=device, generator=generator) if noise is None else noise.to(device).float()
        drawn = draw_noise_after(first, built.draws, generator)
        return accelerated.sample(built.policy, condition[:, None], drawn).to(condition.dtype)


def _build(accelerated: Accelerated, model: Any, steps: int, condition: Tensor) -> Built:
    settings = model.config
    network = {name: getattr(settings, theirs) for name, (theirs, _) in UNET.items()}
    network["down_dims"] = list(network["down_dims"])
    shape = settings.horizon, settings.action_feature.shape[0]
    config, schedule, draws = read_schedule(model.noise_scheduler, steps, shape)
    spec = PolicySpec(
        observation={CONDITION: Feature((condition.shape[1],))},
        n_obs_steps=1,
        horizon=shape[0],
        n_action_steps=1,
        action_dim=shape[1],
        network={"name": "unet1d", **network, "final_groups": FINAL_GROUPS},
        scheduler=config,
        control_hz=None,
        inference={"steps": steps, "spacing": "diffusers"},
    )
    with torch.device("meta"):
        names = {str(published_name(name, separate=False)): name for name in build_network(spec).state_dict()}
    theirs = {
        f"diffusion.unet.{name.replace(COMPILED[1:] + '.', '')}": value
        for name, value in model.unet.state_dict().items()
    }
    adopted = adopt(spec, {names.get(name, name): value for name, value in theirs.items()})
    return Built(accelerated.make_policy(spec, adopted, schedule, condition.device), draws)


@torch.compiler.disable
def conditional_sample(
    self: Any,
    batch_size: int,
    global_cond: Tensor | None = None,
    generator: torch.Generator | None = None,
    noise: Tensor | None = None,
    **others: Any,
) -> Tensor:
    """Replaces LeRobot's method of that name, on an instance or its class."""
    if ATTRIBUTE not in vars(self):  # the method was replaced on the class
        setattr(self, ATTRIBUTE, Accelerated(*REPLACED[type(self)].settings))
        REPLACED[type(self)].made.append(getattr(self, ATTRIBUTE))
    accelerated: Accelerated = getattr(self, ATTRIBUTE)
    original = _original(self, "conditional_sample")
    if global_cond is None or any(value is not None for value in others.values()):
        chunk: Tensor = original(self, batch_size, global_cond=global_cond, generator=generator, noise=noise, **others)
        return chunk

    def ours() -> Tensor:
        return _sample(accelerated, self, global_cond, generator, noise)

    def theirs() -> Tensor:
        given = {"noise": noise} if "noise" in inspect.signature(original).parameters else {}
        return original(self, batch_size, global_cond=global_cond, generator=generator, **given)

    def step_aside() -> None:
        remove(Method(self, "conditional_sample", conditional_sample))
        if type(self) in REPLACED:
            self.conditional_sample = types.MethodType(original, self)

    return sample_checked(accelerated, ours, theirs, step_aside, generator, global_cond.device)


@dataclass
class Replaced:
    """A class with a replaced method: the original, how its models are sampled, and the models sampled so far."""

    original: Callable[..., Tensor]
    settings: tuple[Any, ...] = ()
    made: list[Accelerated] = field(default_factory=list)


REPLACED: dict[type, Replaced] = {}


def _original(instance: Any, name: str) -> Callable[..., Tensor]:
    """LeRobot's own method."""
    kind = type(instance)
    return REPLACED[kind].original if kind in REPLACED else getattr(kind, name)


@torch.compiler.disable
def predict_action_chunk(self: Any, batch: dict[str, Tensor], *args: Any, **kwargs: Any) -> Tensor:
    """Replaces LeRobot's method of that name: it also works if ``select_action`` has not filled the queues.

    LeRobot's asynchronous server calls this method alone, once per chunk, and the original finds the queues empty. The
    present observation is then repeated for the whole history: the previous call's is a chunk old, not a control step.
    """
    original = _original(self, "predict_action_chunk")
    queues = self._queues
    if self.config.image_features and "observation.images" not in batch:
        batch = {**batch, "observation.images": torch.stack([batch[key] for key in self.config.image_features], dim=-4)}
    # LeRobot's processors also put the key "action" into an observation.
    batch = {key: value for key, value in batch.items() if key != "action"}
    observed = [key for key in queues if key in batch]
    if all(queues[key] and queues[key][-1] is batch[key] for key in observed):
        return original(self, batch, *args, **kwargs)
    self._queues = queues | {key: deque([batch[key]] * queues[key].maxlen) for key in observed}
    try:
        return original(self, batch, *args, **kwargs)
    finally:
        self._queues = queues


def replace_methods(
    model: type, policy: type, sampler: str, engine: str, verify: bool, **parameters: Any
) -> Sequence[Accelerated]:
    """As :func:`parapolicy.accelerate`, for all objects of LeRobot's ``DiffusionModel`` and ``DiffusionPolicy``.

    Returns:
        A list with the :class:`Accelerated` of each model, appended at its first chunk.
    """
    settings = Accelerated(sampler, engine, verify, parameters).settings  # raises now, not at the first chunk
    for kind, replacement in ((model, conditional_sample), (policy, predict_action_chunk)):
        REPLACED[kind] = Replaced(getattr(kind, replacement.__name__), settings)
        setattr(kind, replacement.__name__, replacement)
    return REPLACED[model].made
