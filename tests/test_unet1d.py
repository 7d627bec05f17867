from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from parapolicy.engine.lowered import lower
from parapolicy.networks import build_network
from parapolicy.networks.unet1d import ConditionalUnet1D
from tests.helpers import call_network, small_policy, small_spec, some_observation


def build(**changes: object) -> ConditionalUnet1D:
    arguments = {"diffusion_step_embed_dim": 16, "down_dims": [16, 32, 64], "n_groups": 4, **changes}
    return ConditionalUnet1D(input_dim=3, global_cond_dim=5, **arguments)  # type: ignore[arg-type]


def test_published_layout() -> None:
    """The module names under which published weights are stored, for three levels."""
    block = [f"blocks.{i}.block.{j}" for i in (0, 1) for j in (0, 1)] + ["cond_encoder.1"]
    modules = ["diffusion_step_encoder.1", "diffusion_step_encoder.3"]
    for level in ("down_modules.0", "down_modules.1", "down_modules.2", "up_modules.0", "up_modules.1"):
        modules += [f"{level}.{i}.{name}" for i in (0, 1) for name in block]
        modules += [f"{level}.0.residual_conv"]
    modules += [f"{level}.2.conv" for level in ("down_modules.0", "down_modules.1", "up_modules.0", "up_modules.1")]
    modules += [f"mid_modules.{i}.{name}" for i in (0, 1) for name in block]
    modules += ["final_conv.0.block.0", "final_conv.0.block.1", "final_conv.1"]
    expected = {f"{module}.{part}" for module in modules for part in ("weight", "bias")}
    assert set(build().state_dict()) == expected


def test_published_size() -> None:
    """The published low-dimensional Push-T network: 20 observed numbers, two steps, default widths."""
    with torch.device("meta"):
        network = ConditionalUnet1D(input_dim=2, global_cond_dim=40)
    shapes = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    assert shapes["down_modules.0.0.blocks.0.block.0.weight"] == (256, 2, 5)
    assert shapes["mid_modules.0.cond_encoder.1.weight"] == (2048, 296)
    assert shapes["up_modules.0.0.blocks.0.block.0.weight"] == (512, 2048, 5)
    assert shapes["up_modules.0.2.conv.weight"] == (512, 512, 4)
    assert 65e6 < sum(value.numel() for value in network.state_dict().values()) < 66e6


@pytest.mark.parametrize("film_scale", [True, False])
def test_shapes_and_conditioning(film_scale: bool) -> None:
    network = build(cond_predict_scale=film_scale)
    x, timestep, condition = torch.randn(2, 8, 3), torch.tensor([3, 50]), torch.randn(2, 5)
    output = call_network(network, x, timestep, condition)
    assert output.shape == (2, 8, 3)
    assert not torch.allclose(output, call_network(network, x, timestep, condition + 1))
    assert not torch.allclose(output, call_network(network, x, timestep + 1, condition))
    width = network.state_dict()["mid_modules.0.cond_encoder.1.weight"].shape[0]
    assert width == (128 if film_scale else 64)


def test_film_scale_multiplies() -> None:
    """A FiLM scale and bias of zero silence the first block: what is left comes from the bias-free second block."""
    block = build().mid_modules[0]
    torch.nn.init.zeros_(block.cond_encoder[1].weight)
    torch.nn.init.zeros_(block.cond_encoder[1].bias)
    a, b = torch.randn(2, 1, 64, 2)
    cond = torch.randn(1, 21)
    torch.testing.assert_close(block(a, cond) - a, block(b, cond) - b)


def test_even_kernels_are_refused() -> None:
    with pytest.raises(ValueError, match="kernel_size is 4"):
        build(kernel_size=4)


ROWS = torch.tensor([3, 0, 0, 4, 1]), torch.tensor([1, 0, 1, 1, 0])  # steps and elements of network rows


def conditioned(condition: str, **changes: Any) -> ConditionalUnet1D:
    """Two observed steps of four numbers each, and three actions per step."""
    width = 3 + 4 * (condition == "inpaint")
    arguments = {"diffusion_step_embed_dim": 16, "down_dims": [16, 32], "n_groups": 4, **changes}
    return ConditionalUnet1D(width, 8, condition=condition, n_obs_steps=2, **arguments).requires_grad_(False)


def call(network: Any, x: Tensor, observed: Tensor, step: Tensor = ROWS[0], element: Tensor = ROWS[1]) -> Tensor:
    steps, condition = network.embed_steps(torch.arange(5) * 10), network.embed_condition({"state": observed})
    output: Tensor = network(x, steps, condition, step, element)
    return output


def record(module: torch.nn.Module) -> list[tuple[Tensor, Tensor]]:
    """What a block receives and gives at each call from here on."""
    calls: list[tuple[Tensor, Tensor]] = []
    module.register_forward_hook(lambda _, inputs, output: calls.append((inputs[0], output)))
    return calls


@pytest.mark.parametrize("condition", ["global", "local", "inpaint"])
@pytest.mark.parametrize("film_scale", [True, False])
def test_rows_and_rewritten_forms_agree(condition: str, film_scale: bool) -> None:
    network = conditioned(condition, cond_predict_scale=film_scale)
    x, observed = torch.randn(5, 8, 3 + 4 * (condition == "inpaint")), torch.randn(2, 2, 4)
    expected = call(network, x, observed)
    for i, (step, element) in enumerate(zip(*ROWS, strict=True)):
        alone = call(network, x[i : i + 1], observed, step[None], element[None])[0]
        torch.testing.assert_close(expected[i], alone, rtol=0, atol=2e-6)
    torch.testing.assert_close(call(lower(network, torch.float32), x, observed), expected, rtol=0, atol=2e-6)
    rounded = call(lower(network, torch.bfloat16), x, observed)
    assert 1e-5 < (rounded - expected).abs().max() < 0.1
    assert not torch.allclose(call(network, x, observed + 1), expected, atol=1e-3)


def test_local_condition() -> None:
    """The observed steps, and zeros after them, through a block of their own into the middle of the first level."""
    network = conditioned("local")
    encoder, first, second = network.local_cond_encoder[0], *list(network.down_modules[0])[:2]
    calls = record(encoder), record(first), record(second)
    x, observed = torch.randn(5, 8, 3), torch.randn(2, 2, 4)
    expected = call(network, x, observed)
    (local, encoded), (_, before), (after, _) = (call_of[0] for call_of in calls)
    assert local.shape == (5, 4, 8)
    assert torch.equal(local[:, :, :2], observed[ROWS[1]].mT)
    assert not local[:, :, 2:].any()
    assert torch.equal(after, before + encoded)
    assert network.mid_modules[0].cond_encoder[1].in_features == 16  # the timestep alone
    # The published code never adds what its second local block gives, but stores that block's weights.
    names = {name for name in network.state_dict() if name.startswith("local_cond_encoder.1.")}
    assert len(names) == 12
    for parameter in network.local_cond_encoder[1].parameters():
        parameter.fill_(torch.nan)
    assert torch.equal(call(network, x, observed), expected)


def test_inpainting() -> None:
    network = conditioned("inpaint")
    calls = record(network.down_modules[0][0])
    x, observed = torch.randn(5, 8, 7), torch.randn(2, 2, 4)
    call(network, x, observed)
    expected = x.clone()
    expected[:, :2, 3:] = observed[ROWS[1]]
    assert torch.equal(calls[0][0], expected.mT)


@pytest.mark.parametrize("condition", ["local", "inpaint"])
def test_samplers_agree(condition: str) -> None:
    network = {**small_spec().network, "condition": condition}
    policy = small_policy(network=network, observed_dim=8 * (condition == "inpaint"))
    observation = some_observation(policy.spec, 3)
    expected = policy.predict(observation).trajectory
    assert expected.shape == (3, 8, 2)
    chunk = policy.with_sampler("secant", window=6, tolerance=0.0).predict(observation)
    np.testing.assert_allclose(chunk.trajectory, expected, rtol=0, atol=1e-2)  # of 200


@pytest.mark.parametrize(
    ("condition", "changes", "message"),
    [
        ("inpaint", {"observed_dim": 3}, "observed_dim is 3, expected 8 for condition 'inpaint'"),
        ("global", {"observed_dim": 8}, "observed_dim is 8, expected 0 for condition 'global'"),
        ("local", {"n_obs_steps": 9, "first_action": 0}, "n_obs_steps is 9, expected at most the horizon, 8"),
        ("cross", {}, "condition is 'cross', expected one of"),
    ],
)
def test_conditions_that_do_not_fit_are_refused(condition: str, changes: dict[str, Any], message: str) -> None:
    network = {**small_spec().network, "condition": condition}
    with pytest.raises(ValueError, match=message):
        build_network(small_spec(network=network, **changes))


def test_the_last_norm_may_have_groups_of_its_own() -> None:
    network = conditioned("global", final_groups=8)
    assert network.final_conv[0].block[1].num_groups == 8
    assert network.down_modules[0][0].blocks[0].block[1].num_groups == 4
    with pytest.raises(ValueError, match=r"final_groups is 3, expected a divisor of down_dims\[0\], 16"):
        conditioned("global", final_groups=3)
