"""The transformer in the native engine against the network as it was trained."""

import dataclasses
import shutil
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import parapolicy
from parapolicy import export
from parapolicy.engine import Fused, make_engine, native_build, native_library, native_loop
from parapolicy.engine.fused import Bound
from parapolicy.engine.lowered.fused_transformer1d import FusedTransformer1D
from parapolicy.networks.transformer1d import TransformerForDiffusion
from tests.helpers import small_policy, some_observation
from tests.oracles import oracle_folder
from tests.test_fused import INSTRUCTIONS

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ here")
FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16
SIZES: list[dict[str, Any]] = [
    {"n_emb": 64},
    {"n_emb": 48, "n_head": 3, "causal_attn": False},  # 3 vectors of the widest kind
    {"n_emb": 16, "n_head": 4},  # heads smaller than a vector
    {"n_emb": 32, "horizon": 60, "steps": 20},  # as many tokens as there may be, but for a few
    {"n_emb": 32, "condition": "inpaint", "n_cond_layers": 1},
]


def grow(network: nn.Module) -> None:
    """Random weights, large enough that every part matters, and no sum hangs on its last bit."""
    for name, parameter in network.named_parameters():
        scales = name.endswith("weight") and ("norm" in name or "ln_f" in name)
        nn.init.normal_(parameter, 1.0 if scales else 0.0, 0.15)
    network.requires_grad_(False)


def build(
    horizon: int = 16, steps: int = 2, n_layer: int = 2, grown: bool = True, **changes: Any
) -> TransformerForDiffusion:
    torch.manual_seed(0)
    width = 7 if changes.get("condition") == "inpaint" else 2
    network = TransformerForDiffusion(width, horizon, steps, 5, n_layer=n_layer, **changes)
    if grown:
        grow(network)
    return network.eval().requires_grad_(False)


def outputs(network: Any, x: Tensor, step: Tensor, element: Tensor, steps: int = 2) -> Tensor:
    """At x and made-up observations, in x's precision."""
    observed = torch.randn(3, steps, 5, generator=torch.Generator().manual_seed(1)).to(x.dtype)
    tables = network.embed_steps(torch.arange(50)), network.embed_condition({"state": observed})
    result: Tensor = network(x, *(table.to(x.dtype) for table in tables), step, element)
    return result


def rows(count: int, network: TransformerForDiffusion) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(count, network.pos_emb.shape[1], network.input_emb.in_features)
    return x, torch.randint(0, 50, (count,)), torch.randint(0, 3, (count,))


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=str)
@torch.inference_mode()
def test_it_computes_what_the_network_does(sizes: dict[str, Any], dtype: torch.dtype) -> None:
    network, steps = build(**sizes), sizes.get("steps", 2)
    fused, precise = FusedTransformer1D(network, dtype), build(**sizes).double()
    for count in (1, 2, 7, 13):
        given = x, step, element = rows(count, network)
        # With weights as large as these the network's own roundings in float32 are as large as the engine's.
        expected = outputs(precise, x.double(), step, element, steps).float()
        found = outputs(fused, *given, steps)
        scale = float(expected.abs().max())
        assert scale > 0.3
        torch.testing.assert_close(found, expected, rtol=0, atol={FLOAT32: 1e-5, BFLOAT16: 0.05}[dtype] * scale)
        if dtype == BFLOAT16:
            assert not torch.equal(found, outputs(FusedTransformer1D(network), *given, steps))


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=str)
@torch.inference_mode()
def test_a_row_is_the_same_to_the_bit_among_any_others(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    network = build(n_emb=64)
    fused = FusedTransformer1D(network, dtype)
    x, step, element = rows(40, network)
    together = outputs(fused, x, step, element)
    for threads in (1, 2, 5):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        for count in (1, 3, 8, 20, 40):
            for begin in range(0, 40, count):
                part = slice(begin, begin + count)
                assert torch.equal(outputs(fused, x[part], step[part], element[part]), together[part])


@pytest.mark.parametrize("flags", INSTRUCTIONS, ids=lambda flags: flags[0])
@torch.inference_mode()
def test_other_instructions_compute_the_same(flags: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    network = build(n_emb=48, n_head=3)
    given = rows(5, network)
    expected = outputs(network, *given)
    library = native_library.load_library((*native_build.FLAGS, *flags))
    monkeypatch.setattr("parapolicy.engine.lowered.fused_network.load_library", lambda: library)
    found = outputs(FusedTransformer1D(network), *given)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@torch.inference_mode()
def test_what_is_not_finite_stays_so() -> None:
    network = build(n_emb=32)
    for bad in (torch.nan, torch.inf):
        x, step, element = rows(3, network)
        x[1, 3, 0] = bad
        found = outputs(FusedTransformer1D(network), x, step, element)
        assert found[1, 3:].isnan().all()  # causal: not what is before
        assert found[1, :3].isfinite().all()
        assert found[[0, 2]].isfinite().all()


def policy(sampler: str = "sequential", **changes: Any) -> parapolicy.Policy:
    network = {"name": "transformer1d", "n_layer": 2, "n_emb": 32, "n_head": 4, **changes}
    made = small_policy(sampler, network=network)
    grow(made.network)
    return made


@pytest.mark.parametrize("sampler", ["sequential", "collocation", "secant"])
def test_whole_chunks_are_those_of_the_eager_engine(sampler: str, monkeypatch: pytest.MonkeyPatch) -> None:
    eager = policy(sampler)
    fused = dataclasses.replace(eager, engine=Fused())
    calls = []
    loop = native_loop.sample_natively

    def counted(*arguments: Any) -> Any:
        calls.append(loop(*arguments))
        return calls[-1]

    monkeypatch.setattr("parapolicy.engine.fused.sample_natively", counted)
    observation = some_observation(eager.spec, batch=2)
    expected, found = eager.predict(observation, seed=[1, 2]), fused.predict(observation, seed=[1, 2])
    scale = float(np.abs(expected.trajectory).max())
    np.testing.assert_allclose(found.trajectory, expected.trajectory, rtol=0, atol=1e-4 * scale)
    np.testing.assert_array_equal(found.stats.rounds, expected.stats.rounds)
    assert [call is None for call in calls] == [sampler == "secant"]


@pytest.mark.parametrize(
    "changes",
    [
        {"n_emb": 24},
        {"horizon": 65},
        {"steps": 64},
        {"n_cond_layers": 1},
        {"condition": "inpaint", "time_as_condition": False},
    ],
    ids=str,
)
def test_what_it_does_not_do_is_refused_at_load(changes: dict[str, Any]) -> None:
    network = build(**{"n_emb": 32, **changes})
    with pytest.raises(ValueError, match=r"expected a multiple of 16|has a native form"):
        FusedTransformer1D(network)
    engine = Fused()
    with pytest.warns(UserWarning, match="'compiled' is used instead"):
        assert engine._find(network) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert engine._find(network) is None  # once


def test_a_plan_file_is_of_a_unet(tmp_path: Any) -> None:
    fused = dataclasses.replace(policy(), engine=Fused())
    with pytest.raises(ValueError, match="'transformer1d' is not supported in a plan file; expected a UNet"):
        export.write_plan(fused, tmp_path / "plan")
    assert list(tmp_path.iterdir()) == []


def test_the_engine_takes_it() -> None:
    made = policy()
    observation = {key: torch.zeros(1, *shape) for key, shape in made.spec.obs_shapes.items()}
    engine = make_engine("fused", torch.device("cpu"))
    assert isinstance(engine.bind(made.network, made.schedule.timesteps, observation), Bound)


@torch.inference_mode()
def test_it_computes_what_the_published_code_s_checkpoint_does() -> None:
    made = parapolicy.load_policy(oracle_folder("real-stanford") / "transformer_lowdim_pusht.ckpt", device="cpu")
    network, timesteps = made.network, made.schedule.timesteps
    observation = {key: torch.rand(3, *shape) for key, shape in made.spec.obs_shapes.items()}
    given = torch.randn(7, *made.spec.sample_shape), torch.arange(7), torch.arange(7) % 3
    expected = network(given[0], network.embed_steps(timesteps), network.embed_condition(observation), *given[1:])
    found = make_engine("fused", made.device).bind(network, timesteps, observation)(*given)
    assert expected.abs().max() > 0.5
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
