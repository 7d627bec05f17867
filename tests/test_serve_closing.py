"""How connections, and the server, end: what is still computed, what is delivered, what the log says."""

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from websockets.exceptions import ConnectionClosed
from websockets.protocol import State
from websockets.sync.client import ClientConnection

from parapolicy.policy import Chunk, Policy
from parapolicy.serve.settings import ServeConfig
from parapolicy.serve.wire import pack, unpack
from tests.helpers import some_observation
from tests.serving import Running, expected_episode, infer, running, served_policy, silent_client


@pytest.fixture(scope="module")
def policy() -> Policy:
    return served_policy()


class Gated:
    """A policy whose chunks take until the gate is opened."""

    def __init__(self, policy: Policy) -> None:
        self.policy, self.spec, self.calls = policy, policy.spec, 0
        self.begun, self.gate = threading.Event(), threading.Event()

    def predict(self, observation: Any, **options: Any) -> Chunk:
        self.calls += 1
        self.begun.set()
        assert self.gate.wait(60)
        return self.policy.predict(observation, **options)


@pytest.fixture
def gated(policy: Policy) -> Iterator[tuple[Running, Gated]]:
    server, gate = Running(policy, max_batch=1), Gated(policy)
    server.server.batcher.policy = gate  # type: ignore[assignment]
    yield server, gate
    gate.gate.set()
    server.stop()


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.fixture
def clients() -> Iterator[contextlib.ExitStack]:
    with contextlib.ExitStack() as clients:
        yield clients


def ask(server: Running, policy: Policy, clients: contextlib.ExitStack) -> ClientConnection:
    client = clients.enter_context(server.connect())
    client.recv()
    client.send(pack(some_observation(policy.spec)))
    return client


def test_the_request_of_a_client_that_has_gone_is_not_computed(
    gated: tuple[Running, Gated], policy: Policy, clients: contextlib.ExitStack
) -> None:
    server, gate = gated
    first = ask(server, policy, clients)
    assert gate.begun.wait(60)
    gone = ask(server, policy, clients)
    wait_for(lambda: len(server.server.batcher._waiting) == 1)
    gone.close()
    wait_for(lambda: any(connection.state is not State.OPEN for connection in server.server._open))
    gate.gate.set()
    assert isinstance(first.recv(timeout=60), bytes)
    wait_for(lambda: len(server.server._open) == 1)
    assert gate.calls == 1


def test_closing_delivers_the_batch_at_hand_and_drops_what_waits(
    gated: tuple[Running, Gated], policy: Policy, clients: contextlib.ExitStack
) -> None:
    server, gate = gated
    first = ask(server, policy, clients)
    assert gate.begun.wait(60)
    idle = clients.enter_context(server.connect())
    waiting = [ask(server, policy, clients) for _ in range(10)]
    wait_for(lambda: len(server.server.batcher._waiting) == 10)
    server.begin_stop()
    for client in waiting:  # at once, while the batch at hand is being computed
        with pytest.raises(ConnectionClosed, match="the server is closing"):
            client.recv(timeout=60)
    with pytest.raises(OSError, match="refused"):
        server.connect()
    gate.gate.set()
    reply = first.recv(timeout=60)
    assert isinstance(reply, bytes)
    expected = expected_episode(policy, [some_observation(policy.spec)])[0]
    np.testing.assert_allclose(unpack(reply)["actions"], expected, rtol=1e-5, atol=1e-4)
    idle.recv()
    for client in (first, idle):
        with pytest.raises(ConnectionClosed, match="the server is closing"):
            client.recv(timeout=60)
    assert gate.calls == 1


def test_clients_that_neither_read_nor_answer_do_not_hold_up_the_end(policy: Policy) -> None:
    with running(policy) as server:
        clients = [silent_client(server.port) for _ in range(3)]
        wait_for(lambda: len(server.server._open) == 3)
    for client in clients:  # stop() has returned, and the connections are gone
        while client.recv(1 << 16):
            pass
        client.close()


@pytest.mark.parametrize("frame", [b"\x82\x80", b"\x89\x80", b"\x00\x80"], ids=["messages", "pings", "fragments"])
def test_a_client_that_floods_is_cut_off(policy: Policy, caplog: pytest.LogCaptureFixture, frame: bytes) -> None:
    """Empty frames by the thousand: parsing them all would stop everybody."""
    caplog.set_level(logging.INFO, "parapolicy.serve")
    with running(policy) as server, silent_client(server.port) as client:
        with contextlib.suppress(ConnectionError):
            if frame[0] == 0:
                client.sendall(b"\x02\x80" + bytes(4))
            client.sendall((frame + bytes(4)) * 100_000)
            while client.recv(1 << 16):
                pass
        wait_for(lambda: ": flooded: " in caplog.text)
        wait_for(lambda: not server.server._open)


def test_the_log_says_why_a_connection_ended(policy: Policy, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "parapolicy.serve")
    with running(policy, ping_interval=0.05, ping_timeout=0.2) as server:
        with server.connect() as client:
            client.recv()
            infer(client, some_observation(policy.spec))
        wait_for(lambda: "connection ended: received 1000" in caplog.text)
        with silent_client(server.port):
            wait_for(lambda: len(server.server._open) == 1)
            (connection,) = server.server._open
            assert (connection.ping_interval, connection.ping_timeout) == (0.05, 0.2)
            wait_for(lambda: "keepalive ping timeout" in caplog.text)
    config = ServeConfig()
    assert config.ping_timeout is not None
    assert config.ping_timeout > 60  # a client that stands still for a minute stays
