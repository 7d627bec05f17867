"""A round's network rows split over several processes with torch.distributed, each with its own device or cores.

Rank 0 samples; the other ranks answer its calls. :mod:`parapolicy.launch` starts them.
"""

import atexit
import contextlib
import dataclasses
import os
import threading
from collections.abc import Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from parapolicy.denoiser import Denoiser, Evaluate
from parapolicy.digest import digest
from parapolicy.engine.base import Engine
from parapolicy.networks import Network
from parapolicy.samplers import Rounds, Sampler
from parapolicy.schedule import Schedule
from parapolicy.spec import PolicySpec

STOP, BIND, EVALUATE = range(3)
COMPARED = ("another network's weights", "another policy spec", "another engine", "other code", "another torch")
START = 120.0  # seconds in which all processes must have started


class WorkerLostError(RuntimeError):
    """A worker died or did not answer in time. No chunk was computed; restart the processes."""


class Part(Protocol):
    """What a rank needs for its computations, such as a :class:`parapolicy.Policy`."""

    @property
    def spec(self) -> PolicySpec: ...
    @property
    def network(self) -> Network: ...
    @property
    def schedule(self) -> Schedule: ...
    @property
    def engine(self) -> Engine: ...
    @property
    def device(self) -> torch.device: ...


class Groups(NamedTuple):
    """Process groups of all ranks.

    Attributes:
        control: for headers. A robot may pause for any time between calls: workers wait for the next header without
            a timeout, and rank 0 waits at most ``timeout`` for a worker to receive it.
        data: for the data that follows a header immediately, within the timeout.
    """

    control: Any
    data: Any


class Sharded(Engine):
    """Rank 0's engine: every rank evaluates an equal part of a chunk's rows. One chunk is sampled at a time.

    Args:
        engine: computes this rank's own part.
        groups: of all ranks.
        timeout: seconds after which a silent worker counts as lost; the same as the data group's.
    """

    def __init__(self, engine: Engine, groups: Groups, timeout: float) -> None:
        self.engine, self.groups, self.timeout = engine, groups, timeout
        self.ranks = dist.get_world_size()
        self.name = f"{self.ranks} times {engine.name}"
        self.lost: str | None = None
        self._lock = threading.Lock()

    def exclusive(self) -> threading.Lock:
        return self._lock

    def bind(self, network: Network, timesteps: Tensor, observation: Mapping[str, Tensor]) -> "Split":
        """As :meth:`parapolicy.engine.Engine.bind`; this and calls of the result raise :class:`WorkerLostError`."""
        batch = len(next(iter(observation.values())))
        with self._answered():
            self._announce(BIND, len(timesteps), batch, int(timesteps.is_floating_point()))
            dist.broadcast(timesteps.clone(), 0, self.groups.data)
            for value in observation.values():
                dist.broadcast(value.contiguous(), 0, self.groups.data)
        return Split(self, self.engine.bind(network, timesteps, observation))

    def rounds(self, sampler: Sampler, denoiser: Denoiser, noise: Tensor) -> Rounds:
        return self.engine.rounds(sampler, denoiser, noise)

    def run_split(self, evaluate: Evaluate, x: Tensor, step: Tensor, element: Tensor) -> Tensor:
        """The result of ``evaluate``, with each rank computing its part of the rows."""
        share = -(-len(x) // self.ranks)
        rows = _pack(x, step, element)
        fill = rows[:1].expand(share * self.ranks - len(x), -1)  # pads the last parts with the first row
        parts = list(torch.cat((rows, fill)).chunk(self.ranks))
        with self._answered():
            self._announce(EVALUATE, share)
            dist.scatter(torch.empty_like(parts[0]), parts, 0, self.groups.data)
            output = evaluate(x[:share], step[:share], element[:share]).contiguous()
            gathered = [torch.empty_like(output) for _ in range(self.ranks)]
            dist.gather(output, gathered, 0, self.groups.data)
        return torch.cat(gathered)[: len(x)]

    def stop(self) -> None:
        """End the workers after the present chunk; later chunks raise :class:`WorkerLostError`."""
        held = self._lock.acquire(timeout=self.timeout)
        try:
            with contextlib.suppress(WorkerLostError), self._answered():
                self._announce(STOP)
            self.lost = self.lost or f"the {self.ranks} processes were stopped; restart them"
        finally:
            if held:
                self._lock.release()

    def _announce(self, command: int, *sizes: int) -> None:
        header = torch.tensor([command, *sizes, 0, 0, 0][:4])
        dist.broadcast(header, 0, self.groups.control)

    @contextlib.contextmanager
    def _answered(self) -> Iterator[None]:
        if self.lost is not None:
            raise WorkerLostError(self.lost)
        try:
            yield
        except RuntimeError as error:
            self.lost = (
                f"one of {self.ranks} processes died or did not answer within {self.timeout:g} s; no chunk was "
                f"computed; restart the processes ({str(error).splitlines()[0]})"
            )
            raise WorkerLostError(self.lost) from error


@dataclasses.dataclass(frozen=True)
class Split:
    """Rank 0's ``evaluate``, split over all ranks."""

    sharded: Sharded
    evaluate: Evaluate

    def __call__(self, x: Tensor, step: Tensor, element: Tensor) -> Tensor:
        return self.sharded.run_split(self.evaluate, x, step, element)


@torch.inference_mode()
def _answer(part: Part, groups: Groups) -> None:
    """The loop of the other ranks: answer rank 0's calls until it sends stop or ends."""
    spec, device = part.spec, part.device
    evaluate: Evaluate | None = None
    header = torch.empty(4, dtype=torch.int64)
    with contextlib.suppress(RuntimeError):  # rank 0 has ended and reported why
        while True:
            dist.broadcast(header, 0, groups.control)
            command, count, batch, floating = header.tolist()
            if command == STOP:
                return
            if command == BIND:
                timesteps = torch.empty(count, dtype=torch.float32 if floating else torch.int64, device=device)
                dist.broadcast(timesteps, 0, groups.data)
                observation = {key: torch.empty(batch, *shape, device=device) for key, shape in spec.obs_shapes.items()}
                for value in observation.values():
                    dist.broadcast(value, 0, groups.data)
                evaluate = part.engine.bind(part.network, timesteps, observation)
            else:
                assert evaluate is not None
                rows = torch.empty(count, torch.Size(spec.sample_shape).numel() + 2, device=device)
                dist.scatter(rows, None, 0, groups.data)
                dist.gather(evaluate(*_unpack(rows, spec.sample_shape)).contiguous(), None, 0, groups.data)


def _pack(x: Tensor, step: Tensor, element: Tensor) -> Tensor:
    """Pack the arguments of a call into one tensor (N, S + 2), because each message costs time. float32 holds step and
    element indices exactly."""
    return torch.cat((x.flatten(1), step[:, None].to(x.dtype), element[:, None].to(x.dtype)), 1)


def _unpack(rows: Tensor, shape: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    x, step, element = rows[:, :-2].unflatten(1, shape), rows[:, -2], rows[:, -1]
    return x.contiguous(), step.long(), element.long()


def join(part: Part, timeout: float = 10.0) -> Sharded:
    """Join the processes of ``torchrun``. Rank 0 gets its engine; the other ranks answer until it ends, then exit.

    Args:
        part: of this rank.
        timeout: seconds after which a silent rank counts as lost.

    Raises:
        ValueError: not under ``torchrun``.
        SystemExit: on the other ranks, when rank 0 has ended.
    """
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        raise ValueError(
            "engine 'sharded' needs one process per device: torchrun --nproc-per-node=N …; from Python see "
            "parapolicy.launch.start_workers"
        )
    sharded = take_part(part, "env://", int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), timeout)
    if sharded is None:
        raise SystemExit(0)
    atexit.register(sharded.stop)
    return sharded


def take_part(part: Part, address: str, rank: int, processes: int, timeout: float) -> Sharded | None:
    """Connect to the other ranks. Rank 0 gets its engine; the other ranks get None when rank 0 has ended.

    Raises:
        ValueError: on rank 0, if another rank has other weights or another spec, engine or version; the others end.
    """
    _warm_up(part)
    mine = _digests(part)
    groups = connect(address, rank, processes, part.device, timeout)
    everyone = [torch.empty_like(mine) for _ in range(processes)]
    dist.all_gather(everyone, mine, groups.control)
    differences = (torch.stack(everyone) != everyone[0]).any(2).nonzero().tolist()
    if differences and rank == 0:
        listed = ", ".join(f"rank {other} has {COMPARED[what]}" for other, what in differences)
        raise ValueError(f"the processes differ: {listed}; start all with the same checkpoint and engine")
    if differences:
        return None
    if rank == 0:
        return Sharded(part.engine, groups, timeout)
    _answer(part, groups)
    return None


def connect(address: str, rank: int, processes: int, device: torch.device, timeout: float) -> Groups:
    """Connect to the other processes; raises torch's ``DistStoreError`` if they do not connect within ``START`` s."""
    dist.init_process_group("gloo", address, timedelta(seconds=START), processes, rank)
    limit = timedelta(seconds=timeout)
    data = dist.new_group(backend="nccl" if device.type == "cuda" else "gloo", timeout=limit)
    return Groups(dist.new_group(backend="gloo", timeout=timedelta(days=365) if rank else limit), data)


def _digests(part: Part) -> Tensor:
    """Digests that must be equal on all ranks, (len(COMPARED), 32) uint8."""
    code = [path.read_text("utf-8") for path in sorted(Path(__file__).parents[1].rglob("*.py"))]
    facts = (part.network.state_dict(), part.spec.to_dict(), part.engine.name, code, torch.__version__)
    return torch.tensor([list(bytes.fromhex(digest(fact))) for fact in facts], dtype=torch.uint8)


@torch.inference_mode()
def _warm_up(part: Part) -> None:
    """Let the engine compile, if it does, before any call waits for an answer."""
    spec, device = part.spec, part.device
    observation = {key: torch.zeros(1, *shape, device=device) for key, shape in spec.obs_shapes.items()}
    evaluate = part.engine.bind(part.network, part.schedule.timesteps, observation)
    rows = torch.zeros(4, dtype=torch.int64, device=device)
    # Two tensors: dynamo would compile a separate graph for the same tensor passed twice.
    evaluate(torch.zeros(4, *spec.sample_shape, device=device), rows, rows.clone())
