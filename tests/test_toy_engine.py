"""An engine of a third party: one class that binds a network, run by policy and controller unchanged."""

import dataclasses
from collections.abc import Mapping

import numpy as np
import pytest
import torch
from torch import Tensor

import parapolicy
from parapolicy.denoiser import Evaluate
from parapolicy.engine import Engine
from parapolicy.networks import Network
from tests.helpers import small_policy, some_observation


class Halves(Engine):
    """Computes each call in two."""

    name = "halves"

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def bind(self, network: Network, timesteps: Tensor, observation: Mapping[str, Tensor]) -> Evaluate:
        steps, condition = network.embed_steps(timesteps), network.embed_condition(observation)

        def evaluate(*inputs: Tensor) -> Tensor:
            parts = list(zip(*(value.tensor_split(2) for value in inputs), strict=True))
            self.sizes += [len(part[0]) for part in parts]
            return torch.cat([network(x, steps, condition, step, element) for x, step, element in parts])

        return evaluate


@pytest.mark.parametrize("sampler", parapolicy.list_samplers())
def test_every_sampler_runs_with_it(sampler: str) -> None:
    policy = small_policy(sampler)
    halves = Halves()
    observation = some_observation(policy.spec, batch=2)
    expected = policy.predict(observation, seed=3)
    chunk = dataclasses.replace(policy, engine=halves).predict(observation, seed=3)
    np.testing.assert_allclose(chunk.trajectory, expected.trajectory, rtol=0, atol=0.05)
    assert sum(halves.sizes) == chunk.stats.evaluations.sum()


def test_a_controller_runs_with_it() -> None:
    policy = dataclasses.replace(small_policy(), engine=Halves())
    observation = {key: value[0] for key, value in some_observation(policy.spec).items()}
    with parapolicy.Controller(policy) as controller:
        assert np.isfinite([controller.act(observation) for _ in range(6)]).all()
