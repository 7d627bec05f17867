"""Scripted experts: they succeed, repeat from their seeds, and their files are robomimic's."""

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from envs import make_env
from parapolicy.noise import mix_seeds
from parapolicy.train.data import read_hdf5
from tests.helpers import configured, small_spec
from tools import experts

pytest.importorskip("robosuite", reason="robosuite is not installed: pip install 'parapolicy[robomimic]'")


def test_an_attempt_depends_on_its_seed_only() -> None:
    env = experts.make_expert_env("can")
    (success, first), (_, other) = (experts.attempt(env, "can", seed) for seed in (1, 2))
    repeated = experts.attempt(env, "can", 1)[1]
    assert success
    assert first["rewards"].tolist() == [0.0] * (len(first["rewards"]) - 1) + [1.0]
    assert np.abs(first["actions"]).max() <= 1
    assert np.abs(first["actions"][:20] - other["actions"][:20]).max() > 0.1
    for name, values in first.items():
        np.testing.assert_array_equal(values, repeated[name], err_msg=name)


def test_demonstrations_are_trainable_and_succeed_again_open_loop(tmp_path: Path) -> None:
    path = tmp_path / "square.hdf5"
    attempts, lengths = experts.generate("square", path, demonstrations=2)
    assert attempts <= 4
    assert all(60 < length < 300 for length in lengths)
    assert list(tmp_path.iterdir()) == [path]
    data = configured("train", "data=square").data
    sources = {key: value["array"] for key, value in {**data.observation, "action": data.action}.items()}
    read = read_hdf5(path, sources)
    assert read.episode_ends.tolist() == np.cumsum(lengths).tolist()
    observation = {key: tuple(value["shape"]) for key, value in data.observation.items()}
    assert {key: tuple(array.shape[1:]) for key, array in read.arrays.items()} == {**observation, "action": (7,)}
    assert len(read_hdf5(path, sources, "train").episode_ends) == len(read_hdf5(path, sources, "valid").episode_ends)
    env = make_env("square", small_spec(observation=observation, action_dim=7), dataset=str(path))
    with h5py.File(path) as file:
        demo = file["data/demo_1"]
        given = env.reset(options={"state": demo["states"][0]})[0]
        for key in observation:
            np.testing.assert_allclose(given[key], demo[f"obs/{key}"][0], atol=1e-5)
        ends = [env.step(action)[2] for action in demo["actions"][:]]
    assert ends == [False] * (len(ends) - 1) + [True]


class Attempts:
    """An expert's attempts that take no time: every third fails, and the one numbered so is interrupted."""

    def __init__(self, at: int | None = None) -> None:
        self.at, self.seeds = at, []

    def __call__(self, env: Any, task: str, seed: int) -> tuple[bool, dict[str, np.ndarray]]:
        if len(self.seeds) == self.at:
            raise KeyboardInterrupt
        self.seeds.append(seed)
        rng = np.random.default_rng(seed)
        return len(self.seeds) % 3 != 1, {"actions": rng.uniform(-1, 1, (int(rng.integers(3, 9)), 7))}


def test_an_interrupted_generation_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experts, "make_expert_env", lambda task: None)
    monkeypatch.setattr(experts, "attempt", whole := Attempts())
    assert experts.generate("can", tmp_path / "whole.hdf5", 20, seed=3)[0] == 30
    assert whole.seeds == [mix_seeds(3, number) for number in range(30)]
    monkeypatch.setattr(experts, "attempt", Attempts(at=12))
    with pytest.raises(KeyboardInterrupt):
        experts.generate("can", tmp_path / "parts.hdf5", 20, seed=3)
    assert not (tmp_path / "parts.hdf5").exists()
    monkeypatch.setattr(experts, "attempt", rest := Attempts())
    experts.generate("can", tmp_path / "parts.hdf5", 20, seed=3)
    assert rest.seeds == whole.seeds[12:]
    with h5py.File(tmp_path / "whole.hdf5") as one, h5py.File(tmp_path / "parts.hdf5") as other:
        assert one["data"].attrs["total"] == other["data"].attrs["total"]
        assert (len(one["mask/train"]), len(one["mask/valid"])) == (18, 2)
        assert sorted([*one["mask/train"], *one["mask/valid"]]) == sorted(name.encode() for name in one["data"])
        for name in one["data"]:
            np.testing.assert_array_equal(one[f"data/{name}/actions"], other[f"data/{name}/actions"])


def test_what_cannot_be_generated_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"task is 'lift', expected one of \['can', 'square'\]"):
        experts.generate("lift", tmp_path / "lift.hdf5")
    with pytest.raises(ValueError, match="demonstrations is 1, expected at least 2"):
        experts.generate("can", tmp_path / "can.hdf5", demonstrations=1)
    (tmp_path / "can.hdf5").touch()
    with pytest.raises(ValueError, match=r"can\.hdf5 exists"):
        experts.generate("can", tmp_path / "can.hdf5")
    monkeypatch.setattr(experts, "make_expert_env", lambda task: None)
    monkeypatch.setattr(experts, "attempt", lambda *given: (False, {}))
    with pytest.raises(RuntimeError, match="of 20 attempts at can only 0 succeeded"):
        experts.generate("can", tmp_path / "other.hdf5")
