"""Small policies, denoisers, observations and configurations that tests share."""

import atexit
import functools
import importlib.util
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from torch import Tensor
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

from parapolicy.denoiser import Denoiser
from parapolicy.engine import Eager
from parapolicy.networks import Network, build_network
from parapolicy.networks.unet1d import ConditionalUnet1D
from parapolicy.noise import draw_noise
from parapolicy.normalizer import Affine, Normalizer
from parapolicy.policy import Policy
from parapolicy.samplers import Sample, Sampler, make_sampler
from parapolicy.schedule import Schedule, make_schedule
from parapolicy.spec import PolicySpec

DDPM_CONFIG: dict[str, Any] = {
    "_class_name": "DDPMScheduler",
    "num_train_timesteps": 100,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "squaredcos_cap_v2",
    "variance_type": "fixed_small",
    "clip_sample": True,
    "prediction_type": "epsilon",
}
FLOW_CONFIG: dict[str, Any] = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 100}
# read_zarr's, of the fixture buffer
SOURCES: dict[str, Any] = {"position": {"array": "state", "columns": [0, 1]}, "points": "points", "action": "action"}


def small_spec(**changes: Any) -> PolicySpec:
    values: dict[str, Any] = {
        "observation": {"position": (2,), "points": (3, 2)},
        "n_obs_steps": 2,
        "horizon": 8,
        "n_action_steps": 4,
        "action_dim": 2,
        "network": {"name": "unet1d", "diffusion_step_embed_dim": 16, "down_dims": [16, 32], "n_groups": 4},
        "scheduler": {**DDPM_CONFIG, "num_train_timesteps": 20},
        "control_hz": 10,
    }
    return PolicySpec(**values | changes)


def small_policy(sampler: str = "sequential", **changes: Any) -> Policy:
    """Random weights; the output is made large enough to matter."""
    spec = small_spec(**changes)
    network = build_network(spec).requires_grad_(False).eval()
    shapes = spec.normalizer_shapes
    normalizer = Normalizer({k: Affine(torch.full(s, 0.01), torch.full(s, -0.5)) for k, s in shapes.items()})
    schedule = make_schedule(spec.scheduler, sample_shape=spec.sample_shape)
    return Policy(spec, network, normalizer, schedule, make_sampler(sampler), torch.device("cpu"))


def some_observation(spec: PolicySpec, batch: int | None = None, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    lead = () if batch is None else (batch,)
    shapes = {key: (*lead, spec.obs_steps(key), *feature.shape) for key, feature in spec.observation.items()}
    return {key: rng.uniform(0, 100, shape).astype(np.float32) for key, shape in shapes.items()}


def bind(policy: Policy, condition: Tensor, **settings: Any) -> Denoiser:
    """The denoiser of a policy for condition vectors (B, C)."""
    evaluate = policy.engine.bind(policy.network, policy.schedule.timesteps, {"condition": condition[:, None]})
    return Denoiser(evaluate, policy.schedule, policy.spec.sample_shape, **settings)


def call_network(network: Network, x: Tensor, timesteps: Tensor, condition: Tensor) -> Tensor:
    """A network's output for samples (B, H, D) with timesteps (B,) and condition vectors (B, C) of their own."""
    return network.predict(x, timesteps, {"condition": condition[:, None]})


@dataclass(frozen=True)
class AnyDenoiser:
    """Any function as a denoiser, for engines."""

    function: Callable
    schedule: Schedule

    def __call__(self, x: Tensor, step: Tensor, element: Tensor) -> Tensor:
        return self.function(x, step, element)


def run_sampler(
    sampler: Sampler,
    denoiser: Callable,
    schedule: Schedule,
    noise: Tensor,
    stop: Callable[[], bool] | None = None,
    guess: Tensor | None = None,
) -> Sample:
    """A batch of samples by the eager engine, of any function as denoiser."""
    return Eager().run(sampler, AnyDenoiser(denoiser, schedule), noise, stop, guess)


def flat_noise(schedule: Schedule, batch: int = 1, seed: int = 0, shape: tuple[int, ...] | None = None) -> Tensor:
    """Noise as samplers take it, (T + 1, B, S)."""
    return draw_noise(schedule, batch, seed, shape).flatten(2)


@functools.cache
def process_folder() -> Path:
    """A folder of this process, which goes when it ends."""
    folder = Path(tempfile.mkdtemp(prefix="parapolicy-tests-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


class Later(Executor):
    """Runs what is submitted when the test says so."""

    def __init__(self) -> None:
        self.waiting: list[tuple[Future[Any], Callable[[], Any]]] = []

    def submit(self, function: Callable[..., Any], /, *arguments: Any, **options: Any) -> Future[Any]:
        future: Future[Any] = Future()
        self.waiting.append((future, lambda: function(*arguments, **options)))
        return future

    def run(self) -> None:
        waiting, self.waiting = self.waiting, []
        for future, call in waiting:
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(call())
            except Exception as error:
                future.set_exception(error)


@contextmanager
def network_inputs() -> Iterator[list[tuple[Tensor, Tensor]]]:
    """What every call of a network in this block receives: its noisy samples (N, H, Da) and its conditions (N, C)."""
    calls: list[tuple[Tensor, Tensor]] = []

    def note(module: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
        if isinstance(module, ConditionalUnet1D):
            x, _, condition, _, element = inputs
            calls.append((x.detach().clone(), condition[element].detach().clone()))

    hook = register_module_forward_pre_hook(note)
    try:
        yield calls
    finally:
        hook.remove()


def received_condition(policy: Policy, observation: Mapping[str, Any]) -> Tensor:
    """The condition (C,) that the network receives for one observation history."""
    with network_inputs() as calls:
        policy.with_schedule("ddim", 1).with_sampler("sequential").predict(observation)
    ((_, condition),) = calls
    return condition[0]


def linear_denoiser(schedule: Schedule, batch: int, shape: tuple[int, ...], gain: float, seed: int) -> Callable:
    """u_j = bounded linear map of x_j and its neighbour, different for each step and element.

    Only elementwise arithmetic, so that a result does not depend, to the bit, on what shares the call.
    """
    generator = torch.Generator().manual_seed(seed)
    size = torch.Size(shape).numel()
    own, neighbour = gain * (torch.rand(2, len(schedule), shape[-1], generator=generator) * 2 - 1)
    own, neighbour = (value.repeat(1, size // shape[-1]) for value in (own, neighbour))
    bias = torch.randn(batch, size, generator=generator)

    def denoiser(x: Tensor, step: Tensor, element: Tensor) -> Tensor:
        return own[step] * x + neighbour[step] * x.roll(shape[-1], dims=1) + bias[element]

    return denoiser


def configured(name: str, *overrides: str) -> DictConfig:
    """A configuration of ``conf/`` as a command with these overrides would have it."""
    with initialize_config_dir(str(Path(__file__).resolve().parent.parent / "conf"), version_base="1.3"):
        return compose(name, list(overrides))


class Waits(TorchDispatchMode):
    """Fails where a value of a tensor decides what happens next: the host would wait for it, and a capture fail."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name()
        waits = ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::_linalg_check_errors")
        indices = args[1] if name.startswith("aten::index") and isinstance(args[1], list | tuple) else ()
        waiting = name in waits or any(isinstance(i, Tensor) and i.dtype == torch.bool for i in indices)
        assert not waiting, f"{name} waits for a value"
        return func(*args, **(kwargs or {}))


def needs(*packages: str) -> pytest.MarkDecorator:
    """Skip a test without these packages, which are not imported here: OpenVINO's import reports itself."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"not installed: {missing}")
