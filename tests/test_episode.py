"""What each chunk of an episode is computed from, and chunks of several episodes in one batch."""

import time

import numpy as np
import torch

from parapolicy.episode import Episode, group_requests, predict_together
from parapolicy.policy import Policy
from tests.helpers import small_policy, some_observation


def push(episode: Episode, seed: int) -> None:
    """One control step's made-up observation."""
    episode.push({key: value[0] for key, value in some_observation(episode.spec, seed=seed).items()})


def after_first_chunk(policy: Policy, steps: int, seed: int = 0) -> Episode:
    """A warm-started episode, ``steps`` control steps after the observation of its first chunk."""
    episode = Episode(policy.spec, (seed,), warm_start=True)
    push(episode, seed)
    request = episode.request()
    episode.accept(request, predict_together(policy, [request])[0])
    for k in range(steps):
        push(episode, 100 * seed + k)
    return episode


def test_cold_and_warm_chunks_are_sampled_apart() -> None:
    policy = small_policy("semi_implicit")
    episodes = [after_first_chunk(policy, steps) for steps in (4, 8, 3, 8, 4)]  # the horizon is 8: no overlap, cold
    requests = [episode.request() for episode in episodes]
    assert [request.executed for request in requests] == [4, None, 3, None, 4]
    assert group_requests(requests) == [[0, 4], [1, 3], [2]]


def test_each_episode_in_a_batch_starts_from_its_own_chunk() -> None:
    policy = small_policy("semi_implicit")
    requests = [after_first_chunk(policy, 4, seed).request() for seed in (1, 2)]
    for request, chunk in zip(requests, predict_together(policy, requests), strict=True):
        alone = policy.predict(request.observation, seed=request.seed, warm=request.warm, executed=request.executed)
        assert torch.equal(chunk.warm_state.noise, alone.warm_state.noise)  # shifted along with the chunk before
        np.testing.assert_allclose(chunk.trajectory, alone.trajectory, atol=1e-2)  # units of 100


def test_a_batch_of_requests_is_given_the_deadline() -> None:
    policy = small_policy("sequential")
    episodes = [Episode(policy.spec, (seed,)) for seed in range(2)]
    for seed, episode in enumerate(episodes):
        push(episode, seed)
    requests = [episode.request() for episode in episodes]
    chunks = predict_together(policy, requests, deadline=time.monotonic())  # past at once: one round
    assert [chunk.stats.complete for chunk in chunks] == [False, False]
    assert all(chunk.stats.complete for chunk in predict_together(policy, requests))
