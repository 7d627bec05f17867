"""Policies of other programs, small and made up: every sampler, engine and way of an observation takes them."""

import functools
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp

import parapolicy
from parapolicy.engine.lowered.unet1d import LoweredUnet1D
from parapolicy.launch import start_workers
from parapolicy.networks.unet1d import ConditionalUnet1D
from parapolicy.noise import mix_seeds
from parapolicy.planner import made_up_observations
from parapolicy.policy import Policy
from parapolicy.serve.session import Session
from parapolicy.serve.wire import Limits, pack, unpack
from parapolicy.spec import Feature
from tests import lerobot_folders
from tests import stanford_files as files
from tests.helpers import process_folder
from tests.test_stanford_images import hybrid_file

KINDS = ("low-dim", "transformer", "hybrid", "lerobot")
EXACT = ("secant", "semi_implicit", "anderson", "paradigms", "parareal")
STEPS = 12  # of the schedules here


@functools.cache
def checkpoint(kind: str) -> Path:
    """A file or folder as another program writes it; all with DDPM's whole schedule."""
    torch.manual_seed(0)
    scheduler = {**files.DDPM, "num_train_timesteps": STEPS}
    if kind == "lerobot":
        changes: dict[str, Any] = {"noise_scheduler_type": "DDPM", "num_train_timesteps": STEPS}
        changes |= {"num_inference_steps": None, "crop_shape": [40, 36]}
        inputs = {k: v for k, v in lerobot_folders.CAMERAS.items() if "wrist" not in k}
        return lerobot_folders.made_up(process_folder() / kind, input_features=inputs, **changes)[0]
    folder = process_folder() / kind
    folder.mkdir()
    if kind == "hybrid":
        return hybrid_file(folder, "Unet", "group", noise_scheduler=scheduler)[0]
    _, built = files.network_of(files.UNET if kind == "low-dim" else files.TRANSFORMER, {"obs": (3,)})
    config = files.lowdim_config(kind == "low-dim", noise_scheduler=scheduler, num_inference_steps=STEPS)
    return files.save(
        folder / "x.ckpt", config, files.model_state(built) | files.normaliser_state(obs=3, action=2), model={}
    )


@functools.cache
def policy(kind: str) -> Policy:
    return parapolicy.load_policy(checkpoint(kind), "sequential", "cpu", engine="eager")


def normalized(policy: Policy, chunk: parapolicy.Chunk) -> np.ndarray:
    return policy.normalizer.normalize("action", torch.from_numpy(chunk.trajectory)).numpy()


def assert_same_chunks(one: Policy, other: Policy, within: float = 1e-4) -> None:
    for seed, observation in enumerate(made_up_observations(one, 2)):
        found, expected = (p.predict(observation, seed=seed) for p in (one, other))
        np.testing.assert_allclose(normalized(one, found), normalized(one, expected), rtol=0, atol=within)


@pytest.mark.parametrize("kind", KINDS)
def test_every_sampler_runs(kind: str) -> None:
    observations = [{k: v[None].repeat(2, 0) for k, v in o.items()} for o in made_up_observations(policy(kind), 1)]
    for name in parapolicy.list_samplers():
        chunk = policy(kind).with_sampler(name).predict(observations[0])
        assert chunk.actions.shape == (2, 4, 2), name
        assert np.isfinite(chunk.actions).all(), name
        assert (chunk.stats.rounds <= 2 * STEPS).all(), name


@pytest.mark.parametrize("kind", KINDS)
def test_exact_samplers_give_the_sequential_chunk(kind: str) -> None:
    sequential = policy(kind)
    observation = made_up_observations(sequential, 1)[0]
    here = normalized(sequential, sequential.predict(observation))
    assert np.abs(here - normalized(sequential, sequential.predict(observation, seed=1))).max() > 0.01
    for name in EXACT:
        assert_same_chunks(sequential.with_sampler(name, tolerance=0), sequential)


@pytest.mark.distributed
def test_what_is_compiled_gives_the_same_chunks() -> None:
    """One image policy: its encoder, and the rewritten UNet."""
    compiled = parapolicy.load_policy(checkpoint("lerobot"), "sequential", "cpu", engine="compiled")
    assert_same_chunks(compiled, policy("lerobot"))


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ here")
@pytest.mark.parametrize("kind", ["low-dim", "hybrid", "lerobot"])
def test_the_native_engine_gives_the_same_chunks(kind: str, recwarn: pytest.WarningsRecorder) -> None:
    fused = parapolicy.load_policy(checkpoint(kind), "sequential", "cpu", engine="fused")
    assert_same_chunks(fused, policy(kind))
    assert not any("is used instead" in str(warning.message) for warning in recwarn)


@pytest.mark.parametrize("kind", ["low-dim", "hybrid", "lerobot"])
def test_a_rewritten_network_computes_the_same(kind: str) -> None:
    network = policy(kind).network
    assert isinstance(network, ConditionalUnet1D)
    rewritten = LoweredUnet1D(network)
    x, step = torch.randn(3, 8, 2), torch.arange(3)
    inputs, element = {}, torch.tensor([0, 1, 1])
    for key, feature in policy(kind).spec.observation.items():
        inputs[key] = torch.rand(2, 2, *feature.tensor_shape)
    found, expected = (
        n(x, n.embed_steps(step), n.embed_condition(inputs), step, element) for n in (rewritten, network)
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("kind", ["transformer", "lerobot"])
def test_two_processes_give_the_chunk_of_one(kind: str) -> None:
    alone = policy(kind).with_sampler("secant")
    with start_workers(checkpoint(kind), 2, timeout=60.0) as shared:
        for observation in made_up_observations(alone, 2):
            chunk, expected = shared.predict(observation), alone.predict(observation)
            assert chunk.stats.rounds == expected.stats.rounds
            np.testing.assert_allclose(normalized(alone, chunk), normalized(alone, expected), rtol=0, atol=1e-4)
    assert not mp.active_children()


def camera_step(seed: int) -> dict[str, np.ndarray]:
    """One control step as a robot sees it, with a picture of a camera."""
    rng = np.random.default_rng(seed)
    spec = policy("lerobot").spec
    assert spec.observation["observation.images.front"] == Feature((48, 40, 3), "image")
    picture = rng.integers(0, 256, (48, 40, 3), dtype=np.uint8)
    return {"observation.state": rng.normal(size=2), "observation.images.front": picture}


def test_a_controller_acts_on_a_camera() -> None:
    served = policy("lerobot")
    steps = [camera_step(i) for i in range(6)]
    with parapolicy.Controller(served, control_hz=10) as controller:
        controller.reset(seed=0)
        actions = [controller.act(step) for step in steps]
    history = parapolicy.ObservationHistory(served.spec)
    expected = []
    for k, last in enumerate((0, 4)):  # each chunk acts for four control steps
        for step in steps[max(0, last - 1) : last + 1]:
            history.push(step)
        stacked = history.stacked()
        assert stacked["observation.images.front"].dtype == np.uint8
        assert stacked["observation.images.front"].shape == (2, 48, 40, 3)
        expected += [*served.predict(stacked, seed=mix_seeds(0, k)).actions]
    np.testing.assert_allclose(actions, expected[:6], rtol=0, atol=1e-5)


def test_a_picture_reaches_the_policy_over_the_wire() -> None:
    served = policy("lerobot")
    step, limits = camera_step(0), Limits.of(served.spec)
    message = {**step, "observation.state": step["observation.state"].astype(np.float32)}
    data = pack(message)
    assert len(data) <= limits.message_bytes
    session = Session(served.spec, warm_start=False)
    request = session.request(unpack(data, limits))
    arrived = request.observation["observation.images.front"]
    assert arrived.dtype == np.uint8
    assert np.array_equal(arrived, np.stack([step["observation.images.front"]] * 2))
    answer = unpack(pack(session.answer(served.predict(request.observation, seed=request.seed))))
    history = parapolicy.ObservationHistory(served.spec)
    history.push(message)
    expected = served.predict(history.stacked(), seed=mix_seeds(0, 0)).trajectory[1:]
    np.testing.assert_array_equal(answer["actions"], expected)
