"""Few-step methods of other distributions: exact where their idea is taken to its limit, cheap where it is not."""

import dataclasses

import numpy as np
import pytest
import torch
from torch import Tensor

import parapolicy
from parapolicy.samplers import SAMPLERS, Genetic, PartialDenoising, Restart, Sampler, Sequential
from parapolicy.schedule import make_schedule
from tests.helpers import DDPM_CONFIG, flat_noise, run_sampler, small_policy, some_observation

SCHEDULE = make_schedule(DDPM_CONFIG, sample_shape=(4, 1))


def denoise(x: Tensor, step: Tensor, element: Tensor) -> Tensor:
    """u in a linear Gaussian world around 0.3, with variance 0.2."""
    alpha, sigma = SCHEDULE.alpha[step][:, None], SCHEDULE.sigma[step][:, None]
    return 0.3 + alpha * 0.2 * (x - alpha * 0.3) / (alpha**2 * 0.2 + sigma**2)


def drawn(sampler: Sampler, seed: int, guess: Tensor | None = None, batch: int = 2) -> parapolicy.samplers.Sample:
    return run_sampler(sampler, denoise, SCHEDULE, flat_noise(SCHEDULE, batch, seed=seed, shape=(4,)), guess=guess)


def test_they_say_that_they_are_other_distributions() -> None:
    marked = {name for name, sampler in SAMPLERS.items() if not sampler.keeps_distribution}
    assert marked == {"restart", "partial_denoising", "genetic"}


@pytest.mark.parametrize("sampler", [Restart(3), Restart(3, True), PartialDenoising(), Genetic(1)])
def test_the_first_chunk_of_an_episode_is_the_sequential_one(sampler: Sampler) -> None:
    expected, found = drawn(Sequential(), 1), drawn(sampler, 1)
    torch.testing.assert_close(found.x, expected.x, rtol=0, atol=1e-6)
    torch.testing.assert_close(found.u, expected.u, rtol=0, atol=1e-5)
    assert found.rounds.tolist() == found.evaluations.tolist() == [100, 100]


def test_a_restart_runs_the_last_steps_from_the_chunk_before() -> None:
    guess = drawn(Sequential(), 1).u
    found = drawn(Restart(3), 2, guess)
    assert found.rounds.tolist() == found.evaluations.tolist() == [3, 3]
    assert float((found.x - guess[:, -1]).abs().max()) < 0.1  # little noise is left there
    torch.testing.assert_close(found.u[:, :97], guess[:, :97])
    whole = drawn(Restart(100, True), 2, guess)
    torch.testing.assert_close(whole.x, drawn(Sequential(), 2).x, rtol=0, atol=2e-2)  # at the first step all is noise
    noised = drawn(Restart(3, True), 2, guess)
    assert not torch.allclose(noised.x, found.x, atol=1e-4)


def test_partial_denoising_goes_on_from_where_the_states_still_fit() -> None:
    sampler = PartialDenoising(8, 0.05, explore=0.0)
    noise = flat_noise(SCHEDULE, 2, seed=1, shape=(4,))
    before = run_sampler(Sequential(), denoise, SCHEDULE, noise)
    # The same noise and a world that stands still: its states all fit, and the chunk is the same.
    again = run_sampler(sampler, denoise, SCHEDULE, noise, guess=before.u)
    torch.testing.assert_close(again.x, before.x, rtol=0, atol=1e-5)
    assert again.rounds.tolist() == [1, 1]
    assert again.evaluations.tolist() == [8, 8]
    moved = run_sampler(sampler, lambda *a: denoise(*a) + 0.5, SCHEDULE, noise, guess=before.u)
    assert moved.rounds.tolist() == [101, 101]  # nothing fits
    expected = run_sampler(Sequential(), lambda *a: denoise(*a) + 0.5, SCHEDULE, noise)
    torch.testing.assert_close(moved.x, expected.x, rtol=0, atol=1e-5)


def test_partial_denoising_explores() -> None:
    guess = drawn(Sequential(), 1, batch=40).u
    found = drawn(PartialDenoising(8, 10.0, explore=0.5), 1, guess, batch=40)
    explored = int((found.rounds == 101).sum())
    assert 10 < explored < 30
    assert int((found.rounds == 1).sum()) == 40 - explored


def test_a_population_costs_its_members_and_prefers_what_is_likely() -> None:
    schedule = make_schedule(DDPM_CONFIG, "ddim", 5, eta=0.5)

    def wide(x: Tensor, step: Tensor, element: Tensor) -> Tensor:
        alpha, sigma = schedule.alpha[step][:, None], schedule.sigma[step][:, None]
        return alpha * 0.2 * x / (alpha**2 * 0.2 + sigma**2)

    noise = flat_noise(schedule, 200, seed=3, shape=(4,))
    alone, many = (run_sampler(Genetic(p), wide, schedule, noise) for p in (1, 16))
    assert (many.rounds == 5).all()
    assert (many.evaluations == 5 * 16).all()
    assert float(many.x.std()) < 0.9 * float(alone.x.std())


def test_an_element_of_a_population_is_as_alone() -> None:
    together = drawn(Genetic(4), 5, batch=3)
    noise = flat_noise(SCHEDULE, 3, seed=5, shape=(4,))
    for i in range(3):
        single = run_sampler(Genetic(4), denoise, SCHEDULE, noise[:, i : i + 1])
        torch.testing.assert_close(together.x[i], single.x[0], rtol=0, atol=1e-5)


def test_a_policy_restarts_from_its_warm_state() -> None:
    policy = dataclasses.replace(small_policy("restart"), warm_start=True)
    observation = some_observation(policy.spec)
    first = policy.predict(observation, seed=0)
    second = policy.predict(observation, seed=1, warm=first.warm_state)
    assert (first.stats.rounds, second.stats.rounds) == (20, 3)
    assert np.isfinite(second.actions).all()
