"""The native engine against the network as it was trained."""

import dataclasses
import platform
import shutil
import subprocess
import threading
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import parapolicy
from parapolicy.engine import Compiled, Fused, make_engine, native_build, native_library
from parapolicy.engine.lowered.fused_unet1d import FusedUnet1D
from parapolicy.engine.lowered.plan import place_buffers
from parapolicy.networks import ConditionalUnet1D
from tests.helpers import small_policy, some_observation

CAPABILITIES = ["DEFAULT", "AVX2", "AVX512"]
# Flags that leave instructions out; what comes last counts.
INSTRUCTIONS = [
    (f"-march={name}",)
    for name, needed in zip(("x86-64", "x86-64-v3", "x86-64-v4"), CAPABILITIES, strict=True)
    if platform.machine() == "x86_64"
    and CAPABILITIES.index(needed) <= CAPABILITIES.index(torch.backends.cpu.get_cpu_capability())
]
pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ here")
FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16
# Largest difference of an output from the plain network's, as a share of the largest output.
TOLERANCE = {FLOAT32: 2e-5, BFLOAT16: 0.03}


def networks(network: ConditionalUnet1D, dtype: torch.dtype = FLOAT32) -> Any:
    """Both on the same made-up rows: (rows) -> (expected, found)."""
    fused, timesteps = FusedUnet1D(network, dtype), torch.arange(100)
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
    {"input_dim": 2, "down_dims": (96, 192)},  # of 12 and 24, which no vector holds evenly
    {"input_dim": 1, "down_dims": (16, 16, 16, 16), "kernel_size": 1, "n_groups": 2},
]


@pytest.mark.parametrize("sizes", SIZES, ids=lambda sizes: str(sizes["down_dims"]))
@pytest.mark.parametrize("horizon", [8, 16, 24])
@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=str)
@torch.inference_mode()
def test_it_computes_what_the_network_does(sizes: dict[str, Any], horizon: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    network = ConditionalUnet1D(global_cond_dim=20, **sizes).eval()
    for value in network.parameters():  # norms are 1 and 0 at first
        value.add_(0.1 * torch.randn_like(value))
    compute = networks(network, dtype)
    for rows in (1, 2, 7, 13):
        x = torch.randn(rows, horizon, sizes["input_dim"])
        expected, found = compute(x, torch.randint(0, 100, (rows,)), torch.randint(0, 3, (rows,)))
        torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE[dtype] * float(expected.abs().max()))


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=str)
@torch.inference_mode()
def test_a_row_is_the_same_to_the_bit_among_any_others(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the number of rows and threads."""
    torch.manual_seed(0)
    compute = networks(ConditionalUnet1D(2, 20, 32, (64, 128)).eval(), dtype)
    x, step, element = torch.randn(60, 16, 2), torch.randint(0, 100, (60,)), torch.randint(0, 3, (60,))
    together = compute(x, step, element)[1]
    for threads in (1, 2, 5):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        for count in (1, 3, 6, 7, 20, 60):
            for begin in range(0, 60, count):
                part = slice(begin, begin + count)
                assert torch.equal(compute(x[part], step[part], element[part])[1], together[part])


@torch.inference_mode()
def test_so_it_is_in_a_network_whose_weights_no_cache_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads share it layer by layer, unless each has many rows."""
    torch.manual_seed(0)
    network = ConditionalUnet1D(2, 20, 32, (256, 512)).eval()
    compute = networks(network)
    x, step, element = torch.randn(50, 4, 2), torch.randint(0, 100, (50,)), torch.randint(0, 3, (50,))
    expected, alone = compute(x, step, element)
    torch.testing.assert_close(alone, expected, rtol=0, atol=TOLERANCE[FLOAT32] * float(expected.abs().max()))
    assert FusedUnet1D(network).plan(4, 2).weights.nbytes > 40 * 2**20
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    for rows in (1, 2, 13, 20, 40, 50):  # 50: blocks of 16 rows and of 17, which take other parts
        assert torch.equal(compute(x[:rows], step[:rows], element[:rows])[1], alone[:rows])


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=str)
@pytest.mark.parametrize("flags", INSTRUCTIONS, ids=lambda flags: flags[0])
@torch.inference_mode()
def test_other_instructions_compute_the_same(
    dtype: torch.dtype, flags: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    network = ConditionalUnet1D(2, 20, 32, (24, 64)).eval()
    x, step, element = torch.randn(5, 16, 2), torch.randint(0, 100, (5,)), torch.randint(0, 3, (5,))
    expected, found = networks(network, dtype)(x, step, element)
    # The same sums in other orders. In bfloat16 a sum at the edge of two of its values goes to either.
    tolerance = 1e-5 if dtype == FLOAT32 else float((found - expected).abs().max())
    library = native_library.load_library((*native_build.FLAGS, *flags))
    monkeypatch.setattr("parapolicy.engine.lowered.fused_network.load_library", lambda: library)
    other = networks(network, dtype)(x, step, element)[1]
    torch.testing.assert_close(other, found, rtol=0, atol=tolerance)


@torch.inference_mode()
def test_what_is_not_finite_stays_so() -> None:
    network = ConditionalUnet1D(2, 20, 32, (32,)).eval()
    for dtype in (FLOAT32, BFLOAT16):
        compute = networks(network, dtype)
        x, zero = torch.randn(3, 8, 2), torch.zeros(3, dtype=torch.int64)
        x[1, 3, 0] = torch.nan
        found = compute(x, zero, zero)[1]
        assert found[1].isnan().any()
        assert found[[0, 2]].isfinite().all()
        assert compute(x[[0, 2]], zero[:2], zero[:2])[1].isfinite().all()  # nor is it left in memory


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=str)
def test_buffers_share_memory_only_when_none_is_needed(dtype: torch.dtype) -> None:
    network = ConditionalUnet1D(3, 20, 32, (24, 40, 72)).eval()
    plan = FusedUnet1D(network, dtype).plan(16, 3)
    layers, size = place_buffers(plan._layers, plan._sizes)
    assert size < sum(plan._sizes) / 4
    owner = torch.full((size,), -1)

    def activations(at: int, stride: int, channel: int, length: int, channels: int) -> torch.Tensor:
        return owner.as_strided((length, channels), (stride, 1), at + channel)

    first = layers[0]
    activations(0, first.source_stride, 0, first.source_length, first.source_stride)[:] = 0
    for layer, numbered in zip(layers, plan._layers, strict=True):
        source = layer.source, layer.source_stride, layer.source_channel, layer.source_length, layer.inputs
        assert (activations(*source) == numbered.source).all()
        target = layer.target, layer.target_stride, layer.target_channel, layer.target_length, layer.padded
        activations(*target)[:] = numbered.target
        if layer.residual >= 0:
            past = layer.residual, layer.residual_stride, layer.residual_channel, layer.target_length, layer.padded
            assert (activations(*past) == numbered.residual).all()


@pytest.mark.parametrize(("engine", "tolerance"), [("fused", 0.05), ("fused_bfloat16", 10)])  # of 500 pixels
def test_a_policys_chunks_are_those_of_the_eager_engine(
    engine: str, tolerance: float, shipped: parapolicy.Policy
) -> None:
    observation = some_observation(shipped.spec, batch=2)
    for sampler in ("sequential", "secant"):
        eager = shipped.with_sampler(sampler)
        fused = dataclasses.replace(eager, engine=make_engine(engine, shipped.device))
        expected, found = eager.predict(observation, seed=[1, 2]), fused.predict(observation, seed=[1, 2])
        np.testing.assert_allclose(found.trajectory, expected.trajectory, atol=tolerance)
        if engine == "fused":
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
    with pytest.warns(UserWarning, match="'compiled' is used instead: its condition is 'local'"):
        assert engine._find(network) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert engine._find(network) is None  # once
    assert isinstance(engine._fallback, Compiled)


def test_without_instructions_for_bfloat16_float32_takes_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    class Library:
        @staticmethod
        def parapolicy_multiplies_bfloat16() -> int:
            return 0

    monkeypatch.setattr("parapolicy.engine.fused.load_library", lambda: Library)
    network = small_policy().network
    engine = Fused(BFLOAT16)
    with pytest.warns(UserWarning, match="'fused_bfloat16' does not work here, so 'fused' is used instead"):
        found = engine._find(network)
    assert found is not None
    assert found.dtype == FLOAT32
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert engine._find(small_policy().network) is not None  # once
        assert Fused(BFLOAT16, told=True)._find(network) is not None


def test_the_compiled_engine_that_takes_its_place_is_as_precise() -> None:
    engine = Fused(BFLOAT16, told=True)
    assert engine._find(conditioned("local", 0).network) is None
    assert engine._fallback is not None
    multiplies = native_library.load_library().parapolicy_multiplies_bfloat16()
    assert engine._fallback.dtype == (BFLOAT16 if multiplies else FLOAT32)


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
    with pytest.raises(ValueError, match="FiLM values have shapes"):
        network(x, tables[0], tables[1][:, 1:], zero, zero)


def test_without_a_compiler_the_compiled_engine_takes_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    native_library.load_library.cache_clear()
    monkeypatch.setenv("CXX", "no-such-compiler")
    engine = Fused()
    with pytest.warns(UserWarning, match="'compiled' is used instead: the C\\+\\+ compiler 'no-such-compiler'"):
        assert engine._find(small_policy().network) is None
    assert isinstance(engine._fallback, Compiled)
    native_library.load_library.cache_clear()


def test_the_library_is_kept_by_what_it_is_made_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PARAPOLICY_CACHE", str(tmp_path / "cache"))
    native_library.load_library.cache_clear()
    native_library.load_library()
    (library,) = (tmp_path / "cache").iterdir()  # and no unfinished file
    native_library.load_library.cache_clear()
    monkeypatch.setattr(native_library, "compile_library", lambda *a: pytest.fail("compiled again"))
    native_library.load_library()
    native_library.load_library.cache_clear()
    assert library.suffix == ".so"


def test_the_best_of_a_wheel_s_libraries_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By what the processor has; a damaged one is passed over, and one of other sources is not found."""
    monkeypatch.setattr(native_build, "PREBUILT", tmp_path)
    source = tmp_path / "empty.cpp"
    source.write_text("int nothing;")
    best, middle, *_, least = native_build.VARIANTS
    best_words = native_build.VARIANTS[best][1]

    def build(variant: str) -> None:
        subprocess.run(["g++", "-shared", "-fPIC", source, "-o", native_build.prebuilt_path(variant)], check=True)

    def found(words: Iterable[str]) -> str:
        library = native_library._find_prebuilt("flags : " + " ".join(words))
        return "" if library is None else Path(library._name).name.rpartition("-")[0].removeprefix("fused-")

    build(middle)
    native_build.prebuilt_path(best).write_bytes(b"damaged")
    assert found(best_words) == middle
    for variant in native_build.VARIANTS:
        build(variant)
    for variant, (_, needed) in native_build.VARIANTS.items():
        assert found({*needed, "sse2"}) == variant
    assert found(native_build.AVX512 - {"avx512vl"}) == least
    assert found(native_build.AVX2 - {"fma"}) == ""
    assert found(best_words - {"fma"}) == ""
    monkeypatch.setattr(native_build, "HEADERS", native_build.HEADERS[:-1])
    assert found(best_words) == ""


def test_a_compiler_that_fails_is_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PARAPOLICY_CACHE", str(tmp_path))
    with pytest.raises(OSError, match=r"failed: .*no-such-flag"):
        native_library.load_library((*native_build.FLAGS, "-fno-such-flag"))
    assert list(tmp_path.iterdir()) == []
