"""Demonstrations, of zarr or of HDF5, as training windows: (observation history, action horizon) pairs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zarr
from torch import Tensor

from parapolicy.errors import DataError
from parapolicy.rotation import to_rotation_6d


@dataclass(frozen=True)
class Demonstrations:
    """All steps of all episodes, one after the other.

    Attributes:
        arrays: key -> (N, ...) float32, for each observation key and ``"action"``.
        episode_ends: (E,) index just after each episode's last step, increasing, the last one N.
    """

    arrays: Mapping[str, Tensor]
    episode_ends: np.ndarray

    def windows(self, horizon: int, n_obs_steps: int, n_action_steps: int) -> Tensor:
        """Indices (M, H) of all training windows.

        As in the published sampler, a window may begin ``n_obs_steps - 1`` steps before its episode and end
        ``n_action_steps - 1`` steps after it; what lies outside repeats the first or last step.
        """
        rows = []
        start = 0
        for end in self.episode_ends:
            first = np.arange(start - (n_obs_steps - 1), end - horizon + n_action_steps)
            rows.append(np.clip(first[:, None] + np.arange(horizon), start, end - 1))
            start = end
        return torch.from_numpy(np.concatenate(rows))


def read_zarr(path: str | Path, sources: Mapping[str, str | Mapping[str, Any]]) -> Demonstrations:
    """Read a replay buffer in the published layout: ``data/<name>`` arrays and ``meta/episode_ends``.

    Args:
        path: the zarr folder.
        sources: key -> array name, or ``{"array": name, "columns": [...]}`` for some of its columns. Must have
            ``"action"``.

    Raises:
        DataError: no such folder or array, arrays of different lengths, or a value that is not finite.
    """
    path = Path(path)
    if not path.is_dir():
        raise DataError(f"no data set at {str(path)!r}; give the path of a zarr replay buffer, data.path=FOLDER")
    try:
        root = zarr.open_group(str(path), mode="r")
    except (FileNotFoundError, ValueError, KeyError) as error:
        raise DataError(f"{str(path)!r} is no zarr group with data/ and meta/ ({error})") from error
    ends = np.asarray(_array(root, "meta", "episode_ends", path), dtype=np.int64)
    if len(ends) == 0 or (np.diff(ends, prepend=0) < 1).any():
        raise DataError(f"{path}: meta/episode_ends is {ends[:4]}…, expected increasing step counts, one per episode")
    arrays = {}
    for key, source in sources.items():
        name, columns = (source, None) if isinstance(source, str) else (source["array"], source.get("columns"))
        values = np.asarray(_array(root, "data", name, path), dtype=np.float32)
        if columns is not None:
            values = _columns(values, columns, name, path)
        if len(values) != ends[-1]:
            raise DataError(f"{path}: data/{name} has {len(values)} steps, meta/episode_ends calls for {ends[-1]}")
        bad = np.flatnonzero(~np.isfinite(values.reshape(len(values), -1)).all(1))
        if len(bad):
            raise DataError(
                f"{path}: data/{name} has {len(bad)} steps with a value that is not finite, the first at step {bad[0]} "
                f"(episode {np.searchsorted(ends, bad[0], side='right')}); drop or mend those episodes"
            )
        arrays[key] = torch.from_numpy(values)
    return Demonstrations(arrays, ends)


def read_hdf5(path: str | Path, sources: Mapping[str, Any], mask: str | None = None) -> Demonstrations:
    """Read a robomimic HDF5 file: ``data/demo_i/actions`` and ``data/demo_i/obs/<name>``.

    Args:
        path: the file.
        sources: as :func:`read_zarr` takes them; an array's name is ``actions`` or ``obs/<name>``. With
            ``"rotation_6d": True`` absolute actions with axis-angle, as robomimic keeps them, become those with six
            numbers (:func:`parapolicy.rotation.to_rotation_6d`).
        mask: only the demonstrations that ``mask/<mask>`` lists, such as ``train``.

    Raises:
        DataError: no such file, array or mask, arrays of different lengths, or a value that is not finite.
    """
    import h5py

    path = Path(path)
    if not path.is_file():
        raise DataError(f"no data set at {str(path)!r}; give the path of a robomimic HDF5 file, data.path=FILE")
    parts: dict[str, list[np.ndarray]] = {key: [] for key in sources}
    lengths = []
    try:
        with h5py.File(path, "r") as file:
            names = sorted(file["data"], key=lambda name: (len(name), name))
            if mask is not None:
                kept = {name.decode() for name in file[f"mask/{mask}"][:]}
                names = [name for name in names if name in kept]
            for name in names:
                demo = file[f"data/{name}"]
                lengths.append(len(demo["actions"]))
                for key, source in sources.items():
                    given: Mapping[str, Any] = {"array": source} if isinstance(source, str) else source
                    array, columns = given["array"], given.get("columns")
                    values = np.asarray(demo[array][:], dtype=np.float32)
                    values = values if columns is None else _columns(values, columns, array, path)
                    if given.get("rotation_6d"):
                        values = to_rotation_6d(values).astype(np.float32)
                    if len(values) != lengths[-1] or not np.isfinite(values).all():
                        raise DataError(
                            f"{path}: {name}/{array} has {len(values)} steps for {lengths[-1]} actions, or a value "
                            "that is not finite; drop or mend this demonstration"
                        )
                    parts[key].append(values)
    except (OSError, KeyError, TypeError) as error:
        raise DataError(f"{path} does not hold what was asked for in robomimic's layout: {error}") from error
    if not lengths:
        raise DataError(f"{path} holds no demonstrations{f' under mask {mask!r}' if mask else ''}")
    arrays = {key: torch.from_numpy(np.concatenate(values)) for key, values in parts.items()}
    return Demonstrations(arrays, np.cumsum(lengths))


def _array(root: zarr.Group, group: str, name: str, path: Path) -> Any:
    try:
        return root[f"{group}/{name}"][:]  # type: ignore[index]
    except KeyError as error:
        there = sorted(root[group].array_keys()) if group in root else []  # type: ignore[union-attr]
        raise DataError(f"{path} has no array {group}/{name}; {group}/ holds {there}. Name one of them") from error


def _columns(values: np.ndarray, columns: Sequence[int], name: str, path: Path) -> np.ndarray:
    try:
        return values[:, list(columns)]
    except IndexError as error:
        raise DataError(f"{path}: data/{name} has shape {values.shape}, no columns {list(columns)}") from error
