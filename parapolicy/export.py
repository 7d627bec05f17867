"""Writing a policy as a plan file, which ``engine/parapolicy_fused.h`` loads and samples without Python."""

import struct
import zlib
from pathlib import Path

import torch
from torch import Tensor

from parapolicy.engine import Fused
from parapolicy.engine.fused import Bound
from parapolicy.engine.lowered.fused_unet1d import FusedUnet1D
from parapolicy.engine.native_loop import PREDICTIONS, node_tables
from parapolicy.files import replacing
from parapolicy.policy import Policy
from parapolicy.samplers import Collocation, Sequential
from parapolicy.samplers.collocation import Tables

MAGIC, VERSION, ALIGNMENT = b"parafuse", 2, 64
HEADER = "<8sIIq" + 22 * "q" + 6 * "d"  # Header of engine/plan_file.h
CHECKSUM_AT = 12


@torch.inference_mode()
def write_plan(policy: Policy, path: Path) -> None:
    """Write a policy with its schedule and sampler as a plan file.

    The arrays follow the header in the order of ``PlanFile`` in ``engine/plan_file.h``. The library's chunks equal this
    policy's to the bit on the same processor.

    Args:
        policy: with the engine ``fused`` or ``fused_bfloat16``, and the sampler ``sequential`` or ``collocation``.
        path: of the plan file.

    Raises:
        ValueError: the native library does not support the policy.
        OSError: there is no C++ compiler here, or the file cannot be written.
    """
    bound, network = _bind(policy)
    spec, schedule, sampler = policy.spec, policy.schedule, policy.sampler
    plan = network.plan(*spec.sample_shape)
    tables = [schedule.A, schedule.B, schedule.C, schedule.S, schedule.alpha, schedule.sigma, schedule.overshoot]
    arrays = [
        plan.layers,
        plan.weights,
        plan.values,
        bound.steps,
        network.condition_weight,
        *tables,
        *_normalizer(policy),
    ]
    nodes = own = modes = window = most = 0
    last: tuple[float, ...] = (0.0,) * 4
    if isinstance(sampler, Collocation):
        made = node_tables(sampler, schedule)
        nodes, own, modes, window, most = made.count, made.own, int(made.modes is not None), made.window, made.most
        last = made.settle, made.state, made.estimate, made.last_noise
        arrays += [table for table in _node_arrays(sampler.tables(schedule)) if table is not None]

    body = bytearray(struct.calcsize(HEADER))
    for array in arrays:
        body += bytes(-len(body) % ALIGNMENT)
        body += array.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()
    body += bytes(-len(body) % ALIGNMENT)
    words = plan.weights.numel() * plan.weights.element_size() // 4
    shape = plan.network.length, plan.network.channels, plan.network.film, plan.network.precision
    numbers = [len(body), len(plan.layers), words, plan.values.numel(), plan.network.memory, *shape]
    numbers += [len(schedule), PREDICTIONS.index(schedule.prediction), schedule.multistep]
    numbers += [
        schedule.clip is not None,
        schedule.overshoots,
        spec.n_obs_steps,
        spec.condition_dim // spec.n_obs_steps,
    ]
    numbers += [spec.executed.start, spec.n_action_steps, nodes, own, modes, window, most]
    fractions = [schedule.clip or 0.0, spec.control_hz or 0.0, *last]
    struct.pack_into(HEADER, body, 0, MAGIC, VERSION, 0, *numbers, *fractions)
    struct.pack_into("<I", body, CHECKSUM_AT, zlib.crc32(body))
    with replacing(path) as partial:
        partial.write_bytes(body)


def _node_arrays(tables: Tables) -> list[Tensor | None]:
    values = tables.kappa, tables.kept, tables.response, tables.first, tables.noise, tables.sigma
    return [tables.nodes, tables.modes, *values]


def _bind(policy: Policy) -> tuple[Bound, FusedUnet1D]:
    """The native network at the schedule's steps."""
    engine, spec = policy.engine, policy.spec
    if not isinstance(engine, Fused):
        raise ValueError(f"engine is {engine.name!r}, expected 'fused' or 'fused_bfloat16'")
    if type(policy.sampler) not in (Sequential, Collocation):
        raise ValueError(f"sampler is {type(policy.sampler).__name__.lower()!r}, expected sequential or collocation")
    if spec.action_parts:
        raise ValueError("the policy's actions have rotations to convert, which a plan file does not support")
    images = [key for key, feature in spec.observation.items() if feature.kind == "image"]
    if images or spec.network.get("condition", "global") != "global":
        raise ValueError("a plan file supports observed states only, without images, inpainting or local condition")
    nothing = {key: torch.zeros(1, *shape) for key, shape in spec.obs_shapes.items()}
    with policy.engine.exclusive():
        bound = engine.bind(policy.network, policy.schedule.timesteps, nothing)
    if not isinstance(bound, Bound) or not isinstance(bound.network, FusedUnet1D):
        raise ValueError(
            f"the network {spec.network['name']!r} is not supported in a plan file; expected a UNet with a native form"
        )
    return bound, bound.network


def _normalizer(policy: Policy) -> list[Tensor]:
    """Scale, offset and centre of the whole observation and of an action."""
    spec = policy.spec
    observed = [_affine(policy, key) for key in spec.observation]
    whole = [torch.cat(parts).repeat(spec.n_obs_steps) for parts in zip(*observed, strict=True)]
    # "Nothing" is added as -0, which changes no bit of any number.
    scale, offset, centre = _affine(policy, "action", none=-0.0)
    return [*whole, scale, offset, centre]


def _affine(policy: Policy, key: str, none: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    scale, offset, centre = policy.normalizer.maps[key]
    found = scale, offset, torch.full_like(scale, none) if centre is None else centre
    return tuple(value.float().flatten() for value in found)  # type: ignore[return-value]
