"""Training of a Diffusion Policy: noise prediction on demonstration windows, with an exponential moving average.

Every random draw of step s comes from a generator seeded by (seed, s), so that a run that was interrupted and resumed
takes exactly the steps of a run that was not.
"""

import dataclasses
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

from parapolicy.checkpoint import read_checkpoint
from parapolicy.checkpoint.native import write_checkpoint
from parapolicy.compiling import Compiling
from parapolicy.digest import digest
from parapolicy.networks import Network, build_network
from parapolicy.noise import mix_seeds
from parapolicy.normalizer import Normalizer
from parapolicy.schedule import make_schedule
from parapolicy.spec import PolicySpec
from parapolicy.train.data import Demonstrations
from parapolicy.train.state import STATE, TrainingFolder

FAR = 100.0  # normalised: no value that a policy was trained on is as far from 0


@dataclass(frozen=True)
class TrainConfig:
    """How to train.

    Attributes:
        steps: optimizer steps in all; the cosine schedule ends there.
        batch_size: windows per step.
        learning_rate: peak, reached after ``warmup_steps``.
        weight_decay: of AdamW.
        ema_power, ema_max_decay: the average's decay at step s is ``min(max, 1 - (1 + s) ** -power)``.
        precision: ``float32``, ``bfloat16`` (autocast), or ``auto``: bfloat16 where the device computes in it.
        compile: run the network through ``torch.compile``, where that works.
        checkpoint_every: steps between savings of the run's whole state.
        seed: of weights, batches, noise and timesteps.
        init: folder of a trained policy, whose weights and normalizer the run begins with; None: anew.
    """

    steps: int = 10_000
    batch_size: int = 256
    learning_rate: float = 4e-4
    warmup_steps: int = 500
    weight_decay: float = 1e-6
    ema_power: float = 0.75
    ema_max_decay: float = 0.9999
    precision: str = "auto"
    compile: bool = False
    checkpoint_every: int = 500
    seed: int = 0
    init: str | None = None

    def __post_init__(self) -> None:
        if self.precision not in ("auto", "float32", "bfloat16"):
            raise ValueError(f"precision is {self.precision!r}, expected auto, float32 or bfloat16")
        for name in ("steps", "batch_size", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 1")


@dataclass(frozen=True)
class TrainResult:
    """What a finished run reports: its last losses' mean and its whole wall time, resumed parts included."""

    loss: float
    seconds: float


def train(
    spec: PolicySpec, data: Demonstrations, config: TrainConfig, folder: str | Path, device: torch.device
) -> TrainResult:
    """Train a policy and write it, the averaged weights, to ``folder``.

    The run's state stands in ``folder/training.pt`` until the run is finished; calling again with the same arguments
    resumes from it, and does nothing when it is finished. Ctrl-C saves the state before it ends the run.

    Raises:
        DataError: the data does not fit the policy, or has no window.
        ValueError: the folder holds a run with other settings or data, or a damaged state; the scheduler is not one of
            noise; or ``config.init`` is of another kind of policy or of data in another range.
        CheckpointError: ``config.init`` cannot be read.
        FloatingPointError: the loss is no longer finite.
    """
    if make_schedule(spec.scheduler, sample_shape=spec.sample_shape).solver == "flow":
        raise ValueError("the scheduler is one of flow matching, which this does not train; take DDPMScheduler")
    torch.manual_seed(config.seed)
    network = build_network(spec).to(device)
    normalizer = None if config.init is None else _take_over(config.init, spec, network)
    data.check(spec)
    windows = data.windows(spec.horizon, spec.n_obs_steps, spec.n_action_steps)
    used = windows.unique()  # steps
    data.warn_of_outliers(used)
    if normalizer is None:
        normalizer = Normalizer.fit({key: value[used] for key, value in data.arrays.items()})
    values = {key: normalizer.normalize(key, data.arrays[key]) for key in spec.normalizer_shapes}
    for key, normalised in values.items():
        if not (most := normalised[used].abs().max()) < FAR:
            raise ValueError(
                f"{key!r} is up to {most:.3g} when normalised by the policy at {config.init!r}, "
                "which was trained on data in another range; train without init"
            )
    same = {"data": digest([{key: data.arrays[key] for key in values}, data.episode_ends, normalizer.state_dict()])}
    run = {"spec": _json_like(spec.to_dict()), "config": dataclasses.asdict(config), **same}
    kept = TrainingFolder(Path(folder), run)
    if kept.finished is not None:
        return TrainResult(**kept.finished)
    average = [parameter.detach().clone() for parameter in network.parameters()]
    optimizer = torch.optim.AdamW(
        network.parameters(), lr=config.learning_rate, betas=(0.95, 0.999), weight_decay=config.weight_decay, fused=True
    )
    loss_of = _Loss(spec, values, windows, config, network, device)
    step, seconds, smooth = 0, 0.0, math.nan

    if (state := kept.load(device)) is not None:
        network.load_state_dict(state["network"])
        optimizer.load_state_dict(state["optimizer"])
        average = state["average"]
        step, seconds, smooth = state["step"], state["seconds"], state["loss"]

    def save() -> None:
        kept.save(
            {
                "network": network.state_dict(),
                "optimizer": optimizer.state_dict(),
                "average": average,
                "step": step,
                "seconds": seconds + time.perf_counter() - begin,
                "loss": smooth,
            }
        )

    begin = time.perf_counter()
    with tqdm(total=config.steps, initial=step, desc="train", unit="step", smoothing=0.05) as bar:
        try:
            while step < config.steps:
                for group in optimizer.param_groups:
                    group["lr"] = config.learning_rate * _warmup_cosine(step, config)
                loss = loss_of(step)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                decay = min(config.ema_max_decay, 1 - (1 + step) ** -config.ema_power)
                torch._foreach_lerp_(average, [p.detach() for p in network.parameters()], 1 - decay)
                step += 1
                if step % 20 == 0 or step == config.steps:
                    value = loss.item()
                    if not math.isfinite(value):
                        raise FloatingPointError(f"the loss is {value} at step {step}; lower learning_rate")
                    smooth = value if math.isnan(smooth) else 0.95 * smooth + 0.05 * value
                    bar.set_postfix(loss=f"{smooth:.4f}")
                bar.update()
                if step % config.checkpoint_every == 0:
                    save()
        except KeyboardInterrupt:
            save()
            tqdm.write(f"interrupted at step {step}; the same command resumes from {kept.path / STATE}")
            raise

    names = [name for name, _ in network.named_parameters()]
    result = TrainResult(smooth, seconds + time.perf_counter() - begin)
    kept.record(dataclasses.asdict(result))
    write_checkpoint(kept.path, spec, dict(zip(names, average, strict=True)), normalizer)
    kept.finish()
    return result


def _take_over(folder: str, spec: PolicySpec, network: Network) -> Normalizer:
    """Copy a trained policy's weights into ``network``; its normalizer belongs to them."""
    other, trained, normalizer = read_checkpoint(folder)
    for name in ("observation", "action_dim", "n_obs_steps", "horizon", "network", "scheduler"):
        here, there = getattr(spec, name), getattr(other, name)
        if here != there:
            raise ValueError(f"the policy at {folder!r} has the {name} {there}, this run {here}; set them alike")
    network.load_state_dict(trained.state_dict())
    return normalizer


class _Loss:
    """The mean squared error of the network's prediction on step s's batch, of normalised values (N, ...)."""

    def __init__(
        self,
        spec: PolicySpec,
        values: Mapping[str, Tensor],
        windows: Tensor,
        config: TrainConfig,
        network: Network,
        device: torch.device,
    ) -> None:
        self.observation = {key: values[key].to(device) for key in spec.observation}
        self.actions, self.windows = values["action"].to(device), windows
        self.scheduler = DDPMScheduler.from_config(dict(spec.scheduler))
        self.predict = Compiling(network.predict) if config.compile else network.predict
        self.spec, self.config, self.device = spec, config, device
        self.bfloat16 = config.precision == "bfloat16" or (config.precision == "auto" and _computes_bfloat16(device))

    def __call__(self, step: int) -> Tensor:
        generator = torch.Generator().manual_seed(mix_seeds(self.config.seed, step))
        batch = torch.randint(len(self.windows), (self.config.batch_size,), generator=generator)
        steps = self.windows[batch].to(self.device)  # (B, H)
        action = self.actions[steps]
        now = self.spec.n_obs_steps
        observation = {
            key: value[steps[:, now - self.spec.obs_steps(key) : now]] for key, value in self.observation.items()
        }
        noise = torch.randn(action.shape, generator=generator).to(self.device)
        count = self.scheduler.config.num_train_timesteps
        timestep = torch.randint(count, (len(action),), generator=generator).to(self.device)
        noisy = self.scheduler.add_noise(action, noise, timestep)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bfloat16):
            prediction = self.predict(noisy, timestep, observation)
        match self.scheduler.config.prediction_type:
            case "epsilon":
                target = noise
            case "sample":
                target = action
            case _:
                target = self.scheduler.get_velocity(action, noise, timestep)
        return functional.mse_loss(prediction.float(), target)


def _warmup_cosine(step: int, config: TrainConfig) -> float:
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * progress))


def _computes_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    return device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()


def _json_like(value: Any) -> Any:
    """Only what ``torch.load(weights_only=True)`` reads back: dicts, lists, numbers, strings."""
    if isinstance(value, Mapping):
        return {str(key): _json_like(inner) for key, inner in value.items()}
    return [_json_like(inner) for inner in value] if isinstance(value, list | tuple) else value
