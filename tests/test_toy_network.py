"""A network of a third party, with an image among its observations: one class, used by every part of the product."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import parapolicy
from parapolicy.engine import make_engine
from parapolicy.launch import start_workers
from parapolicy.networks import NETWORKS, Embedding, Network
from parapolicy.observation import normalize_observation
from parapolicy.spec import Feature, PolicySpec
from tests.helpers import small_policy

OBSERVATION = {"camera": Feature((6, 8, 3), "image"), "position": Feature((2,))}


class Toy(Network):
    """The mean color of each camera frame and the position move the sample; two condition tensors, not one."""

    def __init__(self, spec: PolicySpec, width: int) -> None:
        super().__init__()
        self.time = nn.Embedding(1000, width)
        self.color, self.place = nn.Linear(3 * spec.n_obs_steps, width), nn.Linear(2 * spec.n_obs_steps, width)
        self.output = nn.Linear(width + spec.action_dim, spec.action_dim)

    @classmethod
    def build(cls, spec: PolicySpec, **arguments: Any) -> "Toy":
        return cls(spec, **arguments)

    def embed_steps(self, timesteps: Tensor) -> Tensor:
        embedding: Tensor = self.time(timesteps)
        return embedding

    def embed_condition(self, observation: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        assert observation["camera"].shape[2:] == (3, 6, 8)
        color = observation["camera"].mean((3, 4)).flatten(1)
        return self.color(color), self.place(observation["position"].flatten(1))

    def forward(self, x: Tensor, steps: Embedding, condition: Embedding, step: Tensor, element: Tensor) -> Tensor:
        assert isinstance(steps, Tensor)
        color, place = condition
        hidden = torch.tanh(steps[step] + color[element] + place[element])[:, None].expand(-1, x.shape[1], -1)
        prediction: Tensor = self.output(torch.cat((hidden, x), -1))
        return prediction


@pytest.fixture
def policy(monkeypatch: pytest.MonkeyPatch) -> parapolicy.Policy:
    monkeypatch.setitem(NETWORKS, "toy", Toy)
    return small_policy(observation=OBSERVATION, network={"name": "toy", "width": 16})


def observe(seed: int, batch: int | None = None) -> dict[str, np.ndarray]:
    rng, lead = np.random.default_rng(seed), (2,) if batch is None else (batch, 2)
    camera = rng.integers(0, 256, (*lead, 6, 8, 3)).astype(np.uint8)
    return {"camera": camera, "position": rng.uniform(0, 100, (*lead, 2)).astype(np.float32)}


@pytest.mark.parametrize("sampler", parapolicy.list_samplers())
def test_every_sampler_runs_it(policy: parapolicy.Policy, sampler: str) -> None:
    expected = policy.predict(observe(0), seed=1).trajectory
    chunk = policy.with_sampler(sampler).predict(observe(0), seed=1)
    assert chunk.trajectory.shape == (8, 2)
    # Another draw, one that trusts in a trained network, and one of another distribution.
    if sampler not in ("speculative", "collocation", "genetic"):
        np.testing.assert_allclose(chunk.trajectory, expected, rtol=0, atol=10)  # of 200
    assert not np.allclose(policy.predict(observe(1), seed=1).trajectory, expected)


def test_images_as_cameras_and_as_data_sets_give_them(policy: parapolicy.Policy) -> None:
    observation = observe(0)
    floats = observation["camera"].transpose(0, 3, 1, 2).astype(np.float32) / 255
    expected = policy.predict(observation).trajectory
    np.testing.assert_allclose(policy.predict({**observation, "camera": floats}).trajectory, expected, atol=1e-3)
    black = np.zeros_like(observation["camera"])
    assert not np.allclose(policy.predict({**observation, "camera": black}).trajectory, expected)


def test_white_is_one(policy: parapolicy.Policy) -> None:
    expected = policy.normalizer.normalize("camera", torch.ones(1, 2, 3, 6, 8))
    for white in (np.full((2, 6, 8, 3), 255, np.uint8), np.ones((2, 3, 6, 8))):
        inputs, batched = normalize_observation(policy.spec, policy.normalizer, {**observe(0), "camera": white})
        assert not batched
        assert torch.equal(inputs["camera"], expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda camera: camera.astype(np.int64), "image 'camera' is int64, expected uint8"),
        (lambda camera: camera.astype(np.float32), r"shape \(2, 6, 8, 3\), expected \(2, 3, 6, 8\)"),
        (lambda camera: camera.transpose(0, 3, 1, 2), r"shape \(2, 3, 6, 8\), expected \(2, 6, 8, 3\)"),
        (lambda camera: camera.transpose(0, 3, 1, 2) * 1.0, "numbers from 0 to 255, expected 0 to 1"),
        (lambda camera: camera.transpose(0, 3, 1, 2) / 200, "numbers from 0 to 1.2.*, expected 0 to 1, or uint8"),
    ],
)
def test_other_images_are_refused(policy: parapolicy.Policy, change: Any, message: str) -> None:
    observation = observe(0)
    with pytest.raises(parapolicy.ObservationError, match=message):
        policy.predict({**observation, "camera": change(observation["camera"])})


def test_the_history_keeps_images_as_they_came(policy: parapolicy.Policy) -> None:
    history = parapolicy.ObservationHistory(policy.spec)
    steps = observe(3)
    for i in range(2):
        history.push({key: value[i] for key, value in steps.items()})
    stacked = history.stacked()
    assert stacked["camera"].dtype == np.uint8
    np.testing.assert_array_equal(stacked["camera"], steps["camera"])
    mixed = {"camera": np.zeros((3, 6, 8), np.float32), "position": np.zeros(2)}
    with pytest.raises(parapolicy.ObservationError, match="'camera' is float32, expected uint8"):
        history.push(mixed)


def test_it_is_saved_and_loaded(policy: parapolicy.Policy, tmp_path: Path) -> None:
    parapolicy.save_policy(policy, tmp_path)
    loaded = parapolicy.load_policy(tmp_path, sampler="sequential", device="cpu", engine="eager")
    assert loaded.spec == policy.spec
    found, expected = (p.predict(observe(0)).trajectory for p in (loaded, policy))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-3)
    assert list(loaded.spec.observation) == ["camera", "position"]


def test_a_controller_and_the_planner_run_it(policy: parapolicy.Policy, tmp_path: Path) -> None:
    steps = observe(0, batch=1)
    with parapolicy.Controller(policy) as controller:
        actions = [controller.act({key: value[0, 0] for key, value in steps.items()}) for _ in range(6)]
    assert np.isfinite(actions).all()
    plan = parapolicy.make_plan(policy, cache=tmp_path)
    assert plan.apply(policy).predict(observe(0)).trajectory.shape == (8, 2)


@pytest.mark.parametrize("engine", ["compiled", "sharded"])
def test_other_engines_run_it(
    policy: parapolicy.Policy, engine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = policy.predict(observe(0, 3), seed=2).trajectory
    if engine == "compiled":
        made = dataclasses.replace(policy, engine=make_engine(engine, policy.device))
        np.testing.assert_allclose(made.predict(observe(0, 3), seed=2).trajectory, expected, rtol=0, atol=1e-2)
        return
    # The workers are processes of their own, which find the class by its entry point.
    package = tmp_path / "toy.dist-info"
    package.mkdir()
    (package / "entry_points.txt").write_text("[parapolicy.networks]\ntoy = tests.test_toy_network:Toy\n")
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: toy\nVersion: 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    parapolicy.save_policy(policy, tmp_path / "policy")
    with start_workers(tmp_path / "policy", 2) as split:
        chunk = split.with_sampler("sequential").predict(observe(0, 3), seed=2)
    np.testing.assert_allclose(chunk.trajectory, expected, rtol=0, atol=1e-2)


def test_bfloat16_products_need_a_lowered_form(policy: parapolicy.Policy) -> None:
    made = dataclasses.replace(policy, engine=make_engine("compiled_bfloat16", policy.device))
    with pytest.raises(ValueError, match=r"Toy has no form with torch\.bfloat16 products; take engine 'compiled'"):
        made.predict(observe(0))


def test_a_network_without_an_encoder_refuses_images() -> None:
    with pytest.raises(ValueError, match=r"has no encoder, but \['camera'\] are images"):
        small_policy(observation=OBSERVATION)
