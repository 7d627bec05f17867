"""A policy server on a thread, and what its clients should be told: for the tests of the server."""

import asyncio
import contextlib
import dataclasses
import socket
import threading
import urllib.request
from collections.abc import Iterator
from typing import Any

import numpy as np
from websockets.sync.client import ClientConnection, connect

from parapolicy.noise import mix_seeds
from parapolicy.policy import Policy
from parapolicy.serve.server import PolicyServer
from parapolicy.serve.settings import ServeConfig
from parapolicy.serve.wire import pack, unpack
from tests.conftest import PATIENCE
from tests.helpers import small_policy, some_observation


class Running:
    """A server on a thread of its own."""

    def __init__(self, policy: Policy, **settings: Any) -> None:
        self.server = PolicyServer(policy, ServeConfig(port=0, **settings))
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))
        self._thread.start()
        while not self._ready.wait(0.1):
            assert self._thread.is_alive()

    async def _run(self) -> None:
        self._stop, self._loop = asyncio.Event(), asyncio.get_running_loop()
        async with self.server.running() as listening:
            self.port = listening.sockets[0].getsockname()[1]
            self._ready.set()
            await self._stop.wait()

    def begin_stop(self) -> None:
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stop.set)

    def stop(self) -> None:
        self.begin_stop()
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive()

    def connect(self, **options: Any) -> ClientConnection:
        return connect(f"ws://127.0.0.1:{self.port}", compression=None, max_size=None, open_timeout=PATIENCE, **options)

    def get(self, path: str, **headers: str) -> str:
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", headers=headers)
        with urllib.request.urlopen(request, timeout=PATIENCE) as response:
            assert response.status == 200
            return str(response.read().decode())

    def metric(self, name: str) -> float:
        return sum(float(line.split()[-1]) for line in self.get("/metrics").splitlines() if line.startswith(name))


@contextlib.contextmanager
def running(policy: Policy, **settings: Any) -> Iterator[Running]:
    server = Running(policy, **settings)
    try:
        yield server
    finally:
        server.stop()


def served_policy(**changes: Any) -> Policy:
    return dataclasses.replace(small_policy("semi_implicit", **changes), reproducible=True)


def one_step(policy: Policy, seed: int) -> dict[str, np.ndarray]:
    return {key: value[-1] for key, value in some_observation(policy.spec, seed=seed).items()}


def silent_client(port: int) -> socket.socket:
    """A client that opens a connection, and then neither reads nor answers."""
    client = socket.create_connection(("127.0.0.1", port), timeout=PATIENCE)
    client.sendall(
        b"GET / HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
    )
    assert client.recv(12) == b"HTTP/1.1 101"
    return client


def infer(client: ClientConnection, message: Any) -> dict[str, Any]:
    client.send(pack(message))
    reply = client.recv(timeout=PATIENCE)
    assert isinstance(reply, bytes), reply
    answer: dict[str, Any] = unpack(reply)
    return answer


def expected_episode(
    policy: Policy, messages: list[dict[str, Any]], seed: int = 0, warm_start: bool = True
) -> list[np.ndarray]:
    """What a client should be answered that sends whole histories, one after the other."""
    actions, warm = [], None
    for k, message in enumerate(messages):
        chunk = policy.predict(message, seed=mix_seeds(seed, k), warm=warm)
        warm = chunk.warm_state if warm_start else None
        actions.append(chunk.trajectory[policy.spec.n_obs_steps - 1 :])
    return actions
