"""Observation in, chunk out: shapes, seeds, batches, and what is refused."""

import copy
import dataclasses
import os
import pickle
import platform
import subprocess
import sys
import threading
import time
from typing import Any

import numpy as np
import pytest
import torch

import parapolicy
from parapolicy.engine import Eager, make_engine
from parapolicy.normalizer import Affine, Normalizer
from tests.conftest import ROOT, SHIPPED
from tests.helpers import needs, small_policy, small_spec, some_observation


def test_one_observation() -> None:
    policy = small_policy()
    chunk = policy.predict(some_observation(policy.spec), seed=1)
    assert chunk.trajectory.shape == (8, 2)
    assert chunk.actions.shape == (4, 2)
    # The first predicted action belongs to the first observation step; execution begins at the newest.
    np.testing.assert_array_equal(chunk.actions, chunk.trajectory[1:5])
    assert chunk.stats.rounds == chunk.stats.evaluations == 20
    assert chunk.stats.residual == 0
    assert set(chunk.stats.stages) == {"encode", "sample", "post"}
    assert min(chunk.stats.stages.values()) > 0
    assert sum(chunk.stats.stages.values()) == pytest.approx(chunk.stats.seconds)


@pytest.mark.parametrize("sampler", parapolicy.list_samplers())
def test_a_batch_is_its_elements(sampler: str) -> None:
    policy = small_policy().with_sampler(sampler)
    observation = some_observation(policy.spec, batch=3)
    batch = policy.predict(observation, seed=[4, 5, 6])
    assert batch.actions.shape == (3, 4, 2)
    for b in range(3):
        single = policy.predict({key: value[b] for key, value in observation.items()}, seed=4 + b)
        np.testing.assert_allclose(single.trajectory, batch.trajectory[b], atol=1e-2)  # units of 100
        assert single.stats.evaluations == batch.stats.evaluations[b]


def test_same_seed_same_chunk_and_given_noise() -> None:
    policy = small_policy("semi_implicit")
    observation = some_observation(policy.spec)
    first, again, other = (policy.predict(observation, seed=seed).trajectory for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert not np.allclose(first, other)
    noise = parapolicy.draw_noise(policy.schedule, seed=1)
    for given in (noise, noise.numpy()):  # files of recorded noise hold arrays
        np.testing.assert_array_equal(policy.predict(observation, noise=given).trajectory, first)


@pytest.mark.parametrize("engine", ["fused", "compiled", pytest.param("openvino", marks=needs("openvino"))])
def test_a_policy_can_be_copied_and_sent_to_another_process(engine: str) -> None:
    policy = dataclasses.replace(small_policy(), engine=make_engine(engine, torch.device("cpu")))
    observation = some_observation(policy.spec)
    if engine == "fused":  # the others' first chunks take long, and their locks alone could not be copied
        policy.predict(observation)
    for twin in (copy.deepcopy(policy), pickle.loads(pickle.dumps(policy))):
        assert (type(twin.engine), twin.engine.name) == (type(policy.engine), policy.engine.name)
        if engine == "fused":
            expected = policy.predict(observation, seed=3).trajectory
            np.testing.assert_array_equal(twin.predict(observation, seed=3).trajectory, expected)


@pytest.mark.parametrize("seed", ["a", 1.5, [0.5], None])
def test_a_seed_that_is_no_whole_number_is_named(seed: Any) -> None:
    policy = small_policy()
    with pytest.raises(ValueError, match=r"seed is .*, expected a whole number"):
        policy.predict(some_observation(policy.spec), seed=seed)


def test_seeds_and_warm_states_must_fit() -> None:
    policy = small_policy()
    observation = some_observation(policy.spec, batch=3)
    with pytest.raises(ValueError, match="there are 2 seeds, expected one, or 3"):
        policy.predict(observation, seed=[0, 1])
    chunk: Any = policy.predict(observation)
    with pytest.raises(ValueError, match="warm is a Chunk, expected the chunk's warm_state"):
        policy.predict(observation, warm=chunk)


@pytest.mark.parametrize("observation", [None, [1.0, 2.0], np.zeros(3)], ids=["none", "list", "array"])
def test_an_observation_is_a_dictionary(observation: Any) -> None:
    policy = small_policy()
    for take in (policy.predict, parapolicy.ObservationHistory(policy.spec).push):
        with pytest.raises(parapolicy.ObservationError, match=r"is a \w+, expected a dictionary of \['position'"):
            take(observation)


def test_the_actions_of_an_inpainting_policy_are_its_sample_s_first_numbers() -> None:
    network = {"name": "unet1d", "down_dims": [16, 32], "n_groups": 4, "condition": "inpaint"}
    policy = small_policy(observation={"state": (3,)}, observed_dim=3, network=network).with_schedule("ddim", 4)
    chunk = policy.predict(some_observation(policy.spec))
    last = chunk.warm_state.estimates[0, -1]  # (8, 5), with which DDIM ends
    expected = policy.normalizer.unnormalize("action", last[:, :2])
    np.testing.assert_allclose(chunk.trajectory, expected.numpy(), atol=1e-4)


class Exclusive(Eager):
    """An engine whose chunks share memory: each may begin when the one before has ended."""

    def __init__(self) -> None:
        self.lock, self.seen = threading.Lock(), []

    def exclusive(self) -> threading.Lock:
        return self.lock

    def bind(self, *arguments: Any, **options: Any) -> Any:
        self.seen.append(("bind", self.lock.locked()))
        return super().bind(*arguments, **options)

    def run(self, *arguments: Any, **options: Any) -> Any:
        sample = super().run(*arguments, **options)
        self.seen.append(("ran", self.lock.locked()))
        return sample


def test_an_engine_is_held_from_a_chunk_s_begin_to_its_last_round() -> None:
    engine = Exclusive()
    policy = dataclasses.replace(small_policy(), engine=engine)
    policy.predict(some_observation(policy.spec))
    assert engine.seen == [("bind", True), ("ran", True)]
    assert not engine.lock.locked()


def test_tensors_and_float64_are_taken() -> None:
    policy = small_policy()
    observation = some_observation(policy.spec)
    expected = policy.predict(observation).trajectory
    as_float64 = {key: value.astype(np.float64) for key, value in observation.items()}
    as_tensors = {key: torch.from_numpy(value) for key, value in observation.items()}
    np.testing.assert_array_equal(policy.predict(as_float64).trajectory, expected)
    np.testing.assert_array_equal(policy.predict(as_tensors).trajectory, expected)
    noise = parapolicy.draw_noise(policy.schedule, 1, seed=0).double()
    np.testing.assert_array_equal(policy.predict(observation, noise).trajectory, expected)


REPRODUCIBLE = """
import dataclasses, sys
import numpy as np, torch, parapolicy
from parapolicy.planner import made_up_observations
torch.set_num_threads(int(sys.argv[2]))
policy = parapolicy.load_policy(sys.argv[1], device="cpu", engine="eager").with_schedule("ddpm", 5)
policy = dataclasses.replace(policy, reproducible=True)
observations = made_up_observations(policy, 13)
for sampler in ("sequential", "secant"):
    policy = policy.with_sampler(sampler)
    alone = [policy.predict(o, seed=i).trajectory for i, o in enumerate(observations)]
    for count in (2, 5, 13):
        together = {key: np.stack([o[key] for o in observations[:count]]) for key in observations[0]}
        batch = policy.predict(together, seed=range(count)).trajectory
        print(sampler, count, np.array_equal(batch, alone[:count]))
"""


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="seen on x86 only")
@pytest.mark.parametrize("threads", ["1", "2"])
def test_reproducible_batches_agree_to_the_bit(threads: str) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": threads, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", REPRODUCIBLE, str(SHIPPED), threads]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    expected = [f"{sampler} {count} True" for sampler in ("sequential", "secant") for count in (2, 5, 13)]
    assert done.stdout.splitlines() == expected


def test_reproducible_conditions_are_embedded_in_full_batches() -> None:
    """A product of one row takes another kernel than one of two."""
    policy = small_policy()
    sizes: list[int] = []
    embed = policy.network.embed_condition

    def note(observation: dict[str, torch.Tensor]) -> Any:
        sizes.extend(len(value) for value in observation.values())
        return embed(observation)

    policy.network.embed_condition = note  # type: ignore[method-assign]
    for batch in (None, 3, 17):
        dataclasses.replace(policy, reproducible=True).predict(some_observation(policy.spec, batch))
    assert sizes == [16, 16, 16, 16, 32, 32]


@pytest.mark.parametrize("sampler", parapolicy.list_samplers())
def test_a_deadline_ends_sampling_after_the_round(sampler: str) -> None:
    policy = small_policy(sampler)
    observation = some_observation(policy.spec)
    whole = policy.predict(observation)
    assert whole.stats.complete is True
    past = policy.predict(observation, deadline=time.monotonic() - 1)
    assert (past.stats.rounds, past.stats.complete) == (1, False)
    never_up = policy.predict(observation, deadline=time.monotonic() + 3600)
    np.testing.assert_array_equal(never_up.trajectory, whole.trajectory)
    asked = []
    two_rounds = policy.predict(observation, deadline=lambda: asked.append(1) or len(asked) == 2)
    assert two_rounds.stats.rounds == len(asked) == 2
    with pytest.raises(ValueError, match="deadline is nan"):
        policy.predict(observation, deadline=float("nan"))
    for wrong in (0.05, time.time() + 0.05, "0.05", True):  # no time of this clock
        with pytest.raises(ValueError, match=r"expected a time of time\.monotonic\(\)"):
            policy.predict(observation, deadline=wrong)


def test_one_state_per_call_is_a_bound() -> None:
    policy = small_policy()
    with pytest.raises(ValueError, match="max_batch is 0"):
        dataclasses.replace(policy, max_batch=0)
    observation = some_observation(policy.spec, batch=2)
    single = dataclasses.replace(policy, max_batch=1).predict(observation)
    np.testing.assert_allclose(single.trajectory, policy.predict(observation).trajectory, rtol=1e-4, atol=1e-3)


def test_without_arguments_it_is_the_published_schedule() -> None:
    policy = small_policy(inference={"solver": "ddim", "steps": 10})
    moved = policy.with_schedule(steps=20)
    assert (moved.schedule.solver, len(moved.schedule)) == ("ddpm", 20)
    published = moved.with_schedule()
    assert (published.schedule.solver, len(published.schedule)) == ("ddim", 10)


@pytest.mark.parametrize("sampler", parapolicy.list_samplers())
def test_max_batch_bounds_every_call_and_changes_nothing(sampler: str) -> None:
    policy = small_policy(sampler)
    sizes: list[int] = []
    policy.network.register_forward_pre_hook(lambda network, inputs: sizes.append(len(inputs[0])))
    observation = some_observation(policy.spec, batch=3)
    whole = policy.predict(observation)
    largest = max(sizes)
    sizes.clear()
    parts = dataclasses.replace(policy, max_batch=2).predict(observation)
    assert max(sizes) == 2 < largest
    np.testing.assert_allclose(parts.trajectory, whole.trajectory, atol=1e-2)
    with pytest.raises(ValueError, match="max_batch is 0"):
        dataclasses.replace(policy, max_batch=0)


BAD = {
    "missing key": (lambda o: o.pop("points"), "lacks .'points'"),
    "unknown key": (lambda o: o.update(image=np.zeros((2, 3))), "unknown keys .'image'"),
    "wrong shape": (lambda o: o.update(points=np.zeros((2, 4, 2))), r"'points' has shape \(2, 4, 2\), expected"),
    "too little history": (lambda o: o.update(position=np.zeros((1, 2))), r"'position' has shape \(1, 2\)"),
    "mixed batches": (lambda o: o.update(points=np.zeros((1, 2, 3, 2))), "batch axis"),
    "unequal batches": (
        lambda o: o.update(position=np.zeros((3, 2, 2)), points=np.zeros((2, 2, 3, 2))),
        "'points' has shape .*, whose batch axis differs",
    ),
    "empty batch": (lambda o: o.update(position=np.zeros((0, 2, 2))), r"shape \(0, 2, 2\)"),
    "NaN": (lambda o: o["position"].__setitem__((1, 0), np.nan), r"'position' holds nan at index \(1, 0\)"),
    "infinite": (lambda o: o["points"].__setitem__((0, 2, 1), np.inf), r"holds inf at index \(0, 2, 1\)"),
    "text": (lambda o: o.update(position="left"), "an array of numbers|expected real numbers"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_observations_are_named(case: str) -> None:
    policy = small_policy()
    observation: dict[str, Any] = some_observation(policy.spec)
    change, message = BAD[case]
    change(observation)
    with pytest.raises(parapolicy.ObservationError, match=message):
        policy.predict(observation)


def test_wrong_noise_is_named() -> None:
    policy = small_policy()
    noise = parapolicy.draw_noise(policy.with_schedule("ddim", 5).schedule)
    with pytest.raises(ValueError, match=r"noise has shape \(6, 1, 8, 2\), expected \(21, 1, 8, 2\)"):
        policy.predict(some_observation(policy.spec), noise=noise)


@pytest.mark.parametrize("sampler", parapolicy.list_samplers())
def test_a_chunk_that_is_not_finite_is_an_error(sampler: str) -> None:
    policy = small_policy(sampler)
    policy.network.final_conv[1].bias.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="action chunk"):
        policy.predict(some_observation(policy.spec))


def test_a_chunk_that_is_not_finite_in_units_is_an_error() -> None:
    policy = small_policy()
    tiny = Affine(torch.full((2,), 1e-39), torch.zeros(2))
    policy = dataclasses.replace(policy, normalizer=Normalizer({**policy.normalizer.maps, "action": tiny}))
    with pytest.raises(FloatingPointError, match="action chunk"):
        policy.predict(some_observation(policy.spec))


@pytest.mark.parametrize("device", ["cuda:99", "gpu"])
def test_a_device_that_is_not_there_is_named(device: str, tmp_path: Any) -> None:
    parapolicy.save_policy(small_policy(), tmp_path)
    with pytest.raises(ValueError, match=f"device '{device}' is not available"):
        parapolicy.load_policy(tmp_path, device=device, engine="eager")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.parametrize("sampler", parapolicy.list_samplers())
def test_cuda_agrees_with_the_cpu(sampler: str, shipped: parapolicy.Policy, tmp_path: Any) -> None:
    parapolicy.save_policy(shipped, tmp_path)
    observation = some_observation(shipped.spec)
    expected = shipped.with_sampler("sequential").predict(observation, seed=1).trajectory
    parameters = {} if sampler == "sequential" else {"tolerance": 0.0}
    policy = parapolicy.load_policy(tmp_path, sampler=sampler, device="cuda", **parameters)
    np.testing.assert_allclose(policy.predict(observation, seed=1).trajectory, expected, atol=0.1)


def test_history_pads_slides_and_resets() -> None:
    history = parapolicy.ObservationHistory(small_spec())
    with pytest.raises(parapolicy.ObservationError, match="empty"):
        history.stacked()
    steps = [{"position": np.full(2, i), "points": np.full((3, 2), i)} for i in range(3)]
    history.push(steps[0])
    assert history.stacked()["position"][:, 0].tolist() == [0, 0]
    history.push(steps[1])
    history.push(steps[2])
    assert history.stacked()["points"][:, 0, 0].tolist() == [1, 2]
    history.reset()
    history.push(steps[2])
    assert history.stacked()["position"][:, 0].tolist() == [2, 2]


def test_history_refuses_and_keeps_what_it_had() -> None:
    history = parapolicy.ObservationHistory(small_spec())
    good = {"position": np.zeros(2), "points": np.zeros((3, 2))}
    history.push(good)
    for bad in ({"position": np.zeros(2)}, {**good, "position": np.zeros(3)}, {**good, "position": [np.nan, 0]}):
        with pytest.raises(parapolicy.ObservationError):
            history.push(bad)
    assert np.isfinite(history.stacked()["position"]).all()


def test_history_names_the_key_that_is_no_array() -> None:
    with pytest.raises(parapolicy.ObservationError, match="'position' is an array of"):
        parapolicy.ObservationHistory(small_spec()).push({"position": "left", "points": np.zeros((3, 2))})


def test_a_history_of_one_step_is_the_newest() -> None:
    history = parapolicy.ObservationHistory(small_spec(n_obs_steps=1))
    for i in range(2):
        history.push({"position": np.full(2, i), "points": np.full((3, 2), i)})
    assert history.stacked()["position"].tolist() == [[1, 1]]


def test_history_does_not_alias_the_callers_buffer() -> None:
    history = parapolicy.ObservationHistory(small_spec())
    buffer = {"position": np.zeros(2, np.float32), "points": np.zeros((3, 2), np.float32)}
    history.push(buffer)
    buffer["position"][:] = 9
    history.push(buffer)
    assert history.stacked()["position"][:, 0].tolist() == [0, 9]


def test_the_library_imports_nothing_slow_before_it_is_used() -> None:
    modules = ["hydra", "omegaconf", "gymnasium", "gym_pusht", "matplotlib", "zarr", "pygame", "envs"]
    modules += ["diffusers", "scipy", "torch._dynamo"]  # which take longer than all else; imported where they are used
    code = f"import sys, parapolicy; print([m for m in {modules} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.ma.masked_array(np.ones((2, 2)), [[0, 0], [0, 1]]), "is a masked array"),
        (np.ones((2, 2), complex), "is an array of complex128, expected real numbers"),
        (np.full((2, 2), "1.0"), "is an array of <U3, expected real numbers"),
        (np.full((2, 2), None), "is an array of object, expected real numbers"),
        ([[1.0], [1.0, 2.0]], "is not an array of numbers"),
    ],
)
def test_observations_of_other_than_real_numbers_are_refused(value: Any, message: str) -> None:
    policy = small_policy()
    observation = {**some_observation(policy.spec), "position": value}
    with pytest.raises(parapolicy.ObservationError, match=f"observation 'position' {message}"):
        policy.predict(observation)


def test_bfloat16_tensors_are_taken_as_observations() -> None:
    policy = small_policy()
    observation = {key: torch.tensor(value).bfloat16() for key, value in some_observation(policy.spec).items()}
    plain = {key: value.float().numpy() for key, value in observation.items()}
    np.testing.assert_array_equal(policy.predict(observation).trajectory, policy.predict(plain).trajectory)
