"""The engine ``fused_bfloat16`` on processors with AMX: its products are in tiles."""

import shutil

import pytest
import torch

from parapolicy.engine import native_build, native_library
from parapolicy.engine.lowered.fused_unet1d import FusedUnet1D
from parapolicy.networks.unet1d import ConditionalUnet1D

WITHOUT = ("-mno-amx-tile", "-mno-amx-bf16")
pytestmark = [
    pytest.mark.skipif("amx_bf16" not in native_library._processor(), reason="this processor has no AMX"),
    pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ here"),
]


def rows_of(network: FusedUnet1D, rows: slice = slice(None)) -> torch.Tensor:
    """Outputs for some of 70 made-up rows."""
    generator = torch.Generator().manual_seed(1)
    x, state = torch.randn(70, 16, 2, generator=generator), torch.randn(3, 1, 20, generator=generator)
    steps, conditions = network.embed_steps(torch.arange(100)), network.embed_condition({"state": state})
    step, element = torch.randint(0, 100, (70,), generator=generator), torch.arange(70) % 3
    return network(x[rows], steps, conditions, step[rows], element[rows])


@pytest.mark.parametrize("down_dims", [(64, 128, 256), (24, 40, 72)], ids=str)  # the second: not of whole tiles
@torch.inference_mode()
def test_tiles_compute_what_vectors_do(down_dims: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    network = ConditionalUnet1D(2, 20, 32, down_dims).eval()
    tiled = FusedUnet1D(network, torch.bfloat16)
    vectors = native_library.load_library((*native_build.FLAGS, *WITHOUT))
    monkeypatch.setattr("parapolicy.engine.lowered.fused_network.load_library", lambda: vectors)
    found, expected = rows_of(tiled), rows_of(FusedUnet1D(network, torch.bfloat16))
    assert not torch.equal(found, expected)  # sums in another order: tiles were used
    assert float((found - expected).abs().max()) < 0.01 * float(expected.abs().max())


@pytest.mark.parametrize("threads", [1, 2])
@torch.inference_mode()
def test_a_row_is_the_same_in_calls_of_any_number(threads: int) -> None:
    torch.manual_seed(0)
    network = FusedUnet1D(ConditionalUnet1D(2, 20, 32, (32, 80)).eval(), torch.bfloat16)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        expected = rows_of(network)
        for size in (1, 2, 3, 7, 16, 17, 33):
            parts = [rows_of(network, slice(begin, begin + size)) for begin in range(0, 70, size)]
            assert torch.equal(torch.cat(parts), expected)
    finally:
        torch.set_num_threads(before)


@torch.inference_mode()
def test_another_library_s_tiles_are_not_disturbed() -> None:
    """oneDNN uses them in the same thread."""
    torch.manual_seed(0)
    network = FusedUnet1D(ConditionalUnet1D(2, 20, 32, (64, 128)).eval(), torch.bfloat16)
    a, b = torch.randn(80, 128, dtype=torch.bfloat16), torch.randn(128, 96, dtype=torch.bfloat16)
    product, output = a @ b, rows_of(network)
    for _ in range(3):
        assert torch.equal(a @ b, product)
        assert torch.equal(rows_of(network), output)
