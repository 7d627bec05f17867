"""Samplers know no shape: any sample is a flat state to them, small or large."""

import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from parapolicy.samplers import SAMPLERS, Sequential, list_samplers, make_sampler
from parapolicy.schedule import make_schedule
from tests.conftest import PATIENCE, ROOT
from tests.helpers import DDPM_CONFIG, flat_noise, linear_denoiser, run_sampler

KEEPING = [name for name in list_samplers() if SAMPLERS[name].keeps_distribution]  # the others are for few steps
EXACT = [name for name in KEEPING if name not in ("sequential", "speculative")]  # at tolerance 0


@pytest.mark.parametrize("name", EXACT)
@given(
    shape=st.sampled_from([(4, 6, 6), (3, 8, 8), (1,)]),
    solver=st.sampled_from(["ddpm", "ddim", "dpmsolver++", "sde-dpmsolver++"]),
    batch=st.integers(1, 3),
    seed=st.integers(0, 100),
    guessed=st.booleans(),
)
def test_any_shape_at_tolerance_zero_is_sequential(
    name: str, shape: tuple[int, ...], solver: str, batch: int, seed: int, guessed: bool
) -> None:
    schedule = make_schedule({**DDPM_CONFIG, "num_train_timesteps": 24, "prediction_type": "sample"}, solver)
    linear = linear_denoiser(schedule, batch, shape, gain=0.4, seed=seed)

    def denoiser(x: Tensor, step: Tensor, element: Tensor) -> Tensor:
        return schedule.estimate(linear(x, step, element), x, step)

    noise = flat_noise(schedule, batch, seed, shape)
    guess = torch.randn(batch, len(schedule), noise.shape[2]) if guessed else None
    expected = run_sampler(Sequential(), denoiser, schedule, noise)
    exact: dict[str, Any] = {"nodes": 24, "settle": 1e-6} if name == "collocation" else {"tolerance": 0.0}
    sample = run_sampler(make_sampler(name, **exact), denoiser, schedule, noise, guess=guess)
    scale = max(1.0, float(expected.x.abs().max()))
    torch.testing.assert_close(sample.x, expected.x, rtol=1e-5, atol=1e-5 * scale)
    assert sample.complete.all()


LARGE = """
import sys, torch
from parapolicy.samplers import make_sampler
from parapolicy.schedule import make_schedule
from tests.helpers import run_sampler, DDPM_CONFIG
torch.set_num_threads(1)
schedule = make_schedule({**DDPM_CONFIG, "num_train_timesteps": 1000, "prediction_type": "sample"})
noise = torch.randn(1001, 1, 16384)
for name in sys.argv[1:]:
    sample = run_sampler(make_sampler(name), lambda x, step, element: 0.9 * x.clamp(-1, 1), schedule, noise)
    assert sample.x.shape == (1, 16384) and torch.isfinite(sample.x).all() and sample.complete.all(), name
    with open("/proc/self/status") as status:  # getrusage's peak begins with that of the parent process
        peak = next(line for line in status if line.startswith("VmHWM:")).split()[1]
    print(name, int(peak) / 2**20)  # the most so far
"""


def test_a_thousand_steps_of_an_image_fit_into_four_gigabytes() -> None:
    command = [sys.executable, "-c", LARGE, *KEEPING]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    peaks = dict(line.split() for line in done.stdout.splitlines())
    assert list(peaks) == KEEPING
    assert {name: peak for name, peak in peaks.items() if float(peak) >= 4.0} == {}
