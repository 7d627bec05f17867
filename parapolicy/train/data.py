"""Demonstrations from zarr or HDF5, as training windows: pairs of observation history and action horizon."""

import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zarr
from torch import Tensor

from parapolicy.errors import DataError
from parapolicy.spec import Feature, PolicySpec
from parapolicy.train.frames import FrameFile, read_blocks
from parapolicy.train.source import Source

# Codecs of numcodecs that only unpack numbers; "pickle" runs code from the file.
CODECS = {
    *("adler32", "astype", "bitround", "blosc", "bz2", "crc32", "crc32c", "delta", "fixedscaleoffset", "fletcher32"),
    *("gzip", "lz4", "lzma", "packbits", "quantize", "shuffle", "zlib", "zstd"),
}


@dataclass(frozen=True)
class Demonstrations:
    """All steps of all episodes, concatenated.

    Attributes:
        arrays: key -> (N, ...) float32, for each observation key and ``"action"``; pictures are (N, H, W, C) uint8.
        episode_ends: (E,) index just after each episode's last step, increasing, the last one N.
    """

    arrays: Mapping[str, Tensor]
    episode_ends: np.ndarray

    def split(self, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Indices of the episodes to train on, and of a random share that is held out.

        Raises:
            DataError: no episode is left to train on.
        """
        count = len(self.episode_ends)
        held_out = max(1, round(share * count)) if share else 0
        if held_out == count:
            raise DataError(f"validation is {share} of {count} episodes, which leaves none to train on; set it to 0")
        drawn = np.random.default_rng(seed).permutation(count)
        return np.sort(drawn[held_out:]), np.sort(drawn[:held_out])

    def windows(
        self, horizon: int, n_obs_steps: int, n_action_steps: int, episodes: Iterable[int] | None = None
    ) -> Tensor:
        """Indices (M, H) of all training windows of the given episodes; None: of all episodes.

        As in the published sampler, a window may begin ``n_obs_steps - 1`` steps before its episode and end
        ``n_action_steps - 1`` steps after it; steps outside repeat the first or last step. A warning names episodes
        that are too short for a window.

        Raises:
            DataError: no episode is long enough.
        """
        rows, short = [], []
        starts = [0, *self.episode_ends]
        for number in range(len(self.episode_ends)) if episodes is None else map(int, episodes):
            start, end = starts[number], self.episode_ends[number]
            first = np.arange(start - (n_obs_steps - 1), end - horizon + n_action_steps)
            rows.append(np.clip(first[:, None] + np.arange(horizon), start, end - 1))
            if not len(first):
                short.append(number)
        if not rows:
            return torch.empty(0, horizon, dtype=torch.int64)
        if len(short) == len(rows):
            raise DataError(f"no episode is long enough for a horizon of {horizon}; shorten it or add data")
        if short:
            needed = horizon - n_action_steps - n_obs_steps + 2
            warnings.warn(
                f"{len(short)} of {len(rows)} episodes are left out: they have fewer than {needed} steps and give no "
                f"window for the horizon of {horizon}: {short[:10]}{'…' if len(short) > 10 else ''}",
                stacklevel=2,
            )
        return torch.from_numpy(np.concatenate(rows))

    def check(self, spec: PolicySpec) -> None:
        """Check that the arrays match a policy's observations and actions.

        Raises:
            DataError: an array is missing, has another shape, or is not of images where the policy observes an image.
        """
        for key, (shape, kind, _) in {**spec.observation, "action": Feature((spec.action_dim,))}.items():
            if key not in self.arrays:
                raise DataError(f"the data's {key!r} is missing; name its array in the data's configuration")
            if (found := tuple(self.arrays[key].shape[1:])) != shape:
                raise DataError(
                    f"the data's {key!r} has shape {found} per step, expected the policy's {shape}; make them equal"
                )
            if (self.arrays[key].dtype == torch.uint8) != (kind == "image"):
                raise DataError(
                    f"the data's {key!r} is {self.arrays[key].dtype}, but the policy's kind is {kind!r}; images are "
                    "read as uint8 if the data's configuration says kind: image"
                )

    def warn_of_outliers(self, steps: Tensor) -> None:
        """Warn of keys in which a single value makes the range over the given steps (n,) ten times as wide."""
        for key, values in self.arrays.items():
            if values.dtype == torch.uint8:
                continue
            flat = values[steps].reshape(len(steps), -1)
            if len(flat) < 3:
                continue
            for sign, text in ((1, "largest"), (-1, "smallest")):
                first, second = (sign * flat).topk(2, dim=0).values.double()
                rest = second - (sign * flat).amin(0).double()
                alone = torch.nonzero((first - second > 9 * rest) & (first - second > 1e-4)).flatten().tolist()
                if alone:
                    column = alone[0]
                    step = int(steps[(sign * flat)[:, column].argmax()])
                    episode = np.searchsorted(self.episode_ends, step, side="right")
                    warnings.warn(
                        f"{key}, number {column}: the {text} value, {sign * first[column]:g} at step {step} (episode "
                        f"{episode}), is more than ten times as far out as all others and determines the range to "
                        "which actions and observations are scaled; correct it or drop the episode"
                        + (f" ({len(alone) - 1} more numbers of {key} alike)" if alone[1:] else ""),
                        stacklevel=2,
                    )


def read_zarr(
    path: str | Path, sources: Mapping[str, str | Mapping[str, Any]], scratch: Path | None = None
) -> Demonstrations:
    """Read a replay buffer in the published layout: ``data/<name>`` arrays and ``meta/episode_ends``.

    Args:
        path: the zarr folder, or a ``.zarr.zip`` file of it.
        sources: key -> array name, or a mapping of the fields of :class:`Source`. Must have ``"action"``.
        scratch: folder for images while they are used; see :class:`parapolicy.train.frames.FrameFile`.

    Raises:
        DataError: no such folder or array, arrays of different lengths or unexpected shapes, or a value that is not
            finite.
    """
    path, taken = Path(path), {key: Source.parse(key, given) for key, given in sources.items()}
    if not path.is_dir() and not (path.is_file() and path.suffix == ".zip"):
        raise DataError(
            f"no data set at {str(path)!r}; give the path of a zarr replay buffer, data.path=FOLDER or FILE.zarr.zip"
        )
    try:
        store: Any = zarr.storage.ZipStore(str(path), mode="r") if path.is_file() else str(path)
        root = zarr.open_group(store, mode="r")
    except Exception as error:  # many kinds: from zarr, zipfile or json
        raise DataError(
            f"{str(path)!r} is not a zarr group with data/ and meta/ ({error}); give the path of a replay buffer"
        ) from error
    ends = _episode_ends(_array(root, "meta", "episode_ends", path, np.asarray), path)
    arrays = {}
    for key, source in taken.items():
        where = f"{path}: data/{source.array}"
        if source.kind == "image":
            values = _array(root, "data", source.array, path, partial(_read_frames, source, scratch, where))
        else:
            values = source.take(_array(root, "data", source.array, path, np.asarray), where)
        if len(values) != ends[-1]:
            raise DataError(f"{where} has {len(values)} steps, expected {ends[-1]} from meta/episode_ends")
        if source.kind == "image":
            arrays[key] = values
            continue
        bad = np.flatnonzero(~np.isfinite(values.reshape(len(values), -1)).all(1))
        if len(bad):
            raise DataError(
                f"{where} has {len(bad)} steps with a value that is not finite, the first at step {bad[0]} "
                f"(episode {np.searchsorted(ends, bad[0], side='right')}); drop or correct those episodes"
            )
        arrays[key] = torch.from_numpy(values)
    return Demonstrations(arrays, ends)


def read_hdf5(
    path: str | Path, sources: Mapping[str, Any], mask: str | None = None, scratch: Path | None = None
) -> Demonstrations:
    """Read a robomimic HDF5 file: ``data/demo_i/actions`` and ``data/demo_i/obs/<name>``.

    Args:
        path: the file.
        sources: as in :func:`read_zarr`; an array's name is ``actions`` or ``obs/<name>``.
        mask: use only the demonstrations listed in ``mask/<mask>``, such as ``train``.
        scratch: as in :func:`read_zarr`.

    Raises:
        DataError: no such file, array or mask, arrays of different lengths or unexpected shapes, or a value that is not
            finite.
    """
    import h5py

    path, taken = Path(path), {key: Source.parse(key, given) for key, given in sources.items()}
    if not path.is_file():
        raise DataError(f"no data set at {str(path)!r}; give the path of a robomimic HDF5 file, data.path=FILE")
    parts: dict[str, list[np.ndarray]] = {key: [] for key, source in taken.items() if source.kind == "state"}
    frames = {
        key: FrameFile(tuple(source.shape or ()), scratch) for key, source in taken.items() if source.kind == "image"
    }
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
                for key, source in taken.items():
                    where = f"{path}: {name}/{source.array}"
                    if key in frames:
                        steps, finite = frames[key].add(read_blocks(demo[source.array]), where), True
                    else:
                        values = source.take(demo[source.array][:], where)
                        parts[key].append(values)
                        steps, finite = len(values), bool(np.isfinite(values).all())
                    if steps != lengths[-1] or not finite:
                        raise DataError(
                            f"{where} has {steps} steps for {lengths[-1]} actions, or a value that is not finite; drop "
                            "or correct this demonstration"
                        )
    except DataError:
        raise
    except Exception as error:  # many kinds, if a file is damaged
        raise DataError(f"{path} lacks a requested array, or does not have robomimic's layout: {error}") from error
    if not lengths:
        raise DataError(f"{path} holds no demonstrations{f' under mask {mask!r}' if mask else ''}")
    arrays = {key: torch.from_numpy(np.concatenate(values)) for key, values in parts.items()}
    arrays |= {key: pictures.tensor() for key, pictures in frames.items()}
    return Demonstrations(arrays, np.cumsum(lengths))


def _read_frames(source: Source, scratch: Path | None, where: str, array: Any) -> Tensor:
    frames = FrameFile(tuple(source.shape or ()), scratch)
    frames.add(read_blocks(array), where)
    return frames.tensor()


def _codecs(array: Any) -> list[str]:
    """The numcodecs of an array in zarr's format 2; format 3 has no unsafe ones."""
    packed = [*(array.filters or ()), *(getattr(array, "compressors", None) or (getattr(array, "compressor", None),))]
    return [codec.codec_id for codec in packed if hasattr(codec, "codec_id")]


def _array(root: zarr.Group, group: str, name: str, path: Path, read: Callable[[Any], Any]) -> Any:
    """The result of ``read`` on an array of the data set."""
    try:
        array: Any = root[f"{group}/{name}"]
        unsafe = [codec for codec in _codecs(array) if codec not in CODECS]
        if unsafe:
            raise DataError(
                f"{path}: {group}/{name} is packed by {unsafe}, expected some of {sorted(CODECS)}. Other codecs may "
                "run code from the file; write the array again with one of these"
            )
        return read(array)
    except DataError:
        raise
    except KeyError as error:
        there = sorted(root[group].array_keys()) if group in root else []  # type: ignore[union-attr]
        raise DataError(f"{path} has no array {group}/{name}; name one of {group}/'s: {there}") from error
    except Exception as error:  # many kinds, if a chunk is damaged
        raise DataError(f"{path}: {group}/{name} cannot be read ({error}); copy the data set again") from error


def _episode_ends(given: Any, path: Path) -> np.ndarray:
    """Checked episode ends (E,) int64, from (E,) or a column (E, 1)."""
    ends = np.asarray(given)
    ends = ends[:, 0] if ends.ndim == 2 and ends.shape[1] == 1 else ends
    whole = ends.ndim == 1 and ends.size > 0 and ends.dtype.kind in "iuf" and (ends == np.floor(ends)).all()
    if not whole or (np.diff(ends.astype(np.int64), prepend=0) < 1).any():
        raise DataError(f"{path}: meta/episode_ends is {ends[:4]}…, expected increasing step counts, one per episode")
    return ends.astype(np.int64)
