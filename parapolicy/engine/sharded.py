"""A round's rows split over several processes, each with its own device or cores, by torch.distributed.

Rank 0 samples; the others answer its calls. Under ``torchrun``, :func:`join` does either. From Python,
:func:`start_workers` starts the others.
"""

import atexit
import contextlib
import dataclasses
import os
import socket
from collections.abc import Iterator
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

if TYPE_CHECKING:
    from parapolicy.engine import Engine, Evaluate
    from parapolicy.policy import Policy

STOP, BIND, EVALUATE = range(3)
START = 120.0  # seconds in which all processes must have started


class WorkerLostError(RuntimeError):
    """A worker died or did not answer in time. No chunk was computed; start the processes anew."""


class Groups(NamedTuple):
    """Process groups of all ranks.

    Attributes:
        control: for headers; a robot may stand still for as long as it likes before the next one, so that workers wait
            for it without end, but rank 0 no longer than the timeout for their taking it.
        data: for what follows a header at once, within the timeout.
    """

    control: Any
    data: Any


class Sharded:
    """Rank 0's engine: every rank evaluates an equal part of the rows.

    Args:
        engine: what this rank computes its own part with.
        groups: of all ranks.
        timeout: seconds after which a silent worker counts as lost, as the data group was made with.
    """

    def __init__(self, engine: "Engine", groups: Groups, timeout: float) -> None:
        self.engine, self.groups, self.timeout = engine, groups, timeout
        self.ranks = dist.get_world_size()
        self.name = f"{self.ranks} times {engine.name}"
        self.lost: str | None = None

    def bind(self, timesteps: Tensor, condition: Tensor) -> "Evaluate":
        """As :meth:`parapolicy.engine.Engine.bind`; it and what it returns raise :class:`WorkerLostError`."""
        with self._answered():
            self._announce(BIND, len(timesteps), *condition.shape)
            dist.broadcast(timesteps.clone(), 0, self.groups.data)
            dist.broadcast(condition.contiguous(), 0, self.groups.data)
        return Split(self, self.engine.bind(timesteps, condition))

    def run(self, evaluate: "Evaluate", x: Tensor, step: Tensor, element: Tensor) -> Tensor:
        """What ``evaluate`` gives, each rank with its part of the rows."""
        share = -(-len(x) // self.ranks)
        rows = _pack(x, step, element)
        fill = rows[:1].expand(share * self.ranks - len(x), -1)  # the last parts are filled up with the first row
        parts = list(torch.cat((rows, fill)).chunk(self.ranks))
        with self._answered():
            self._announce(EVALUATE, share, *x.shape[1:])
            dist.scatter(torch.empty_like(parts[0]), parts, 0, self.groups.data)
            output = evaluate(x[:share], step[:share], element[:share]).contiguous()
            gathered = [torch.empty_like(output) for _ in range(self.ranks)]
            dist.gather(output, gathered, 0, self.groups.data)
        return torch.cat(gathered)[: len(x)]

    def stop(self) -> None:
        """Let the workers end."""
        with contextlib.suppress(WorkerLostError), self._answered():
            self._announce(STOP)

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
                f"computed; start the processes anew ({str(error).splitlines()[0]})"
            )
            raise WorkerLostError(self.lost) from error


@dataclasses.dataclass(frozen=True)
class Split:
    """Rank 0's ``evaluate``, with the other ranks' help.

    Attributes:
        compiles: as of ``evaluate``.
    """

    sharded: Sharded
    evaluate: "Evaluate"

    @property
    def compiles(self) -> bool:
        return getattr(self.evaluate, "compiles", False)

    def __call__(self, x: Tensor, step: Tensor, element: Tensor) -> Tensor:
        return self.sharded.run(self.evaluate, x, step, element)


@torch.inference_mode()
def answer(engine: "Engine", groups: Groups, device: torch.device) -> None:
    """The other ranks' work: compute what rank 0 sends, until it says stop or is gone."""
    evaluate: Evaluate | None = None
    header = torch.empty(4, dtype=torch.int64)
    with contextlib.suppress(RuntimeError):  # rank 0 is gone: it has said why
        while True:
            dist.broadcast(header, 0, groups.control)
            command, first, second, third = header.tolist()
            if command == STOP:
                return
            if command == BIND:
                timesteps = torch.empty(first, dtype=torch.int64, device=device)
                condition = torch.empty(second, third, device=device)
                dist.broadcast(timesteps, 0, groups.data)
                dist.broadcast(condition, 0, groups.data)
                evaluate = engine.bind(timesteps, condition)
            else:
                assert evaluate is not None
                rows = torch.empty(first, second * third + 2, device=device)
                dist.scatter(rows, None, 0, groups.data)
                dist.gather(evaluate(*_unpack(rows, second, third)).contiguous(), None, 0, groups.data)


def _pack(x: Tensor, step: Tensor, element: Tensor) -> Tensor:
    """One tensor (N, H D + 2) to send, because each one that is sent takes its time; float32 holds numbers of steps and
    elements exactly."""
    return torch.cat((x.flatten(1), step[:, None].to(x.dtype), element[:, None].to(x.dtype)), 1)


def _unpack(rows: Tensor, horizon: int, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    x, step, element = rows[:, :-2].unflatten(1, (horizon, dim)), rows[:, -2], rows[:, -1]
    return x.contiguous(), step.long(), element.long()


def join(policy: "Policy", timeout: float = 10.0) -> Sharded:
    """Under ``torchrun``: rank 0 gets its engine; the other ranks answer until it ends, and then end too.

    Args:
        policy: this rank's, with the engine that computes its part.
        timeout: seconds after which a silent rank counts as lost.

    Raises:
        ValueError: not under ``torchrun``.
        SystemExit: on the other ranks, when rank 0 is done.
    """
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        raise ValueError(
            "engine 'sharded' needs one process per device: torchrun --nproc-per-node=N …; from Python see "
            "parapolicy.engine.sharded.start_workers"
        )
    engine = _warm_up(policy)
    groups = _connect("env://", int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), policy.device, timeout)
    if dist.get_rank() > 0:
        answer(engine, groups, policy.device)
        raise SystemExit(0)
    sharded = Sharded(engine, groups, timeout)
    atexit.register(sharded.stop)
    return sharded


def free_address() -> str:
    """Where processes of this machine can meet: the loopback address with a port that nobody uses."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"tcp://127.0.0.1:{probe.getsockname()[1]}"


@contextlib.contextmanager
def start_workers(
    folder: str | os.PathLike[str],
    processes: int = 2,
    engine: str = "eager",
    device: str = "cpu",
    timeout: float = 10.0,
) -> Iterator["Policy"]:
    """A policy whose network calls are split over this process and ``processes - 1`` others, which end with the block.

    On the CPU every process computes with as many threads as this one: divide the machine's cores before.

    Args:
        folder: the policy folder.
        engine: what each process computes with.
        device: of every process; ``cuda`` gives each its own GPU.
        timeout: seconds after which a silent worker counts as lost.
    """
    from parapolicy.policy import load_policy

    address = free_address()
    context = mp.get_context("spawn")
    names = [f"cuda:{rank}" if device == "cuda" else device for rank in range(processes)]
    workers = [
        context.Process(
            target=_work,
            args=(folder, engine, name, address, rank, processes, timeout, torch.get_num_threads()),
            daemon=True,
        )
        for rank, name in enumerate(names)
        if rank > 0
    ]
    for worker in workers:
        worker.start()
    sharded: Sharded | None = None
    try:
        policy = load_policy(folder, device=names[0], engine=engine)
        own = _warm_up(policy)
        groups = _connect(address, 0, processes, policy.device, timeout)
        sharded = Sharded(own, groups, timeout)
        yield dataclasses.replace(policy, engine=sharded)
    finally:
        if sharded is not None:
            sharded.stop()
        for worker in workers:
            worker.join(1.0)
            worker.kill()
            worker.join()
        if dist.is_initialized():
            dist.destroy_process_group()


def _work(
    folder: str, engine: str, device: str, address: str, rank: int, processes: int, timeout: float, threads: int
) -> None:
    from parapolicy.policy import load_policy

    torch.set_num_threads(threads)
    policy = load_policy(folder, device=device, engine=engine)
    answer(_warm_up(policy), _connect(address, rank, processes, policy.device, timeout), policy.device)


@torch.inference_mode()
def _warm_up(policy: "Policy") -> "Engine":
    """The policy's engine, compiled where it does that before anybody waits for an answer."""
    spec, device = policy.spec, policy.device
    assert policy.engine is not None
    evaluate = policy.engine.bind(policy.schedule.timesteps, torch.zeros(1, spec.condition_dim, device=device))
    rows = torch.zeros(4, dtype=torch.int64, device=device)
    # Not the same tensor twice, for which dynamo would compile a graph of its own.
    evaluate(torch.zeros(4, spec.horizon, spec.action_dim, device=device), rows, rows.clone())
    return policy.engine


def _connect(address: str, rank: int, processes: int, device: torch.device, timeout: float) -> Groups:
    """Meet the other processes; raises torch's ``DistStoreError`` where they do not come within ``START`` seconds."""
    dist.init_process_group("gloo", address, timedelta(seconds=START), processes, rank)
    limit = timedelta(seconds=timeout)
    data = dist.new_group(backend="nccl" if device.type == "cuda" else "gloo", timeout=limit)
    return Groups(dist.new_group(backend="gloo", timeout=timedelta(days=365) if rank else limit), data)
