"""Parareal sampling is exact after its sweeps, and saves rounds before."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import parapolicy
from parapolicy.samplers import Parareal, Sequential
from tests.helpers import bind, flat_noise, run_sampler
from tests.test_samplers import counting, problems, stop_after


@given(problem=problems(), data=st.data())
def test_all_sweeps_are_sequential(problem: Any, data: st.DataObject) -> None:
    schedule, denoiser, noise = problem
    blocks = data.draw(st.one_of(st.none(), st.integers(1, len(schedule))))
    guess = data.draw(st.sampled_from([None, torch.randn(noise.shape[1], *noise[1:, 0].shape)]))
    expected = run_sampler(Sequential(), denoiser, schedule, noise)
    sample = run_sampler(Parareal(0.0, blocks), denoiser, schedule, noise, guess=guess)
    scale = max(1.0, float(expected.x.abs().max()))
    torch.testing.assert_close(sample.x, expected.x, rtol=1e-5, atol=1e-4 * scale)
    torch.testing.assert_close(sample.u, expected.u, rtol=1e-5, atol=1e-3 * scale)
    assert sample.complete.all()


@given(problem=problems(), data=st.data())
def test_costs_are_what_happened_and_elements_are_alone(problem: Any, data: st.DataObject) -> None:
    schedule, denoiser, noise = problem
    sampler = Parareal(data.draw(st.sampled_from([0.0, 0.1, 1.0])))
    log: list[Tensor] = []
    together = run_sampler(sampler, counting(denoiser, log), schedule, noise)
    calls = torch.cat(log, 1)
    for b in range(noise.shape[1]):
        assert together.rounds[b] == sum(bool((entries[1] == b).any()) for entries in log)
        assert together.evaluations[b] == int((calls[1] == b).sum())

        def alone(x: Tensor, step: Tensor, element: Tensor, b: int = b) -> Tensor:
            return denoiser(x, step, element + b)

        single = run_sampler(sampler, alone, schedule, noise[:, b : b + 1])
        assert torch.equal(single.x[0], together.x[b])
        assert single.rounds[0] == together.rounds[b]


@given(problem=problems(), data=st.data())
def test_stopping_early_returns_what_there_is(problem: Any, data: st.DataObject) -> None:
    schedule, denoiser, noise = problem
    guess = data.draw(st.sampled_from([None, torch.zeros(noise.shape[1], *noise[1:, 0].shape)]))
    budget = data.draw(st.integers(0, 30))
    whole = run_sampler(Parareal(), denoiser, schedule, noise, guess=guess)
    early = run_sampler(Parareal(), denoiser, schedule, noise, stop_after(budget), guess)
    assert torch.equal(early.rounds, whole.rounds.clamp(max=max(1, budget)))
    assert torch.isfinite(early.x).all()
    assert torch.equal(early.x[early.complete], whole.x[early.complete])


@pytest.mark.parametrize(("solver", "steps"), [("ddpm", None), ("dpmsolver++", 20)])
def test_on_the_shipped_policy(shipped: parapolicy.Policy, solver: str, steps: int | None) -> None:
    policy = shipped.with_schedule(solver, steps)
    denoiser = bind(policy, torch.rand(3, policy.spec.condition_dim) * 2 - 1)
    noise = flat_noise(policy.schedule, 3, seed=0)
    with torch.inference_mode():
        expected = run_sampler(Sequential(), denoiser, policy.schedule, noise)
        exact = run_sampler(Parareal(0.0), denoiser, policy.schedule, noise)
        loose = run_sampler(Parareal(0.1), denoiser, policy.schedule, noise)
        warm = run_sampler(Parareal(0.1), denoiser, policy.schedule, noise, guess=expected.u)
    torch.testing.assert_close(exact.x, expected.x, rtol=0, atol=1e-5)
    assert (loose.x - expected.x).abs().max() < 0.05
    assert (warm.x - expected.x).abs().max() < 1e-4
    assert (warm.rounds <= loose.rounds).all()
    assert (loose.rounds < exact.rounds).all()
    if steps is None:
        assert (loose.rounds < len(policy.schedule)).all()
