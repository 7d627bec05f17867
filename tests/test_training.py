"""Training that can be stopped anywhere."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr

import parapolicy
from parapolicy.digest import digest
from parapolicy.normalizer import STILL_SCALE, Normalizer
from parapolicy.train.data import Demonstrations, read_zarr
from parapolicy.train.loss import Loss
from parapolicy.train.state import RECORD, STATE, TrainingFolder
from parapolicy.train.trainer import TrainConfig, train
from tests.helpers import SOURCES, network_inputs, received_condition, small_spec

CONFIG = TrainConfig(steps=12, batch_size=8, warmup_steps=3, checkpoint_every=4, precision="float32")


def test_episodes_too_short_for_the_horizon_are_named(buffer: Path, tmp_path: Path) -> None:
    data = read_zarr(buffer, SOURCES)
    with pytest.raises(parapolicy.DataError, match="long enough for a horizon of 64"):
        train(small_spec(horizon=64), data, CONFIG, tmp_path, torch.device("cpu"))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return parapolicy.load_policy(folder, device="cpu", engine="eager").network.state_dict()


def stop_at(step: int, patch: pytest.MonkeyPatch) -> None:
    original = Loss.__call__

    def interrupted(self: Loss, now: int, *arguments: Any, **named: Any) -> dict[str, torch.Tensor]:
        if now == step:
            raise KeyboardInterrupt
        return original(self, now, *arguments, **named)

    patch.setattr(Loss, "__call__", interrupted)


def test_an_interrupted_run_ends_with_the_same_weights(
    buffer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, spec, cpu = read_zarr(buffer, SOURCES), small_spec(), torch.device("cpu")
    train(spec, data, CONFIG, tmp_path / "whole", cpu)

    with monkeypatch.context() as patch:
        stop_at(6, patch)
        with pytest.raises(KeyboardInterrupt):
            train(spec, data, CONFIG, tmp_path / "parts", cpu)
    assert (tmp_path / "parts" / STATE).is_file()
    assert not (tmp_path / "parts" / "config.json").exists()
    train(spec, data, CONFIG, tmp_path / "parts", cpu)

    whole, parts = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert all(torch.equal(value, parts[name]) for name, value in whole.items())
    assert not (tmp_path / "parts" / STATE).exists()


def test_another_runs_state_is_not_taken_over(buffer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, cpu = read_zarr(buffer, SOURCES), torch.device("cpu")

    with monkeypatch.context() as patch:
        stop_at(0, patch)
        with pytest.raises(KeyboardInterrupt):
            train(small_spec(), data, CONFIG, tmp_path, cpu)
    with pytest.raises(ValueError, match="state of a run with other settings"):
        train(small_spec(), data, dataclasses.replace(CONFIG, seed=1), tmp_path, cpu)


@pytest.mark.parametrize(
    ("prediction", "precision"),
    [("epsilon", "float32"), ("sample", "float32"), ("v_prediction", "float32"), ("epsilon", "bfloat16")],
)
def test_training_learns(buffer: Path, tmp_path: Path, prediction: str, precision: str) -> None:
    spec = small_spec(scheduler={**small_spec().scheduler, "prediction_type": prediction})
    config = dataclasses.replace(CONFIG, steps=120, batch_size=32, precision=precision, learning_rate=3e-3)
    data = read_zarr(buffer, SOURCES)
    short = train(spec, data, dataclasses.replace(config, steps=1), tmp_path / "short", torch.device("cpu"))
    result = train(spec, data, config, tmp_path / "long", torch.device("cpu"))
    assert result.loss < 0.8 * short.loss


def test_training_and_sampling_compute_the_same_condition(buffer: Path, tmp_path: Path) -> None:
    """With next to no noise, each training sample shows which step it is of: the policy there sees the same."""
    quiet = {"num_train_timesteps": 2, "beta_schedule": "linear", "beta_start": 1e-7, "beta_end": 1e-7}
    spec = small_spec(n_obs_steps=3, scheduler={**small_spec().scheduler, **quiet})
    data, config = read_zarr(buffer, SOURCES), dataclasses.replace(CONFIG, steps=1, batch_size=256)
    with network_inputs() as calls:
        train(spec, data, config, tmp_path, torch.device("cpu"))
    ((samples, conditions),) = calls
    policy = parapolicy.load_policy(tmp_path, device="cpu", engine="eager")
    actions = policy.normalizer.normalize("action", data.arrays["action"])  # (N, Da)
    expected, history = [], parapolicy.ObservationHistory(spec)
    for step in range(len(actions)):
        if step in data.episode_ends:
            history.reset()
        history.push({key: data.arrays[key][step] for key in spec.observation})
        expected.append(received_condition(policy, history.stacked()))
    now = samples[:, spec.n_obs_steps - 1]  # each sample's first executed action
    distance, step = torch.cdist(now, actions).min(1)
    assert distance.max() < 0.01 < torch.pdist(actions).min()
    assert len(step.unique()) > 20
    torch.testing.assert_close(conditions, torch.stack(expected)[step], rtol=0, atol=1e-5)


def test_a_diverging_run_stops(buffer: Path, tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, steps=200, learning_rate=1e30, warmup_steps=0)
    with pytest.raises(FloatingPointError, match="lower learning_rate"):
        train(small_spec(), read_zarr(buffer, SOURCES), config, tmp_path / "run", torch.device("cpu"))
    assert not (tmp_path / "run" / "config.json").exists()


def test_bad_train_settings_are_named() -> None:
    with pytest.raises(ValueError, match="precision is 'half'"):
        TrainConfig(precision="half")
    with pytest.raises(ValueError, match="steps is 0"):
        TrainConfig(steps=0)


def test_a_run_goes_on_from_a_trained_policy(buffer: Path, tmp_path: Path) -> None:
    data, cpu, first = read_zarr(buffer, SOURCES), torch.device("cpu"), tmp_path / "first"
    train(small_spec(), data, CONFIG, first, cpu)
    shifted = Demonstrations({key: value + 1 for key, value in data.arrays.items()}, data.episode_ends)
    still = dataclasses.replace(CONFIG, steps=2, learning_rate=0.0, init=str(first))
    train(small_spec(), shifted, still, tmp_path / "second", cpu)
    before, after = (
        parapolicy.load_policy(tmp_path / name, device="cpu", engine="eager") for name in ("first", "second")
    )
    assert all(
        torch.equal(value, after.network.state_dict()[name]) for name, value in before.network.state_dict().items()
    )
    assert torch.equal(before.normalizer.maps["action"].offset, after.normalizer.maps["action"].offset)

    with pytest.raises(ValueError, match="has the horizon"):
        train(small_spec(horizon=32), data, still, tmp_path / "third", cpu)


def interrupted_run(data: Demonstrations, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        stop_at(6, patch)
        with pytest.raises(KeyboardInterrupt):
            train(small_spec(), data, CONFIG, folder, torch.device("cpu"))


def test_a_run_does_not_go_on_with_other_data(buffer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, cpu = read_zarr(buffer, SOURCES), torch.device("cpu")
    interrupted_run(data, tmp_path / "run", monkeypatch)
    data.arrays["position"][12, 0] += 0.001
    with pytest.raises(ValueError, match=r"state of a run with other settings \(data\)"):
        train(small_spec(), data, CONFIG, tmp_path / "run", cpu)


def test_a_state_with_one_flipped_bit_is_refused(buffer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever the bit is: refused, or one that carries nothing."""
    data = read_zarr(buffer, SOURCES)
    interrupted_run(data, tmp_path / "run", monkeypatch)
    path = tmp_path / "run" / STATE
    whole, refused = path.read_bytes(), []
    kept = TrainingFolder(tmp_path / "run", torch.load(path, weights_only=True)["run"])
    state = digest(kept.load(torch.device("cpu")))
    rng = np.random.default_rng(0)
    for place in rng.integers(len(whole), size=60):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << rng.integers(8)
        path.write_bytes(damaged)
        try:
            assert digest(kept.load(torch.device("cpu"))) == state
        except ValueError as error:
            refused.append(str(error))
    assert len(refused) > 40
    assert all("to start again" in sentence for sentence in refused)
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="damaged"):
        train(small_spec(), data, CONFIG, tmp_path / "run", torch.device("cpu"))


def test_a_finished_policy_is_never_trained_over(buffer: Path, tmp_path: Path) -> None:
    data, cpu, folder = read_zarr(buffer, SOURCES), torch.device("cpu"), tmp_path / "policy"
    result = train(small_spec(), data, CONFIG, folder, cpu)
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.iterdir()}
    assert train(small_spec(), data, CONFIG, folder, cpu) == result
    with pytest.raises(ValueError, match=r"finished policy of a run with other settings \(steps\); choose another"):
        train(small_spec(), data, dataclasses.replace(CONFIG, steps=20), folder, cpu)
    moved = Demonstrations({key: value + 1 for key, value in data.arrays.items()}, data.episode_ends)
    with pytest.raises(ValueError, match=r"other settings \(data\)"):
        train(small_spec(), moved, CONFIG, folder, cpu)
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.iterdir()} == before
    record = (folder / RECORD).read_text()
    (folder / RECORD).write_text(record.replace('"loss": ', '"loss": 1'))
    with pytest.raises(ValueError, match="damaged"):
        train(small_spec(), data, CONFIG, folder, cpu)
    (folder / RECORD).unlink()
    with pytest.raises(ValueError, match="has a finished policy without"):
        train(small_spec(), data, CONFIG, folder, cpu)


def test_an_action_that_never_moves_comes_out_as_its_constant(tmp_path: Path) -> None:
    """Whatever the network says; an observation that never moved has no influence, whatever the sensor says."""
    rng = np.random.default_rng(0)
    arrays = {
        "position": torch.tensor(rng.uniform(0, 512, (40, 2)), dtype=torch.float32),
        "points": torch.tensor(rng.uniform(0, 512, (40, 3, 2)), dtype=torch.float32),
        "action": torch.tensor(rng.uniform(0, 512, (40, 4)), dtype=torch.float32),
    }
    arrays["position"][:, 1] = 311.0
    arrays["action"][:, 1] = 0.05
    arrays["action"][:, 2] = 511.9
    arrays["action"][:, 3] = torch.tensor(rng.uniform(-1e-6, 1e-6, 40))  # next to nothing
    spec = small_spec(action_dim=4)
    train(spec, Demonstrations(arrays, np.array([40])), CONFIG, tmp_path, torch.device("cpu"))
    policy = parapolicy.load_policy(tmp_path, device="cpu", engine="eager")
    normalised = policy.normalizer.normalize("action", arrays["action"])
    assert normalised.abs().max() < 1 + 1e-5
    assert normalised[:, 1:3].abs().max() == 0
    observation = {"position": np.full((2, 2), 300.0), "points": np.full((2, 3, 2), 250.0)}
    seen = policy.predict(observation, seed=1).trajectory
    np.testing.assert_allclose(seen[:, 1:], np.tile([0.05, 511.9, 0], (8, 1)), rtol=0, atol=1e-4)
    extreme = policy.normalizer.unnormalize("action", torch.full((4,), 30.0))
    np.testing.assert_allclose(extreme[1:], [0.05, 511.9, 0], rtol=0, atol=1e-4)
    observation["position"][:, 1] = 0.0
    moved = received_condition(policy, observation)
    observation["position"][:, 1] = 311.0
    assert (moved - received_condition(policy, observation)).abs().max() < 0.1


def test_roundings_of_a_large_constant_are_not_motion() -> None:
    values = torch.full((20, 1), 1e6)
    values[::2] += 0.0625  # one rounding
    affine = Normalizer.fit({"time": values}).maps["time"]
    assert affine.scale == STILL_SCALE


def test_short_episodes_are_named_and_left_out_of_the_fit(buffer: Path, tmp_path: Path) -> None:
    root = zarr.open_group(str(buffer), mode="a")
    root["data/action"][:5] = 1e5
    data = read_zarr(buffer, SOURCES)
    with pytest.warns(UserWarning, match=r"1 of 3 episodes are left out.* fewer than 6 steps.*: \[0\]"):
        train(small_spec(horizon=10, n_action_steps=4, n_obs_steps=2), data, CONFIG, tmp_path, torch.device("cpu"))
    scale = parapolicy.load_policy(tmp_path, device="cpu", engine="eager").normalizer.maps["action"].scale
    assert scale.min() > 2 / 520


def test_arrays_that_do_not_fit_the_policy_are_named_before_training(buffer: Path, tmp_path: Path) -> None:
    data, cpu = read_zarr(buffer, SOURCES), torch.device("cpu")
    with pytest.raises(
        parapolicy.DataError, match=r"the data's 'action' has shape \(2,\) per step, expected the policy's \(3,\)"
    ):
        train(small_spec(action_dim=3), data, CONFIG, tmp_path, cpu)
    with pytest.raises(parapolicy.DataError, match="the data's 'camera' is missing"):
        train(small_spec(observation={"camera": (2,)}), data, CONFIG, tmp_path, cpu)
    flow = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000}
    with pytest.raises(ValueError, match="flow matching"):
        train(small_spec(scheduler=flow), data, CONFIG, tmp_path, cpu)
    assert not (tmp_path / "config.json").exists()


def test_a_policy_of_another_range_is_not_gone_on_from(buffer: Path, tmp_path: Path) -> None:
    data, cpu = read_zarr(buffer, SOURCES), torch.device("cpu")
    still = {**data.arrays, "action": torch.full((34, 2), 0.5)}
    train(small_spec(), Demonstrations(still, data.episode_ends), CONFIG, tmp_path / "first", cpu)
    with pytest.raises(ValueError, match=r"'action' is up to .* trained on data in another range"):
        train(small_spec(), data, dataclasses.replace(CONFIG, init=str(tmp_path / "first")), tmp_path / "second", cpu)


def test_without_a_compiler_training_goes_on(buffer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    torch.compiler.reset()
    data, compiled = read_zarr(buffer, SOURCES), dataclasses.replace(CONFIG, steps=2, compile=True)
    no_compiler = torch._inductor.config.patch({"cpp.cxx": ("/nonexistent",)})  # monkeypatch would leave none behind
    with pytest.warns(UserWarning, match="runs uncompiled") as caught, no_compiler:
        train(small_spec(), data, compiled, tmp_path / "compiled", torch.device("cpu"))
    assert len([w for w in caught if "runs uncompiled" in str(w.message)]) == 1
    train(small_spec(), data, dataclasses.replace(CONFIG, steps=2), tmp_path / "plain", torch.device("cpu"))
    plain, same = weights(tmp_path / "plain"), weights(tmp_path / "compiled")
    assert all(torch.equal(value, plain[name]) for name, value in same.items())
