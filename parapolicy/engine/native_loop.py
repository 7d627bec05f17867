"""Whole chunks as one call of C++: the loops of ``sequential`` and ``collocation`` over a native network."""

import ctypes
import math
import time
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from parapolicy.denoiser import Denoiser
from parapolicy.engine.base import Deadline
from parapolicy.engine.lowered.fused_network import FusedNetwork
from parapolicy.samplers import Collocation, Sample, Sampler, Sequential
from parapolicy.samplers.base import root_mean_square
from parapolicy.samplers.collocation import ROUNDS
from parapolicy.schedule import Schedule

PREDICTIONS = ("epsilon", "sample", "v_prediction", "flow_prediction")  # in the order of chunk.h
NO_MEMORY, BEYOND_TABLE = -1, -2  # enum Failure of chunk.h
NO_LIMIT = 2**62
STOP = ctypes.CFUNCTYPE(ctypes.c_int32)
POINTER, INTEGER, NUMBER = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double


class Struct(ctypes.Structure):
    """A structure of chunk.h with the same name and fields, and the tensors that it points to."""

    held: tuple[Any, ...] = ()


class ScheduleTables(Struct):
    _fields_ = (
        *((name, POINTER) for name in ("A", "B", "C", "S", "alpha", "sigma", "overshoot")),
        *((name, INTEGER) for name in ("steps", "prediction", "multistep", "clips", "overshoots")),
        ("clip", NUMBER),
    )


class Nodes(Struct):
    _fields_ = (
        *((name, POINTER) for name in ("steps", "modes", "transposed", "kappa", "kept", "response")),
        *((name, POINTER) for name in ("first", "noise", "sigma", "interpolation")),
        *((name, INTEGER) for name in ("count", "own", "window", "most")),
        *((name, NUMBER) for name in ("settle", "state", "estimate", "last_noise")),
    )


class Job(Struct):
    _fields_ = (
        *((name, POINTER) for name in ("network", "films", "schedule")),
        *((name, INTEGER) for name in ("max_rows", "threads")),
        ("stop", STOP),
        ("seconds", NUMBER),
        *((name, POINTER) for name in ("part", "free")),
    )


class Costs(Struct):
    _fields_ = tuple((name, POINTER) for name in ("rounds", "evaluations", "complete", "residual"))


def sample_natively(
    network: FusedNetwork,
    steps: Tensor,
    condition: Tensor,
    sampler: Sampler,
    denoiser: Denoiser,
    noise: Tensor,
    stop: Callable[[], bool] | None,
) -> Sample | None:
    """A sample as from :meth:`parapolicy.engine.Engine.run`, or None if the sampler has no native loop.

    Rows are computed independently of each other to the bit, so ``reproducible`` needs nothing more.

    Args:
        network: the native network.
        steps, condition: its FiLM values, (T, F) and (B, F).
    """
    loop, schedule, batch = LOOPS.get(type(sampler)), denoiser.schedule, noise.shape[1]
    if loop is None or network.inpaints:
        return None
    expected = len(schedule) + 1, batch, math.prod(denoiser.sample_shape)
    if noise.shape != expected or len(steps) != len(schedule) or len(condition) < batch:
        raise ValueError(
            f"noise has shape {tuple(noise.shape)}, expected {expected}, for {len(steps)} steps and "
            f"{len(condition)} conditions"
        )
    steps, condition = steps.float().contiguous(), condition.float().contiguous()
    stopping, films = _Stopping(stop), network.films(steps, condition)
    tables, plan = schedule_tables(schedule), network.plan(*denoiser.sample_shape)
    held = None if denoiser.held is None else [value.float().contiguous() for value in denoiser.held]
    job = Job(
        network=ctypes.addressof(plan.network),
        films=ctypes.addressof(films),
        schedule=ctypes.addressof(tables),
        max_rows=denoiser.max_batch or NO_LIMIT,
        threads=torch.get_num_threads(),
        stop=STOP(stopping) if stopping.function is not None else STOP(),
        seconds=stopping.seconds,
        part=None if held is None else held[0].data_ptr(),
        free=None if held is None else held[1].data_ptr(),
    )
    sample = loop(network.library, job, sampler, schedule, noise.float().contiguous())
    stopping.check()
    return sample


class _Stopping:
    """Calls a Python function from C++, or lets C++ watch a deadline without Python."""

    def __init__(self, stop: Callable[[], bool] | None) -> None:
        timed = isinstance(stop, Deadline)
        self.function = None if timed else stop
        self.seconds = max(0.0, stop.time - time.monotonic()) if isinstance(stop, Deadline) else -1.0
        self.error: BaseException | None = None

    def __call__(self) -> int:
        assert self.function is not None
        try:
            return bool(self.function())
        except BaseException as error:  # exceptions cannot pass through C++: end sampling, raise afterwards
            self.error = error
            return 1

    def check(self) -> None:
        if self.error is not None:
            raise self.error


def _sequential(library: Any, job: Job, sampler: Sampler, schedule: Schedule, noise: Tensor) -> Sample:
    batch, size = noise.shape[1:]
    steps = len(schedule)
    x, u = noise.new_empty(batch, size), noise.new_empty(batch, steps, size)
    taken = _checked(
        library.parapolicy_sequential(ctypes.byref(job), noise.data_ptr(), batch, x.data_ptr(), u.data_ptr())
    )
    count = torch.full((batch,), taken)
    change = u[:, taken - 1] - u[:, taken - 2] if taken > 1 else u[:, 0]
    residual = torch.zeros(batch) if taken == steps else root_mean_square(change)
    return Sample(x, u, count, count, residual, torch.full((batch,), taken == steps))


def _collocation(library: Any, job: Job, sampler: Sampler, schedule: Schedule, noise: Tensor) -> Sample:
    assert isinstance(sampler, Collocation)
    nodes = node_tables(sampler, schedule)
    batch, size = noise.shape[1:]
    x, u = noise.new_empty(batch, size), noise.new_empty(batch, len(schedule), size)
    rounds, evaluations = torch.empty(2, batch, dtype=torch.int64)
    complete, residual = torch.empty(batch, dtype=torch.int32), noise.new_empty(batch)
    costs = Costs(*(value.data_ptr() for value in (rounds, evaluations, complete, residual)))
    pointers = noise.data_ptr(), batch, x.data_ptr(), u.data_ptr()
    _checked(library.parapolicy_collocation(ctypes.byref(job), ctypes.byref(nodes), *pointers, ctypes.byref(costs)))
    return Sample(x, u, rounds, evaluations, residual, complete.bool())


LOOPS: dict[type[Sampler], Callable[..., Sample]] = {Sequential: _sequential, Collocation: _collocation}


def _checked(result: int) -> int:
    if result == NO_MEMORY:
        raise MemoryError("there is not enough memory for the chunk")
    if result < 0:
        raise IndexError("a step or element index is beyond its table")
    return result


@lru_cache(maxsize=8)
def schedule_tables(schedule: Schedule) -> ScheduleTables:
    """A schedule in the form of chunk.h."""
    names = ("A", "B", "C", "S", "alpha", "sigma", "overshoot")
    held = tuple(getattr(schedule, name).detach().float().contiguous() for name in names)
    made = ScheduleTables(
        *(table.data_ptr() for table in held),
        steps=len(schedule),
        prediction=PREDICTIONS.index(schedule.prediction),
        multistep=schedule.multistep,
        clips=schedule.clip is not None,
        overshoots=schedule.overshoots,
        clip=schedule.clip or 0.0,
    )
    made.held = held
    return made


@lru_cache(maxsize=8)
def node_tables(sampler: Collocation, schedule: Schedule) -> Nodes:
    """The tables of collocation in the form of chunk.h."""
    tables = sampler.tables(schedule)
    modes = None if tables.modes is None else tables.modes.contiguous()
    transposed = None if modes is None else modes.T.contiguous()
    names = ("kappa", "kept", "response", "first", "noise", "sigma", "interpolation")
    values = (getattr(tables, name) for name in names)
    held = tuple(value if value is None else value.contiguous() for value in (tables.nodes, modes, transposed, *values))
    count = len(tables.nodes)
    made = Nodes(
        *(value if value is None else value.data_ptr() for value in held),
        count=count,
        own=tables.response.shape[2],
        window=min(sampler.window, count),
        most=ROUNDS * count,
        settle=sampler.settle,
        state=tables.last[0],
        estimate=tables.last[1],
        last_noise=tables.last[2],
    )
    made.held = held
    return made
