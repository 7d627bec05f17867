"""Warm starts: the guess saves rounds and changes nothing; the noise stays standard normal."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from envs import make_env
from parapolicy.denoiser import Denoiser
from parapolicy.engine import Eager
from parapolicy.evaluate.run.rollout import rollout
from parapolicy.noise import draw_noise
from parapolicy.observation import normalize_observation
from parapolicy.policy import Policy
from parapolicy.warm import WarmState
from tests.helpers import run_sampler, small_policy, some_observation

FIXED_POINT = ["paradigms", "semi_implicit", "anderson", "secant"]


def test_shifted_noise_is_standard_normal_and_independent() -> None:
    """Over a chain of chunks: every chunk's noise passes for N(0, I), and neighbours share what they should."""
    policy = small_policy()
    executed, steps = policy.spec.n_action_steps, len(policy.schedule)
    count, last = 300, []
    state = WarmState(torch.zeros(count, steps, 8, 2), draw_noise(policy.schedule, count, seed=0))
    for chunk in range(1, 4):
        noise = state.shift_noise(draw_noise(policy.schedule, count, seed=chunk), executed)
        assert torch.equal(noise[:, :, :-executed], state.noise[:, :, executed:])
        state = WarmState(state.estimates, noise)
        last = noise.transpose(0, 1).reshape(count, -1).double().numpy()
    assert stats.kstest(last.ravel(), "norm").pvalue > 1e-3
    correlation = np.corrcoef(last[:, :200].T)
    off = correlation[np.triu_indices(200, 1)] * np.sqrt(count)
    assert stats.kstest(off, "norm").pvalue > 1e-3  # any repeated number would stand out with correlation 1
    assert abs(off).max() < 6


@pytest.mark.parametrize("shift_noise", [True, False])
@pytest.mark.parametrize("name", FIXED_POINT)
def test_exact_warm_start_equals_sequential(name: str, shift_noise: bool) -> None:
    policy = small_policy().with_sampler(name, window=6, tolerance=0.0)
    first = policy.predict(some_observation(policy.spec, batch=3), seed=1)
    observation = some_observation(policy.spec, batch=3, seed=5)
    chunk = policy.predict(observation, seed=2, warm=first.warm_state, shift_noise=shift_noise)
    fresh = draw_noise(policy.schedule, 3, seed=2)
    noise = first.warm_state.shift_noise(fresh, policy.spec.n_action_steps) if shift_noise else fresh
    assert torch.equal(chunk.warm_state.noise, noise)
    expected = policy.with_sampler("sequential").predict(observation, noise=noise)
    np.testing.assert_allclose(chunk.trajectory, expected.trajectory, rtol=1e-4, atol=2e-3)


@pytest.mark.parametrize("name", FIXED_POINT)
def test_a_perfect_guess_leaves_one_round_per_window(name: str) -> None:
    policy = small_policy().with_sampler("sequential")
    observation = some_observation(policy.spec)
    state = policy.predict(observation, seed=1).warm_state
    sampler = policy.with_sampler(name, window=10, tolerance=0.1)
    noise, guess = state.noise.flatten(2), state.estimates.flatten(2)
    sample = run_sampler(sampler.sampler, _denoiser(policy, observation), policy.schedule, noise, guess=guess)
    assert int(sample.rounds[0]) <= 3  # two windows; ParaDiGMS waits for its last states to stand still


class Noting(Eager):
    """Keeps the last call's noise and guess."""

    def run(self, sampler: Any, denoiser: Any, noise: Any, stop: Any = None, guess: Any = None) -> Any:
        self.noise, self.guess = noise, guess
        return super().run(sampler, denoiser, noise, stop, guess)


@pytest.mark.parametrize(("name", "shared"), [("secant", True), ("speculative", False)])
def test_the_guess_is_shifted_and_noise_is_shared_only_where_that_is_exact(name: str, shared: bool) -> None:
    engine = Noting()
    policy = dataclasses.replace(small_policy(name), engine=engine)
    observation = some_observation(policy.spec)
    state = policy.predict(observation, seed=1).warm_state
    assert engine.guess is None
    policy.predict(observation, seed=2, warm=state, executed=3)
    assert torch.equal(engine.guess, state.guess(3).flatten(2))
    assert not torch.equal(engine.guess, state.guess(0).flatten(2))
    fresh = draw_noise(policy.schedule, 1, seed=2)
    assert torch.equal(engine.noise, (state.shift_noise(fresh, 3) if shared else fresh).flatten(2))


@pytest.mark.parametrize("executed", [-1, 8])
def test_chunks_that_do_not_overlap_share_no_state(executed: int) -> None:
    policy = small_policy()
    observation = some_observation(policy.spec)
    state = policy.predict(observation).warm_state
    with pytest.raises(ValueError, match=f"executed is {executed}, expected 0 to 7"):
        policy.predict(observation, warm=state, executed=executed)
    policy.predict(observation, warm=state, executed=7)


def test_a_second_chunk_of_one_moment_is_the_first_again() -> None:
    """After no step, all noise is the first chunk's, whatever the seed."""
    policy = small_policy("secant")
    first = policy.predict(some_observation(policy.spec), seed=1)
    again = policy.predict(some_observation(policy.spec), seed=2, warm=first.warm_state, executed=0)
    assert torch.equal(again.warm_state.noise, first.warm_state.noise)
    np.testing.assert_allclose(again.trajectory, first.trajectory, atol=0.2)  # of 100, at secant's tolerance


def _denoiser(policy: Policy, observation: dict) -> Denoiser:
    inputs, _ = normalize_observation(policy.spec, policy.normalizer, observation)
    evaluate = policy.engine.bind(policy.network, policy.schedule.timesteps, inputs)
    return Denoiser(evaluate, policy.schedule, policy.spec.sample_shape)


def test_an_element_starts_warm_alone_as_in_a_batch(shipped: Policy) -> None:
    policy = dataclasses.replace(shipped.with_sampler("semi_implicit"), reproducible=True)
    rng = np.random.default_rng(0)
    shapes = [(key, feature.shape) for key, feature in policy.spec.observation.items()]
    observation = {key: rng.uniform(150, 350, (8, 2, *shape)).astype(np.float32) for key, shape in shapes}
    state = policy.predict(observation, seed=1).warm_state
    warm = policy.predict(observation, seed=2, warm=state)
    alone = {key: value[3:4] for key, value in observation.items()}
    one = policy.predict(alone, noise=warm.warm_state.noise[:, 3:4], warm=state[3])
    assert one.stats.rounds[0] == warm.stats.rounds[3]
    np.testing.assert_allclose(one.trajectory[0], warm.trajectory[3], rtol=1e-5, atol=1e-3)


def test_a_new_episode_starts_cold(shipped: Policy) -> None:
    """Episodes with warm starts depend neither on the environments beside them nor on those that ended before."""
    policy = dataclasses.replace(shipped.with_sampler("semi_implicit", tolerance=1.0), warm_start=True)

    def run(num_envs: int) -> dict[int, list[float]]:
        episodes = rollout(policy, lambda: make_env("pusht", policy.spec, max_episode_steps=24), [3, 4, 5], 0, num_envs)
        return {episode.seed: [*episode.rewards, *episode.rounds] for episode in episodes}

    assert run(1) == run(2)


def test_a_state_that_does_not_fit_is_refused() -> None:
    policy = small_policy("semi_implicit")
    state = policy.predict(some_observation(policy.spec, batch=2)).warm_state
    with pytest.raises(ValueError, match="warm state's estimates have shape"):
        policy.predict(some_observation(policy.spec), warm=state)
    with pytest.raises(ValueError, match="same policy, schedule"):
        policy.with_schedule("ddim", 5).predict(some_observation(policy.spec, batch=2), warm=state)


@pytest.mark.parametrize("executed", [1, 2, 3])
def test_the_guess_is_the_estimates_later_and_the_last_one_repeated(executed: int) -> None:
    estimates = torch.arange(2 * 3 * 4 * 2.0).view(2, 3, 4, 2)
    guess = WarmState(estimates, torch.zeros(4, 2, 4, 2)).guess(executed)
    expected = [estimates[:, :, min(h + executed, 3)] for h in range(4)]
    torch.testing.assert_close(guess, torch.stack(expected, 2), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["estimates", "noise"])
def test_either_part_of_a_wrong_shape_is_refused(name: str) -> None:
    good = WarmState(torch.zeros(1, 3, 4, 2), torch.zeros(4, 1, 4, 2))
    good.check((4, 1, 4, 2))
    bad = dataclasses.replace(good, **{name: torch.zeros(1, 3, 4, 3)})
    with pytest.raises(ValueError, match=r"warm state's .* expected \(1, 3, 4, 2\) and \(4, 1, 4, 2\)"):
        bad.check((4, 1, 4, 2))
