"""The common part of the adapters: sampling, noise, and comparison with the original.

One method of a live object decides what it samples. That method is replaced on the instance; everything else stays the
library's. Network, scheduler and number of steps are read at each call, so that overrides and changed weights take
effect.
"""

import copy
import inspect
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from parapolicy.denoiser import Denoiser, check_finite
from parapolicy.engine import ENGINES, make_engine
from parapolicy.networks import Network, build_network
from parapolicy.normalizer import Affine, Normalizer
from parapolicy.planner import make_first_sampler, make_plan
from parapolicy.policy import Policy
from parapolicy.schedule import Schedule, make_schedule
from parapolicy.spec import PolicySpec

ATTRIBUTE = "_parapolicy"  # of an accelerated object
CONDITION = "condition"  # the sampling policy's only observation: the output of the library's encoders
RECENT = 1000  # chunks whose costs are kept
VERIFIED = 0.05  # largest difference from the original's chunk, normalised, that ``verify`` accepts
WAY_OUT = "parapolicy.restore(policy) restores its own sampling"


class Method(NamedTuple):
    """A method of a live object, and its replacement."""

    owner: Any
    name: str
    replacement: Callable[..., Any]


class Cost(NamedTuple):
    """The cost of a chunk: wall time in seconds, and rounds and network evaluations of each element, (B,)."""

    seconds: float
    rounds: np.ndarray
    evaluations: np.ndarray


class Built(NamedTuple):
    """The objects built for a live policy: a policy with its weights, and which steps draw noise."""

    policy: Policy
    draws: list[bool]


class Accelerated:
    """How a live object is sampled, and what was built for it. A copy of the object builds its own.

    Attributes:
        settings: sampler, engine, verify and the sampler's parameters.
        verify: whether the next chunk is to be compared with the original's.
        recent: costs of the last chunks.

    Raises:
        ValueError: an unknown sampler, parameter or engine.
    """

    def __init__(self, sampler: str, engine: str, verify: bool, parameters: dict[str, Any]) -> None:
        self.settings = sampler, engine, verify, parameters
        make_first_sampler(sampler, **parameters)  # raises now, not at the first chunk
        if engine not in ENGINES or engine == "sharded":
            raise ValueError(f"engine is {engine!r}, expected one of {[e for e in ENGINES if e != 'sharded']}")
        self.recent: deque[Cost] = deque(maxlen=RECENT)
        self.verify = verify
        self._built: Built | None = None
        self._key: tuple[Any, ...] = ()
        self._lock = threading.RLock()

    def __deepcopy__(self, memo: dict[int, Any]) -> "Accelerated":
        return Accelerated(*self.settings)

    def __reduce__(self) -> tuple[Any, ...]:
        return Accelerated, self.settings

    @contextmanager
    def built(self, key: tuple[Any, ...], network: nn.Module, make: Callable[[], Built]) -> Iterator[Built]:
        """What was built for the object in its present state, for the caller alone.

        Args:
            key: the settings it depends on, besides the weights.
            network: whose weights it depends on.
            make: builds it anew, if key or weights have changed.
        """
        weights = tuple((value.data_ptr(), value._version) for value in network.parameters())
        whole = key, weights, network.training
        with self._lock:
            if self._built is None or self._key != whole:
                self._built = make()
                self._key = whole
            yield self._built

    def make_policy(self, spec: PolicySpec, network: Network, schedule: Schedule, device: torch.device) -> Policy:
        """A policy from conditions to normalised chunks, with this object's sampler and engine."""
        sampler, engine, _, parameters = self.settings
        one = torch.ones(())
        plain = {key: Affine(one.expand(s).clone(), torch.zeros(s)) for key, s in spec.normalizer_shapes.items()}
        policy = Policy(
            spec=spec,
            network=network,
            normalizer=Normalizer(plain).to(device),
            schedule=schedule.to(device),
            sampler=make_first_sampler(sampler, **parameters),
            device=device,
            engine=make_engine(engine, device),  # a new one: the last may have packed weights that changed since
        )
        return make_plan(policy, **parameters).apply(policy) if sampler == "auto" else policy

    def sample(self, policy: Policy, condition: Tensor, noise: Tensor) -> Tensor:
        """Chunks (B, *sample_shape) for conditions (B, To, C) and noise (T + 1, B, *sample_shape).

        Raises:
            FloatingPointError: the chunk is not finite.
        """
        begin = time.perf_counter()
        with torch.inference_mode(), torch.autocast(condition.device.type, enabled=False), policy.engine.exclusive():
            evaluate = policy.engine.bind(policy.network, policy.schedule.timesteps, {CONDITION: condition.float()})
            denoiser = Denoiser(evaluate, policy.schedule, policy.spec.sample_shape)
            sample = policy.engine.run(policy.sampler, denoiser, noise.flatten(2))
            check_finite(sample.x, "action chunk")
        rounds, evaluations = sample.rounds.cpu().numpy(), sample.evaluations.cpu().numpy()
        self.recent.append(Cost(time.perf_counter() - begin, rounds, evaluations))
        return sample.x.clone().unflatten(
            1, policy.spec.sample_shape
        )  # cloned, so that the caller may change it in place


def read_schedule(
    scheduler: Any, steps: int, sample_shape: tuple[int, int], options: Mapping[str, Any] | None = None
) -> tuple[dict[str, Any], Schedule, list[bool]]:
    """The config and the tables of a live scheduler, and which of its steps draw noise.

    Each step is compared with the scheduler's own.

    Args:
        scheduler: of diffusers.
        steps: number of inference steps that the library sets.
        sample_shape: of one chunk.
        options: keyword arguments of the scheduler's step.

    Raises:
        ValueError: a scheduler, setting or option that is not supported, or steps that differ from the tables.
    """
    options = dict(options or {})
    config = {"_class_name": type(scheduler).__name__, **scheduler.config}
    config = {name: value for name, value in config.items() if value is not None}
    if unknown := sorted(options.keys() - {"eta", "use_clipped_model_output"}):
        raise ValueError(f"the scheduler's step gets {unknown}, which are not supported; {WAY_OUT}")
    schedule = make_schedule(config, steps=steps, sample_shape=sample_shape, spacing="diffusers", **options)
    own = copy.deepcopy(scheduler)
    own.set_timesteps(steps)
    if own.timesteps.tolist() != schedule.timesteps.tolist():
        raise ValueError(f"the timesteps of {config['_class_name']} differ from its config; {WAY_OUT}")
    generator, draws = torch.Generator().manual_seed(0), []
    previous = torch.zeros(1, 16)
    for j, timestep in enumerate(own.timesteps):
        x, output = torch.randn(2, 1, 16, generator=generator)
        before = generator.get_state()
        expected = own.step(output, timestep, x, generator=generator, **options).prev_sample
        draws.append(not torch.equal(before, generator.get_state()))
        noise = torch.randn(1, 16, generator=torch.Generator().set_state(before)) * draws[-1]
        step = torch.tensor([j])
        estimate = schedule.estimate(output, x, step)
        difference = schedule.step(x, estimate, previous, noise, step) - expected
        if not difference.abs().amax() <= 1e-4 * expected.abs().amax().clamp(min=1):
            raise ValueError(f"the step of {config['_class_name']} at {timestep} differs from its config; {WAY_OUT}")
        previous = estimate
    return config, schedule, draws


def draw_noise_after(first: Tensor, draws: Sequence[bool], generator: torch.Generator | None) -> Tensor:
    """Noise (T + 1, *shape): the given first state, then exactly the numbers that the scheduler's steps draw.

    Args:
        first: (*shape).
        draws: which steps draw noise; from :func:`read_schedule`.
        generator: which they draw from; None: torch's default.
    """
    device = first.device if generator is None else generator.device

    def draw() -> Tensor:
        return torch.randn(first.shape, generator=generator, device=device).to(first.device)

    drawn = [draw() if draws_noise else torch.zeros_like(first) for draws_noise in draws]
    return torch.stack([first, *drawn])


def adopt(spec: PolicySpec, tensors: Mapping[str, Tensor]) -> Network:
    """The network of a spec, sharing the memory of a live network.

    Args:
        spec: of the network.
        tensors: of the live network, by our names.

    Raises:
        ValueError: they are not float32, or names or shapes differ from the network's.
    """
    with torch.device("meta"):
        network = build_network(spec)
    expected = {name: (tuple(value.shape), torch.float32) for name, value in network.state_dict().items()}
    found = {name: (tuple(value.shape), value.dtype) for name, value in tensors.items()}
    if expected != found:
        wrong = sorted(name for name in {*expected, *found} if expected.get(name) != found.get(name))
        raise ValueError(
            f"the network is not the published {spec.network['name']} with its settings in float32: {wrong[:3]} "
            f"differ; {WAY_OUT}"
        )
    network.load_state_dict({name: tensors[name].detach() for name in expected}, assign=True)
    return network.requires_grad_(False).eval()


def sample_checked(
    accelerated: Accelerated,
    ours: Callable[[], Tensor],
    original: Callable[[], Tensor],
    step_aside: Callable[[], None],
    generator: torch.Generator | None,
    device: torch.device,
) -> Tensor:
    """Sample our chunk. While ``accelerated.verify`` is set, compare it with the original's from the same random
    numbers.

    Args:
        step_aside: called, with a warning, if they differ: restores the policy's own sampling.
        generator: which both draw from; None: torch's default of ``device``.
    """
    if not accelerated.verify:
        return ours()
    accelerated.verify = False
    with _rewound(generator, device):
        found = ours()
    expected = original()
    difference = float((found - expected).detach().abs().amax())
    if not difference <= VERIFIED:
        warnings.warn(
            f"parapolicy's first chunk differs from the policy's own by {difference:.2g}, normalised, "
            f"expected at most {VERIFIED}; from now on the policy uses its own sampling",
            stacklevel=5,
        )
        step_aside()
    return expected


@contextmanager
def _rewound(generator: torch.Generator | None, device: torch.device) -> Iterator[None]:
    """Reset the generator afterwards, so that random numbers drawn inside are drawn again."""
    if generator is not None:
        state = generator.get_state()
        yield
        generator.set_state(state)
    else:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield


def remove(*methods: Method) -> None:
    """Restore the objects' own methods."""
    for owner, name, _ in methods:
        for attribute in (name, ATTRIBUTE):
            vars(owner).pop(attribute, None)


def arguments_of(function: Callable[..., Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
    """The arguments of a call by name, without those that are None."""
    given = inspect.signature(function).bind(*args, **kwargs).arguments
    return {name: value for name, value in given.items() if value is not None}
