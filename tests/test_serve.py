"""The policy server: real websocket connections, well-behaved and otherwise."""

import contextlib
import os
import random
import re
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgpack
import numpy as np
import pytest
from websockets.exceptions import ConnectionClosed

from parapolicy.episode import Request
from parapolicy.policy import Chunk, Policy
from parapolicy.serve.server import PolicyServer
from parapolicy.serve.session import Session
from parapolicy.serve.settings import ServeConfig
from parapolicy.serve.wire import WireError, pack, unpack
from tests.conftest import PATIENCE
from tests.helpers import small_policy, some_observation
from tests.serving import Running, expected_episode, infer, one_step, running, served_policy


@pytest.fixture(scope="module")
def policy() -> Policy:
    return served_policy()


@pytest.fixture(scope="module")
def server(policy: Policy) -> Iterator[Running]:
    with running(policy, warm_start=True, max_message_bytes=100_000) as server:
        yield server


def test_an_episode_is_answered_as_the_policy_would(server: Running, policy: Policy) -> None:
    histories = [some_observation(policy.spec, seed=i) for i in range(3)]
    with server.connect() as client:
        described = unpack(client.recv())
        assert described["observation"] == {"position": [2], "points": [3, 2]}
        assert (described["action_horizon"], described["n_action_steps"], described["control_hz"]) == (7, 4, 10)
        answers = [infer(client, history) for history in histories]
    for answer, expected in zip(answers, expected_episode(policy, histories), strict=True):
        assert answer["actions"].shape == (7, 2)
        np.testing.assert_allclose(answer["actions"], expected, rtol=1e-5, atol=1e-4)
        assert answer["policy_timing"]["infer_ms"] > 0
    assert "prev_total_ms" not in answers[0]["server_timing"]
    assert answers[1]["server_timing"]["prev_total_ms"] >= answers[0]["server_timing"]["infer_ms"]


def test_reset_begins_a_new_episode(server: Running, policy: Policy) -> None:
    step = one_step(policy, 0)
    with server.connect() as client:
        client.recv()
        first = infer(client, {**step, "seed": 5})
        infer(client, one_step(policy, 1))
        again = infer(client, {**step, "reset": True, "seed": 5})
        other = infer(client, {**step, "reset": True, "seed": np.int64(6)})
    np.testing.assert_array_equal(first["actions"], again["actions"])
    assert not np.array_equal(first["actions"], other["actions"])


def test_clients_are_computed_together_and_answered_apart(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight episodes at once: the same actions as one after the other, in fewer batches than requests."""
    asked, request = threading.Semaphore(0), Session.request

    def counted(session: Session, *arguments: Any) -> Request:
        made = request(session, *arguments)
        asked.release()
        return made

    monkeypatch.setattr(Session, "request", counted)
    episodes = [[some_observation(policy.spec, seed=100 * c + k) for k in range(6)] for c in range(8)]

    def play(c: int) -> list[np.ndarray]:
        with server.connect() as client:
            client.recv()
            return [infer(client, {**m, "seed": c} if k == 0 else m)["actions"] for k, m in enumerate(episodes[c])]

    with running(policy, warm_start=True) as server, ThreadPoolExecutor(8) as threads:
        compute = server.server.batcher._compute

        def all_have_asked(requests: Any) -> Any:
            """The first batch ends when every client has asked, so that the others wait for the second one."""
            server.server.batcher._compute = compute  # type: ignore[method-assign]
            assert all(asked.acquire(timeout=PATIENCE) for _ in range(8))
            return compute(requests)

        server.server.batcher._compute = all_have_asked  # type: ignore[method-assign]
        played = list(threads.map(play, range(8)))
        assert server.metric("parapolicy_requests_total") == 48
        assert server.metric("parapolicy_batch_size_count") < 48
    for c, actions in enumerate(played):
        for ours, alone in zip(actions, expected_episode(policy, episodes[c], c), strict=True):
            np.testing.assert_allclose(ours, alone, rtol=1e-5, atol=1e-4)


def bad_messages(policy: Policy) -> dict[str, tuple[Any, str]]:
    good = some_observation(policy.spec)
    nan = good["points"].copy()
    nan[0, 1, 1] = np.nan
    array = {b"__ndarray__": True, b"data": b"x" * 16, b"dtype": "<f4", b"shape": [4]}
    return {
        "text frame": ("hello", "text frame"),
        "no msgpack": (b"\xc1\xff", "not msgpack"),
        "cut off": (pack(good)[:-3], "not msgpack"),
        "not a map": (pack([1, 2]), "expected a map"),
        "missing key": (pack({"points": good["points"]}), r"lacks \['position'\]"),
        "unknown key": (pack({**good, "camera": 1}), r"unknown keys \['camera'\]"),
        "shape": (pack({**good, "points": np.zeros((3, 3))}), "shape"),
        "ragged": (pack({**good, "points": [[1], [1, 2]]}), "not an array of numbers"),
        "nan": (pack({**good, "points": nan}), "nan at index"),
        "words": (pack({**good, "points": "far away"}), "an array of numbers|real numbers"),
        "object dtype": (pack({**good, "points": {**array, b"dtype": "|O"}}), r"dtype '\|O'"),
        "structured dtype": (pack({**good, "points": {**array, b"dtype": "f4,f4"}}), "dtype 'f4,f4'"),
        "too few bytes": (pack({**good, "points": {**array, b"shape": [2, 1 << 60]}}), "16 bytes of data"),
        "negative shape": (pack({**good, "points": {**array, b"shape": [-1, 4]}}), "expected at most 8 sizes"),
        "seed": (pack({**good, "seed": -1}), "seed is -1"),
        "reset": (pack({**good, "reset": "yes"}), "reset is 'yes'"),
        "executed": (pack({**good, "executed": 1.5}), "executed is 1.5"),
        "deep": (b"\x91" * 50_000, "not msgpack"),
        "empty lists": (b"\xdc\x03\xe8" + (b"\xdc\x00\x3f" + b"\x90" * 63) * 1000, "more than [0-9]+ values"),
        "empty maps": (b"\xdc\x03\xe8" + (b"\xdc\x00\x3f" + b"\x80" * 63) * 1000, "more than [0-9]+ values"),
        "long list": (b"\xdd\x00\x00\xff\xff" + b"\x00" * 65535, "exceeds max_array_len"),
        "long map": (pack({f"{i}": 0 for i in range(1000)}), "exceeds max_map_len"),
        "key twice": (b"\x82" + 2 * (pack("points") + b"\x00"), "a repeated key"),
        "extension": (pack(msgpack.Timestamp(5)), "exceeds max_ext_len"),
        "long word": (pack({**good, "points": "far" * 10_000}), "an array of numbers|real numbers"),
        "too far": (pack({**good, "points": good["points"] + 1e38}), "action chunk holds a value that is not finite"),
        "mixed": (pack({**good, "points": good["points"][0]}), "send all keys stacked"),
    }


@pytest.mark.parametrize("name", list(bad_messages(small_policy())))
def test_a_bad_message_is_told_in_a_line_and_the_next_good_one_is_answered(
    server: Running, policy: Policy, name: str
) -> None:
    message, told = bad_messages(policy)[name]
    histories = [some_observation(policy.spec, seed=i) for i in range(2)]
    with server.connect() as client:
        client.recv()
        first = infer(client, histories[0])
        client.send(message)
        error = client.recv(timeout=PATIENCE)
        assert isinstance(error, str)
        assert re.search(told, error), error
        assert len(error) <= 200
        answers = [first, infer(client, histories[1])]
    for answer, expected in zip(answers, expected_episode(policy, histories), strict=True):
        np.testing.assert_allclose(answer["actions"], expected, rtol=1e-5, atol=1e-4)


def test_an_oversized_message_closes_its_connection(server: Running, policy: Policy) -> None:
    with server.connect() as client:
        client.recv()
        with contextlib.suppress(ConnectionClosed):  # it may be closed while the rest is being sent
            client.send(b"x" * 200_000)
        with pytest.raises(ConnectionClosed) as closed:
            client.recv(timeout=PATIENCE)
        assert closed.value.rcvd is not None
        assert closed.value.rcvd.code == 1009
    with server.connect() as client:
        client.recv()
        infer(client, some_observation(policy.spec))


def test_clients_that_vanish_or_flood_do_not_stop_the_others(server: Running, policy: Policy) -> None:
    message = pack(some_observation(policy.spec))
    half = socket.create_connection(("127.0.0.1", server.port))
    half.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n")  # and never the rest
    clients = contextlib.ExitStack()
    vanished = clients.enter_context(server.connect())
    vanished.recv()
    vanished.send(message)
    vanished.socket.shutdown(socket.SHUT_RDWR)
    flooding = clients.enter_context(server.connect())
    flooding.recv()

    def flood() -> None:
        with contextlib.suppress(ConnectionClosed, OSError):
            for _ in range(3000):
                flooding.send(message)

    thread = threading.Thread(target=flood)
    thread.start()
    with server.connect() as client:
        client.recv()
        for k in range(5):
            infer(client, some_observation(policy.spec, seed=k))
    with contextlib.suppress(OSError):  # the server may have cut it off already
        flooding.socket.shutdown(socket.SHUT_RDWR)
    thread.join(PATIENCE)
    half.close()
    clients.close()
    deadline = time.monotonic() + PATIENCE
    while server.metric("parapolicy_connections") and time.monotonic() < deadline:
        time.sleep(0.05)
    assert server.metric("parapolicy_connections") == 0


class Moody:
    """A policy that cannot digest some observations."""

    def __init__(self, policy: Policy) -> None:
        self.policy, self.spec = policy, policy.spec

    def predict(self, observation: Any, **options: Any) -> Chunk:
        if (observation["position"] > 1000).any():
            raise FloatingPointError("the action chunk holds a value that is not finite")
        return self.policy.predict(observation, **options)


def test_a_chunk_that_fails_does_not_take_its_batch_with_it(policy: Policy) -> None:
    server = PolicyServer(policy, ServeConfig())
    server.batcher.policy = Moody(policy)  # type: ignore[assignment]
    good, bad = some_observation(policy.spec), some_observation(policy.spec)
    bad["position"] = bad["position"] + 5000
    outcomes = server.batcher._compute([Request(o, number=0, seed=7, begin=0) for o in (good, bad, good)])
    assert isinstance(outcomes[1], FloatingPointError)
    for chunk in (outcomes[0], outcomes[2]):
        assert isinstance(chunk, Chunk)
        np.testing.assert_allclose(chunk.actions, policy.predict(good, seed=7).actions, rtol=1e-5, atol=1e-4)


def test_a_deadline_cuts_chunks_short(policy: Policy) -> None:
    with (
        running(policy.with_sampler("paradigms", tolerance=0.0), deadline_ms=0.001) as server,
        server.connect() as client,
    ):
        client.recv()
        answer = infer(client, some_observation(policy.spec))
        assert (answer["rounds"], answer["complete"]) == (1, False)
        assert server.metric("parapolicy_incomplete_total") == 1


def mutations(policy: Policy, seed: int) -> Iterator[bytes]:
    """Messages that are almost right, for ever."""
    rng = random.Random(seed)
    good = pack(some_observation(policy.spec))
    while True:
        data = bytearray(good)
        match rng.randrange(4):
            case 0:
                data = data[: rng.randrange(len(data))]
            case 1:
                for _ in range(rng.randint(1, 8)):
                    data[rng.randrange(len(data))] = rng.randrange(256)
            case 2:
                data = bytearray(rng.randbytes(rng.randint(0, 200)))
            case 3:
                place = rng.randrange(len(data))
                data[place:place] = rng.randbytes(rng.randint(1, 30))
        yield bytes(data)


def test_a_fuzzer_leaves_the_server_alive_and_correct(server: Running, policy: Policy) -> None:
    """PARAPOLICY_FUZZ messages, 400 by default; a mutant that happens to be right may be answered."""
    count = int(os.environ.get("PARAPOLICY_FUZZ", 400))
    messages = mutations(policy, seed=1)
    refused = 0
    with server.connect() as client:
        client.recv()
        for _ in range(count):
            client.send(next(messages))
            refused += isinstance(client.recv(timeout=PATIENCE), str)
    assert refused > 0.8 * count
    history = some_observation(policy.spec)
    with server.connect() as client:
        client.recv()
        actions = infer(client, history)["actions"]
    np.testing.assert_allclose(actions, expected_episode(policy, [history])[0], rtol=1e-5, atol=1e-4)


def test_wire_round_trip() -> None:
    message = {
        "a": np.arange(6, dtype="<i2").reshape(2, 3),
        "b": [np.float32(1.5), True, None, "text"],
        "c": {"empty": np.zeros((0, 4))},
    }
    back = unpack(pack(message))
    np.testing.assert_array_equal(back["a"], message["a"])
    assert back["a"].dtype == np.dtype("<i2")
    assert (back["b"], back["c"]["empty"].shape) == ([1.5, True, None, "text"], (0, 4))
    with pytest.raises(TypeError, match="complex128"):
        pack(np.complex128(1))
    with pytest.raises(WireError, match="does not fit"):
        unpack(pack({b"__npgeneric__": True, b"data": 300, b"dtype": "|u1"}))
