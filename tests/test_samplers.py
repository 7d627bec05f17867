"""Properties of the samplers, on schedules, windows, tolerances and denoisers drawn at random."""

import dataclasses
import inspect
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import DDIMParallelScheduler, DDPMParallelScheduler
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

import parapolicy
from parapolicy.samplers import Sampler, Sequential, make_sampler
from parapolicy.schedule import Schedule, make_schedule
from tests.helpers import (
    DDPM_CONFIG,
    bind,
    call_network,
    flat_noise,
    linear_denoiser,
    run_sampler,
    small_policy,
    small_spec,
)

PARALLEL = ["paradigms", "semi_implicit", "anderson", "secant"]
SHAPE = (4, 2)  # (H, D)


@st.composite
def problems(draw: st.DrawFn) -> tuple[Schedule, Callable, Tensor]:
    """A random schedule, a random linear denoiser, and noise for a random batch."""
    count = draw(st.integers(2, 40))
    solver = draw(st.sampled_from(["ddpm", "ddim", "dpmsolver++"]))
    config = {
        **DDPM_CONFIG,
        "num_train_timesteps": count,
        "beta_schedule": draw(st.sampled_from(["linear", "squaredcos_cap_v2"])),
        "prediction_type": "sample",
        "clip_sample": draw(st.booleans()),
    }
    eta = draw(st.sampled_from([0.0, 0.5])) if solver == "ddim" else 0.0
    schedule = make_schedule(config, solver, steps=draw(st.integers(1, count)), eta=eta)
    batch, seed = draw(st.integers(1, 4)), draw(st.integers(0, 1000))
    linear = linear_denoiser(schedule, batch, SHAPE, gain=draw(st.sampled_from([0.1, 0.6])), seed=seed)

    def denoiser(x: Tensor, step: Tensor, element: Tensor) -> Tensor:
        return schedule.estimate(linear(x, step, element), x, step)

    return schedule, denoiser, flat_noise(schedule, batch, seed, SHAPE)


def counting(denoiser: Callable, log: list[Tensor]) -> Callable:
    def counted(x: Tensor, step: Tensor, element: Tensor) -> Tensor:
        log.append(torch.stack((step, element)))
        return denoiser(x, step, element)

    return counted


@pytest.mark.parametrize("name", PARALLEL)
@given(problem=problems(), data=st.data())
def test_tolerance_zero_is_sequential(name: str, problem: Any, data: st.DataObject) -> None:
    schedule, denoiser, noise = problem
    window = data.draw(st.integers(1, len(schedule)))
    expected = run_sampler(Sequential(), denoiser, schedule, noise)
    sample = run_sampler(make_sampler(name, window=window, tolerance=0.0), denoiser, schedule, noise)
    scale = float(expected.x.abs().max())
    torch.testing.assert_close(sample.x, expected.x, rtol=1e-5, atol=1e-5 * max(1.0, scale))


@pytest.mark.parametrize("name", PARALLEL)
@given(problem=problems(), data=st.data())
def test_costs_are_bounded_and_counted(name: str, problem: Any, data: st.DataObject) -> None:
    """Rounds never exceed T, window 1 needs exactly T, and the statistics are what really happened."""
    schedule, denoiser, noise = problem
    steps, batch = len(schedule), noise.shape[1]
    window = data.draw(st.integers(1, steps))
    tolerance = data.draw(st.sampled_from([0.0, 0.1, 1.0]))
    log: list[Tensor] = []
    sample = run_sampler(
        make_sampler(name, window=window, tolerance=tolerance), counting(denoiser, log), schedule, noise
    )
    assert (sample.rounds <= steps).all()
    assert (sample.rounds >= -(-steps // window)).all()
    if window == 1:
        assert (sample.rounds == steps).all()
    calls = torch.cat(log, 1)
    for b in range(batch):
        mine = calls[0, calls[1] == b]
        assert sample.evaluations[b] == len(mine)
        assert set(mine.tolist()) == set(range(steps))  # every step was evaluated at least once
        assert sum(bool((entries[1] == b).any()) for entries in log) == sample.rounds[b]
    assert len(log) == sample.rounds.max()
    assert all(len(entries[0]) <= window * batch for entries in log)


@pytest.mark.parametrize("name", ["sequential", *PARALLEL])
@given(problem=problems(), data=st.data())
def test_elements_do_not_depend_on_each_other(name: str, problem: Any, data: st.DataObject) -> None:
    """Each element alone gives the same bits, rounds and evaluations as in the batch."""
    schedule, denoiser, noise = problem
    parameters = {} if name == "sequential" else {"window": data.draw(st.integers(1, len(schedule)))}
    sampler = make_sampler(name, **parameters)
    together = run_sampler(sampler, denoiser, schedule, noise)
    for b in range(noise.shape[1]):

        def alone(x: Tensor, step: Tensor, element: Tensor, b: int = b) -> Tensor:
            return denoiser(x, step, element + b)

        single = run_sampler(sampler, alone, schedule, noise[:, b : b + 1])
        assert torch.equal(single.x[0], together.x[b])
        assert single.rounds[0] == together.rounds[b]
        assert single.evaluations[0] == together.evaluations[b]


@pytest.mark.parametrize("name", PARALLEL)
@given(problem=problems())
def test_a_smaller_tolerance_is_closer_and_costs_more(name: str, problem: Any) -> None:
    schedule, denoiser, noise = problem
    exact = run_sampler(Sequential(), denoiser, schedule, noise).x
    loose, tight = (
        run_sampler(make_sampler(name, window=len(schedule), tolerance=tolerance), denoiser, schedule, noise)
        for tolerance in (1.0, 1e-3)
    )
    assert (tight.rounds >= loose.rounds).all()
    assert (tight.x - exact).abs().max() <= (loose.x - exact).abs().max() + 1e-5
    # 1e-3 standard deviations of the step noise per round; a contraction can leave a few times that.
    assert (tight.x - exact).abs().max() <= 2e-2


@pytest.mark.parametrize("name", ["anderson", "secant"])
@given(problem=problems(), data=st.data())
def test_acceleration_never_costs_more_than_one_round(name: str, problem: Any, data: st.DataObject) -> None:
    schedule, denoiser, noise = problem
    # What DDIM clips off comes back magnified, which the secant sampler's error estimate takes further rounds to trust.
    assume(not schedule.overshoots)
    parameters = {"window": data.draw(st.integers(1, len(schedule))), "tolerance": data.draw(st.floats(1e-3, 1))}
    plain = run_sampler(make_sampler("semi_implicit", **parameters), denoiser, schedule, noise)
    accelerated = run_sampler(make_sampler(name, **parameters), denoiser, schedule, noise)
    assert (accelerated.rounds <= plain.rounds + 1).all()


@pytest.mark.parametrize("name", PARALLEL)
@given(problem=problems())
def test_noise_is_neither_changed_nor_added_to(name: str, problem: Any) -> None:
    """The noise tensor stays as it was and is the only randomness: two calls, and another global seed, agree."""
    schedule, denoiser, noise = problem
    kept = noise.clone()
    sampler = make_sampler(name)
    first = run_sampler(sampler, denoiser, schedule, noise)
    torch.manual_seed(1)
    second = run_sampler(sampler, denoiser, schedule, noise)
    assert torch.equal(noise, kept)
    assert torch.equal(first.x, second.x)


@pytest.mark.parametrize("name", ["sequential", "speculative", *PARALLEL])
@pytest.mark.parametrize(("solver", "eta"), [("ddpm", 0.0), ("ddim", 1.0), ("ddim", 0.0), ("dpmsolver++", 0.0)])
def test_noise_marginals_are_untouched(name: str, solver: str, eta: float) -> None:
    """For Gaussian data of variance 0.25 the best estimate is linear, and the result's variance is known exactly."""
    config = {**DDPM_CONFIG, "clip_sample": False, "prediction_type": "sample", "num_train_timesteps": 50}
    schedule = make_schedule(config, solver, eta=eta)
    weight = 0.25 * schedule.alpha / (0.25 * schedule.alpha**2 + schedule.sigma**2)

    def denoiser(x: Tensor, step: Tensor, element: Tensor) -> Tensor:
        return weight[step, None] * x

    # Covariance of (x_j, u_{j-1}) step by step: the table's own recurrence on second moments.
    moments = torch.tensor([[1.0, 0.0], [0.0, 0.0]], dtype=torch.float64)
    for j in range(len(schedule)):
        a, b, c, s, w = (float(table[j]) for table in (schedule.A, schedule.B, schedule.C, schedule.S, weight))
        move = torch.tensor([[a + b * w, c], [w, 0.0]], dtype=torch.float64)
        moments = move @ moments @ move.T
        moments[0, 0] += s**2
    expected = float(moments[0, 0])

    count = 1500
    sample = run_sampler(make_sampler(name), denoiser, schedule, torch.randn(len(schedule) + 1, count, 8))
    values = sample.x.flatten().double()
    assert abs(float(values.mean())) < 5 * (expected / values.numel()) ** 0.5
    assert abs(float(values.var()) / expected - 1) < 5 * (2 / values.numel()) ** 0.5


@pytest.mark.parametrize("name", PARALLEL)
@settings(max_examples=20)  # each draws a network
@given(
    window=st.integers(1, 20),
    batch=st.integers(1, 3),
    seed=st.integers(0, 100),
    solver=st.sampled_from(["ddpm", "ddim", "dpmsolver++"]),
)
def test_small_networks_at_tolerance_zero(name: str, window: int, batch: int, seed: int, solver: str) -> None:
    torch.manual_seed(seed)
    policy = small_policy().with_schedule(solver)
    condition = torch.randn(batch, policy.spec.condition_dim)
    # A call's roundings must not depend on its size: untrained networks magnify them.
    denoiser = bind(policy, condition, reproducible=True)
    noise = flat_noise(policy.schedule, batch, seed)
    with torch.inference_mode():
        expected = run_sampler(Sequential(), denoiser, policy.schedule, noise)
        sample = run_sampler(make_sampler(name, window=window, tolerance=0.0), denoiser, policy.schedule, noise)
    assert (sample.rounds <= len(policy.schedule)).all()
    # Untrained networks magnify float32 roundings, DDIM's most; a wrong prefix would show at 1e-2.
    torch.testing.assert_close(sample.x, expected.x, rtol=0, atol=1e-4)


def stop_after(rounds: int) -> Callable[[], bool]:
    asked = iter(range(1, 1000))
    return lambda: next(asked) >= rounds


@pytest.mark.parametrize("name", ["sequential", *PARALLEL])
@given(problem=problems(), data=st.data())
def test_stopping_early_returns_what_there_is(name: str, problem: Any, data: st.DataObject) -> None:
    """At least one round, never more than asked for; enough rounds give the complete sample, to the bit."""
    schedule, denoiser, noise = problem
    sampler = make_sampler(name) if name == "sequential" else make_sampler(name, window=data.draw(st.integers(1, 20)))
    whole = run_sampler(sampler, denoiser, schedule, noise)
    assert whole.complete.all()
    budget = data.draw(st.integers(0, len(schedule) + 1))
    early = run_sampler(sampler, denoiser, schedule, noise, stop_after(budget))
    assert torch.equal(early.rounds, whole.rounds.clamp(max=max(1, budget)))
    assert (early.evaluations <= whole.evaluations).all()
    assert torch.equal(early.complete, whole.rounds <= max(1, budget))
    assert torch.isfinite(early.x).all()
    assert torch.equal(early.x[early.complete], whole.x[early.complete])


@pytest.mark.parametrize("name", ["sequential", *PARALLEL])
def test_a_stopped_sample_is_already_an_estimate(name: str, shipped: parapolicy.Policy) -> None:
    """Nearly all of the rounds leave less of the way than one does, and the residual says so."""
    condition = torch.rand(4, shipped.spec.condition_dim) * 2 - 1
    denoiser = bind(shipped, condition)
    noise = flat_noise(shipped.schedule, 4, seed=0)
    with torch.inference_mode():
        sampler = make_sampler(name)
        whole = run_sampler(sampler, denoiser, shipped.schedule, noise)
        rounds = int(whole.rounds.min())
        late = run_sampler(sampler, denoiser, shipped.schedule, noise, stop_after(rounds * 9 // 10))
        once = run_sampler(sampler, denoiser, shipped.schedule, noise, stop_after(1))
    assert once.x.abs().max() <= 1.0  # an estimate of the clean sample, not a noisy state
    assert (late.x - whole.x).square().mean() < 0.5 * (once.x - whole.x).square().mean()
    assert (late.residual < once.residual).all()


def parallel_scheduler(solver: str, config: dict[str, Any], steps: int, **settings: Any) -> Any:
    """diffusers' scheduler for the published loop."""
    kind = DDPMParallelScheduler if solver == "ddpm" else DDIMParallelScheduler
    known = inspect.signature(kind.__init__).parameters
    scheduler = kind.from_config({k: v for k, v in config.items() if k in known} | settings)
    scheduler.set_timesteps(steps)
    return scheduler


def published_paradigms(
    predict: Callable[[Tensor, Tensor], Tensor], scheduler: Any, noise: Tensor, window: int, tolerance: float
) -> tuple[Tensor, int]:
    """Algorithm 1 for a batch of one, on diffusers' own parallel scheduler; (H, D) sample and rounds."""
    steps = len(scheduler.timesteps)
    variance = torch.stack([scheduler._get_variance(t) for t in scheduler.timesteps])
    inverse = torch.cat((1 / variance, torch.tensor([torch.inf]))) / noise[0].numel()
    states = noise[0].repeat(steps + 1, 1, 1)
    added = variance.sqrt() if isinstance(scheduler, DDPMParallelScheduler) else torch.zeros_like(variance)
    scaled = added[:, None, None] * noise[1:]
    begin, end, rounds = 0, min(window, steps), 0
    while begin < steps:
        rounds += 1
        block, times = states[begin:end], scheduler.timesteps[begin:end]
        moved = scheduler.batch_step_no_noise(predict(block, times), times, block)
        new = states[begin] + (moved - block).cumsum(0) + scaled[begin:end].cumsum(0)
        ratio = (new - states[begin + 1 : end + 1]).flatten(1).square().sum(1) * inverse[begin + 1 : end + 1]
        failed = (ratio > tolerance**2).nonzero()
        ahead = min(1 + int(failed[0]) if len(failed) else end - begin, window)
        states[begin + 1 : end + 1] = new
        new_begin = begin + ahead
        new_end = min(new_begin + window, steps)
        states[end : new_end + 1] = states[end].clone()
        begin, end = new_begin, new_end
    return states[-1], rounds


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("window", "tolerance"), [(20, 0.1), (7, 0.3), (100, 0.05), (1, 0.1)])
@pytest.mark.parametrize(("solver", "steps"), [("ddpm", 60), ("ddim", 30)])
def test_paradigms_is_the_published_algorithm(
    solver: str, steps: int, seed: int, window: int, tolerance: float
) -> None:
    """Same rounds and same result as the published loop driven by diffusers' parallel schedulers."""
    torch.manual_seed(seed)
    spec = small_spec(scheduler={**DDPM_CONFIG, "num_train_timesteps": 60})
    policy = small_policy(scheduler=spec.scheduler).with_schedule(solver, steps)
    schedule = policy.schedule
    scheduler = parallel_scheduler(solver, spec.scheduler, steps)
    condition = torch.randn(1, spec.condition_dim)
    noise = parapolicy.draw_noise(schedule, 1, seed)

    def predict(x: Tensor, timestep: Tensor) -> Tensor:
        return call_network(policy.network, x, timestep, condition.expand(len(x), -1))

    expected, rounds = published_paradigms(predict, scheduler, noise[:, 0], window, tolerance)
    sampler: Sampler = make_sampler("paradigms", window=window, tolerance=tolerance)
    sample = run_sampler(sampler, bind(policy, condition), schedule, noise.flatten(2))
    assert int(sample.rounds[0]) == rounds
    torch.testing.assert_close(sample.x[0], expected.flatten(), rtol=0, atol=1e-5)


def test_the_published_fault_in_ddim_is_mended() -> None:
    """With ``set_alpha_to_one`` off, diffusers' batched step ends elsewhere than its own ``step``; ours does not."""
    settings = {"set_alpha_to_one": False, "clip_sample": False}
    config = {**DDPM_CONFIG, **settings, "num_train_timesteps": 60}
    policy = small_policy(scheduler=config).with_schedule("ddim", 20)
    network, schedule = policy.network, policy.schedule
    scheduler = parallel_scheduler("ddim", config, 20, **settings)
    condition = torch.randn(1, small_spec().condition_dim)
    noise = parapolicy.draw_noise(schedule, 1, 0)
    x = noise[0]
    for t in scheduler.timesteps:
        x = scheduler.step(call_network(network, x, t[None], condition), t, x).prev_sample
    sample = run_sampler(make_sampler("paradigms", window=1), bind(policy, condition), schedule, noise.flatten(2))
    torch.testing.assert_close(sample.x, x.flatten(1), rtol=0, atol=1e-4)

    def predict(x: Tensor, timestep: Tensor) -> Tensor:
        return call_network(network, x, timestep, condition.expand(len(x), -1))

    published, _ = published_paradigms(predict, scheduler, noise[:, 0], window=1, tolerance=0.0)
    assert (published - x[0]).abs().max() > 1e-3


@pytest.mark.parametrize(("solver", "steps"), [("ddpm", None), ("ddim", 25), ("dpmsolver++", 20)])
@pytest.mark.parametrize("name", PARALLEL)
def test_shipped_policy_is_exact_at_tolerance_zero(
    shipped: parapolicy.Policy, name: str, solver: str, steps: int | None
) -> None:
    policy = shipped.with_schedule(solver, steps)
    condition = torch.rand(1, policy.spec.condition_dim) * 2 - 1
    denoiser = bind(policy, condition)
    noise = flat_noise(policy.schedule, 1, seed=0)
    with torch.inference_mode():
        expected = run_sampler(Sequential(), denoiser, policy.schedule, noise)
        sample = run_sampler(make_sampler(name, window=20, tolerance=0.0), denoiser, policy.schedule, noise)
    torch.testing.assert_close(sample.x, expected.x, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        ("picard", {}, "sampler is 'picard', expected one of"),
        ("paradigms", {"windw": 3}, r"no parameters \['windw'\]"),
        ("sequential", {"window": 3}, "expected none"),
    ],
)
def test_unknown_names_are_named(name: str, parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_sampler(name, **parameters)


COUNTS = (0, -1, 2.5, True, "2")
INVALID: dict[str, dict[str, tuple[Any, ...]]] = {
    "sequential": {},
    "paradigms": {"window": (*COUNTS, None), "tolerance": (-1.0, float("nan"), float("inf"), "0.1", None)},
    "semi_implicit": {"window": COUNTS, "tolerance": (-1.0, float("nan"))},
    "anderson": {"window": COUNTS, "tolerance": (-1.0,), "history": COUNTS, "triangular": ("no", 2, None)},
    "secant": {"window": COUNTS, "tolerance": (-1.0,), "history": (-1, 0.5, True)},
    "speculative": {"window": COUNTS, "calls": (0, 3, True, "1")},
    "parareal": {"tolerance": (-1.0,), "blocks": COUNTS},
    "collocation": {
        "nodes": (0, True, (), (3, 2), (-1, 5), (1.5, 3)),
        "window": COUNTS,
        "settle": (0, -1.0, True, "1"),
    },
    "restart": {"last": COUNTS, "renoise": ("no", 1, None)},
    "partial_denoising": {"levels": COUNTS, "threshold": (-1.0, True, "1"), "explore": (-0.1, "1", None)},
    "genetic": {"population": COUNTS, "temperature": (0, -1.0, True, "1")},
}


def test_every_parameter_of_every_sampler_has_invalid_values_here() -> None:
    known = {name: {f.name for f in dataclasses.fields(make_sampler(name))} for name in parapolicy.list_samplers()}
    assert {name: set(values) for name, values in INVALID.items()} == known


@pytest.mark.parametrize(
    ("name", "parameter", "value"),
    [(name, key, value) for name, invalid in INVALID.items() for key, values in invalid.items() for value in values],
)
def test_a_refused_value_is_told_with_its_parameter(name: str, parameter: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"^{parameter} is {re.escape(repr(value))}, expected"):
        make_sampler(name, **{parameter: value})
