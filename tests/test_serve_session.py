"""What a connection's messages are taken for: one step, a history, the same episode, a new one."""

import time
from typing import Any

import numpy as np
import pytest

from parapolicy.errors import ObservationError
from parapolicy.noise import mix_seeds
from parapolicy.policy import Policy
from parapolicy.serve.server import PolicyServer
from parapolicy.serve.session import Session
from parapolicy.serve.settings import ServeConfig
from parapolicy.serve.wire import unpack
from tests.helpers import small_policy, some_observation
from tests.serving import infer, one_step, running, served_policy


@pytest.fixture(scope="module")
def policy() -> Policy:
    return served_policy()


def stack(before: dict[str, np.ndarray], now: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {key: np.stack([before[key], now[key]]) for key in now}


def test_a_single_step_is_joined_only_with_the_one_before_it(policy: Policy) -> None:
    """One observation per chunk, as openpi's ActionChunkBroker sends, is the whole history; executed=1 joins."""
    a, b, c, d = (one_step(policy, i) for i in range(4))
    with running(policy, warm_start=True) as server, server.connect() as client:
        assert "executed=1" in unpack(client.recv())["history"]
        messages = [a, b, {**c, "executed": 1}, {**d, "executed": 2}, stack(a, b), {**c, "executed": 1}]
        answers = [infer(client, message) for message in messages]
    histories = [stack(a, a), stack(b, b), stack(b, c), stack(d, d), stack(a, b), stack(b, c)]
    executed = [4, 4, 1, 2, 4, 1]
    warm = None
    for k, answer in enumerate(answers):
        assert answer["new_episode"] == (k == 0)
        chunk = policy.predict(histories[k], seed=mix_seeds(0, k), warm=warm, executed=warm and executed[k])
        warm = chunk.warm_state
        np.testing.assert_allclose(answer["actions"], chunk.trajectory[1:], rtol=1e-5, atol=1e-4)


def test_a_pause_begins_a_new_episode(policy: Policy) -> None:
    """client.reset() of openpi sends nothing."""
    a, b = one_step(policy, 0), one_step(policy, 1)
    session = Session(policy.spec, warm_start=True, pause_s=3.0)

    def ask(message: dict[str, Any], silence_s: float) -> tuple[int, bool, float]:
        request = session.request(message, silence_s)
        session.answer(policy.predict(request.observation, seed=request.seed))
        return request.number, request.warm is not None, float(request.observation["position"][0, 0])

    past, now = (float(step["position"][0]) for step in (a, b))
    assert ask(a, 0.0) == (0, False, past)
    assert ask({**b, "executed": 1}, 2.9) == (1, True, past)
    assert ask({**b, "executed": 1}, 3.1) == (0, False, now)
    assert ask({**b, "executed": 1, "reset": False}, 1e6)[:2] == (1, True)
    with pytest.raises(ObservationError, match="middle of an episode"):
        session.request({**b, "seed": 3})
    assert ask({**b, "seed": 3}, 4.0)[:2] == (0, False)


def test_the_server_measures_the_pause(policy: Policy) -> None:
    step = one_step(policy, 0)
    with running(policy, warm_start=True, episode_pause_s=0.3) as server, server.connect() as client:
        assert unpack(client.recv())["episode_pause_s"] == 0.3
        first = infer(client, step)
        time.sleep(0.4)
        again = infer(client, step)
        kept = infer(client, {**step, "reset": False})
    assert (first["new_episode"], again["new_episode"], kept["new_episode"]) == (True, True, False)
    np.testing.assert_array_equal(first["actions"], again["actions"])
    assert PolicyServer(policy, ServeConfig()).pause_s == 1.6  # four chunks of four actions at 10 Hz


def test_steps_and_stacks_are_not_mixed(policy: Policy) -> None:
    stacked, single = some_observation(policy.spec), one_step(policy, 0)
    with pytest.raises(ObservationError, match=r"'points' has shape \(3, 2\), for one step, but \['position'\] are"):
        Session(policy.spec, False).request({**stacked, "points": single["points"]})


def test_a_policy_with_an_options_name_is_refused() -> None:
    with pytest.raises(ValueError, match=r"observes \['reset'\]"):
        Session(small_policy(observation={"reset": (1,)}).spec, True)


def test_a_message_that_is_not_answered_leaves_the_episode_as_it_was(policy: Policy) -> None:
    a, b, c = (one_step(policy, i) for i in range(3))
    session = Session(policy.spec, warm_start=False)
    session.request({**b, "seed": 7})  # computing its chunk fails
    request = session.request({**a, "seed": 8})
    session.answer(policy.predict(request.observation))
    session.request({**b, "executed": 1})
    with pytest.raises(ObservationError, match="lacks"):
        session.request({"points": b["points"]})
    request = session.request({**c, "executed": 1})
    assert request.number == 1
    np.testing.assert_array_equal(request.observation["position"], stack(a, c)["position"])
