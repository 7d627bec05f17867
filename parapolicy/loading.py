"""Loading a policy from its files, onto a device, with a sampler and an engine."""

import dataclasses
import os
from typing import Any

import torch

from parapolicy.calibrate import with_calibration
from parapolicy.checkpoint import read_checkpoint
from parapolicy.checkpoint.native import write_checkpoint
from parapolicy.engine import make_engine
from parapolicy.errors import CheckpointError
from parapolicy.planner import default_sampler, make_first_sampler, make_plan
from parapolicy.policy import Policy
from parapolicy.schedule import make_schedule


def load_policy(
    folder: str | os.PathLike[str],
    sampler: str | None = None,
    device: str = "auto",
    engine: str = "auto",
    ema: bool = False,
    **parameters: Any,
) -> Policy:
    """Load a policy folder (``config.json`` and ``model.safetensors``), or another format that a reader recognises.

    Args:
        folder: our own policy folder; LeRobot's, or the folder that holds its ``pretrained_model``; a file of
            torch.save; or a policy on the Hugging Face hub, ``hf://owner/name[@revision]``.
        sampler: one of :func:`parapolicy.list_samplers`, with its own ``parameters``. ``collocation`` without a
            calibration beside the weights is calibrated at the first load, which takes seconds. ``auto``: the sampler
            that :func:`parapolicy.make_plan` finds fastest here, for the given ``tolerance``, ``fidelity`` and
            ``bound`` (or the plan's defaults). Left out: ``collocation`` if a calibration beside the weights has
            measured that it keeps the policy's distribution, as for the shipped policies, and otherwise ``secant``.
        engine: one of :data:`parapolicy.engine.ENGINES`. ``compiled`` compiles at the first call, for about a minute
            if torch's cache on disk does not have the network yet. ``compiled_bfloat16`` rounds the factors of its
            matrix products to bfloat16, which is faster on CPUs with bfloat16 instructions. ``fused`` computes the
            network in C++ on a CPU, and ``fused_bfloat16`` does so with that rounding. ``cuda_graph`` captures whole
            rounds of ``secant`` and ``collocation``. ``sharded`` splits calls over the processes of ``torchrun``, each
            with the engine ``compiled``. ``auto``: see :func:`parapolicy.engine.make_engine`; under ``torchrun``,
            ``sharded``.
        ema: use the averaged weights that LeRobot saves in ``pretrained_model_ema`` beside the policy.
        device: ``auto`` (a GPU if there is one), ``cpu``, ``cuda``, ``cuda:1``, …

    Raises:
        CheckpointError: a file is missing or damaged, or the files do not match each other.
        ValueError: an unknown sampler, parameter, engine or device, ``sharded`` outside of ``torchrun``, or parameters
            without a sampler's name.
    """
    if sampler is None and parameters:
        raise ValueError(
            f"{sorted(parameters)} are parameters of a sampler, but no sampler is named; add sampler='secant'"
        )
    chosen = make_first_sampler(sampler or "secant", **parameters)
    target = pick_device(device)
    made = make_engine("compiled" if engine == "sharded" else engine, target)
    spec, network, normalizer = read_checkpoint(folder, ema)
    try:
        schedule = make_schedule(spec.scheduler, sample_shape=spec.sample_shape, **spec.inference)
    except (ValueError, TypeError, RuntimeError, ArithmeticError) as error:
        raise CheckpointError(f"{folder}: its scheduler config gives no schedule: {error!s:.250}") from error
    network = network.to(target)
    policy = Policy(spec, network, normalizer.to(target), schedule.to(target), chosen, target, engine=made)
    if engine == "sharded" or (engine == "auto" and int(os.environ.get("WORLD_SIZE", 1)) > 1):
        from parapolicy.engine.sharded import join  # torch.distributed is slow to load

        policy = dataclasses.replace(policy, engine=join(policy))
    calibrated = chosen.uses_calibration or parameters.get("fidelity") == "distribution"
    policy = with_calibration(policy, folder, measure=calibrated)
    if sampler is None:
        return dataclasses.replace(policy, sampler=default_sampler(policy))
    return make_plan(policy, **parameters).apply(policy) if sampler == "auto" else policy


def save_policy(policy: Policy, folder: str | os.PathLike[str]) -> None:
    """Write a policy folder that :func:`load_policy` reads back, weights equal to the bit."""
    write_checkpoint(folder, policy.spec, policy.network.state_dict(), policy.normalizer)


def pick_device(name: str) -> torch.device:
    """A device by name. ``auto``: a GPU if there is one, else the CPU. Under ``torchrun`` each process has its own GPU.

    Raises:
        ValueError: not a device name, or a device that is not available.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {name!r} is not available ({error}); take 'auto' or 'cpu'") from error
    return device
