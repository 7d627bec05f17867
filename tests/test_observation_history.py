"""What the observation history copies: each frame once, when it is pushed."""

import copy
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

import parapolicy
from parapolicy.episode import Episode
from parapolicy.observation import ROOM, _Block
from parapolicy.serve.session import Session
from parapolicy.serve.wire import pack, unpack
from parapolicy.spec import Feature, PolicySpec
from tests.helpers import small_policy, small_spec

HEIGHT, WIDTH = 4, 6


def spec_of(steps: int = 2) -> PolicySpec:
    """Of a policy with a camera of ``steps`` steps and a state of three."""
    images = {"camera": Feature((HEIGHT, WIDTH, 3), "image", steps), "position": (2,)}
    return small_spec(observation=images, n_obs_steps=3)


def step(number: int) -> dict[str, np.ndarray]:
    return {"camera": np.full((HEIGHT, WIDTH, 3), number, np.uint8), "position": np.full(2, number, np.float32)}


@pytest.fixture
def copied(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Number of values of every copy that histories make."""
    numbers: list[int] = []
    add = _Block.add

    def counted(block: _Block, values: np.ndarray) -> None:
        if values.dtype == np.uint8:
            numbers.append(len(values))
        add(block, values)

    monkeypatch.setattr(_Block, "add", counted)
    return numbers


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_a_frame_is_copied_once_and_handed_out_as_a_view(steps: int, copied: list[int]) -> None:
    history, handed = parapolicy.ObservationHistory(spec_of(steps)), []
    buffer = np.empty((HEIGHT, WIDTH, 3), np.uint8)  # a driver's, which is filled again and again
    for number in range(100):
        buffer[:] = number
        history.push({"camera": buffer, "position": step(number)["position"]})
        handed.append(history.stacked())
        assert not np.shares_memory(handed[-1]["camera"], buffer)
    for number, observation in enumerate(handed):  # later steps have not changed them
        expected = [max(0, number - k) for k in reversed(range(steps))]
        assert observation["camera"][:, 0, 0, 0].tolist() == expected
        assert observation["position"].tolist() == [[max(0, number - k)] * 2 for k in (2, 1, 0)]
    carried = sum(copied) - 100  # into a new block of memory
    assert carried <= (steps - 1) * (100 / ROOM)
    joined = [np.shares_memory(older["camera"], newer["camera"]) for older, newer in pairwise(handed)]
    assert sum(joined) >= (0 if steps == 1 else 99 - 100 / ROOM)


def test_copies_of_a_history_go_on_by_themselves() -> None:
    history = parapolicy.ObservationHistory(spec_of())
    history.push(step(1))
    for number in range(2, 40):
        other = copy.copy(history)
        other.push(step(100 + number))
        kept = other.stacked()
        history.push(step(number))
        assert kept["camera"][:, 0, 0, 0].tolist() == [number - 1, 100 + number]
        assert history.stacked()["camera"][:, 0, 0, 0].tolist() == [number - 1, number]
        assert other.stacked()["position"][:, 0].tolist() == [max(1, number - 2), number - 1, 100 + number]


def test_a_request_is_a_view_of_its_episode() -> None:
    episode = Episode(spec_of())
    episode.push(step(1))
    episode.push(step(2))
    first = episode.request().observation["camera"]
    assert np.shares_memory(first, episode.history.stacked()["camera"])
    assert first[:, 0, 0, 0].tolist() == [1, 2]


def begun_session(number: int) -> tuple[Session, parapolicy.Chunk]:
    """A session that has answered the step of this number, and a chunk to answer with."""
    image = Feature((HEIGHT, WIDTH, 3), "image")
    session = Session(small_spec(observation={"camera": image, "position": (2,)}), warm_start=False)
    blind = small_policy(observation={"position": (2,)})  # an answer does not depend on what it was computed from
    chunk = blind.predict({"position": np.zeros((2, 2))})
    session.request(step(number))
    session.answer(chunk)
    return session, chunk


def served(session: Session, message: dict[str, Any]) -> np.ndarray:
    """The camera's frames of the request that the session makes of a message from the wire."""
    return session.request(unpack(pack(message))).observation["camera"]


def test_the_server_copies_each_frame_once(copied: list[int]) -> None:
    session, chunk = begun_session(0)
    copied.clear()
    for number in range(1, ROOM + 1):
        assert served(session, step(number) | {"executed": 1})[-1, 0, 0, 0] == number
        session.answer(chunk)
    assert copied == [1] * ROOM
    copied.clear()
    stacked = {key: np.stack([step(20)[key], step(21)[key]]) for key in step(0)}
    assert served(session, stacked)[:, 0, 0, 0].tolist() == [20, 21]
    assert copied == [1, 1]


def test_a_request_that_is_not_answered_leaves_the_history() -> None:
    session, _ = begun_session(1)
    lost = served(session, step(2) | {"executed": 1})
    again = served(session, step(3) | {"executed": 1})
    assert lost[:, 0, 0, 0].tolist() == [1, 2]
    assert again[:, 0, 0, 0].tolist() == [1, 3]
