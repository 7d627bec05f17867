"""Reading demonstrations, and training that can be stopped anywhere."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr

import parapolicy
from parapolicy.train import trainer
from parapolicy.train.data import Demonstrations, read_zarr
from parapolicy.train.trainer import STATE, TrainConfig, train
from tests.helpers import network_inputs, received_condition, small_spec

SOURCES = {"position": {"array": "state", "columns": [0, 1]}, "points": "points", "action": "action"}
CONFIG = TrainConfig(steps=12, batch_size=8, warmup_steps=3, checkpoint_every=4, precision="float32")


@pytest.fixture
def buffer(tmp_path: Path) -> Path:
    """Three episodes of 5, 9 and 20 steps in the published layout."""
    path = tmp_path / "replay.zarr"
    layout = {"zarr_format": 2} if int(zarr.__version__[0]) > 2 else {}  # the published one; zarr 2 knows no other
    root = zarr.open_group(str(path), mode="w", **layout)
    rng = np.random.default_rng(0)
    for name, shape in {"state": (34, 5), "points": (34, 3, 2), "action": (34, 2)}.items():
        root[f"data/{name}"] = rng.uniform(0, 512, shape).astype(np.float32)
    root["meta/episode_ends"] = np.array([5, 14, 34])
    return path


def test_arrays_and_columns(buffer: Path) -> None:
    data = read_zarr(buffer, SOURCES)
    assert data.episode_ends.tolist() == [5, 14, 34]
    assert data.arrays["points"].shape == (34, 3, 2)
    state = zarr.open_group(str(buffer), mode="r")["data/state"][:]
    np.testing.assert_array_equal(data.arrays["position"].numpy(), state[:, :2])


def test_windows_stay_in_their_episode_and_pad_its_ends() -> None:
    data = Demonstrations({}, np.array([5, 14]))
    windows = data.windows(horizon=8, n_obs_steps=2, n_action_steps=4)
    episode = np.searchsorted([5, 14], windows.numpy(), side="right")
    assert (episode == episode[:, :1]).all()
    assert windows[0].tolist() == [0, 0, 1, 2, 3, 4, 4, 4]
    assert windows[-1].tolist() == [9, 10, 11, 12, 13, 13, 13, 13]
    # Every step of every episode is once the newest observation that a chunk starts from.
    assert sorted(set(windows[:, 1].tolist())) == [0, 1, *range(5, 11)]


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ({"action": "actions"}, "no array data/actions; data/ holds .'action', 'points', 'state'"),
        ({"action": {"array": "state", "columns": [7]}}, r"shape \(34, 5\), no columns \[7\]"),
    ],
)
def test_missing_arrays_are_named(buffer: Path, sources: dict, message: str) -> None:
    with pytest.raises(parapolicy.DataError, match=message):
        read_zarr(buffer, sources)


def test_bad_data_is_named(buffer: Path, tmp_path: Path) -> None:
    root = zarr.open_group(str(buffer), mode="a")
    root["data/action"][7, 1] = np.nan
    with pytest.raises(parapolicy.DataError, match=r"data/action has 1 steps .* first at step 7 \(episode 1\)"):
        read_zarr(buffer, SOURCES)
    root["meta/episode_ends"][2] = 30
    with pytest.raises(parapolicy.DataError, match="has 34 steps, meta/episode_ends calls for 30"):
        read_zarr(buffer, SOURCES)
    root["meta/episode_ends"][1] = 3
    with pytest.raises(parapolicy.DataError, match="expected increasing step counts"):
        read_zarr(buffer, SOURCES)
    with pytest.raises(parapolicy.DataError, match=r"no data set at .*nowhere"):
        read_zarr(tmp_path / "nowhere", SOURCES)
    (tmp_path / "empty").mkdir()
    with pytest.raises(parapolicy.DataError, match="empty"):
        read_zarr(tmp_path / "empty", SOURCES)


def test_episodes_too_short_for_the_horizon_are_named(buffer: Path, tmp_path: Path) -> None:
    data = read_zarr(buffer, SOURCES)
    with pytest.raises(parapolicy.DataError, match="long enough for a horizon of 64"):
        train(small_spec(horizon=64), data, CONFIG, tmp_path, torch.device("cpu"))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return parapolicy.load_policy(folder, device="cpu").network.state_dict()


def test_an_interrupted_run_ends_with_the_same_weights(
    buffer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, spec, cpu = read_zarr(buffer, SOURCES), small_spec(), torch.device("cpu")
    train(spec, data, CONFIG, tmp_path / "whole", cpu)

    original = trainer._Loss.__call__

    def interrupted(self: trainer._Loss, step: int) -> torch.Tensor:
        if step == 6:
            raise KeyboardInterrupt
        return original(self, step)

    monkeypatch.setattr(trainer._Loss, "__call__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(spec, data, CONFIG, tmp_path / "parts", cpu)
    assert (tmp_path / "parts" / STATE).is_file()
    assert not (tmp_path / "parts" / "config.json").exists()
    monkeypatch.setattr(trainer._Loss, "__call__", original)
    train(spec, data, CONFIG, tmp_path / "parts", cpu)

    whole, parts = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert all(torch.equal(value, parts[name]) for name, value in whole.items())
    assert not (tmp_path / "parts" / STATE).exists()


def test_another_runs_state_is_not_taken_over(buffer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, cpu = read_zarr(buffer, SOURCES), torch.device("cpu")

    def stop(self: trainer._Loss, step: int) -> torch.Tensor:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(trainer._Loss, "__call__", stop)
        with pytest.raises(KeyboardInterrupt):
            train(small_spec(), data, CONFIG, tmp_path, cpu)
    with pytest.raises(ValueError, match="state of a run with other settings"):
        train(small_spec(), data, dataclasses.replace(CONFIG, seed=1), tmp_path, cpu)


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_training_learns(buffer: Path, tmp_path: Path, prediction: str, precision: str) -> None:
    spec = small_spec(scheduler={**small_spec().scheduler, "prediction_type": prediction})
    config = dataclasses.replace(CONFIG, steps=150, batch_size=32, precision=precision, learning_rate=3e-3)
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
    policy = parapolicy.load_policy(tmp_path, device="cpu")
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
    before, after = (parapolicy.load_policy(tmp_path / name, device="cpu") for name in ("first", "second"))
    assert all(
        torch.equal(value, after.network.state_dict()[name]) for name, value in before.network.state_dict().items()
    )
    assert torch.equal(before.normalizer.maps["action"].offset, after.normalizer.maps["action"].offset)

    with pytest.raises(ValueError, match="has the horizon"):
        train(small_spec(horizon=32), data, still, tmp_path / "third", cpu)
