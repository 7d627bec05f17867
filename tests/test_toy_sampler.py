"""A sampler of a third party: one class with one kind of rounds, run by policy, controller and engines unchanged."""

import dataclasses
import time
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

import parapolicy
from parapolicy.engine import make_engine
from parapolicy.samplers import DenoiserLike, Rounds, Sample, Sampler
from parapolicy.schedule import Schedule
from tests.helpers import small_policy, some_observation


@dataclass(frozen=True)
class Jacobi(Sampler):
    """Every state at once, each from the last round's state before it, for a number of rounds."""

    count: int

    def rounds(self, schedule: Schedule, noise: Tensor, compiled: bool = False) -> "JacobiRounds":
        return JacobiRounds(self.count, schedule)


class JacobiRounds(Rounds):
    def __init__(self, count: int, schedule: Schedule) -> None:
        self.count, self.schedule = count, schedule

    @property
    def done(self) -> bool:
        return self.taken == self.count

    def begin(self, noise: Tensor, guess: Tensor | None) -> None:
        steps, batch = len(self.schedule), noise.shape[1]
        self.z, self.taken = noise[1:].transpose(0, 1), 0
        self.x = noise[0][:, None].repeat(1, steps + 1, 1)
        self.step = torch.arange(steps).repeat(batch, 1)
        self.element = torch.arange(batch).repeat_interleave(steps)

    def advance(self, denoiser: DenoiserLike) -> None:
        before = self.x[:, :-1]
        self.u = denoiser(before.flatten(0, 1), self.step.flatten(), self.element).view_as(before)
        self.x[:, 1:] = self.schedule.step(before, self.u, self.u, self.z, self.step)
        self.taken += 1

    def result(self) -> Sample:
        rounds = torch.full((len(self.x),), self.taken)
        complete = torch.full_like(rounds, self.done, dtype=torch.bool)
        return Sample(self.x[:, -1], self.u, rounds, rounds * len(self.schedule), torch.zeros(len(self.x)), complete)


def test_it_is_sequential_after_as_many_rounds_as_steps() -> None:
    policy = small_policy()
    observation = some_observation(policy.spec, batch=2)
    expected = policy.predict(observation, seed=1).trajectory
    jacobi = dataclasses.replace(policy, sampler=Jacobi(len(policy.schedule)))
    chunk = jacobi.predict(observation, seed=1)
    np.testing.assert_allclose(chunk.trajectory, expected, rtol=0, atol=1e-2)
    assert chunk.stats.rounds.tolist() == [20, 20]
    early = jacobi.predict(observation, seed=1, deadline=time.monotonic())
    assert early.stats.rounds.tolist() == [1, 1]
    assert not early.stats.complete.any()


def test_controllers_and_engines_run_it() -> None:
    policy = dataclasses.replace(small_policy(), sampler=Jacobi(20))
    with parapolicy.Controller(policy) as controller:
        observation = {key: value[0] for key, value in some_observation(policy.spec).items()}
        actions = [controller.act(observation) for _ in range(6)]
    assert np.isfinite(actions).all()
    one = dataclasses.replace(policy, engine=make_engine("eager", policy.device))
    np.testing.assert_array_equal(
        one.predict(some_observation(policy.spec)).trajectory, policy.predict(some_observation(policy.spec)).trajectory
    )
