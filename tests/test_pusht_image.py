"""Push-T from pixels in closed loop: the camera's picture reaches the policy, and results are repeatable."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

import parapolicy
from envs import make_env
from parapolicy.digest import digest
from parapolicy.evaluate.run.rollout import EpisodeRecord, rollout
from parapolicy.networks import build_network
from parapolicy.normalizer import Affine, Normalizer
from parapolicy.samplers import make_sampler
from parapolicy.schedule import make_schedule
from parapolicy.spec import Feature, PolicySpec
from tests.helpers import DDPM_CONFIG, configured

CAMERA = {"width": 16, "levels": 2, "keypoints": 8, "features": 6}


@pytest.fixture(scope="module")
def policy() -> parapolicy.Policy:
    """Of random weights, with the shipped one's observation."""
    torch.manual_seed(0)
    spec = PolicySpec(
        {"image": Feature((96, 96, 3), "image"), "agent_pos": Feature((2,))},
        2,
        8,
        4,
        2,
        {"name": "unet1d", "down_dims": [16], "encoder": {"cameras": {"image": CAMERA}}},
        {**DDPM_CONFIG, "num_train_timesteps": 5},
        10.0,
    )
    network = build_network(spec).eval().requires_grad_(False)
    scales = {"image": (2.0, -1.0), "agent_pos": (1 / 256, -1.0), "action": (1 / 256, -1.0)}
    maps = {
        key: Affine(torch.full(shape, scales[key][0]), torch.full(shape, scales[key][1]))
        for key, shape in spec.normalizer_shapes.items()
    }
    schedule = make_schedule(spec.scheduler, sample_shape=spec.sample_shape)
    return parapolicy.Policy(spec, network, Normalizer(maps), schedule, make_sampler("sequential"), torch.device("cpu"))


def test_episodes_do_not_depend_on_the_number_of_environments_or_on_processes(policy: parapolicy.Policy) -> None:
    def run(num_envs: int, processes: bool) -> dict[int, EpisodeRecord]:
        build = partial(make_env, "pusht", policy.spec, max_episode_steps=12)
        episodes = rollout(policy, build, range(300_000, 300_003), num_envs=num_envs, processes=processes)
        return {episode.seed: episode for episode in episodes}

    first = run(1, False)
    for others in (run(3, False), run(2, True)):
        assert others.keys() == first.keys()
        for seed, episode in others.items():
            assert digest(episode.observations) == digest(first[seed].observations)
            np.testing.assert_allclose(episode.rewards, first[seed].rewards, rtol=1e-12)  # shapely's areas round


def test_the_picture_matters(policy: parapolicy.Policy) -> None:
    env = make_env("pusht", policy.spec)
    history = parapolicy.ObservationHistory(policy.spec)
    history.push(env.reset(seed=0)[0])
    observation = history.stacked()
    assert observation["image"].shape == (2, 96, 96, 3)
    before = policy.predict(observation).trajectory
    assert (
        abs(policy.predict({**observation, "image": observation["image"][:, ::-1].copy()}).trajectory - before).max()
        > 0
    )


def test_the_command_evaluates_the_policy_that_sees() -> None:
    assert configured("eval", "env=pusht_image").checkpoint == "checkpoints/pusht_image"
    assert configured("eval", "env=lift").checkpoint == "checkpoints/lift_lowdim"


def test_training_settings_of_the_policy_that_sees(tmp_path: Path) -> None:
    """Those of its data go before the general ones."""
    config = configured("train", "data=pusht_image", f"data.path={tmp_path}")
    assert config.train.batch_size == 64
    assert config.policy.network.encoder.cameras.image.features == 18
    assert "encoder" not in configured("train", f"data.path={tmp_path}").policy.network
    assert configured("train", f"data.path={tmp_path}").train.batch_size == 256
