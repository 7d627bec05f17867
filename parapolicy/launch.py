"""Starting the sharded engine's processes from Python. Under ``torchrun``, ``load_policy`` joins them."""

import contextlib
import dataclasses
import os
import socket
from collections.abc import Iterator

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from parapolicy.engine.sharded import Sharded, take_part
from parapolicy.loading import load_policy
from parapolicy.policy import Policy


def free_address() -> str:
    """An address for processes of this machine to meet: loopback with a free port."""
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
) -> Iterator[Policy]:
    """A policy whose network calls are split over this process and ``processes - 1`` others, which end with the block.

    On the CPU every process uses as many threads as this one, so divide the machine's cores first.

    Args:
        folder: the policy folder.
        processes: number of processes, this one included.
        engine: the engine in each process.
        device: of every process; ``cuda`` gives each its own GPU.
        timeout: seconds after which a silent worker counts as lost.
    """
    address = free_address()
    context = mp.get_context("spawn")
    devices = [f"cuda:{rank}" if device == "cuda" else device for rank in range(processes)]
    workers = [
        context.Process(
            target=_work,
            args=(folder, engine, name, address, rank, processes, timeout, torch.get_num_threads()),
            daemon=True,
        )
        for rank, name in enumerate(devices)
        if rank > 0
    ]
    for worker in workers:
        worker.start()
    sharded: Sharded | None = None
    try:
        policy = load_policy(folder, device=devices[0], engine=engine)
        sharded = take_part(policy, address, 0, processes, timeout)
        assert sharded is not None  # this is rank 0
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
    torch.set_num_threads(threads)
    try:
        take_part(load_policy(folder, device=device, engine=engine), address, rank, processes, timeout)
    finally:
        if dist.is_initialized():  # threads still running at the interpreter's end may abort the process
            dist.destroy_process_group()
