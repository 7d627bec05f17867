"""The engine openvino: equal to eager for any number of rows, and it reports to nobody."""

import dataclasses
import socket
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import parapolicy
from parapolicy.engine import OpenVino, make_engine
from parapolicy.engine.openvino import import_openvino
from parapolicy.networks import NETWORKS, Embedding, Network
from tests.helpers import needs, small_policy, some_observation
from tests.test_toy_network import OBSERVATION, Toy

installed = needs("openvino")
# Condition layers mix its memory's tokens, which the native engine does not compute.
TRANSFORMER = {"name": "transformer1d", "n_layer": 1, "n_head": 2, "n_emb": 16, "n_cond_layers": 1}


@pytest.fixture(scope="module")
def eager() -> parapolicy.Policy:
    return small_policy(network=TRANSFORMER)


@pytest.fixture(scope="module")
def policy(eager: parapolicy.Policy) -> parapolicy.Policy:
    return dataclasses.replace(eager, engine=OpenVino())


@installed
@pytest.mark.parametrize("sampler", ["sequential", "collocation", "secant"])
def test_chunks_are_those_of_eager(sampler: str, policy: parapolicy.Policy, eager: parapolicy.Policy) -> None:
    for seed, batch in ((0, None), (1, 3)):
        observation = some_observation(policy.spec, batch, seed)
        found = policy.with_sampler(sampler).predict(observation, seed=seed)
        expected = eager.with_sampler(sampler).predict(observation, seed=seed)
        np.testing.assert_allclose(found.trajectory, expected.trajectory, rtol=0, atol=0.01)  # of 200


@installed
@pytest.mark.parametrize("name", ["toy", "unet1d"])
def test_any_network_and_number_of_rows(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of a third party with two condition tensors, and one whose first steps see an observed step each."""
    monkeypatch.setitem(NETWORKS, "toy", Toy)
    local = {"name": "unet1d", "down_dims": [8], "n_groups": 4, "condition": "local"}
    made = small_policy(**(toy() if name == "toy" else {"network": local}))
    engine, network = OpenVino(), made.network
    observation = {
        key: torch.randn(4, 2, *((3, 6, 8) if feature.kind == "image" else feature.shape))
        for key, feature in made.spec.observation.items()
    }
    for elements in (1, 4):
        observed = {key: value[:elements] for key, value in observation.items()}
        bound = engine.bind(network, made.schedule.timesteps, observed)
        expected = make_engine("eager", made.device).bind(network, made.schedule.timesteps, observed)
        for rows in (1, 2, 40):
            given = (
                torch.randn(rows, *made.spec.sample_shape),
                torch.randint(20, (rows,)),
                torch.arange(rows) % elements,
            )
            torch.testing.assert_close(bound(*given), expected(*given), rtol=0, atol=1e-5)


def toy() -> dict[str, Any]:
    return {"observation": OBSERVATION, "network": {"name": "toy", "width": 16}}


def toy_observation() -> dict[str, np.ndarray]:
    return {"camera": np.zeros((2, 6, 8, 3), np.uint8), "position": np.zeros((2, 2), np.float32)}


@installed
def test_threads_share_it(policy: parapolicy.Policy) -> None:
    observations = [some_observation(policy.spec, seed=seed) for seed in range(8)]
    expected = [policy.predict(observation).trajectory for observation in observations]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            found = list(pool.map(lambda observation: policy.predict(observation).trajectory, observations))
            np.testing.assert_array_equal(found, expected)


class Remembers(Toy):
    """What its trace cannot hold: the number of rows decides."""

    def forward(self, x: Tensor, steps: Embedding, condition: Embedding, step: Tensor, element: Tensor) -> Tensor:
        return super().forward(x, steps, condition, step, element) * len(x)


class Untraceable(Toy):
    """By an operator that OpenVINO does not have."""

    def forward(self, x: Tensor, steps: Embedding, condition: Embedding, step: Tensor, element: Tensor) -> Tensor:
        return torch.linalg.eigvals(x @ x.mT).real[..., None].expand_as(x)


@installed
@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Remembers, r"converted for OpenVINO differs from the network by .* at 1 rows"),
        (Untraceable, "does not support"),
    ],
)
def test_what_it_cannot_compute_is_refused(kind: type[Network], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(NETWORKS, "toy", kind)
    made = dataclasses.replace(small_policy(**toy()), engine=OpenVino())
    with pytest.raises(ValueError, match=message):
        made.predict(toy_observation())


@installed
def test_nothing_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    """OpenVINO's telemetry would report its import and every conversion."""
    openvino = import_openvino()
    assert openvino.tools.ovc.telemetry_utils.tm.__name__ == "openvino.tools.ovc.telemetry_stub"
    assert "openvino_telemetry" not in sys.modules
    reached: list[Any] = []
    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, lambda *address: reached.append(address), raising=False)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *address: reached.append(address))
    monkeypatch.setitem(NETWORKS, "toy", Toy)
    dataclasses.replace(small_policy(**toy()), engine=OpenVino()).predict(toy_observation())
    assert reached == []


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(ValueError, match=r"pip install 'parapolicy\[openvino\]'"):
        make_engine("openvino", torch.device("cpu"))


def test_it_is_for_cpus() -> None:
    with pytest.raises(ValueError, match="engine 'openvino' needs a CPU"):
        make_engine("openvino", torch.device("cuda"))
