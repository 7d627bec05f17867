import pytest
import torch

from parapolicy.networks.unet1d import ConditionalUnet1D
from tests.helpers import call_network


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
