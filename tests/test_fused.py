"""The native engine against the network as it was trained."""

import dataclasses
import os
import shutil
import threading
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import parapolicy
from parapolicy.engine import Compiled, Fused, make_engine, native_library
from parapolicy.engine.lowered import fused_unet1d
from parapolicy.engine.lowered.fused_unet1d import FusedUnet1D
from parapolicy.networks import ConditionalUnet1D
from tests.helpers import small_policy, some_observation

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ here")
NARROW = ("-mno-avx512f", "-mno-avx") if torch.backends.cpu.get_cpu_capability() != "DEFAULT" else ()


def networks(network: ConditionalUnet1D) -> Any:
    """Both on the same made-up rows: (rows) -> (expected, found)."""
    fused, timesteps = FusedUnet1D(network), torch.arange(100)
    observation = {"state": torch.randn(3, 1, 20, generator=torch.Generator().manual_seed(1))}
    tables = fused.embed_steps(timesteps), fused.embed_condition(observation)
    plain = network.embed_steps(timesteps), network.embed_condition(observation)

    def compute(x: torch.Tensor, step: torch.Tensor, element: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return network(x, *plain, step, element), fused(x, *tables, step, element)

    return compute


SIZES = [
    {"input_dim": 2, "down_dims": (64, 128, 256), "diffusion_step_embed_dim": 32},
    {"input_dim": 7, "down_dims": (16, 32), "kernel_size": 3, "cond_predict_scale": False},
    {"input_dim": 3, "down_dims": (24, 40, 72), "kernel_size": 7},  # groups of 3, 5 and 9 channels
    {"input_dim": 5, "down_dims": (32,), "n_groups": 4, "final_groups": 8},
    {"input_dim": 1, "down_dims": (16, 16, 16, 16), "kernel_size": 1, "n_groups": 2},
]


@pytest.mark.parametrize("sizes", SIZES, ids=lambda sizes: str(sizes["down_dims"]))
@pytest.mark.parametrize("horizon", [8, 16, 24])
@torch.inference_mode()
def test_it_computes_what_the_network_does(sizes: dict[str, Any], horizon: int) -> None:
    torch.manual_seed(0)
    network = ConditionalUnet1D(global_cond_dim=20, **sizes).eval()
    for value in network.parameters():  # norms are 1 and 0 at first
        value.add_(0.1 * torch.randn_like(value))
    compute = networks(network)
    for rows in (1, 2, 7, 13):
        x = torch.randn(rows, horizon, sizes["input_dim"])
        expected, found = compute(x, torch.randint(0, 100, (rows,)), torch.randint(0, 3, (rows,)))
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-5 * float(expected.abs().max()))


@torch.inference_mode()
def test_a_row_is_the_same_to_the_bit_among_any_others() -> None:
    torch.manual_seed(0)
    compute = networks(ConditionalUnet1D(2, 20, 32, (64, 128)).eval())
    x, step, element = torch.randn(20, 16, 2), torch.randint(0, 100, (20,)), torch.randint(0, 3, (20,))
    together = compute(x, step, element)[1]
    for count in (1, 3, 6, 7):
        for begin in range(0, 20, count):
            part = slice(begin, begin + count)
            assert torch.equal(compute(x[part], step[part], element[part])[1], together[part])


@torch.inference_mode()
def test_threads_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    compute = networks(ConditionalUnet1D(2, 20, 32, (64, 128)).eval())
    x, step, element = torch.randn(50, 16, 2), torch.randint(0, 100, (50,)), torch.randint(0, 3, (50,))
    results = []
    for threads in (1, 2, 5):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        results.append(compute(x, step, element)[1])
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_a_helper_that_does_not_run_is_not_waited_for() -> None:
    blocked, done = threading.Event(), []
    pool = fused_unet1d._pool(os.getpid())
    blockers = [pool.submit(blocked.wait) for _ in range(os.cpu_count() or 1)]
    try:
        fused_unet1d.share_out([slice(i, i + 1) for i in range(6)], done.append, threads=4)
    finally:
        blocked.set()
    assert [part.start for part in done] == list(range(6))
    assert all(blocker.result(60) for blocker in blockers)


@torch.inference_mode()
def test_narrow_instructions_compute_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """SSE2 where the processor has more; the tile is half as wide or less."""
    torch.manual_seed(0)
    network = ConditionalUnet1D(2, 20, 32, (24, 64)).eval()
    x, step, element = torch.randn(5, 16, 2), torch.randint(0, 100, (5,)), torch.randint(0, 3, (5,))
    expected, wide = networks(network)(x, step, element)
    narrow_library = native_library.load_library((*native_library.FLAGS, *NARROW))
    monkeypatch.setattr("parapolicy.engine.lowered.fused_unet1d.load_library", lambda: narrow_library)
    narrow = networks(network)(x, step, element)[1]
    torch.testing.assert_close(narrow, expected, rtol=0, atol=1e-5)
    if NARROW:
        assert narrow_library.parapolicy_tile() == 8
    torch.testing.assert_close(narrow, wide, rtol=0, atol=1e-5)


def test_a_policys_chunks_are_those_of_the_eager_engine(shipped: parapolicy.Policy) -> None:
    observation = some_observation(shipped.spec, batch=2)
    for sampler in ("sequential", "secant"):
        eager = shipped.with_sampler(sampler)
        fused = dataclasses.replace(eager, engine=make_engine("fused", shipped.device))
        expected, found = eager.predict(observation, seed=[1, 2]), fused.predict(observation, seed=[1, 2])
        np.testing.assert_allclose(found.trajectory, expected.trajectory, atol=0.05)  # of 500 pixels
        np.testing.assert_array_equal(found.stats.rounds, expected.stats.rounds)


def test_a_chunk_does_not_depend_on_its_batch() -> None:
    policy = dataclasses.replace(small_policy("semi_implicit"), engine=Fused(), reproducible=True)
    observation = some_observation(policy.spec, batch=5)
    together = policy.predict(observation, seed=list(range(5))).warm_state.estimates
    one = {key: value[3] for key, value in observation.items()}
    assert torch.equal(policy.predict(one, seed=3).warm_state.estimates[0], together[3])


def test_threads_may_share_it() -> None:
    policy = dataclasses.replace(small_policy("secant"), engine=Fused())
    observations = [some_observation(policy.spec, seed=i) for i in range(4)]
    expected = [policy.predict(o, seed=i).trajectory for i, o in enumerate(observations)]
    found: dict[int, list[np.ndarray]] = {}

    def work(i: int) -> None:
        found[i] = [policy.predict(observations[i], seed=i).trajectory for _ in range(5)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, trajectories in found.items():
        for trajectory in trajectories:
            np.testing.assert_array_equal(trajectory, expected[i])


def conditioned(condition: str, observed_dim: int) -> parapolicy.Policy:
    network = {"name": "unet1d", "down_dims": [16, 32], "n_groups": 4, "condition": condition}
    return small_policy(observation={"state": (3,)}, observed_dim=observed_dim, network=network)


def test_inpainting_is_native() -> None:
    eager = conditioned("inpaint", 3)
    fused, observation = dataclasses.replace(eager, engine=Fused()), some_observation(eager.spec)
    found = fused.predict(observation).trajectory
    np.testing.assert_allclose(found, eager.predict(observation).trajectory, atol=0.05)


def test_for_other_networks_the_compiled_engine_takes_its_place() -> None:
    engine, network = Fused(), conditioned("local", 0).network
    with pytest.warns(UserWarning, match="'compiled' takes its place: its condition is 'local'"):
        assert engine._find(network) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert engine._find(network) is None  # once
    assert isinstance(engine._fallback, Compiled)


def test_an_index_beyond_a_table_is_refused() -> None:
    network = FusedUnet1D(ConditionalUnet1D(2, 20, 32, (16,)).eval())
    tables = network.embed_steps(torch.arange(10)), network.embed_condition({"state": torch.randn(3, 1, 20)})
    x, zero = torch.randn(2, 8, 2), torch.tensor([0, 0])
    for step, element in ((torch.tensor([0, 10]), zero), (torch.tensor([0, -1]), zero), (zero, torch.tensor([0, 3]))):
        with pytest.raises(IndexError, match="row 1 has step"):
            network(x, *tables, step, element)
    far = torch.zeros(50, dtype=torch.int64).index_fill(0, torch.tensor(41), 10)
    with pytest.raises(IndexError, match="row 41 has step 10 and element 0, expected below 10 and 3"):
        network(torch.randn(50, 8, 2), *tables, far, torch.zeros_like(far))
    with pytest.raises(ValueError, match="expected \\(2,\\)"):
        network(x, *tables, zero[:1], zero)


def test_without_a_compiler_the_compiled_engine_takes_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    native_library.load_library.cache_clear()
    monkeypatch.setenv("CXX", "no-such-compiler")
    engine = Fused()
    with pytest.warns(UserWarning, match="'compiled' takes its place: the C\\+\\+ compiler 'no-such-compiler'"):
        assert engine._find(small_policy().network) is None
    assert isinstance(engine._fallback, Compiled)
    native_library.load_library.cache_clear()


def test_the_library_is_kept_by_what_it_is_made_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PARAPOLICY_CACHE", str(tmp_path / "cache"))
    native_library.load_library.cache_clear()
    native_library.load_library()
    (library,) = (tmp_path / "cache").iterdir()  # and no unfinished file
    native_library.load_library.cache_clear()
    monkeypatch.setattr(native_library, "_compile", lambda *a: pytest.fail("compiled again"))
    native_library.load_library()
    native_library.load_library.cache_clear()
    assert library.suffix == ".so"


def test_a_compiler_that_fails_is_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PARAPOLICY_CACHE", str(tmp_path))
    with pytest.raises(OSError, match=r"fails: .*no-such-flag"):
        native_library.load_library((*native_library.FLAGS, "-fno-such-flag"))
    assert list(tmp_path.iterdir()) == []
