"""Every step of every table against the diffusers scheduler's own ``step``."""

from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler
from hypothesis import given
from hypothesis import strategies as st

from parapolicy.schedule import make_schedule
from tests.helpers import DDPM_CONFIG

SHAPE = (3, 4, 2)  # (N, H, D)


def inputs(kind: str, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """State and network output: ordinary, or large enough that clipping rules."""
    generator = torch.Generator().manual_seed(seed)
    x, output = torch.randn(2, *SHAPE, generator=generator)
    return (x, output) if kind == "random" else (x * 1e3, -output * 1e4)


def assert_step_equal(ours: torch.Tensor, theirs: torch.Tensor, *terms: torch.Tensor) -> None:
    """Equal to a few float32 roundings of the largest term of the sum."""
    scale = max(float(term.abs().max()) for term in (theirs, *terms))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=scale * 2e-6)


def config_of(**changes: Any) -> dict[str, Any]:
    return {**DDPM_CONFIG, **changes}


@pytest.mark.parametrize("kind", ["random", "extreme"])
@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize(
    ("steps", "spacing", "variance"),
    [
        (100, "leading", "fixed_small"),
        (100, "leading", "fixed_large"),
        (100, "leading", "fixed_small_log"),
        (10, "leading", "fixed_small"),
        (16, "trailing", "fixed_small"),
        (7, "linspace", "fixed_small"),
        (1, "leading", "fixed_small"),
    ],
)
def test_ddpm_equals_diffusers(kind: str, clip: bool, prediction: str, steps: int, spacing: str, variance: str) -> None:
    config = config_of(clip_sample=clip, prediction_type=prediction, timestep_spacing=spacing, variance_type=variance)
    schedule = make_schedule(config, steps=steps)
    oracle = DDPMScheduler.from_config({k: v for k, v in config.items() if k[0] != "_"})
    oracle.set_timesteps(steps)
    assert schedule.timesteps.tolist() == oracle.timesteps.tolist()
    for j, timestep in enumerate(oracle.timesteps):
        x, output = inputs(kind, j)
        generator = torch.Generator().manual_seed(j)
        expected = oracle.step(output, timestep, x, generator=generator).prev_sample
        z = torch.randn(SHAPE, generator=torch.Generator().manual_seed(j))
        step = torch.full((len(x),), j)
        u = schedule.estimate(output, x, step)
        assert_step_equal(schedule.step(x, u, u, z, step), expected, schedule.A[j] * x, schedule.B[j] * u)


@pytest.mark.parametrize("kind", ["random", "extreme"])
@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("reclip", [True, False])
@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize(
    ("steps", "eta", "spacing", "to_one"),
    [
        (100, 0.0, "leading", True),
        (100, 1.0, "leading", True),
        (10, 0.3, "leading", False),
        (16, 0.7, "trailing", True),
    ],
)
def test_ddim_equals_diffusers(
    kind: str, clip: bool, reclip: bool, prediction: str, steps: int, eta: float, spacing: str, to_one: bool
) -> None:
    config = config_of(
        _class_name="DDIMScheduler", clip_sample=clip, prediction_type=prediction, timestep_spacing=spacing
    )
    config["set_alpha_to_one"] = to_one
    schedule = make_schedule(config, steps=steps, eta=eta, use_clipped_model_output=reclip)
    oracle = DDIMScheduler.from_config({k: v for k, v in config.items() if k[0] != "_"})
    oracle.set_timesteps(steps)
    for j, timestep in enumerate(oracle.timesteps):
        x, output = inputs(kind, j)
        z = torch.randn(SHAPE, generator=torch.Generator().manual_seed(j))
        noise = {"variance_noise": z} if eta else {}
        expected = oracle.step(output, timestep, x, eta=eta, use_clipped_model_output=reclip, **noise)
        step = torch.full((len(x),), j)
        u = schedule.estimate(output, x, step)
        ours = schedule.step(x, u, u, z, step)
        assert_step_equal(ours, expected.prev_sample, schedule.A[j] * x, schedule.B[j] * u)


@pytest.mark.parametrize("kind", ["random", "extreme"])
@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("solver_type", ["midpoint", "heun"])
@pytest.mark.parametrize(
    ("steps", "spacing", "final"),
    [(100, "trailing", "zero"), (20, "linspace", "zero"), (10, "linspace", "sigma_min"), (15, "leading", "sigma_min")],
)
def test_dpmsolver_equals_diffusers(
    kind: str, prediction: str, order: int, solver_type: str, steps: int, spacing: str, final: str
) -> None:
    config = {
        "_class_name": "DPMSolverMultistepScheduler",
        "num_train_timesteps": 100,
        "beta_schedule": "squaredcos_cap_v2",
        "prediction_type": prediction,
        "solver_order": order,
        "solver_type": solver_type,
        "timestep_spacing": spacing,
        "final_sigmas_type": final,
    }
    schedule = make_schedule(config, steps=steps)
    oracle = DPMSolverMultistepScheduler.from_config({k: v for k, v in config.items() if k[0] != "_"})
    oracle.set_timesteps(steps)
    previous = torch.zeros(SHAPE)
    for j, timestep in enumerate(oracle.timesteps):
        x, output = inputs(kind, j)
        expected = oracle.step(output, timestep, x).prev_sample
        step = torch.full((len(x),), j)
        u = schedule.estimate(output, x, step)
        ours = schedule.step(x, u, previous, torch.zeros(SHAPE), step)
        terms = schedule.A[j] * x, schedule.B[j] * u, schedule.C[j] * previous
        assert_step_equal(ours, expected, *terms)
        previous = u


def test_dpmsolver_clips_where_the_training_config_clips() -> None:
    schedule = make_schedule(DDPM_CONFIG, "dpmsolver++", steps=20)
    x, output = inputs("extreme", 0)
    u = schedule.estimate(output, x, torch.zeros(len(x), dtype=torch.int64))
    assert u.abs().max() == 1.0
    assert make_schedule({**DDPM_CONFIG, "clip_sample": False}, "dpmsolver++", steps=20).clip is None


@given(
    solver=st.sampled_from(["ddpm", "ddim", "dpmsolver++"]),
    count=st.integers(2, 60),
    data=st.data(),
    beta_schedule=st.sampled_from(["linear", "scaled_linear", "squaredcos_cap_v2"]),
)
def test_a_perfect_estimate_is_reached(solver: str, count: int, data: st.DataObject, beta_schedule: str) -> None:
    """Whatever the schedule, a network that always answers the same clean sample leads there."""
    steps = data.draw(st.integers(1, count))
    config = config_of(num_train_timesteps=count, beta_schedule=beta_schedule, prediction_type="sample")
    schedule = make_schedule(config, solver, steps=steps)
    assert len(schedule) == steps
    clean = torch.rand(SHAPE) * 2 - 1
    x = torch.randn(SHAPE)
    for j in range(steps):
        step = torch.full((len(x),), j)
        u = schedule.estimate(clean, x, step)
        x = schedule.step(x, u, u, torch.randn(SHAPE), step)
    # "trailing" and "leading" may stop a little before timestep 0, where some noise is left by construction.
    residual_noise = float(schedule.sigma[-1]) if solver == "ddim" and schedule.A[-1] > 0 else 0.0
    torch.testing.assert_close(x, clean, rtol=0, atol=1e-4 + 4 * residual_noise)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"solver": "euler"}, "solver is 'euler'"),
        ({"steps": 0}, "steps is 0"),
        ({"steps": 101}, "steps is 101, expected 1 to 100"),
        ({"eta": 0.5}, "only ddim takes it"),
        ({"solver": "ddim", "eta": 2.0}, "eta is 2.0"),
        ({"order": 2}, "only dpmsolver"),
        ({"solver": "dpmsolver++", "order": 3}, "solver_order 3"),
    ],
)
def test_bad_settings_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_schedule(DDPM_CONFIG, **arguments)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"thresholding": True}, "thresholding is on"),
        ({"variance_type": "learned"}, "variance_type is 'learned'"),
        ({"prediction_type": "flow"}, "prediction_type is 'flow'"),
        ({"_class_name": "PNDMScheduler"}, "PNDMScheduler"),
        ({"steps_offset": 5}, "distinct timesteps"),
    ],
)
def test_unsupported_configs_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_schedule(config_of(**changes))


def test_repeated_timesteps_are_refused() -> None:
    config = {**DDPM_CONFIG, "_class_name": "DPMSolverMultistepScheduler", "timestep_spacing": "linspace"}
    with pytest.raises(ValueError, match="take another number of steps or timestep_spacing"):
        make_schedule(config, steps=100)
