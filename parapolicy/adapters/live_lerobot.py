"""A LeRobot ``DiffusionPolicy`` in memory, from 0.3 on: its chunks are sampled here, all else stays LeRobot's.

One method decides what a diffusion policy of LeRobot samples: ``conditional_sample`` of its ``diffusion`` model. It is
replaced on the instance. Queues, encoders, processors, training, ``state_dict`` and ``to`` are not touched. Network,
scheduler and number of steps are read at each call, so that command-line overrides and weights that change take effect.
"""

import inspect
import threading
import types
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from parapolicy.checkpoint.lerobot_config import FINAL_GROUPS, UNET
from parapolicy.checkpoint.lerobot_folder import COMPILED, published_name
from parapolicy.engine import ENGINES, make_engine
from parapolicy.networks import Network, build_network
from parapolicy.normalizer import Affine, Normalizer
from parapolicy.planner import make_first_sampler, make_plan
from parapolicy.policy import ChunkStats, Policy
from parapolicy.schedule import Schedule, make_schedule
from parapolicy.spec import Feature, PolicySpec

ATTRIBUTE = "_parapolicy"  # of a model that is accelerated
CONDITION = "condition"  # the only observation of the policy that samples: what LeRobot's encoders made
RECENT = 1000  # chunks whose costs are kept
VERIFIED = 0.05  # largest difference from LeRobot's own chunk, normalised, that ``verify`` takes for equal
P = TypeVar("P")


class Accelerated:
    """How a model is sampled, and what was built for that. A copy of the model builds its own.

    Attributes:
        settings: sampler, engine, verify and the sampler's parameters.
        policy: of this library, with the model's weights; None before the first chunk.
        recent: what the last chunks cost.
    """

    def __init__(self, sampler: str, engine: str, verify: bool, parameters: dict[str, Any]) -> None:
        self.settings = sampler, engine, verify, parameters
        make_first_sampler(sampler, **parameters)  # refuses what is wrong now
        if engine not in ENGINES or engine == "sharded":
            raise ValueError(f"engine is {engine!r}, expected one of {[e for e in ENGINES if e != 'sharded']}")
        self.policy: Policy | None = None
        self.recent: deque[ChunkStats] = deque(maxlen=RECENT)
        self.verify = verify
        self._built: tuple[Any, ...] = ()
        self._lock = threading.RLock()

    def __deepcopy__(self, memo: dict[int, Any]) -> "Accelerated":
        return Accelerated(*self.settings)

    def __reduce__(self) -> tuple[Any, ...]:
        return Accelerated, self.settings

    def sample(self, model: Any, condition: Tensor, generator: torch.Generator | None, noise: Tensor | None) -> Tensor:
        """Chunks (B, H, Da), normalised, for condition vectors (B, C)."""
        with self._lock, torch.autocast(condition.device.type, enabled=False):
            policy = self._find(model, condition)
            shape = policy.spec.sample_shape
            drawn = draw_as_lerobot(policy.schedule, (len(condition), *shape), condition.device, generator, noise)
            chunk = policy.predict({CONDITION: condition.float()[:, None]}, noise=drawn)
            self.recent.append(chunk.stats)
        return torch.from_numpy(chunk.trajectory).to(condition)

    def _find(self, model: Any, condition: Tensor) -> Policy:
        """The policy for the model as it is now."""
        steps, scheduler = int(model.num_inference_steps), model.noise_scheduler
        config = {"_class_name": type(scheduler).__name__, **scheduler.config}
        weights = dict(model.unet.named_parameters())
        versions = tuple((value.data_ptr(), value._version) for value in weights.values())
        built = (steps, sorted(map(str, config.items())), condition.shape[1], versions)
        if self.policy is None or built != self._built:
            sampler, engine, _, parameters = self.settings
            # A new engine, too: it may have packed the weights that have changed.
            self.policy = _build(model, config, steps, condition, sampler, engine, parameters)
            self._built = built
        return self.policy


def _build(
    model: Any, config: dict[str, Any], steps: int, condition: Tensor, sampler: str, engine: str, parameters: Any
) -> Policy:
    settings = model.config
    network = {name: getattr(settings, theirs) for name, (theirs, _) in UNET.items()}
    network["down_dims"] = list(network["down_dims"])
    spec = PolicySpec(
        observation={CONDITION: Feature((condition.shape[1],))},
        n_obs_steps=1,
        horizon=settings.horizon,
        n_action_steps=1,
        action_dim=settings.action_feature.shape[0],
        network={"name": "unet1d", **network, "final_groups": FINAL_GROUPS},
        scheduler={name: value for name, value in config.items() if value is not None},
        control_hz=None,
        inference={"steps": steps, "spacing": "diffusers"},
    )
    one, device = torch.ones(()), condition.device
    plain = {
        key: Affine(one.expand(shape).clone(), torch.zeros(shape)) for key, shape in spec.normalizer_shapes.items()
    }
    schedule = make_schedule(spec.scheduler, sample_shape=spec.sample_shape, **spec.inference).to(device)
    policy = Policy(
        spec=spec,
        network=_adopt(spec, model.unet),
        normalizer=Normalizer(plain).to(device),
        schedule=schedule,
        sampler=make_first_sampler(sampler, **parameters),
        device=device,
        engine=make_engine(engine, device),
    )
    return make_plan(policy, **parameters).apply(policy) if sampler == "auto" else policy


def _adopt(spec: PolicySpec, unet: nn.Module) -> Network:
    """LeRobot's UNet as ours, on the same memory.

    Raises:
        ValueError: its tensors are others than those of a conditional UNet of these settings, or not float32.
    """
    theirs = {
        f"diffusion.unet.{name.replace(COMPILED[1:] + '.', '')}": value for name, value in unet.state_dict().items()
    }
    with torch.device("meta"):
        network = build_network(spec)
    names = {name: str(published_name(name, separate=False)) for name in network.state_dict()}
    shapes = {names[name]: (tuple(value.shape), torch.float32) for name, value in network.state_dict().items()}
    found = {name: (tuple(value.shape), value.dtype) for name, value in theirs.items()}
    if shapes != found:
        wrong = sorted(name for name in {*shapes, *found} if shapes.get(name) != found.get(name))
        raise ValueError(
            f"the UNet is not LeRobot's conditional UNet in float32: {wrong[:3]} differ from what its config says; "
            "parapolicy.restore(policy) gives LeRobot's own sampling back"
        )
    network.load_state_dict({name: theirs[published] for name, published in names.items()}, assign=True)
    return network.requires_grad_(False).eval()


def draw_as_lerobot(
    schedule: Schedule,
    shape: tuple[int, ...],
    device: torch.device,
    generator: torch.Generator | None,
    first: Tensor | None = None,
) -> Tensor:
    """Noise (T + 1, *shape) from the generator, or torch's own, number for number as LeRobot's loop draws it.

    Args:
        schedule: its steps without noise draw none.
        first: x_T, where it is given.
    """
    from diffusers.utils.torch_utils import randn_tensor

    first = torch.randn(shape, device=device, generator=generator) if first is None else first.to(device, torch.float32)
    drawn = [
        randn_tensor(shape, generator=generator, device=device) if scale else torch.zeros(shape, device=device)
        for scale in schedule.S.tolist()
    ]
    return torch.stack([first, *drawn])


@torch.compiler.disable
def conditional_sample(
    self: Any,
    batch_size: int,
    global_cond: Tensor | None = None,
    generator: torch.Generator | None = None,
    noise: Tensor | None = None,
    **others: Any,
) -> Tensor:
    """Takes the place of LeRobot's method of that name, on an instance or its class."""
    if ATTRIBUTE not in vars(self):  # of a class whose method was replaced
        setattr(self, ATTRIBUTE, Accelerated(*REPLACED[type(self)].settings))
        REPLACED[type(self)].made.append(getattr(self, ATTRIBUTE))
    accelerated: Accelerated = getattr(self, ATTRIBUTE)
    if global_cond is None or any(value is not None for value in others.values()):
        return _original(self, "conditional_sample")(
            self, batch_size, global_cond=global_cond, generator=generator, noise=noise, **others
        )
    if accelerated.verify:
        accelerated.verify = False
        return _verified(self, accelerated, batch_size, global_cond, generator, noise)
    return accelerated.sample(self, global_cond, generator, noise)


@dataclass
class Replaced:
    """A class whose method was replaced: the method, how its models are sampled, and those that were."""

    original: Callable[..., Tensor]
    settings: tuple[Any, ...] = ()
    made: list[Accelerated] = field(default_factory=list)


REPLACED: dict[type, Replaced] = {}


def _original(instance: Any, name: str) -> Callable[..., Tensor]:
    """LeRobot's own method."""
    kind = type(instance)
    return REPLACED[kind].original if kind in REPLACED else getattr(kind, name)


def _verified(
    model: Any, accelerated: Accelerated, batch: int, condition: Tensor, generator: Any, noise: Tensor | None
) -> Tensor:
    """LeRobot's own chunk, and whether ours of the same noise is near; if not, LeRobot's sampling stays."""
    with _rewound(generator, condition.device):
        ours = accelerated.sample(model, condition, generator, noise)
    original = _original(model, "conditional_sample")
    given = {"noise": noise} if "noise" in inspect.signature(original).parameters else {}
    theirs = original(model, batch, global_cond=condition, generator=generator, **given)
    difference = float((ours - theirs).abs().amax())
    if not difference <= VERIFIED:
        warnings.warn(
            f"parapolicy steps aside: its first chunk differs from LeRobot's own by {difference:.2g}, normalised, and "
            f"at most {VERIFIED} was expected; LeRobot samples from here on",
            stacklevel=4,
        )
        _remove(model)
        if type(model) in REPLACED:
            model.conditional_sample = types.MethodType(original, model)
    return theirs


@contextmanager
def _rewound(generator: torch.Generator | None, device: torch.device) -> Iterator[None]:
    """Random numbers drawn inside are drawn again behind it."""
    if generator is not None:
        state = generator.get_state()
        yield
        generator.set_state(state)
    else:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield


@torch.compiler.disable
def predict_action_chunk(self: Any, batch: dict[str, Tensor], *args: Any, **kwargs: Any) -> Tensor:
    """Takes the place of LeRobot's method of that name: it also works where ``select_action`` did not fill the queues.

    LeRobot's asynchronous server calls it alone, once per chunk. The original finds the queues empty, then. The present
    observation stands for the whole history: the one of the last call is a chunk ago, not a control step.
    """
    original = _original(self, "predict_action_chunk")
    queues = self._queues
    if self.config.image_features and "observation.images" not in batch:
        batch = {**batch, "observation.images": torch.stack([batch[key] for key in self.config.image_features], dim=-4)}
    # LeRobot's processors put the key "action" into what they make of an observation, too.
    batch = {key: value for key, value in batch.items() if key != "action"}
    observed = [key for key in queues if key in batch]
    if all(queues[key] and queues[key][-1] is batch[key] for key in observed):
        return original(self, batch, *args, **kwargs)
    self._queues = queues | {key: deque([batch[key]] * queues[key].maxlen) for key in observed}
    try:
        return original(self, batch, *args, **kwargs)
    finally:
        self._queues = queues


def accelerate(policy: P, sampler: str = "auto", engine: str = "auto", verify: bool = False, **parameters: Any) -> P:
    """Sample a live LeRobot ``DiffusionPolicy`` by this library from now on.

    Everything else of the policy stays as it is, and so do its random numbers: with ``sampler="sequential"`` the chunks
    are LeRobot's own of the same seed.

    Args:
        policy: of LeRobot 0.3 or newer; its weights in float32.
        sampler: as of :func:`parapolicy.load_policy`, with its ``parameters``. ``auto`` measures at the first chunk, in
            seconds, which one is fastest here.
        engine: one of :data:`parapolicy.engine.ENGINES`.
        verify: sample the first chunk by LeRobot, too; where the two differ, warn and leave the sampling to LeRobot.

    Returns:
        The same object.

    Raises:
        TypeError: not a diffusion policy of LeRobot.
        ValueError: an unknown sampler, parameter or engine. At the first chunk: a network or scheduler that LeRobot's
            diffusion policies do not have.
    """
    model = getattr(policy, "diffusion", None)
    if not callable(getattr(model, "conditional_sample", None)) or not hasattr(model, "unet"):
        raise TypeError(
            f"{type(policy).__name__} is no DiffusionPolicy of LeRobot: it has no diffusion.conditional_sample"
        )
    assert model is not None
    setattr(model, ATTRIBUTE, Accelerated(sampler, engine, verify, parameters))
    model.conditional_sample = types.MethodType(conditional_sample, model)
    policy.predict_action_chunk = types.MethodType(predict_action_chunk, policy)  # type: ignore[attr-defined]
    return policy


def restore(policy: P) -> P:
    """Give a policy back its own sampling; nothing happens to one that has it.

    Returns:
        The same object.
    """
    _remove(policy.diffusion)  # type: ignore[attr-defined]
    vars(policy).pop("predict_action_chunk", None)
    return policy


def replace_methods(
    model: type, policy: type, sampler: str, engine: str, verify: bool, **parameters: Any
) -> Sequence[Accelerated]:
    """As :func:`accelerate`, for all objects of LeRobot's classes ``DiffusionModel`` and ``DiffusionPolicy``.

    Returns:
        What each model is sampled with, appended at its first chunk.
    """
    settings = Accelerated(sampler, engine, verify, parameters).settings  # refuses what is wrong now
    for kind, replacement in ((model, conditional_sample), (policy, predict_action_chunk)):
        REPLACED[kind] = Replaced(getattr(kind, replacement.__name__), settings)
        setattr(kind, replacement.__name__, replacement)
    return REPLACED[model].made


def _remove(model: Any) -> None:
    for name in ("conditional_sample", ATTRIBUTE):
        vars(model).pop(name, None)
