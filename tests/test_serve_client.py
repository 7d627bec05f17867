"""The client that comes back, and a controller whose policy is on a server, over a network that stalls and breaks."""

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from parapolicy.control import Controller, Pacer
from parapolicy.noise import mix_seeds
from parapolicy.policy import Policy
from parapolicy.serve.client import PolicyClient, RemotePolicy, described_spec
from tests.conftest import PATIENCE
from tests.helpers import some_observation
from tests.serving import one_step, running, served_policy, silent_client


@pytest.fixture(scope="module")
def policy() -> Policy:
    return served_policy()


class Proxy:
    """Passes bytes on; ``stall`` keeps the client's next ones for so many seconds, ``cut`` ends all connections."""

    def __init__(self, port: int) -> None:
        self._target, self.flows = port, threading.Event()
        self.flows.set()
        self.stall = 0.0
        self._open: list[socket.socket] = []
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port = self._listening.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listening.accept()
                server = socket.create_connection(("127.0.0.1", self._target), timeout=PATIENCE)
                self._open += [client, server]
                for source, target in ((client, server), (server, client)):
                    arguments = source, target, source is client
                    threading.Thread(target=self._pass_on, args=arguments, daemon=True).start()

    def _pass_on(self, source: socket.socket, target: socket.socket, asks: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                self.flows.wait(PATIENCE)
                if asks:
                    seconds, self.stall = self.stall, 0.0
                    time.sleep(seconds)
                target.sendall(data)
        for each in (source, target):
            end(each)

    def cut(self) -> None:
        for each in self._open:
            end(each)
        self._open = []

    def close(self) -> None:
        self.flows.set()
        self._listening.close()
        self.cut()


def end(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
    connection.close()


@pytest.fixture
def proxied(policy: Policy) -> Iterator[Proxy]:
    with running(policy, warm_start=True) as server:
        proxy = Proxy(server.port)
        yield proxy
        proxy.close()


def uri(port: int) -> str:
    return f"ws://127.0.0.1:{port}"


def expected(policy: Policy, step: dict[str, np.ndarray], seed: int = 0) -> np.ndarray:
    """Of a first chunk, from one step alone."""
    history = {key: np.stack([value, value]) for key, value in step.items()}
    return policy.predict(history, seed=mix_seeds(seed, 0)).trajectory[1:]


def test_a_lost_connection_is_told_and_the_next_call_begins_an_episode(policy: Policy, proxied: Proxy) -> None:
    """Never is an observation from before the loss joined with one from after it, nor answered late."""
    a, b, c = (one_step(policy, i) for i in range(3))
    with PolicyClient(uri(proxied.port)) as client:
        assert client.infer(a)["new_episode"]
        assert not client.infer({**b, "executed": 1})["new_episode"]
        proxied.cut()
        with pytest.raises(ConnectionError, match="is lost"):
            client.infer({**c, "executed": 1})
        answer = client.infer({**c, "executed": 1})
        assert answer["new_episode"]
        assert client.connections == 2
        np.testing.assert_allclose(answer["actions"], expected(policy, c), rtol=1e-5, atol=1e-4)
        assert not client.infer({**a, "executed": 1})["new_episode"]


def test_an_answer_that_comes_too_late_is_never_taken(policy: Policy, proxied: Proxy) -> None:
    a, b = one_step(policy, 0), one_step(policy, 1)
    with PolicyClient(uri(proxied.port), timeout=0.5) as client:
        client.connect()
        proxied.flows.clear()
        with pytest.raises(ConnectionError, match="is lost"):
            client.infer(a)
        proxied.flows.set()
        client.timeout = PATIENCE
        np.testing.assert_allclose(client.infer(b)["actions"], expected(policy, b), rtol=1e-5, atol=1e-4)


def test_a_reset_announces_an_episode_with_its_seed(policy: Policy, proxied: Proxy) -> None:
    a = one_step(policy, 0)
    with PolicyClient(uri(proxied.port)) as client:
        client.infer(a)
        client.reset(seed=7)
        answer = client.infer(a)
        assert answer["new_episode"]
        np.testing.assert_allclose(answer["actions"], expected(policy, a, seed=7), rtol=1e-5, atol=1e-4)
        assert not client.infer(a)["new_episode"]


def test_a_refusal_is_told_and_the_connection_stays(policy: Policy, proxied: Proxy) -> None:
    with PolicyClient(uri(proxied.port)) as client:
        client.infer(one_step(policy, 0))
        with pytest.raises(RuntimeError, match=r"lacks \['position', 'points'\]"):
            client.infer({"nothing": 1})
        assert not client.infer(one_step(policy, 1))["new_episode"]
        assert client.connections == 1


def test_servers_that_cannot_be_used_are_named(policy: Policy) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        with pytest.raises(ConnectionError, match="cannot be reached"):
            PolicyClient(uri(port), connect_timeout=0.2).infer({})
    with pytest.raises(ConnectionError, match="cannot be reached"):
        PolicyClient(uri(port), connect_timeout=0.2).infer({})
    with pytest.raises(ValueError, match="uri is 'nowhere'"):
        PolicyClient("nowhere").infer({})
    with pytest.raises(ValueError, match="timeout is 0"):
        PolicyClient(uri(port), timeout=0)
    with running(policy, api_key="k3y") as server:
        with pytest.raises(PermissionError, match="check api_key"):
            PolicyClient(uri(server.port)).connect()
        with PolicyClient(uri(server.port), api_key="k3y") as client:
            assert client.infer(one_step(policy, 0))["new_episode"]
    with running(policy, max_connections=1) as server:
        taken = silent_client(server.port)
        with PolicyClient(uri(server.port)) as client, pytest.raises(ConnectionError, match="refuses"):
            client.connect()
        taken.close()


def test_what_a_server_says_of_its_policy(policy: Policy) -> None:
    with running(policy) as server, PolicyClient(uri(server.port)) as client:
        spec = RemotePolicy(client).spec
        assert spec.observation == policy.spec.observation
        assert (spec.n_obs_steps, spec.n_action_steps, spec.action_dim) == (2, 4, 2)
        assert (spec.horizon, spec.executed, spec.control_hz) == (7, slice(0, 4), 10)
    with pytest.raises(ValueError, match="does not describe its policy"):
        described_spec({"policy": "another"})


def play(policy: Policy, proxy: Proxy, steps: int, fault: Callable[[int], None]) -> tuple[Controller, list[np.ndarray]]:
    """An asynchronous controller at 10 Hz; ``fault`` is called with each step."""
    client = PolicyClient(uri(proxy.port), timeout=PATIENCE)
    with client, Controller(RemotePolicy(client), asynchronous=True) as controller:
        pacer, actions = Pacer(10), []
        for step in range(steps):
            pacer.wait()
            fault(step)
            actions.append(controller.act(one_step(policy, step)))
    return controller, actions


def test_a_controller_plays_a_servers_chunks_as_its_own(policy: Policy) -> None:
    """In step, its actions are those of a controller with the policy in its own process."""
    with running(policy) as server, PolicyClient(uri(server.port)) as client:
        remote, here = Controller(RemotePolicy(client)), Controller(policy)
        for step in range(9):
            observation = one_step(policy, step)
            np.testing.assert_allclose(remote.act(observation), here.act(observation), rtol=1e-5, atol=1e-4)
        assert len(remote.planned()) == len(here.planned())


def test_a_stall_of_300_ms_leaves_no_gap() -> None:
    """With the usual chunks of 15 actions, of which 8 are executed."""
    policy = served_policy(horizon=16, n_action_steps=8)
    with running(policy) as server:
        proxy = Proxy(server.port)
        controller, actions = play(policy, proxy, 20, lambda step: setattr(proxy, "stall", 0.3) if step == 2 else None)
        proxy.close()
    record = controller.record
    assert record.steps == len(actions) == 20
    assert np.isfinite(actions).all()
    assert record.failures == record.held == 0
    assert record.continued >= 1  # the stall was felt
    rows = np.asarray(actions)
    assert (np.abs(np.diff(rows, axis=0)).max(1) > 0).all()  # no action stands still


def test_a_lost_connection_leaves_no_gap(policy: Policy, proxied: Proxy) -> None:
    controller, actions = play(policy, proxied, 12, lambda step: proxied.cut() if step == 5 else None)
    assert np.isfinite(actions).all()
    assert controller.record.failures >= 1
    assert "is lost" in str([chunk.error for chunk in controller.record.chunks])
    assert controller.record.chunks[-1].error is None


def test_a_remote_answer_is_checked(policy: Policy, proxied: Proxy) -> None:
    with PolicyClient(uri(proxied.port)) as client:
        remote = RemotePolicy(client)
        observation = some_observation(policy.spec)
        remote.spec = described_spec({**client.metadata, "action_horizon": 9})
        with pytest.raises(ValueError, match=r"shape \(7, 2\), expected \(9, 2\)"):
            remote.predict(observation)
