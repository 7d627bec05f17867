"""Training of a Diffusion Policy: noise prediction on demonstration windows, with an exponential moving average.

Every random draw of step s comes from a generator seeded by (seed, s), so a run that was interrupted and resumed takes
exactly the same steps as one that was not.
"""

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from parapolicy.checkpoint.native import write_checkpoint
from parapolicy.digest import digest
from parapolicy.networks import Network, build_network
from parapolicy.normalizer import Normalizer
from parapolicy.schedule import make_schedule
from parapolicy.spec import PolicySpec
from parapolicy.train.data import Demonstrations
from parapolicy.train.log import CsvLog, Log
from parapolicy.train.loss import Loss
from parapolicy.train.start import begin_from, check_targets, fit_normalizer
from parapolicy.train.state import STATE, TrainingFolder

FAR = 100.0  # normalised; values of a policy's own training data are closer to 0
VALIDATION_BATCHES = 8


@dataclass(frozen=True)
class TrainConfig:
    """How to train.

    Attributes:
        steps: total optimizer steps; the cosine schedule ends there.
        batch_size: windows per step.
        learning_rate: peak, reached after ``warmup_steps``.
        weight_decay: of AdamW.
        ema_power, ema_max_decay: the average's decay at step s is ``min(max, 1 - (1 + s) ** -power)``.
        precision: ``float32``, ``bfloat16`` (autocast), or ``auto``: bfloat16 if the device supports it.
        compile: use ``torch.compile`` for the network if it works; the cameras' encoders are not compiled.
        checkpoint_every: steps between two savings of the run's state.
        seed: of weights, batches, noise, timesteps, crops and held-out episodes.
        init: folder of a trained policy whose weights and normalizer the run starts with; None: new ones.
        initial_weights: policy of any kind, from which the run starts with each tensor of the same name and shape, and
            the normalizer of each key of the same name and shape; None: new ones.
        validation: share of the episodes that is held out for measuring the averaged weights' loss.
        validate_every: steps between two measurements.
        target_weight: weight of the targets' error relative to that of the noise.
        target_steps: first steps that train only the cameras, on the targets.

    Raises:
        ValueError: a value out of range, or both ``init`` and ``initial_weights``.
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
    initial_weights: str | None = None
    validation: float = 0.0
    validate_every: int = 500
    target_weight: float = 1.0
    target_steps: int = 0

    def __post_init__(self) -> None:
        if self.precision not in ("auto", "float32", "bfloat16"):
            raise ValueError(f"precision is {self.precision!r}, expected auto, float32 or bfloat16")
        for name in ("steps", "batch_size", "checkpoint_every", "validate_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 1")
        for name in ("target_steps", "target_weight"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 0")
        if not 0 <= self.validation < 1:
            raise ValueError(f"validation is {self.validation}, expected a share of the episodes from 0 to below 1")
        if self.init is not None and self.initial_weights is not None:
            raise ValueError("init and initial_weights are both set, expected at most one of them")


@dataclass(frozen=True)
class TrainResult:
    """The results of a finished run.

    Attributes:
        loss: mean of the last losses.
        seconds: total wall time, including interrupted parts.
        validation: denoising error of the averaged weights on held-out episodes; None: no held-out episodes.
    """

    loss: float
    seconds: float
    validation: float | None = None


def train(
    spec: PolicySpec,
    data: Demonstrations,
    config: TrainConfig,
    folder: str | Path,
    device: torch.device,
    *,
    targets: Mapping[str, str] | None = None,
    logger: Callable[[Path, int], Log] = CsvLog,
) -> TrainResult:
    """Train a policy and write it, with averaged weights, to ``folder``.

    The run's state is in ``folder/training.pt`` until the run is finished. Calling again with the same arguments
    resumes from it; if the run is finished, nothing happens. Ctrl-C saves the state and ends the run.

    Args:
        spec: of the policy.
        data: its observations, actions and targets.
        config: how to train.
        folder: of the policy.
        device: to train on.
        targets: key of recorded numbers -> camera whose features are also trained to equal them, normalised. The policy
            does not observe these numbers: they only help the camera's encoder to find useful features sooner.
        logger: opens the record of losses in a folder, for a run that continues from a step.

    Raises:
        DataError: the data does not fit the policy, or has no window.
        ValueError: the folder has a run with other settings or data, or a damaged state; the scheduler is of flow
            matching; the initial policy is of another kind or of data in another range; or the cameras cannot be
            trained on the targets.
        CheckpointError: the initial policy cannot be read.
        FloatingPointError: the loss is no longer finite.
    """
    if make_schedule(spec.scheduler, sample_shape=spec.sample_shape).solver == "flow":
        raise ValueError("the scheduler is of flow matching, which cannot be trained here; take DDPMScheduler")
    targets = targets or {}
    torch.manual_seed(config.seed)
    network = build_network(spec).to(device)
    taken_over = begin_from(config.init, config.initial_weights, spec, network)
    data.check(spec)
    check_targets(targets, spec, network, data, config.target_steps)
    windows, held_out = (
        data.windows(spec.horizon, spec.n_obs_steps, spec.n_action_steps, episodes)
        for episodes in data.split(config.validation, config.seed)
    )
    used = torch.cat((windows, held_out)).unique()  # steps
    data.warn_of_outliers(used)
    arrays = {key: data.arrays[key] for key in [*spec.normalizer_shapes, *targets]}
    states = {key: value[used] for key, value in arrays.items() if value.dtype != torch.uint8}
    normalizer = fit_normalizer(spec, states, taken_over)
    for key, value in states.items():
        if not (most := normalizer.normalize(key, value).abs().max()) < FAR:
            name = "init" if config.initial_weights is None else "initial_weights"
            raise ValueError(
                f"{key!r} is up to {most:.3g} when normalised by the policy at {getattr(config, name)!r}, which was "
                f"trained on data in another range; train without {name}"
            )
    same = {"data": digest([arrays, data.episode_ends, normalizer.state_dict()]), "targets": dict(targets)}
    run = {"spec": _json_like(spec.to_dict()), "config": dataclasses.asdict(config), **same}
    kept = TrainingFolder(Path(folder), run)
    if kept.finished is not None:
        return TrainResult(**kept.finished)
    average = [parameter.detach().clone() for parameter in network.parameters()]
    optimizer = torch.optim.AdamW(
        network.parameters(), lr=config.learning_rate, betas=(0.95, 0.999), weight_decay=config.weight_decay, fused=True
    )
    loss_of = Loss(
        spec,
        network,
        normalizer,
        arrays,
        targets=targets,
        seed=config.seed,
        batch_size=config.batch_size,
        compile=config.compile,
        bfloat16=config.precision == "bfloat16" or (config.precision == "auto" and _computes_bfloat16(device)),
        target_weight=config.target_weight,
        device=device,
    )
    step, seconds, smooth, validation = 0, 0.0, math.nan, math.nan

    if (state := kept.load(device)) is not None:
        network.load_state_dict(state["network"])
        optimizer.load_state_dict(state["optimizer"])
        average = state["average"]
        step, seconds, smooth, validation = state["step"], state["seconds"], state["loss"], state["validation"]

    def save() -> None:
        kept.save(
            {
                "network": network.state_dict(),
                "optimizer": optimizer.state_dict(),
                "average": average,
                "step": step,
                "seconds": seconds + time.perf_counter() - begin,
                "loss": smooth,
                "validation": validation,
            }
        )

    begin = time.perf_counter()
    with (
        logger(kept.path, step) as log,
        tqdm(total=config.steps, initial=step, desc="train", unit="step", smoothing=0.05) as bar,
    ):
        try:
            while step < config.steps:
                rate = config.learning_rate * _warmup_cosine(step, config)
                for group in optimizer.param_groups:
                    group["lr"] = rate
                terms = loss_of(step, windows, targets_alone=step < config.target_steps)
                optimizer.zero_grad(set_to_none=True)
                terms["loss"].backward()
                optimizer.step()
                decay = min(config.ema_max_decay, 1 - (1 + step) ** -config.ema_power)
                torch._foreach_lerp_(average, [p.detach() for p in network.parameters()], 1 - decay)
                step += 1
                if step % 20 == 0 or step == config.steps:
                    values = {name: term.item() for name, term in terms.items()}
                    if not math.isfinite(values["loss"]):
                        raise FloatingPointError(f"the loss is {values['loss']} at step {step}; lower learning_rate")
                    smooth = values["loss"] if math.isnan(smooth) else 0.95 * smooth + 0.05 * values["loss"]
                    bar.set_postfix(loss=f"{smooth:.4f}")
                    log.write(step, {**values, "learning_rate": rate})
                if len(held_out) and (step % config.validate_every == 0 or step == config.steps):
                    with _swapped(network, average):
                        values = loss_of.held_out(held_out, VALIDATION_BATCHES)
                    validation = values["denoising"]
                    log.write(step, {f"validation/{name}": value for name, value in values.items()})
                bar.update()
                if step % config.checkpoint_every == 0:
                    save()
        except KeyboardInterrupt:
            save()
            tqdm.write(f"interrupted at step {step}; the same command resumes from {kept.path / STATE}")
            raise

    names = [name for name, _ in network.named_parameters()]
    result = TrainResult(smooth, seconds + time.perf_counter() - begin, None if math.isnan(validation) else validation)
    kept.record(dataclasses.asdict(result))
    weights = {**network.state_dict(), **dict(zip(names, average, strict=True))}
    own = Normalizer({key: normalizer.maps[key] for key in spec.normalizer_shapes})
    write_checkpoint(kept.path, spec, weights, own)
    kept.finish()
    return result


@contextlib.contextmanager
def _swapped(network: Network, average: list[Tensor]) -> Iterator[None]:
    """Put the averaged weights into the network; restore its own afterwards."""
    parameters = [parameter.detach() for parameter in network.parameters()]
    own = [parameter.clone() for parameter in parameters]
    torch._foreach_copy_(parameters, average)
    try:
        yield
    finally:
        torch._foreach_copy_(parameters, own)


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
    """Convert to the types that ``torch.load(weights_only=True)`` reads: dicts, lists, numbers, strings."""
    if isinstance(value, Mapping):
        return {str(key): _json_like(inner) for key, inner in value.items()}
    return [_json_like(inner) for inner in value] if isinstance(value, list | tuple) else value
