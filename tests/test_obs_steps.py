"""Policies that see another number of steps of each key."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import parapolicy
from parapolicy import Feature, ObservationError, PolicySpec
from parapolicy.describe import describe, present
from parapolicy.networks import build_network
from parapolicy.observation import normalize_observation
from parapolicy.planner import made_up_observations
from parapolicy.serve.session import Session
from parapolicy.serve.wire import Limits, pack, unpack
from tests.helpers import small_policy, small_spec

VIT = {"name": "vit", "patch": 8, "width": 16, "depth": 1, "heads": 2, "hidden": 16}
CAMERA = {"encoder": "timm", "backbone": VIT}
OBSERVATION = {"camera": Feature((16, 24, 3), "image", 1), "position": Feature((2,)), "force": Feature((4,), steps=2)}


def network_of(**encoder: Any) -> dict[str, Any]:
    settings = {"cameras": {"camera": CAMERA}, "shared": False, "layout": "key", **encoder}
    return {**small_spec().network, "encoder": settings}


def policy_of() -> parapolicy.Policy:
    return small_policy(observation=OBSERVATION, n_obs_steps=3, network=network_of())


def step(number: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(number)
    picture = rng.integers(256, size=(16, 24, 3), dtype=np.uint8)
    return {"camera": picture, "position": rng.uniform(0, 100, 2), "force": rng.uniform(0, 100, 4)}


def test_a_spec_with_steps_comes_back() -> None:
    spec = small_spec(observation=OBSERVATION, n_obs_steps=3, network=network_of())
    assert [spec.obs_steps(key) for key in spec.observation] == [1, 3, 2]
    assert spec.obs_shapes == {"camera": (1, 3, 16, 24), "position": (3, 2), "force": (2, 4)}
    assert spec.condition_dim == 16 * 24 * 3 + 6 + 8
    assert PolicySpec.from_dict(spec.to_dict()) == spec
    assert [("steps" in entry) for entry in spec.to_dict()["observation"]] == [True, False, True]


def test_the_policys_own_number_is_none() -> None:
    given = small_spec(observation={"position": Feature((2,), steps=2)}, n_obs_steps=2)
    assert given == small_spec(observation={"position": (2,)}, n_obs_steps=2)


@pytest.mark.parametrize("steps", [0, 3, True, "1"])
def test_steps_that_are_no_part_of_the_history_are_refused(steps: Any) -> None:
    with pytest.raises(ValueError, match=f"'position' has {steps!r} steps, expected 1 to 2"):
        small_spec(observation={"position": Feature((2,), steps=steps)}, n_obs_steps=2)


def test_a_history_hands_out_each_keys_last_steps() -> None:
    policy = policy_of()
    history = parapolicy.ObservationHistory(policy.spec)
    history.push(step(0))
    first = history.stacked()
    assert {key: len(value) for key, value in first.items()} == {"camera": 1, "position": 3, "force": 2}
    np.testing.assert_array_equal(first["force"], np.float32([step(0)["force"]] * 2))
    for number in (1, 2, 3):
        history.push(step(number))
    found = history.stacked()
    np.testing.assert_array_equal(found["camera"], [step(3)["camera"]])
    np.testing.assert_array_equal(found["position"], np.float32([step(i)["position"] for i in (1, 2, 3)]))
    np.testing.assert_array_equal(found["force"], np.float32([step(i)["force"] for i in (2, 3)]))
    assert policy.predict(found).actions.shape == (4, 2)


def test_the_condition_is_one_key_after_the_other() -> None:
    policy = policy_of()
    (observation,) = made_up_observations(policy, 1)
    inputs, _ = normalize_observation(policy.spec, policy.normalizer, observation)
    network: Any = policy.network
    condition = network.embed_condition(inputs)[0]
    assert condition.shape == (16 + 6 + 8,)
    torch.testing.assert_close(condition[:16], network.encoder.cameras[0](inputs["camera"][0])[0])
    torch.testing.assert_close(condition[16:22], inputs["position"].flatten())
    torch.testing.assert_close(condition[22:], inputs["force"].flatten())


def test_another_number_of_steps_is_refused() -> None:
    policy = policy_of()
    (observation,) = made_up_observations(policy, 1)
    observation["force"] = np.zeros((3, 4), np.float32)
    with pytest.raises(ObservationError, match=r"'force' has shape \(3, 4\), expected \(2, 4\)"):
        policy.predict(observation)


def test_the_server_takes_them_stacked_or_step_by_step() -> None:
    policy = policy_of()
    history = parapolicy.ObservationHistory(policy.spec)
    for number in range(5):
        history.push(step(number))
    stacked = history.stacked()
    message = unpack(pack(stacked), Limits.of(policy.spec))
    request = Session(policy.spec, warm_start=False).request(message)
    session = Session(policy.spec, warm_start=False)
    for number in range(5):
        last = session.request({**step(number), "executed": 1})
        session.answer(policy.predict(last.observation))
    for key, value in stacked.items():
        np.testing.assert_array_equal(request.observation[key], value)
        np.testing.assert_array_equal(last.observation[key], value)


def test_a_folder_keeps_them(tmp_path: Path) -> None:
    policy = policy_of()
    parapolicy.save_policy(policy, tmp_path / "x")
    again = parapolicy.load_policy(tmp_path / "x", sampler="sequential", device="cpu", engine="eager")
    assert again.spec == policy.spec
    (observation,) = made_up_observations(policy, 1)
    np.testing.assert_array_equal(again.predict(observation).actions, policy.predict(observation).actions)


def test_a_description_names_them() -> None:
    text = present("x", describe(policy_of()))
    assert "camera: image 16x24x3 uint8, 1 steps" in text
    assert "force: state 4 float32, 2 steps" in text


def test_networks_that_need_equal_steps_refuse_others() -> None:
    states = {"position": Feature((2,)), "force": Feature((4,), steps=1)}
    with pytest.raises(ValueError, match="an encoder with layout 'key'"):
        build_network(small_spec(observation=states))
    spec = small_spec(observation=OBSERVATION, n_obs_steps=3, network=network_of(layout="step"))
    with pytest.raises(ValueError, match="an encoder with layout 'key'"):
        build_network(spec)
    with pytest.raises(ValueError, match="takes observed steps, but the encoder's layout is by key"):
        build_network(small_spec(observation=OBSERVATION, n_obs_steps=3, network=network_of() | {"condition": "local"}))
    transformer = {"name": "transformer1d", "n_layer": 1, "n_emb": 16, "encoder": network_of()["encoder"]}
    with pytest.raises(ValueError, match="takes observed steps, but the encoder's layout is by key"):
        build_network(small_spec(observation=OBSERVATION, n_obs_steps=3, network=transformer))
    with pytest.raises(ValueError, match="layout is 'time', expected one of"):
        build_network(small_spec(observation=OBSERVATION, n_obs_steps=3, network=network_of(layout="time")))
    with pytest.raises(ValueError, match="expected an encoder of"):
        build_network(
            small_spec(observation=OBSERVATION, n_obs_steps=3, network=network_of(cameras={"camera": {"encoder": "x"}}))
        )
