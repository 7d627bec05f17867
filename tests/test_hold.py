"""Chunks that are sampled with some of their actions held."""

import dataclasses
import re
import shutil
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from parapolicy.denoiser import Denoiser
from parapolicy.engine import Engine, Fused
from parapolicy.episode import Episode, group_requests, predict_together
from parapolicy.hold import HeldNumbers, Hold, hold_weights
from parapolicy.noise import draw_noise
from parapolicy.policy import Policy
from parapolicy.samplers import Sequential, make_sampler
from parapolicy.schedule import Schedule, make_schedule
from tests.helpers import (
    DDPM_CONFIG,
    flat_noise,
    linear_denoiser,
    network_inputs,
    run_sampler,
    small_policy,
    some_observation,
)

SHAPE = (4, 2)
EXACT = ["paradigms", "semi_implicit", "anderson", "secant", "parareal"]  # sequential, at tolerance 0
SCHEDULES: dict[str, dict[str, Any]] = {
    "ddpm": {},
    "ddim": {"solver": "ddim", "steps": 7, "eta": 0.5},
    "dpmsolver++": {"solver": "dpmsolver++", "steps": 8},
}


def linear_problem(draw: st.DrawFn) -> tuple[Schedule, Denoiser, Tensor]:
    """A random linear denoiser of a random schedule, with numbers held, and its noise."""
    config = {**DDPM_CONFIG, "prediction_type": "sample", "num_train_timesteps": 25, "clip_sample": draw(st.booleans())}
    schedule = make_schedule(config, **SCHEDULES[draw(st.sampled_from(sorted(SCHEDULES)))])
    batch, seed = draw(st.integers(1, 3)), draw(st.integers(0, 1000))
    linear = linear_denoiser(schedule, batch, SHAPE, gain=0.6, seed=seed)
    weights = torch.tensor(draw(st.lists(st.sampled_from([0.0, 0.0, 0.3, 1.0]), min_size=4, max_size=4)))
    weight = weights.repeat_interleave(2).expand(batch, -1)
    value = torch.rand(batch, 8, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    held = HeldNumbers(value * weight, 1 - weight)

    def evaluate(x: Tensor, step: Tensor, element: Tensor) -> Tensor:
        return linear(x.flatten(1), step, element).view_as(x)

    noise = flat_noise(schedule, batch, seed, SHAPE)
    noise[0] = held.first_state(noise[0], schedule)
    return schedule, Denoiser(evaluate, schedule, SHAPE, held=held), noise


@pytest.mark.parametrize("name", EXACT)
@settings(max_examples=20)
@given(data=st.data())
def test_a_parallel_held_solve_is_the_sequential_one(name: str, data: st.DataObject) -> None:
    schedule, denoiser, noise = data.draw(st.composite(linear_problem)())
    guess = data.draw(st.sampled_from([None, 0.3]))  # cold, warm
    window = {} if name == "parareal" else {"window": data.draw(st.integers(1, len(schedule)))}
    estimates = None if guess is None else torch.full((noise.shape[1], len(schedule), 8), guess)
    expected = run_sampler(Sequential(), denoiser, schedule, noise)
    sample = run_sampler(make_sampler(name, tolerance=0.0, **window), denoiser, schedule, noise, guess=estimates)
    torch.testing.assert_close(sample.x, expected.x, rtol=1e-5, atol=1e-5 * max(1.0, float(expected.x.abs().max())))


@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_a_held_number_is_at_every_level_the_action_with_that_level_s_noise(name: str) -> None:
    schedule = make_schedule({**DDPM_CONFIG, "prediction_type": "sample"}, **SCHEDULES[name])
    batch, value = 4000, 0.7
    held = HeldNumbers(torch.full((batch, 8), value), torch.zeros(batch, 8))
    states: list[Tensor] = []

    def evaluate(x: Tensor, step: Tensor, element: Tensor) -> Tensor:
        states.append(x.flatten(1))
        return torch.zeros_like(x)

    noise = torch.randn(len(schedule) + 1, batch, 8, generator=torch.Generator().manual_seed(0))
    noise[0] = held.first_state(noise[0], schedule)
    sample = run_sampler(Sequential(), Denoiser(evaluate, schedule, SHAPE, held=held), schedule, noise)
    for j, x in enumerate(states):
        alpha, sigma = float(schedule.alpha[j]), float(schedule.sigma[j])
        assert float(x.mean()) == pytest.approx(alpha * value, abs=0.03 * sigma)
        assert float(x.std()) == pytest.approx(sigma, rel=0.03)
    torch.testing.assert_close(sample.x, held.part, atol=0.05, rtol=0)  # some schedules end with a little noise


def a_hold(policy: Policy, batch: int, committed: int = 3, soft: bool = False) -> Hold:
    rng, spec = np.random.default_rng(1), policy.spec
    actions = rng.uniform(-40, 140, (batch, spec.horizon, spec.action_dim)).astype(np.float32)
    return Hold(actions, hold_weights(spec.horizon, 1, committed, 5, soft))


@pytest.mark.parametrize("sampler", ["sequential", "collocation", "secant", "paradigms", "speculative"])
@pytest.mark.parametrize("schedule", [{}, {"solver": "ddim", "steps": 5}])
def test_held_actions_come_out_exactly(sampler: str, schedule: dict[str, Any]) -> None:
    policy = small_policy(sampler).with_schedule(**schedule)
    observation, hold = some_observation(policy.spec, batch=2), a_hold(small_policy(), 2)
    held, plain = policy.predict(observation, hold=hold), policy.predict(observation)
    np.testing.assert_array_equal(held.trajectory[:, 1:4], hold.actions[:, 1:4])
    np.testing.assert_array_equal(held.actions[:, :3], hold.actions[:, 1:4])
    assert (held.trajectory[:, 4:] != plain.trajectory[:, 4:]).any()  # the network has seen them
    assert not (held.trajectory[:, 4:] == hold.actions[:, 4:]).any()


def test_a_soft_hold_draws_the_chunk_nearer_the_less_the_later() -> None:
    policy = small_policy("sequential")
    observation = some_observation(policy.spec, batch=16)
    hold = a_hold(policy, 16, soft=True)
    soft, plain = (policy.predict(observation, hold=h).trajectory for h in (hold, None))
    kept = 1 - hold.weights[0]
    distances = [np.abs(chunk - hold.actions).mean((0, 2))[4:6] for chunk in (soft, plain)]
    assert (distances[0] < distances[1]).all()
    assert 0 < kept[4] < kept[5] < 1


@pytest.mark.parametrize("sampler", ["sequential", "collocation", "secant"])
def test_an_empty_hold_is_none_to_the_bit(sampler: str) -> None:
    policy = dataclasses.replace(small_policy(sampler), reproducible=True)
    observation = some_observation(policy.spec, batch=2)
    expected = policy.predict(observation).trajectory
    hold = a_hold(policy, 2, committed=0)
    np.testing.assert_array_equal(policy.predict(observation, hold=hold).trajectory, expected)
    weights = np.stack((hold_weights(8, 1, 3, 5, False), np.zeros(8)))  # of one element, nothing is held
    beside = policy.predict(observation, hold=Hold(hold.actions, weights)).trajectory
    np.testing.assert_array_equal(beside[1], expected[1])
    assert (beside[0] != expected[0]).any()


class PerRound(Fused):
    """The native network with the samplers' rounds in Python."""

    def run(self, *arguments: Any, **options: Any) -> Any:
        return Engine.run(self, *arguments, **options)


@pytest.mark.parametrize(
    ("clips", "action", "value"),  # 100 units are 0.5 normalised
    [(True, 100.0, 0.5), (True, 300.0, 1.0), (True, -100.0, -1.0), (False, 300.0, 2.5)],
)
def test_a_policy_s_network_first_sees_the_held_actions_at_the_highest_level_of_noise(
    clips: bool, action: float, value: float
) -> None:
    policy = small_policy(scheduler={**DDPM_CONFIG, "num_train_timesteps": 20, "clip_sample": clips})
    schedule = policy.schedule
    hold = Hold(np.full((8, 2), action), [0, 1, 0, 0, 0, 0, 0, 0])
    noise = draw_noise(schedule, 1, seed=3)
    with network_inputs() as calls:
        chunk = policy.predict(some_observation(policy.spec), noise, hold=hold)
    assert torch.equal(chunk.warm_state.noise, noise)  # the next chunk goes on with noise alone
    assert chunk.trajectory[1].tolist() == [action, action]
    soft = policy.predict(some_observation(policy.spec), noise, hold=Hold(hold.actions, 0.9 * hold.weights))
    assert (soft.trajectory[1] != action).all()  # drawn towards it, and not it
    expected = noise[0].clone()
    expected[:, 1] = schedule.alpha[0] * value + schedule.sigma[0] * noise[0, :, 1]
    torch.testing.assert_close(calls[0][0], expected)


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ here")
@pytest.mark.parametrize(("sampler", "tolerance"), [("sequential", 0.0), ("collocation", 1e-4)])
@pytest.mark.parametrize("soft", [False, True])
def test_the_native_loop_holds_too(sampler: str, tolerance: float, soft: bool) -> None:
    policy = small_policy(sampler)
    observation, hold = some_observation(policy.spec, batch=3), a_hold(policy, 3, soft=soft)
    native, by_rounds = (
        dataclasses.replace(policy, engine=engine).predict(observation, hold=hold, seed=3)
        for engine in (Fused(), PerRound())
    )
    np.testing.assert_allclose(native.trajectory, by_rounds.trajectory, rtol=0, atol=tolerance * 200)
    np.testing.assert_array_equal(native.trajectory[:, 1:4], hold.actions[:, 1:4])


def test_observed_numbers_of_a_sample_stay_free() -> None:
    policy = small_policy("sequential")
    policy = dataclasses.replace(policy, spec=dataclasses.replace(policy.spec, observed_dim=3))
    held = policy._held_numbers(a_hold(policy, 2), 2)
    free = held.free.view(2, 8, 5)
    assert (free[:, 1:4, :2] == 0).all()
    assert (free[:, :, 2:] == 1).all()
    assert (held.part.view(2, 8, 5)[:, :, 2:] == 0).all()


@pytest.mark.parametrize(
    ("actions", "weights", "message"),
    [
        (np.zeros((8, 2)), np.zeros(7), "actions of shape (8, 2) and weights of shape (7,)"),
        (np.zeros(8), np.zeros(8), "actions of shape (8,)"),
        (np.zeros((8, 2)), np.full(8, 1.5), "expected numbers from 0 (free) to 1"),
        (np.zeros((8, 2)), np.full(8, np.nan), "expected numbers from 0 (free) to 1"),
        (np.full((8, 2), np.nan), np.ones(8), "not finite"),
    ],
)
def test_a_hold_that_does_not_fit_is_refused(actions: Any, weights: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        Hold(actions, weights)


def test_a_hold_of_another_policy_is_refused() -> None:
    policy = small_policy()
    with pytest.raises(ValueError, match=re.escape("held actions have shape (6, 2), expected (8, 2)")):
        policy.predict(some_observation(policy.spec), hold=Hold(np.zeros((6, 2)), np.ones(6)))
    with pytest.raises(ValueError, match=re.escape("held actions have shape (1, 8, 2), expected (8, 2) or 3 of them")):
        policy.predict(some_observation(policy.spec, batch=3), hold=Hold(np.zeros((1, 8, 2)), np.ones((1, 8))))


def test_weights_of_real_time_chunking() -> None:
    """As the paper has them, for a horizon of 8 of which one step has passed."""
    np.testing.assert_array_equal(hold_weights(8, 1, 2, 5, False), [0, 1, 1, 0, 0, 0, 0, 0])
    soft = hold_weights(8, 1, 2, 5, True)
    c = np.array([3, 2, 1]) / 4
    np.testing.assert_allclose(soft[3:6], c * np.expm1(c) / np.expm1(1), rtol=1e-6)
    np.testing.assert_array_equal(soft[[0, 1, 2, 6, 7]], [0, 1, 1, 0, 0])
    np.testing.assert_array_equal(hold_weights(8, 1, 9, 5, False), [0, 1, 1, 1, 1, 1, 0, 0])


def test_an_episode_holds_what_the_running_chunk_has_for_the_same_time() -> None:
    policy = small_policy()
    episode = Episode(policy.spec, (3,))

    def push(seed: int) -> None:
        episode.push({key: value[0] for key, value in some_observation(policy.spec, seed=seed).items()})

    push(0)
    first = episode.request(committed=2)
    assert first.hold is None  # nothing is running yet
    chunk = policy.predict(first.observation, seed=first.seed)
    episode.accept(first, chunk)
    for seed in range(1, 4):
        push(seed)
    later = episode.request(committed=2)
    assert later.hold is not None
    assert (later.held_from, later.committed) == (0, 2)
    np.testing.assert_array_equal(later.hold.actions[1:3], chunk.trajectory[4:6])
    np.testing.assert_array_equal(later.hold.weights, [0, 1, 1, 0, 0, 0, 0, 0])
    plain = episode.request()
    together = [later, plain]
    assert group_requests(together) == [[0], [1]]  # no predict would hold for one and not for the other
    held = predict_together(policy, [later])[0].trajectory
    np.testing.assert_array_equal(held[1:3], chunk.trajectory[4:6])
    for seed in range(4, 9):
        push(seed)
    assert episode.request(committed=2).hold is None  # the two no longer overlap
