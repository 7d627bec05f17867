"""Reading demonstrations from a replay buffer."""

import json
import pickle
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr

import parapolicy
from parapolicy.digest import digest
from parapolicy.train.data import Demonstrations, read_zarr
from tests.helpers import SOURCES


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
        ({"action": "actions"}, "no array data/actions; name one of data/'s: .'action', 'points', 'state'"),
        ({"action": {"array": "state", "columns": [7]}}, r"shape \(34, 5\), but columns asks for \[7\]"),
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
    with pytest.raises(parapolicy.DataError, match="has 34 steps, expected 30 from meta/episode_ends"):
        read_zarr(buffer, SOURCES)
    root["meta/episode_ends"][1] = 3
    with pytest.raises(parapolicy.DataError, match="expected increasing step counts"):
        read_zarr(buffer, SOURCES)
    with pytest.raises(parapolicy.DataError, match=r"no data set at .*nowhere"):
        read_zarr(tmp_path / "nowhere", SOURCES)
    (tmp_path / "empty").mkdir()
    with pytest.raises(parapolicy.DataError, match="empty"):
        read_zarr(tmp_path / "empty", SOURCES)


def test_a_value_that_alone_widens_the_range_is_named(buffer: Path, tmp_path: Path) -> None:
    root = zarr.open_group(str(buffer), mode="a")
    root["data/action"][9, 1] = -6e3
    steps = torch.arange(34)
    with pytest.warns(UserWarning, match=r"action, number 1: the smallest value, -6000 at step 9 \(episode 1\)"):
        read_zarr(buffer, SOURCES).warn_of_outliers(steps)
    root["data/action"][9, 1] = -600  # only twice as wide
    root["data/action"][:, 0] = np.arange(34) % 2  # a gripper
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_zarr(buffer, SOURCES).warn_of_outliers(steps)


def test_arrays_take_the_shape_that_is_asked_for(buffer: Path) -> None:
    root = zarr.open_group(str(buffer), mode="a")
    root["data/flat"] = root["data/points"][:].reshape(34, 6)
    flat = read_zarr(buffer, {**SOURCES, "points": {"array": "flat", "shape": [3, 2]}})
    assert torch.equal(flat.arrays["points"], read_zarr(buffer, SOURCES).arrays["points"])


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            {"array": "points", "shape": [2]},
            r"data/points has the shape \(3, 2\) per step, expected \(2,\) from the configuration",
        ),
        ({"array": "state", "columns": [0, 1], "shape": [3]}, r"shape \(2,\) per step in these columns.* \(3,\)"),
        (
            {"array": "state", "column": [0, 1]},
            r"unknown keys \['column'\]; expected array: NAME and",
        ),
        ({"columns": [0, 1]}, "expected array: NAME"),
        ("words", "data/words holds <U3, expected real numbers"),
        ("waves", "data/waves holds complex64, expected real numbers"),
        ({"array": "state", "rotation_6d": True}, r"data/state has shape \(34, 5\), which rotation_6d cannot convert"),
    ],
)
def test_bad_sources_are_named(buffer: Path, source: Any, message: str) -> None:
    root = zarr.open_group(str(buffer), mode="a")
    root["data/waves"] = np.ones((34, 2), np.complex64)
    root["data/words"] = np.full((34, 2), "1.0")
    with pytest.raises(parapolicy.DataError, match=message):
        read_zarr(buffer, {**SOURCES, "position": source})


@pytest.mark.parametrize("ends", [[[5], [14], [34]], [5.0, 14.0, 34.0]])
def test_episode_ends_may_be_a_column(buffer: Path, ends: list) -> None:
    root = zarr.open_group(str(buffer), mode="a")
    del root["meta/episode_ends"]
    root["meta/episode_ends"] = np.array(ends)
    assert read_zarr(buffer, SOURCES).episode_ends.tolist() == [5, 14, 34]


def test_a_zipped_replay_buffer_reads_like_its_folder(buffer: Path, tmp_path: Path) -> None:
    zipped = Path(shutil.make_archive(str(tmp_path / "replay.zarr"), "zip", buffer))
    here, there = read_zarr(buffer, SOURCES), read_zarr(zipped, SOURCES)
    assert digest([here.arrays, here.episode_ends]) == digest([there.arrays, there.episode_ends])
    zipped.write_bytes(zipped.read_bytes()[:1000])
    with pytest.raises(parapolicy.DataError, match=r"replay.zarr.zip.* is not a zarr group"):
        read_zarr(zipped, SOURCES)


class RunsCode:
    """Leaves a file where it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.mark,))


@pytest.mark.parametrize("entry", ["filters", "compressor"])
def test_a_replay_buffer_packed_by_pickle_is_refused_unread(buffer: Path, tmp_path: Path, entry: str) -> None:
    path, codec = buffer / "data" / "action" / ".zarray", {"id": "pickle", "protocol": 5}
    about = {**json.loads(path.read_text()), "dtype": "|O", "fill_value": None, "filters": None, "compressor": None}
    path.write_text(json.dumps({**about, entry: [codec] if entry == "filters" else codec}))
    for chunk in path.parent.glob("[0-9]*"):
        chunk.write_bytes(pickle.dumps(RunsCode(tmp_path / "mark")))
    # zarr 3 refuses it, too, and zarr 2 where it is the compressor
    with pytest.raises(parapolicy.DataError, match=r"data/action .*(pickle|cannot be read \(error decoding metadata)"):
        read_zarr(buffer, SOURCES)
    assert not (tmp_path / "mark").exists()
