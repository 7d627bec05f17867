"""Every step of every table against the diffusers scheduler's own ``step``."""

from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
from hypothesis import given
from hypothesis import strategies as st

from parapolicy.schedule import make_schedule
from tests.helpers import DDPM_CONFIG, FLOW_CONFIG

SHAPE = (3, 8)  # (N, S)


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
        (1, "trailing", "fixed_small"),
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
@pytest.mark.parametrize("algorithm", ["dpmsolver++", "sde-dpmsolver++"])
@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("solver_type", ["midpoint", "heun"])
@pytest.mark.parametrize(
    ("steps", "spacing", "final"),
    [(100, "trailing", "zero"), (20, "linspace", "zero"), (10, "linspace", "sigma_min"), (15, "leading", "sigma_min")],
)
def test_dpmsolver_equals_diffusers(
    kind: str, algorithm: str, prediction: str, order: int, solver_type: str, steps: int, spacing: str, final: str
) -> None:
    config = {
        "_class_name": "DPMSolverMultistepScheduler",
        "num_train_timesteps": 100,
        "beta_schedule": "squaredcos_cap_v2",
        "prediction_type": prediction,
        "algorithm_type": algorithm,
        "solver_order": order,
        "solver_type": solver_type,
        "timestep_spacing": spacing,
        "final_sigmas_type": final,
    }
    schedule = make_schedule(config, steps=steps)
    assert schedule.solver == algorithm
    oracle = DPMSolverMultistepScheduler.from_config({k: v for k, v in config.items() if k[0] != "_"})
    oracle.set_timesteps(steps)
    assert schedule.timesteps.tolist() == oracle.timesteps.tolist()
    oracle.sigmas = oracle.sigmas.double()  # exp(-h) - 1 is a difference of nearly equal numbers in float32
    previous = torch.zeros(SHAPE)
    for j, timestep in enumerate(oracle.timesteps):
        x, output = inputs(kind, j)
        z = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1000 + j))
        expected = oracle.step(output, timestep, x, variance_noise=z).prev_sample
        step = torch.full((len(x),), j)
        u = schedule.estimate(output, x, step)
        ours = schedule.step(x, u, previous, z, step)
        terms = schedule.A[j] * x, schedule.B[j] * u, schedule.C[j] * previous
        assert_step_equal(ours, expected, *terms)
        previous = u


@pytest.mark.parametrize("kind", ["random", "extreme"])
@pytest.mark.parametrize(("steps", "shift"), [(100, 1.0), (10, 1.0), (10, 3.0), (3, 0.5), (1, 3.0)])
def test_flow_equals_diffusers(kind: str, steps: int, shift: float) -> None:
    config = {**FLOW_CONFIG, "shift": shift}
    schedule = make_schedule(config, steps=steps)
    assert (schedule.solver, schedule.prediction, schedule.clip) == ("flow", "flow_prediction", None)
    oracle = FlowMatchEulerDiscreteScheduler.from_config({k: v for k, v in config.items() if k[0] != "_"})
    oracle.set_timesteps(sigmas=[1 - i / steps for i in range(steps)])
    assert schedule.timesteps.dtype == torch.float32
    torch.testing.assert_close(schedule.timesteps, oracle.timesteps)
    for j, timestep in enumerate(oracle.timesteps):
        x, velocity = inputs(kind, j)
        expected = oracle.step(velocity, timestep, x).prev_sample
        step = torch.full((len(x),), j)
        u = schedule.estimate(velocity, x, step)
        ours = schedule.step(x, u, u, torch.zeros(SHAPE), step)
        assert_step_equal(ours, expected, schedule.A[j] * x, schedule.B[j] * u)


def test_all_steps_of_flow_are_the_timesteps_of_training() -> None:
    oracle = FlowMatchEulerDiscreteScheduler(num_train_timesteps=100)
    torch.testing.assert_close(make_schedule(FLOW_CONFIG).timesteps, oracle.timesteps)


@pytest.mark.parametrize("steps", [2, 10, 40])
def test_second_order_flow_equals_diffusers(steps: int) -> None:
    schedule = make_schedule(FLOW_CONFIG, steps=steps, order=2)
    oracle = DPMSolverMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", solver_order=2, lower_order_final=False
    )
    oracle.set_timesteps(steps)
    oracle.sigmas = torch.cat((schedule.sigma, torch.zeros(1)))
    assert (schedule.C[0], schedule.C[-1]) == (0, 0)
    assert schedule.C[1] == 0  # the log-SNR is infinite at t = 1: the first finite slope is known one step later
    previous = torch.zeros(SHAPE)
    for j, timestep in enumerate(oracle.timesteps):
        x, velocity = inputs("random", j)
        expected = oracle.step(velocity, timestep, x).prev_sample
        step = torch.full((len(x),), j)
        u = schedule.estimate(velocity, x, step)
        ours = schedule.step(x, u, previous, torch.zeros(SHAPE), step)
        assert_step_equal(ours, expected, schedule.B[j] * u, schedule.C[j] * previous)
        previous = u


@pytest.mark.parametrize(("config", "solver"), [(FLOW_CONFIG, "flow"), (DDPM_CONFIG, "dpmsolver++")])
def test_second_order_is_more_accurate(config: dict[str, Any], solver: str) -> None:
    """On Gaussian data, whose probability-flow ODE is solved in closed form."""
    errors = []
    for order in (1, 2):
        settings = {**config, "prediction_type": "sample", "clip_sample": False, "num_train_timesteps": 1000}
        schedule = make_schedule(settings, solver, steps=20, order=order)
        deviation = 0.4
        x = start = torch.linspace(-2, 2, 8)[None]
        previous = torch.zeros_like(x)
        for j in range(len(schedule)):
            alpha, sigma = schedule.alpha[j], schedule.sigma[j]
            step = torch.tensor([j])
            u = alpha * deviation**2 * x / (alpha**2 * deviation**2 + sigma**2)
            x, previous = schedule.step(x, u, previous, torch.zeros_like(x), step), u
        first = (schedule.alpha[0] ** 2 * deviation**2 + schedule.sigma[0] ** 2) ** 0.5
        errors.append(float((x - start * deviation / first).abs().max()))
    assert errors[1] < errors[0] / 2


def _diffusers_ddpm(oracle: DDPMScheduler) -> dict[str, list[torch.Tensor]]:
    """The coefficients as diffusers' ``DDPMScheduler.step`` writes them, in float32."""
    tables: dict[str, list[torch.Tensor]] = {name: [] for name in ("A", "B", "S", "alpha", "sigma")}
    for t in oracle.timesteps:
        previous = oracle.previous_timestep(t)
        alpha_prod, one = oracle.alphas_cumprod[t], torch.tensor(1.0)
        alpha_prod_previous = oracle.alphas_cumprod[previous] if previous >= 0 else one
        beta_prod, beta_prod_previous = 1 - alpha_prod, 1 - alpha_prod_previous
        current_alpha = alpha_prod / alpha_prod_previous
        tables["A"].append(current_alpha**0.5 * beta_prod_previous / beta_prod)
        tables["B"].append((alpha_prod_previous**0.5 * (1 - current_alpha)) / beta_prod)
        tables["S"].append(oracle._get_variance(t) ** 0.5 if t > 0 else torch.tensor(0.0))
        tables["alpha"].append(alpha_prod**0.5)
        tables["sigma"].append(beta_prod**0.5)
    return tables


def _diffusers_ddim(oracle: DDIMScheduler, eta: float) -> dict[str, list[torch.Tensor]]:
    """The coefficients as diffusers' ``DDIMScheduler.step`` writes them, by state and estimate, in float32."""
    tables: dict[str, list[torch.Tensor]] = {name: [] for name in ("A", "B", "S", "alpha", "sigma")}
    for t in oracle.timesteps:
        previous = t - oracle.config.num_train_timesteps // oracle.num_inference_steps
        alpha_prod = oracle.alphas_cumprod[t]
        alpha_prod_previous = oracle.alphas_cumprod[previous] if previous >= 0 else oracle.final_alpha_cumprod
        deviation = eta * oracle._get_variance(t, previous) ** 0.5
        gain = (1 - alpha_prod_previous - deviation**2) ** 0.5 / (1 - alpha_prod) ** 0.5
        tables["A"].append(gain)
        tables["B"].append(alpha_prod_previous**0.5 - gain * alpha_prod**0.5)
        tables["S"].append(deviation)
        tables["alpha"].append(alpha_prod**0.5)
        tables["sigma"].append((1 - alpha_prod) ** 0.5)
    return tables


@pytest.mark.parametrize("beta_schedule", ["squaredcos_cap_v2", "linear"])
@pytest.mark.parametrize(
    ("solver", "steps", "eta"),
    [
        ("ddpm", 100, 0.0),
        ("ddpm", 10, 0.0),
        ("ddim", 100, 0.0),
        ("ddim", 16, 0.0),
        ("ddim", 10, 0.0),
        ("ddim", 50, 1.0),
    ],
)
def test_tables_are_diffusers_float32_to_the_bit(beta_schedule: str, solver: str, steps: int, eta: float) -> None:
    """Closed-loop results depend on every bit of them."""
    config = config_of(beta_schedule=beta_schedule, clip_sample=False)
    schedule = make_schedule(config, solver, steps, eta)
    kind = DDPMScheduler if solver == "ddpm" else DDIMScheduler
    oracle = kind.from_config({k: v for k, v in config.items() if k not in ("_class_name", "variance_type")})
    oracle.set_timesteps(steps)
    expected = _diffusers_ddpm(oracle) if solver == "ddpm" else _diffusers_ddim(oracle, eta)
    for name, values in expected.items():
        torch.testing.assert_close(getattr(schedule, name), torch.stack(values), rtol=0, atol=0, msg=name)


@pytest.mark.parametrize("steps", [100, 20])
def test_dpmsolver_tables_are_diffusers_float32_to_rounding(steps: int) -> None:
    schedule = make_schedule(DDPM_CONFIG, "dpmsolver++", steps, order=1)
    oracle = DPMSolverMultistepScheduler(num_train_timesteps=100, beta_schedule="squaredcos_cap_v2")
    oracle.set_timesteps(timesteps=schedule.timesteps.tolist())
    alpha, sigma = oracle._sigma_to_alpha_sigma_t(oracle.sigmas)
    h = (torch.log(alpha) - torch.log(sigma)).diff()
    torch.testing.assert_close(schedule.A, sigma[1:] / sigma[:-1], rtol=3e-7, atol=0)
    # exp(-h) - 1 is a difference of nearly equal numbers in float32.
    torch.testing.assert_close(schedule.B, -alpha[1:] * (torch.exp(-h) - 1), rtol=1e-6, atol=3e-7)


def test_dpmsolver_clips_where_the_training_config_clips() -> None:
    schedule = make_schedule(DDPM_CONFIG, "dpmsolver++", steps=20)
    x, output = inputs("extreme", 0)
    u = schedule.estimate(output, x, torch.zeros(len(x), dtype=torch.int64))
    assert u.abs().max() == 1.0
    assert make_schedule({**DDPM_CONFIG, "clip_sample": False}, "dpmsolver++", steps=20).clip is None


@given(
    solver=st.sampled_from(["ddpm", "ddim", "dpmsolver++", "sde-dpmsolver++", "flow"]),
    count=st.integers(2, 60),
    data=st.data(),
    beta_schedule=st.sampled_from(["linear", "scaled_linear", "squaredcos_cap_v2"]),
)
def test_a_perfect_estimate_is_reached(solver: str, count: int, data: st.DataObject, beta_schedule: str) -> None:
    """Whatever the schedule, a network that always answers the same clean sample leads there."""
    steps = data.draw(st.integers(1, count))
    base = FLOW_CONFIG if solver == "flow" else config_of(beta_schedule=beta_schedule)
    order = data.draw(st.sampled_from([None, 1, 2])) if solver not in ("ddpm", "ddim") else None
    config = {**base, "num_train_timesteps": count, "prediction_type": "sample"}
    schedule = make_schedule(config, solver, steps=steps, order=order)
    assert len(schedule) == steps
    clean = torch.rand(SHAPE) * 2 - 1
    x = torch.randn(SHAPE)
    for j in range(steps):
        step = torch.full((len(x),), j)
        u = schedule.estimate(clean, x, step)
        x = schedule.step(x, u, u, torch.randn(SHAPE), step)
    # "leading" may stop a little before timestep 0, where some noise is left by construction.
    residual_noise = float(schedule.sigma[-1]) if solver == "ddim" and schedule.A[-1] > 0 else 0.0
    torch.testing.assert_close(x, clean, rtol=0, atol=1e-4 + 4 * residual_noise)


@pytest.mark.parametrize(
    ("solver", "steps", "first"),
    [
        ("ddim", 60, 99),
        ("ddim", 51, 99),
        ("ddim", 75, 99),
        ("ddim", 40, 99),
        ("ddim", 34, 99),
        ("ddim", 3, 99),
        ("ddim", 2, 50),
        ("ddim", 1, 99),
        ("ddpm", 60, 99),
        ("ddpm", 1, 99),
        ("ddim", 4, 75),
        ("ddim", 10, 90),
        ("ddim", 16, 90),
        ("ddim", 50, 98),
        ("ddpm", 50, 98),
        ("dpmsolver++", 60, 99),
        ("sde-dpmsolver++", 60, 99),
    ],
)
def test_schedules_begin_near_the_noise(solver: str, steps: int, first: int) -> None:
    schedule = make_schedule(DDPM_CONFIG, solver, steps)
    assert schedule.timesteps[0] == first
    assert len(schedule) == steps
    # A step ends where the next one starts, and the last one without noise.
    fully = make_schedule(DDPM_CONFIG, solver)
    level = dict(zip(fully.timesteps.tolist(), fully.sigma.tolist(), strict=True))
    following = torch.tensor([level[t] for t in schedule.timesteps.tolist()[1:]] + [0.0])
    kept = (schedule.A * schedule.sigma) ** 2 + schedule.S**2
    torch.testing.assert_close(kept.sqrt(), following, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("count", [20, 50, 100, 1000])
@pytest.mark.parametrize("solver", ["ddpm", "ddim", "dpmsolver++"])
@pytest.mark.parametrize("named", ["DDPMScheduler", "DPMSolverMultistepScheduler"])
def test_no_number_of_steps_begins_far_from_the_noise(count: int, solver: str, named: str) -> None:
    config = config_of(num_train_timesteps=count, timestep_spacing="leading", _class_name=named)
    for steps in [*range(1, min(count, 100) + 1), count]:
        first = int(make_schedule(config, solver, steps).timesteps[0])
        assert count - first <= count / 2
        assert count - first <= max(count / steps, count / 10)


def test_the_last_step_of_fixed_large_adds_no_noise() -> None:
    schedule = make_schedule(config_of(variance_type="fixed_large"), steps=60)
    assert (schedule.timesteps[-1], schedule.S[-1]) == (1, 0)
    assert (schedule.S[:-1] > 0).all()
