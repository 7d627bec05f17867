"""A window split over two real processes gives the same chunk as one, and a lost worker an error in time."""

import copy
import dataclasses
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import parapolicy
from parapolicy import launch
from parapolicy.engine.sharded import Sharded, WorkerLostError, _pack, _unpack, connect, take_part
from parapolicy.launch import free_address, start_workers
from parapolicy.loading import pick_device
from tests.conftest import PATIENCE, ROOT, SHIPPED


def observation(policy: parapolicy.Policy, batch: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = [(key, feature.shape) for key, feature in policy.spec.observation.items()]
    return {key: rng.uniform(150, 350, (batch, 2, *shape)).astype(np.float32) for key, shape in shapes}


def test_two_processes_give_the_chunk_of_one(shipped: parapolicy.Policy) -> None:
    with start_workers(SHIPPED, 2) as policy:
        for schedule, batch in (("ddpm", 1), ("ddim", 3)):
            ours, alone = (p.with_sampler("secant").with_schedule(schedule, 50) for p in (policy, shipped))
            chunk, expected = ours.predict(observation(ours, batch)), alone.predict(observation(ours, batch))
            assert chunk.stats.rounds.tolist() == expected.stats.rounds.tolist()
            np.testing.assert_allclose(chunk.trajectory, expected.trajectory, rtol=0, atol=0.05)
    assert not mp.active_children()


def test_threads_and_a_reset_get_their_own_chunks(shipped: parapolicy.Policy) -> None:
    quick = shipped.with_schedule("ddim", 5).with_sampler("sequential")
    observations = [{key: value + 3 * i for key, value in observation(quick, 1 + i).items()} for i in range(2)]
    expected = [quick.predict(o).trajectory for o in observations]
    with start_workers(SHIPPED, 2) as policy:
        ours = dataclasses.replace(quick, engine=policy.engine)
        with ThreadPoolExecutor(2) as pool:
            found = pool.map(lambda o: [ours.predict(o).trajectory for _ in range(15)], observations)
            for chunks, right in zip(found, expected, strict=True):
                for chunk in chunks:
                    np.testing.assert_allclose(chunk, right, rtol=0, atol=0.05)
    with pytest.raises(WorkerLostError, match="were stopped"):
        ours.predict(observations[0])


def test_processes_with_other_weights_do_not_join(shipped: parapolicy.Policy, tmp_path: Path) -> None:
    other = copy.deepcopy(shipped)
    with torch.no_grad():
        next(other.network.parameters())[0] += 1
    parapolicy.save_policy(other, tmp_path)
    address = free_address()
    arguments = (tmp_path, "eager", "cpu", address, 1, 2, 10.0, 1)
    worker = mp.get_context("spawn").Process(target=launch._work, args=arguments, daemon=True)
    worker.start()
    try:
        with pytest.raises(ValueError, match="processes differ: rank 1 has another network's weights;"):
            take_part(shipped, address, 0, 2, 10.0)
        worker.join(30)
        assert worker.exitcode == 0
    finally:
        worker.kill()
        worker.join()
        dist.destroy_process_group()


def test_rows_arrive_as_they_were_sent() -> None:
    rows = torch.randn(40, 16, 2), torch.arange(960, 1000), torch.arange(40)
    for sent, arrived in zip(rows, _unpack(_pack(*rows), (16, 2)), strict=True):
        assert arrived.dtype == sent.dtype
        assert arrived.is_contiguous()
        assert torch.equal(arrived, sent)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_lost_worker_is_an_error_within_the_timeout(how: int) -> None:
    with start_workers(SHIPPED, 2, timeout=5.0) as policy:
        policy.predict(observation(policy, 1))
        (worker,) = mp.active_children()
        calls = iter(range(1000))

        def strike() -> bool:
            """Hit the worker in the middle of a chunk, after the second round."""
            if next(calls) == 1:
                os.kill(worker.pid, how)
            return False

        begin = time.monotonic()
        with pytest.raises(WorkerLostError, match="died or did not answer within 5 s; no chunk was computed"):
            policy.predict(observation(policy, 1), deadline=strike)
        assert time.monotonic() - begin < PATIENCE
        with pytest.raises(WorkerLostError):  # and no silent wrong chunk afterwards
            policy.predict(observation(policy, 1))
    assert not mp.active_children()


def never_listen(address: str) -> None:
    """A worker that stands still before it waits for a header."""
    connect(address, 1, 2, torch.device("cpu"), 3.0)
    time.sleep(1000)


def test_a_worker_that_never_listens_is_an_error_within_the_timeout(shipped: parapolicy.Policy) -> None:
    address = free_address()
    worker = mp.get_context("spawn").Process(target=never_listen, args=(address,), daemon=True)
    worker.start()
    try:
        sharded = Sharded(shipped.engine, connect(address, 0, 2, torch.device("cpu"), 3.0), 3.0)
        begin = time.monotonic()
        with pytest.raises(WorkerLostError, match="did not answer within 3 s"):
            sharded.bind(shipped.network, torch.arange(3), {"keypoint": torch.zeros(1, 2, 18)})
        assert time.monotonic() - begin < PATIENCE
    finally:
        worker.kill()
        worker.join()
        dist.destroy_process_group()


@pytest.mark.distributed
def test_torchrun_starts_it(tmp_path: Path, shipped: parapolicy.Policy) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import sys, numpy as np, parapolicy\n"
        "policy = parapolicy.load_policy(sys.argv[1], device='cpu', engine='sharded')\n"
        "keys = policy.spec.observation.items()\n"
        "chunk = policy.predict({key: np.full((2, *feature.shape), 250.0) for key, feature in keys})\n"
        "print('chunk', policy.engine.ranks, chunk.actions.sum())\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", str(script)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, str(SHIPPED)], env=environment, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("chunk")]
    keys = shipped.spec.observation.items()
    alone = parapolicy.load_policy(SHIPPED, device="cpu", engine="eager")
    expected = alone.predict({key: np.full((2, *feature.shape), 250.0) for key, feature in keys})
    _, ranks, total = line.split()
    assert ranks == "2"
    assert abs(float(total) - expected.actions.sum()) < 0.5


def test_every_process_of_torchrun_has_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("LOCAL_RANK", "97")
    for name in ("auto", "cuda"):
        with pytest.raises(ValueError, match="device 'cuda:97' is not available"):
            pick_device(name)
    assert pick_device("cpu") == torch.device("cpu")
