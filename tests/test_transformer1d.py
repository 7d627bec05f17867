"""The transformer computes what torch's own layers do with its weights, at any mixture of steps and elements."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import parapolicy
from parapolicy.engine import make_engine
from parapolicy.engine.lowered import lower
from parapolicy.networks import build_network
from parapolicy.networks.transformer1d import TransformerForDiffusion
from parapolicy.policy import Policy
from parapolicy.spec import Feature
from tests.helpers import small_policy, small_spec, some_observation

HORIZON, STEPS, ACTION, OBSERVED, EMB, HEADS = 8, 3, 2, 5, 16, 4
VARIANTS: dict[str, dict[str, Any]] = {
    "published": {},
    "not causal": {"causal_attn": False},
    "condition layers": {"n_cond_layers": 2},
    "condition layers, not causal": {"n_cond_layers": 1, "causal_attn": False},
    "inpainting": {"condition": "inpaint"},
    "inpainting, condition layers": {"condition": "inpaint", "n_cond_layers": 1},
    "encoder only": {"condition": "inpaint", "time_as_condition": False},
    "encoder only, not causal": {"condition": "inpaint", "time_as_condition": False, "causal_attn": False},
}
ROWS = torch.tensor([3, 0, 0, 4, 1, 2]), torch.tensor([1, 0, 1, 1, 0, 0])  # steps and elements of network rows
TIMESTEPS = torch.tensor([0, 7, 20, 50, 99])

needs_compiler = pytest.mark.skipif(
    shutil.which("c++") is None and shutil.which("g++") is None, reason="no C++ compiler here"
)


def grow(network: nn.Module) -> None:
    """Random weights, large enough that every part of the network matters."""
    for name, parameter in network.named_parameters():
        nn.init.normal_(parameter, 1.0 if "norm" in name and "weight" in name else 0.0, 0.3)
    network.requires_grad_(False)


def build(**changes: Any) -> TransformerForDiffusion:
    width = ACTION + (OBSERVED if changes.get("condition") == "inpaint" else 0)
    arguments = {"n_layer": 2, "n_head": HEADS, "n_emb": EMB, **changes}
    network = TransformerForDiffusion(width, HORIZON, STEPS, OBSERVED, **arguments)
    grow(network)
    return network


def inputs(network: TransformerForDiffusion) -> tuple[Tensor, Tensor]:
    """Noisy samples of the rows, and the observations of two elements."""
    return torch.randn(len(ROWS[0]), HORIZON, network.input_emb.in_features), torch.randn(2, STEPS, OBSERVED)


def call(network: Any, x: Tensor, observed: Tensor, step: Tensor = ROWS[0], element: Tensor = ROWS[1]) -> Tensor:
    steps, condition = network.embed_steps(TIMESTEPS), network.embed_condition({"state": observed})
    output: Tensor = network(x, steps, condition, step, element)
    return output


def reference(network: Any, x: Tensor, timestep: Tensor, observed: Tensor) -> Tensor:
    """The prediction at one sample (H, D) by torch's own transformer layers, whole and at one rate."""
    common = {"dim_feedforward": 4 * EMB, "dropout": 0.0, "activation": "gelu", "batch_first": True, "norm_first": True}

    def layers(layer: type[nn.Module], source: Any) -> Any:
        one = layer(EMB, HEADS, **common)
        count = len(source.layers)
        decodes = isinstance(one, nn.TransformerDecoderLayer)
        made: Any = nn.TransformerDecoder(one, count) if decodes else nn.TransformerEncoder(one, count, None, False)
        made.load_state_dict(source.state_dict(), strict=True)
        return made.eval()

    half = torch.exp(-torch.arange(EMB // 2) * np.log(10_000) / (EMB // 2 - 1))
    time = torch.cat(((timestep * half).sin(), (timestep * half).cos()))[None, None].float()
    x = x[None].clone()
    if network.inpaints:
        x[0, :STEPS, ACTION:] = observed
    tokens = network.input_emb(x)
    causal = network.mask is not None
    if network.encoder_only:
        tokens = torch.cat((time, tokens), 1) + network.pos_emb
        mask = nn.Transformer.generate_square_subsequent_mask(HORIZON + 1) if causal else None
        tokens = layers(nn.TransformerEncoderLayer, network.encoder)(tokens, mask=mask)[:, 1:]
    else:
        memory = time if network.inpaints else torch.cat((time, network.cond_obs_emb(observed)[None]), 1)
        memory = memory + network.cond_pos_emb
        if network.n_cond_layers:
            memory = layers(nn.TransformerEncoderLayer, network.encoder)(memory)
        else:
            first, _, second = network.encoder
            memory = second(functional.mish(first(memory)))
        mask = nn.Transformer.generate_square_subsequent_mask(HORIZON) if causal else None
        seen = torch.full((HORIZON, memory.shape[1]), -torch.inf if causal and not network.inpaints else 0.0)
        for step in range(HORIZON):  # the timestep and the observed steps up to its own
            seen[step, : step + 2] = 0
        decoder = layers(nn.TransformerDecoderLayer, network.decoder)
        tokens = decoder(tokens + network.pos_emb, memory, tgt_mask=mask, memory_mask=seen)
    return network.head(network.ln_f(tokens))[0]


@pytest.mark.parametrize("variant", VARIANTS)
def test_it_is_torchs_transformer(variant: str) -> None:
    network = build(**VARIANTS[variant])
    x, observed = inputs(network)
    found = call(network, x, observed)
    assert found.std() > 0.1
    for i, (step, element) in enumerate(zip(*ROWS, strict=True)):
        expected = reference(network, x[i], TIMESTEPS[step], observed[element])
        torch.testing.assert_close(found[i], expected, rtol=1e-5, atol=1e-5)
        alone = call(network, x[i : i + 1], observed, step[None], element[None])[0]
        torch.testing.assert_close(found[i], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_packed_products_are_its_layers(variant: str) -> None:
    network = build(**VARIANTS[variant])
    x, observed = inputs(network)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    expected = call(network, x, observed)
    torch.testing.assert_close(call(lower(network, torch.float32), x, observed), expected, rtol=1e-5, atol=1e-5)
    rounded = call(lower(network, torch.bfloat16), x, observed)
    assert rounded.dtype == torch.float32
    assert 1e-5 < (rounded - expected).abs().max() < 0.1 * expected.abs().max()  # bfloat16 has 8 bits
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_published_layout() -> None:
    """The names under which published weights are stored, but for the masks, which are no weights."""
    attention = ("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias")
    names = {"pos_emb", "cond_pos_emb"}
    for module in ("input_emb", "cond_obs_emb", "encoder.0", "encoder.2", "ln_f", "head"):
        names |= {f"{module}.weight", f"{module}.bias"}
    for layer in ("decoder.layers.0", "decoder.layers.1"):
        names |= {f"{layer}.{module}.{part}" for module in ("self_attn", "multihead_attn") for part in attention}
        modules = ("linear1", "linear2", "norm1", "norm2", "norm3")
        names |= {f"{layer}.{module}.{part}" for module in modules for part in ("weight", "bias")}
    assert set(build().state_dict()) == names
    inpainting = set(build(condition="inpaint").state_dict())
    assert inpainting == names - {"cond_obs_emb.weight", "cond_obs_emb.bias"}
    alone = build(condition="inpaint", time_as_condition=False)
    assert not [name for name in alone.state_dict() if name.startswith(("decoder", "cond"))]
    assert alone.pos_emb.shape == (1, HORIZON + 1, EMB)


def test_published_size() -> None:
    """The published low-dimensional Push-T transformer: 20 observed numbers, two steps, 16 actions."""
    with torch.device("meta"):
        network = TransformerForDiffusion(2, 16, 2, 20)
    shapes = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    assert shapes["decoder.layers.7.multihead_attn.in_proj_weight"] == (768, 256)
    assert (shapes["pos_emb"], shapes["cond_pos_emb"]) == ((1, 16, 256), (1, 3, 256))
    assert 8.9e6 < sum(value.numel() for value in network.state_dict().values()) < 9.1e6


def test_a_step_sees_nothing_later() -> None:
    network = build()
    x, observed = inputs(network)
    expected = call(network, x, observed)
    changed = x.clone()
    changed[:, 5:] += 1
    found = call(network, changed, observed)
    torch.testing.assert_close(found[:, :5], expected[:, :5])
    assert (found[:, 5:] - expected[:, 5:]).abs().amin((0, 2)).min() > 1e-4
    changed = observed.clone()
    changed[:, 2] += 1
    found = call(network, x, changed)
    torch.testing.assert_close(found[:, :2], expected[:, :2])
    assert not torch.allclose(found[:, 2], expected[:, 2])


def test_memory_is_projected_ahead_of_the_rounds() -> None:
    """Once the steps and the observations are embedded, the weights that did it are not needed."""
    network = build()
    x, observed = inputs(network)
    steps, condition = network.embed_steps(TIMESTEPS), network.embed_condition({"state": observed})
    expected = network(x, steps, condition, *ROWS)
    for part in (network.cond_obs_emb, network.encoder):
        for parameter in part.parameters():
            parameter.fill_(torch.nan)
    for layer in network.decoder.layers:
        layer.multihead_attn.in_proj_weight[EMB:] = torch.nan
    assert torch.equal(network(x, steps, condition, *ROWS), expected)


@pytest.mark.parametrize("variant", ["inpainting", "encoder only"])
def test_the_observation_takes_its_place_in_the_sample(variant: str) -> None:
    network = build(**VARIANTS[variant])
    x, observed = inputs(network)
    noisy = x.clone()
    noisy[:, :STEPS, ACTION:] = torch.nan
    assert torch.equal(call(network, noisy, observed), call(network, x, observed))
    assert not torch.allclose(call(network, x, observed + 1), call(network, x, observed))
    noisy = x.clone()
    noisy[:, STEPS:, ACTION:] += 1
    assert not torch.allclose(call(network, noisy, observed), call(network, x, observed))


SMALL: dict[str, Any] = {"name": "transformer1d", "n_layer": 1, "n_head": 2, "n_emb": 16}


def transformer_policy(observed_dim: int = 0, **changes: Any) -> Policy:
    policy = small_policy(network={**SMALL, **changes}, observed_dim=observed_dim)
    grow(policy.network)
    return policy


@pytest.mark.parametrize(
    ("observed_dim", "changes"),
    [(0, {}), (0, {"n_cond_layers": 1}), (8, {"condition": "inpaint"})],
    ids=["published", "condition layers", "inpainting"],
)
def test_samplers_agree(observed_dim: int, changes: dict[str, Any]) -> None:
    policy = transformer_policy(observed_dim, **changes)
    observation = some_observation(policy.spec, 3)
    expected = policy.predict(observation)
    assert expected.trajectory.shape == (3, 8, 2)
    for sampler in ("secant", "paradigms", "semi_implicit"):
        chunk = policy.with_sampler(sampler, window=6, tolerance=0.0).predict(observation)
        np.testing.assert_allclose(chunk.trajectory, expected.trajectory, rtol=0, atol=1e-2)  # of 200
    other = policy.predict({key: 0.9 * value for key, value in observation.items()})
    assert not np.allclose(other.trajectory, expected.trajectory, atol=1e-2)


@needs_compiler
@pytest.mark.distributed  # half a minute of compiling
@pytest.mark.parametrize(("engine", "tolerance"), [("compiled", 1e-2), ("compiled_bfloat16", 20)])
def test_engines_agree(engine: str, tolerance: float, recwarn: pytest.WarningsRecorder) -> None:
    policy = transformer_policy().with_sampler("sequential")
    compiled = dataclasses.replace(policy, engine=make_engine(engine, policy.device))
    for schedule, batch in (("ddpm", None), ("ddim", 3)):
        observation = some_observation(policy.spec, batch)
        expected = policy.with_schedule(schedule).predict(observation).trajectory
        found = compiled.with_schedule(schedule).predict(observation).trajectory
        np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance)  # of 200, by large weights
    assert not [w for w in recwarn if "torch.compile does not work" in str(w.message)]


def test_pictures_are_encoded_once_per_chunk(tmp_path: Path) -> None:
    camera = {"backbone": "resnet18", "keypoints": 4, "features": 6}
    changes = {"network": {**SMALL, "encoder": {"cameras": {"camera": camera}}}}
    observation = {"camera": Feature((32, 32, 3), "image"), "position": Feature((2,))}
    policy = small_policy(observation=observation, **changes)
    assert policy.network.cond_obs_emb.in_features == 8
    assert "obs_encoder.cameras.0.backbone.conv1.weight" in policy.network.state_dict()
    calls: list[tuple[int, ...]] = []
    policy.network.obs_encoder.register_forward_hook(lambda module, inputs, output: calls.append(tuple(output.shape)))
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 256, (3, 2, 32, 32, 3)).astype(np.uint8)
    seen = {"camera": pictures, "position": rng.uniform(0, 100, (3, 2, 2)).astype(np.float32)}
    expected = policy.predict(seen).trajectory
    assert calls == [(3, 16)]
    assert lower(policy.network, torch.bfloat16).obs_encoder is policy.network.obs_encoder
    parapolicy.save_policy(policy, tmp_path)
    loaded = parapolicy.load_policy(tmp_path, sampler="sequential", engine="eager", device="cpu")
    np.testing.assert_allclose(loaded.predict(seen).trajectory, expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_layer": 0}, "n_layer is 0, expected a whole number from 1"),
        ({"n_emb": 2}, "n_emb is 2, expected a whole number from 4"),
        ({"n_emb": 18, "n_head": 4}, "n_emb is 18, expected an even multiple of n_head, 4"),
        ({"n_cond_layers": True}, "n_cond_layers is True"),
        ({"causal_attn": 1}, "causal_attn is 1, expected true or false"),
        ({"condition": "global"}, "condition is 'global', expected one of"),
        ({"time_as_condition": False}, "time_as_condition is false with condition 'cross'"),
        ({"n_heads": 2}, "arguments .* do not fit 'transformer1d'"),
    ],
)
def test_other_arguments_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_network(small_spec(network={**SMALL, **changes}))


def test_inpainting_and_the_spec_must_agree() -> None:
    inpaint = {**SMALL, "condition": "inpaint"}
    with pytest.raises(ValueError, match="observed_dim is 7, expected 8 for condition 'inpaint'"):
        build_network(small_spec(network=inpaint, observed_dim=7))
    with pytest.raises(ValueError, match="observed_dim is 8, expected 0 for condition"):
        build_network(small_spec(network=SMALL, observed_dim=8))
    with pytest.raises(ValueError, match="n_obs_steps is 10, expected at most the horizon, 8"):
        build_network(small_spec(network=inpaint, observed_dim=8, n_obs_steps=10, first_action=0))
