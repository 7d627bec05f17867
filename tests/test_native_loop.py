"""Whole chunks in C++ against the samplers' own rounds around the same native network."""

import dataclasses
import shutil
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import parapolicy
from parapolicy.calibrate import with_calibration
from parapolicy.denoiser import Denoiser
from parapolicy.engine import Deadline, Engine, Fused, native_loop
from parapolicy.planner import made_up_observations
from parapolicy.policy import Chunk
from parapolicy.samplers import Sampler
from tests.conftest import ROOT
from tests.helpers import DDPM_CONFIG, small_policy, some_observation

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ here")
SHIPPED = ("pusht_lowdim", "lift_lowdim", "can_lowdim", "square_lowdim")
FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 20}


class PerRound(Fused):
    """The native network with the samplers' rounds in Python."""

    def run(self, *arguments: Any, **options: Any) -> Any:
        return Engine.run(self, *arguments, **options)


@pytest.fixture
def native_calls(monkeypatch: pytest.MonkeyPatch) -> list[type[Sampler]]:
    """The samplers that were run in C++."""
    calls: list[type[Sampler]] = []
    for kind, loop in native_loop.LOOPS.items():

        def noted(*arguments: Any, kind: type[Sampler] = kind, loop: Callable[..., Any] = loop) -> Any:
            calls.append(kind)
            return loop(*arguments)

        monkeypatch.setitem(native_loop.LOOPS, kind, noted)
    return calls


def both(policy: parapolicy.Policy, observation: Any, **options: Any) -> tuple[Chunk, Chunk]:
    """A chunk by rounds in Python, and natively."""
    by_rounds = dataclasses.replace(policy, engine=PerRound())
    return by_rounds.predict(observation, **options), dataclasses.replace(policy, engine=Fused()).predict(
        observation, **options
    )


def assert_equal(expected: Chunk, found: Chunk, exact: bool) -> None:
    """Samples, estimates and costs; what sums in another order is equal to a few roundings of the largest number."""
    pairs = [(torch.from_numpy(chunk.trajectory) for chunk in (found, expected))]
    pairs.append(chunk.warm_state.estimates for chunk in (found, expected))
    for value, wanted in pairs:
        torch.testing.assert_close(value, wanted, rtol=0, atol=0 if exact else 1e-5 * float(wanted.abs().max()))
    for name in ("rounds", "evaluations", "complete", "error", "rejections"):
        np.testing.assert_array_equal(getattr(found.stats, name), getattr(expected.stats, name))
    np.testing.assert_allclose(found.stats.residual, expected.stats.residual, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", SHIPPED)
@pytest.mark.parametrize("batch", [1, 5])
def test_a_shipped_policy_s_chunk_is_the_same(name: str, batch: int, native_calls: list[Any]) -> None:
    folder = ROOT / "checkpoints" / name
    policy = with_calibration(parapolicy.load_policy(folder, device="cpu", engine="eager"), folder, measure=False)
    observations = made_up_observations(policy, batch)
    observation = {key: np.stack([one[key] for one in observations]) for key in observations[0]}
    ways = {
        "DDPM-100": policy.with_sampler("sequential"),
        "DDIM-10": policy.with_schedule("ddim", 10).with_sampler("sequential"),
        "DDIM-16": policy.with_schedule("ddim", 16).with_sampler("sequential"),
        "collocation 19": policy.with_sampler("collocation", nodes=19),
        "collocation 15, window 1": policy.with_sampler("collocation", nodes=15, window=1),
    }
    for way, candidate in ways.items():
        assert_equal(*both(candidate, observation, seed=3), exact="collocation" not in way)
    assert len(native_calls) == len(ways)


CONFIGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "epsilon, without clipping": ({"clip_sample": False}, {}),
    "a sample": ({"prediction_type": "sample"}, {}),
    "v": ({"prediction_type": "v_prediction"}, {}),
    "a narrow range": ({"clip_sample_range": 0.3}, {}),
    "DDIM, whose clipped excess stays": ({"clip_sample_range": 0.3}, {"solver": "ddim", "steps": 7, "eta": 0.5}),
    "of second order": ({}, {"solver": "dpmsolver++", "order": 2}),
    "of second order, with noise": ({}, {"solver": "sde-dpmsolver++", "order": 2, "steps": 12}),
}


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("sampler", ["sequential", "collocation"])
def test_every_schedule_s_chunk_is_the_same(config: str, sampler: str, native_calls: list[Any]) -> None:
    changes, settings = CONFIGS[config]
    policy = small_policy(scheduler={**DDPM_CONFIG, "num_train_timesteps": 20, **changes}).with_schedule(**settings)
    policy = policy.with_sampler(sampler, **({"nodes": 6} if sampler == "collocation" else {}))
    assert_equal(*both(policy, some_observation(policy.spec, 3)), exact=sampler == "sequential")
    assert len(native_calls) == 1


@pytest.mark.parametrize("sampler", ["sequential", "collocation"])
def test_flow_matching_is_the_same(sampler: str, native_calls: list[Any]) -> None:
    policy = small_policy(sampler, scheduler=FLOW)
    assert_equal(*both(policy, some_observation(policy.spec, 2)), exact=sampler == "sequential")
    assert len(native_calls) == 1


@pytest.mark.parametrize("settings", [{"reproducible": True}, {"max_batch": 2}, {"reproducible": True, "max_batch": 3}])
@pytest.mark.parametrize("sampler", ["sequential", "collocation"])
def test_the_size_of_calls_changes_nothing(settings: dict[str, Any], sampler: str, native_calls: list[Any]) -> None:
    plain = dataclasses.replace(small_policy(sampler), engine=Fused())
    policy, observation = dataclasses.replace(plain, **settings), some_observation(plain.spec, 5)
    assert_equal(*both(policy, observation), exact=sampler == "sequential")
    found = policy.predict(observation, seed=list(range(5))).warm_state.estimates
    if "max_batch" in settings:
        assert torch.equal(
            found,
            dataclasses.replace(policy, max_batch=None).predict(observation, seed=list(range(5))).warm_state.estimates,
        )
    if "reproducible" in settings:
        alone = policy.predict({key: value[3] for key, value in observation.items()}, seed=3)
        assert torch.equal(alone.warm_state.estimates[0], found[3])
    assert set(native_calls) == {type(policy.sampler)}


def after(rounds: int) -> Callable[[], bool]:
    """True from the so-many-th question on."""
    asked = [0]

    def stop() -> bool:
        asked[0] += 1
        return asked[0] >= rounds

    return stop


@pytest.mark.parametrize("sampler", ["sequential", "collocation"])
@pytest.mark.parametrize("rounds", [1, 2, 4, 1000])
def test_a_function_ends_it_after_the_same_round(sampler: str, rounds: int, native_calls: list[Any]) -> None:
    policy = small_policy(sampler)
    observation = some_observation(policy.spec, 2)
    expected, found = (
        dataclasses.replace(policy, engine=engine).predict(observation, deadline=after(rounds))
        for engine in (PerRound(), Fused())
    )
    assert_equal(expected, found, exact=sampler == "sequential")
    assert (found.stats.complete == (rounds == 1000)).all()
    assert rounds == 1000 or (found.stats.rounds == rounds).all()
    assert len(native_calls) == 1


@pytest.mark.parametrize("sampler", ["sequential", "collocation"])
def test_a_time_ends_it(sampler: str, monkeypatch: pytest.MonkeyPatch, native_calls: list[Any]) -> None:
    monkeypatch.setattr(Deadline, "__call__", lambda deadline: pytest.fail("C++ watches the time itself"))
    policy = dataclasses.replace(small_policy(sampler), engine=Fused())
    observation = some_observation(policy.spec)
    past = policy.predict(observation, deadline=time.monotonic() - 1).stats
    later = policy.predict(observation, deadline=time.monotonic() + 3600).stats
    never = policy.predict(observation, deadline=float("inf")).stats
    assert (past.rounds, past.complete) == (1, False)
    assert later.complete
    assert never.complete
    assert later.rounds == never.rounds == policy.predict(observation).stats.rounds
    assert len(native_calls) == 4


def test_the_controller_s_deadline_is_watched_in_c(monkeypatch: pytest.MonkeyPatch, native_calls: list[Any]) -> None:
    monkeypatch.setattr(Deadline, "__call__", lambda deadline: pytest.fail("C++ watches the time itself"))
    policy = dataclasses.replace(small_policy(), engine=Fused())
    observation = {key: value[0] for key, value in some_observation(policy.spec).items()}
    for deadline_ms, late in ((1e6, 0), (1e-6, 1)):
        with parapolicy.Controller(policy, deadline_ms=deadline_ms) as controller:
            controller.reset(seed=0)
            controller.act(observation)
            assert controller.latency["late"] == late
    assert len(native_calls) == 2


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_what_the_function_raises_comes_out(error: type[BaseException]) -> None:
    policy = dataclasses.replace(small_policy(), engine=Fused())
    asked = []

    def stop() -> bool:
        asked.append(None)
        raise error("the clock is gone")

    with pytest.raises(error, match="the clock is gone"):
        policy.predict(some_observation(policy.spec), deadline=stop)
    assert len(asked) == 1
    assert policy.predict(some_observation(policy.spec)).stats.complete


def test_other_samplers_and_inpainting_go_round_by_round(native_calls: list[Any]) -> None:
    network = {"name": "unet1d", "down_dims": [16, 32], "n_groups": 4, "condition": "inpaint"}
    inpainting = small_policy(observation={"state": (3,)}, observed_dim=3, network=network)
    for policy in (small_policy("secant"), small_policy("parareal"), inpainting):
        assert_equal(*both(policy, some_observation(policy.spec)), exact=True)
    assert native_calls == []


def test_a_warm_start_changes_nothing() -> None:
    policy = dataclasses.replace(small_policy("collocation"), engine=Fused())
    observation = some_observation(policy.spec)
    cold = policy.predict(observation, seed=1)
    warm = policy.predict(observation, noise=cold.warm_state.noise, warm=policy.predict(observation).warm_state)
    np.testing.assert_array_equal(cold.trajectory, warm.trajectory)


def test_what_is_not_finite_ends_and_is_refused() -> None:
    for sampler in ("sequential", "collocation"):
        policy = dataclasses.replace(small_policy(sampler), engine=Fused())
        noise = torch.full((len(policy.schedule) + 1, 1, *policy.spec.sample_shape), float("nan"))
        with pytest.raises(FloatingPointError, match="action chunk"):
            policy.predict(some_observation(policy.spec), noise=noise)


def test_noise_of_another_schedule_is_refused() -> None:
    policy = dataclasses.replace(small_policy(), engine=Fused())
    observation = {"state": torch.zeros(1, 2, 8)}
    bound = policy.engine.bind(policy.network, policy.schedule.timesteps, observation)
    denoiser = Denoiser(bound, policy.schedule, policy.spec.sample_shape)
    for shape in ((20, 1, 16), (21, 2, 16), (21, 1, 15)):
        with pytest.raises(ValueError, match="noise has shape"):
            policy.engine.run(policy.sampler, denoiser, torch.zeros(shape))


def test_schedules_may_take_turns() -> None:
    """More of them than are kept, with one engine."""
    policy = dataclasses.replace(small_policy(), engine=Fused())
    turns = [policy.with_schedule("ddim", steps) for steps in (*range(1, 13), 1, 12, 2)]
    for turn in turns:
        alone = dataclasses.replace(turn, engine=Fused())
        observation = some_observation(policy.spec)
        np.testing.assert_array_equal(turn.predict(observation).trajectory, alone.predict(observation).trajectory)


def test_threads_may_sample_at_once() -> None:
    policy = dataclasses.replace(small_policy("collocation"), engine=Fused())
    observations = [some_observation(policy.spec, 2, seed=i) for i in range(4)]
    expected = [policy.predict(o, seed=i).trajectory for i, o in enumerate(observations)]
    found: dict[int, list[np.ndarray]] = {}

    def work(i: int) -> None:
        found[i] = [policy.predict(observations[i], seed=i).trajectory for _ in range(20)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(4):
        for trajectory in found[i]:
            np.testing.assert_array_equal(trajectory, expected[i])
