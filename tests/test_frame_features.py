"""Frames that a later chunk sees again are not encoded again, and its actions are the same to the bit."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch

import parapolicy
from parapolicy.episode import Episode, predict_together
from parapolicy.frame_features import FrameFeatures
from parapolicy.networks import build_network
from parapolicy.normalizer import Affine, Normalizer
from parapolicy.policy import Policy
from parapolicy.samplers import make_sampler
from parapolicy.schedule import make_schedule
from parapolicy.spec import Feature, PolicySpec
from tests.helpers import DDPM_CONFIG

CAMERA = {"width": 16, "levels": 1, "keypoints": 4, "features": 5}
SPEC = PolicySpec(
    {"a": Feature((20, 24, 3), "image"), "s": Feature((2,)), "b": Feature((16, 16, 3), "image")},
    2,
    8,
    1,
    3,
    {"name": "unet1d", "down_dims": [16], "encoder": {"cameras": {"a": CAMERA, "b": CAMERA}}},
    {**DDPM_CONFIG, "num_train_timesteps": 5},
    10.0,
)


@pytest.fixture(scope="module")
def policy() -> Policy:
    torch.manual_seed(0)
    network = build_network(SPEC).eval().requires_grad_(False)
    maps = {k: Affine(torch.full(shape, 2.0), torch.full(shape, -1.0)) for k, shape in SPEC.normalizer_shapes.items()}
    schedule = make_schedule(SPEC.scheduler, sample_shape=SPEC.sample_shape)
    return Policy(SPEC, network, Normalizer(maps), schedule, make_sampler("semi_implicit"), torch.device("cpu"))


def frame(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    pictures = {k: rng.integers(0, 256, SPEC.observation[k].shape, dtype=np.uint8) for k in "ab"}
    return {**pictures, "s": rng.normal(size=2).astype(np.float32)}


@contextmanager
def encoded(policy: Policy) -> Iterator[list[int]]:
    """How many frames each call of an encoder was given."""
    counts: list[int] = []
    encoder: Any = policy.network.encoder
    hooks = [
        camera.register_forward_pre_hook(lambda _, inputs: counts.append(len(inputs[0]))) for camera in encoder.cameras
    ]
    try:
        yield counts
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize("warm_start", [False, True])
def test_each_frame_is_encoded_once_and_chunks_are_the_same_to_the_bit(policy: Policy, warm_start: bool) -> None:
    episode = Episode(SPEC, (3,), warm_start)
    with encoded(policy) as counts:
        for step in range(5):
            episode.push(frame(step))
            request = episode.request()
            before = len(counts)
            (chunk,) = predict_together(policy, [request])
            assert counts[before:] == [1, 1]  # one new frame of each camera; the first one stands for two
            anew = policy.predict(
                request.observation,
                seed=request.seed,
                warm=request.warm,
                executed=request.executed,
                features=[FrameFeatures()],
            )
            assert np.array_equal(chunk.trajectory, anew.trajectory)
            together = policy.predict(
                request.observation, seed=request.seed, warm=request.warm, executed=request.executed
            )
            np.testing.assert_allclose(chunk.trajectory, together.trajectory, atol=1e-5)
            episode.accept(request, chunk)


def test_episodes_in_a_batch_keep_their_own_frames(policy: Policy) -> None:
    """Also where one of them begins anew while the other goes on."""
    episodes = [Episode(SPEC, (seed,)) for seed in range(2)]
    for seed, episode in enumerate(episodes):
        episode.push(frame(seed))
    predict_together(policy, [episode.request() for episode in episodes])
    episodes[1] = Episode(SPEC, (5,))
    for seed, episode in enumerate(episodes):
        episode.push(frame(10 + seed))
    requests = [episode.request() for episode in episodes]
    with encoded(policy) as counts:
        chunks = predict_together(policy, requests)
    assert counts == [1, 1, 1, 1]
    for request, chunk in zip(requests, chunks, strict=True):
        alone = policy.predict(request.observation, seed=request.seed)
        np.testing.assert_allclose(chunk.trajectory, alone.trajectory, atol=1e-5)


def test_reproducible_chunks_do_not_depend_on_their_batch(policy: Policy) -> None:
    same = parapolicy.Policy(**{**vars(policy), "reproducible": True})
    episodes = [Episode(SPEC, (seed,)) for seed in range(19)]
    for seed, episode in enumerate(episodes):
        episode.push(frame(seed))
    requests = [episode.request() for episode in episodes]
    chunks = predict_together(same, requests)
    for i in (0, 18):
        (alone,) = predict_together(same, [requests[i]])
        assert np.array_equal(alone.trajectory, chunks[i].trajectory)


def test_a_controller_encodes_only_new_frames(policy: Policy) -> None:
    controller = parapolicy.Controller(policy, control_hz=10)
    controller.reset(seed=0)
    actions = []
    with encoded(policy) as counts:
        for step in range(3):
            actions.append(controller.act(frame(step)))
    assert counts == [1] * 6
    controller.reset(seed=0)
    with encoded(policy) as counts:
        again = [controller.act(frame(step)) for step in range(3)]
    assert counts == [1] * 6  # nothing is kept over a reset
    assert np.array_equal(actions, again)


def test_features_are_given_for_each_element(policy: Policy) -> None:
    observation = {key: np.stack([[value] * 2] * 3) for key, value in frame(0).items()}
    with pytest.raises(ValueError, match="features are given for 1 episodes, expected 3"):
        policy.predict(observation, features=[FrameFeatures()])


def test_states_alone_keep_no_frames() -> None:
    episode = Episode(PolicySpec({"s": (2,)}, 2, 8, 4, 3, {"name": "unet1d"}, DDPM_CONFIG, None))
    episode.push({"s": np.zeros(2)})
    assert episode.request().features is None
