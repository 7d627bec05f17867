"""Engines compute the same function as the trained network."""

import dataclasses
import os
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import parapolicy
from parapolicy.compiling import Compiling
from parapolicy.engine import ENGINES, Compiled, CudaGraph, Eager, Fused, make_engine
from parapolicy.engine.lowered.unet1d import LoweredUnet1D
from parapolicy.networks.unet1d import ConditionalUnet1D
from parapolicy.samplers import secant
from tests.conftest import SHIPPED
from tests.helpers import call_network, small_policy, some_observation


@pytest.mark.parametrize(
    ("down_dims", "kernel_size", "film_scale", "horizon"),
    [((16, 32), 5, True, 8), ((8, 16, 32), 3, False, 16), ((16,), 5, True, 5), ((16, 16, 32, 32), 1, True, 24)],
)
def test_matrix_products_are_the_convolutions(
    down_dims: tuple[int, ...], kernel_size: int, film_scale: bool, horizon: int
) -> None:
    network = ConditionalUnet1D(3, 7, 16, down_dims, kernel_size, 4, film_scale).requires_grad_(False)
    x, timestep, condition = torch.randn(5, horizon, 3), torch.arange(5), torch.randn(5, 7)
    rewritten = LoweredUnet1D(network)
    rows, observation = torch.tensor([3, 0, 0, 4, 1]), {"condition": condition[:, None]}
    steps, film = rewritten.embed_steps(timestep), rewritten.embed_condition(observation)
    found = rewritten(x, steps, film, rows, rows.flip(0))
    expected = call_network(network, x, timestep[rows], condition[rows.flip(0)])
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)


def test_the_shipped_network_is_rewritten_faithfully(shipped: parapolicy.Policy) -> None:
    assert isinstance(shipped.network, ConditionalUnet1D)
    rewritten = LoweredUnet1D(shipped.network)
    x, step = torch.randn(6, 16, 2), torch.tensor([0, 20, 40, 60, 80, 99])
    condition = torch.rand(6, shipped.spec.condition_dim)
    timesteps = shipped.schedule.timesteps
    steps, film = rewritten.embed_steps(timesteps), rewritten.embed_condition({"condition": condition[:, None]})
    found = rewritten(x, steps, film, step, torch.arange(6))
    expected = call_network(shipped.network, x, timesteps[step], condition)
    torch.testing.assert_close(found, expected, rtol=0, atol=5e-6)


def test_bfloat16_products_round_and_nothing_else(shipped: parapolicy.Policy) -> None:
    rounded, exact = LoweredUnet1D(shipped.network, torch.bfloat16), LoweredUnet1D(shipped.network)
    x, film, row = torch.randn(6, 16, 2), torch.randn(6, exact.film_bias.shape[0]) / 8, torch.arange(6)
    expected, found = exact(x, film, film, row, row), rounded(x, film, film, row, row)
    assert found.dtype == torch.float32
    error = (found - expected).abs().max()
    assert 1e-5 < error < 0.1  # bfloat16 has 8 bits
    kept = {name: value for name, value in rounded.state_dict().items() if value.dtype == torch.bfloat16}
    assert kept
    for name, value in rounded.state_dict().items():
        # Packed weights, which CPUs without bfloat16 instructions lack for it, stand transposed.
        unpacked, weight = (v.to_dense().t() if v.is_mkldnn else v for v in (value, exact.state_dict()[name]))
        torch.testing.assert_close(unpacked, weight.to(value.dtype), rtol=0, atol=0)


def test_a_dozen_windows_in_one_process_are_all_compiled() -> None:
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    double = Compiling(lambda x: 2 * x, dynamic=False, backend=backend)
    for size in range(2, 14):
        assert torch.equal(double(torch.ones(size)), torch.full((size,), 2.0))
    assert len(graphs) == 12


@pytest.mark.skipif(shutil.which("c++") is None and shutil.which("g++") is None, reason="no C++ compiler here")
def test_a_compiled_policy_gives_the_same_chunks(recwarn: pytest.WarningsRecorder) -> None:
    # One level: compiling takes longer than everything else here.
    network = {"name": "unet1d", "diffusion_step_embed_dim": 16, "down_dims": [16], "n_groups": 4}
    policy = small_policy(network=network).with_sampler("secant", window=6, tolerance=0.0)
    compiled = dataclasses.replace(policy, engine=Compiled())
    for schedule, batch in (("ddpm", None), ("ddim", 3), ("ddpm", 2)):
        observation = some_observation(policy.spec, batch)
        expected = policy.with_schedule(schedule).predict(observation)
        chunk = compiled.with_schedule(schedule).predict(observation)
        np.testing.assert_allclose(chunk.trajectory, expected.trajectory, rtol=1e-4, atol=1e-2)
        assert np.array_equal(chunk.stats.rounds, expected.stats.rounds)
    assert not [w for w in recwarn if "torch.compile does not work" in str(w.message)]


@pytest.mark.parametrize(("batch", "reproducible", "compiled"), [(None, False, 2), (1, True, 0), (2, False, 0)])
def test_one_sample_s_rounds_are_compiled(
    batch: int | None, reproducible: bool, compiled: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But not where a result must not depend on the batch that it is computed in."""
    made: list[Any] = []

    def compile_nothing(function: Any, **options: Any) -> Any:
        made.append(function)
        return function

    monkeypatch.setattr(torch, "compile", compile_nothing)
    rounds = secant.SecantRounds._prepare, secant.SecantRounds._correct
    monkeypatch.setattr(secant, "COMPILED", tuple(Compiling(part, dynamic=False) for part in rounds))
    policy = small_policy("secant")
    policy = dataclasses.replace(policy, engine=Compiled(), reproducible=reproducible)
    policy.predict(some_observation(policy.spec, batch))
    assert sum(function in rounds for function in made) == compiled


def test_without_a_compiler_it_warns_once_and_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = small_policy("semi_implicit")

    def fail(*arguments: torch.Tensor) -> torch.Tensor:
        raise torch._dynamo.exc.TorchDynamoException("no C++ compiler")

    monkeypatch.setattr(torch, "compile", lambda module, **options: fail)
    compiled = dataclasses.replace(policy, engine=Compiled())
    observation = some_observation(policy.spec)
    with pytest.warns(UserWarning, match="runs uncompiled") as caught:
        chunk = compiled.predict(observation)
    assert len([w for w in caught if "runs uncompiled" in str(w.message)]) == 1
    np.testing.assert_allclose(chunk.trajectory, policy.predict(observation).trajectory, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("writable", [True, False])
def test_a_cache_that_cannot_be_made_is_replaced_or_done_without(
    writable: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(blocked / "cache"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path if writable else blocked / "tmp"))
    double = Compiling(lambda x: 2 * x + 1, backend="eager")
    for _ in range(2):
        assert torch.equal(double(torch.ones(3)), torch.full((3,), 3.0))
    expected = "cannot be written" if writable else "runs uncompiled"
    assert [expected in str(w.message) for w in recwarn if w.category is UserWarning] == [True]
    assert Path(os.environ["TORCHINDUCTOR_CACHE_DIR"]).is_dir() == writable


def in_threads(functions: list[Callable[[], np.ndarray]], times: int) -> list[list[np.ndarray]]:
    """What each function gives, so many times, in a thread of its own."""
    with ThreadPoolExecutor(len(functions)) as pool:
        return list(pool.map(lambda function: [function() for _ in range(times)], functions))


def test_threads_share_a_compiled_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each with its own network, schedule and batch."""
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    engine = Compiled()
    policies = [dataclasses.replace(small_policy("sequential"), engine=engine) for _ in range(2)]
    policies.append(policies[0].with_schedule("ddim", 20))
    observation = some_observation(policies[0].spec)
    expected = [dataclasses.replace(p, engine=Compiled()).predict(observation).trajectory for p in policies]
    switch = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        calls = [lambda p=p: p.predict(observation).trajectory for p in policies]
        for found, right in zip(in_threads(calls, 6), expected, strict=True):
            for trajectory in found:
                np.testing.assert_allclose(trajectory, right, rtol=0, atol=1e-2)
    finally:
        sys.setswitchinterval(switch)


def test_chunks_of_a_cuda_graph_engine_wait_for_each_other() -> None:
    engine = CudaGraph()
    with engine.exclusive():
        assert not engine.exclusive().acquire(blocking=False)


class OneMemory(Eager):
    """Has one memory for its chunks, as captured graphs have."""

    def __init__(self) -> None:
        self.lock = threading.Lock()

    def exclusive(self) -> threading.Lock:
        return self.lock

    def bind(self, *arguments: Any) -> Any:
        self.evaluate = super().bind(*arguments)
        return lambda *inputs: self.evaluate(*inputs)


def test_an_engine_with_one_memory_computes_one_chunk_at_a_time() -> None:
    policy = dataclasses.replace(small_policy("sequential"), engine=OneMemory())
    observations = [some_observation(policy.spec, seed=seed) for seed in range(4)]
    expected = [policy.predict(observation).trajectory for observation in observations]
    calls = [lambda o=o: policy.predict(o).trajectory for o in observations]
    for found, right in zip(in_threads(calls, 5), expected, strict=True):
        for trajectory in found:
            np.testing.assert_array_equal(trajectory, right)


def test_engines_are_chosen_by_name() -> None:
    cpu = torch.device("cpu")
    for name in ("eager", "compiled", "compiled_bfloat16", "fused", "fused_bfloat16"):
        assert name in ENGINES
        assert make_engine(name, cpu).name == name
    with pytest.raises(ValueError, match="torchrun"):
        make_engine("sharded", cpu)
    with pytest.raises(ValueError, match="needs one process per device: torchrun"):
        parapolicy.load_policy(SHIPPED, engine="sharded", device="cpu")
    with pytest.raises(ValueError, match="engine is 'tensorrt', expected one of"):
        parapolicy.load_policy(SHIPPED, engine="tensorrt", device="cpu")


def test_auto_goes_by_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    for supported, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda supported=supported: supported)
        engine = make_engine("auto", cpu)
        assert type(engine) is Fused
        assert engine.dtype == dtype
    engine = make_engine("auto", torch.device("cuda"))
    assert type(engine) is Compiled
    assert engine.dtype == torch.float32
    with pytest.raises(ValueError, match="engine 'fused_bfloat16' needs a CPU"):
        make_engine("fused_bfloat16", torch.device("cuda"))
    with pytest.raises(ValueError, match="engine is 'fast', expected one of"):
        make_engine("fast", torch.device("cpu"))


def test_cuda_graphs_need_cuda() -> None:
    with pytest.raises(ValueError, match=r"cuda_graph.*needs a CUDA device.*cpu"):
        make_engine("cuda_graph", torch.device("cpu"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.parametrize("batch", [None, 3])
def test_captured_rounds_give_the_same_chunks(batch: int | None) -> None:
    policy = parapolicy.load_policy(SHIPPED, device="cuda", engine="eager")
    captured = dataclasses.replace(policy, engine=make_engine("cuda_graph", policy.device))
    for seed in range(4):  # as it is, captured, replayed, replayed
        observation = some_observation(policy.spec, batch)
        expected, chunk = (p.predict(observation, seed=seed) for p in (policy, captured))
        assert np.abs(chunk.trajectory - expected.trajectory).max() < 1.0  # pixels
