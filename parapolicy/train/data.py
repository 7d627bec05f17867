"""Demonstrations, of zarr or of HDF5, as training windows: (observation history, action horizon) pairs."""

import math
import warnings
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
from parapolicy.spec import PolicySpec

# Codecs of numcodecs that unpack numbers and nothing else; "pickle" runs what a file says.
CODECS = {
    *("adler32", "astype", "bitround", "blosc", "bz2", "crc32", "crc32c", "delta", "fixedscaleoffset", "fletcher32"),
    *("gzip", "lz4", "lzma", "packbits", "quantize", "shuffle", "zlib", "zstd"),
}


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
        ``n_action_steps - 1`` steps after it; what lies outside repeats the first or last step. Episodes that are too
        short for a window are named in a warning.

        Raises:
            DataError: no episode is long enough.
        """
        rows, short = [], []
        start = 0
        for number, end in enumerate(self.episode_ends):
            first = np.arange(start - (n_obs_steps - 1), end - horizon + n_action_steps)
            rows.append(np.clip(first[:, None] + np.arange(horizon), start, end - 1))
            if not len(first):
                short.append(number)
            start = end
        if len(short) == len(rows):
            raise DataError(f"no episode is long enough for a horizon of {horizon}; shorten it or add data")
        if short:
            needed = horizon - n_action_steps - n_obs_steps + 2
            warnings.warn(
                f"{len(short)} of {len(rows)} episodes are left out, because they have less than {needed} steps and "
                f"give no window of the horizon of {horizon}: {short[:10]}{'…' if len(short) > 10 else ''}",
                stacklevel=2,
            )
        return torch.from_numpy(np.concatenate(rows))

    def check(self, spec: PolicySpec) -> None:
        """Check that the arrays are what a policy observes and does.

        Raises:
            DataError: an array is missing or of another shape, or the policy observes images.
        """
        for key, shape in spec.normalizer_shapes.items():
            if key in spec.observation and spec.observation[key].kind != "state":
                raise DataError(f"{key!r} is of kind {spec.observation[key].kind!r}; only states can be trained on")
            if key not in self.arrays or tuple(self.arrays[key].shape[1:]) != shape:
                found = tuple(self.arrays[key].shape[1:]) if key in self.arrays else "missing"
                raise DataError(f"the data's {key!r} is {found} per step, the policy's is {shape}; set them alike")

    def warn_of_outliers(self, steps: Tensor) -> None:
        """Name each key in which one value alone makes the range of the given steps (n,) ten times as wide."""
        for key, values in self.arrays.items():
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
                        f"{episode}), is more than ten times as far out as all others, and the range to which actions "
                        "and observations are scaled follows it; mend it or drop the episode"
                        + (f" ({len(alone) - 1} more numbers of {key} alike)" if alone[1:] else ""),
                        stacklevel=2,
                    )


@dataclass(frozen=True)
class Source:
    """Where a data set has a key's values.

    Attributes:
        array: its name.
        columns: those taken, of a step's first axis; None: all.
        rotation_6d: whether to turn absolute actions with axis-angle, as robomimic keeps them, into those with six
            numbers (:func:`parapolicy.rotation.to_rotation_6d`).
        shape: of a step's value, to which numbers in another arrangement are brought; None: as the array has it.
    """

    array: str
    columns: Sequence[int] | None = None
    rotation_6d: bool = False
    shape: Sequence[int] | None = None

    @classmethod
    def parse(cls, key: str, given: "str | Mapping[str, Any]") -> "Source":
        """From an array's name, or a mapping of this class's fields.

        Raises:
            DataError: unknown fields, or no array.
        """
        fields = {"array": given} if isinstance(given, str) else dict(given)
        unknown = sorted(set(fields) - set(cls.__dataclass_fields__))
        if unknown or not isinstance(fields.get("array"), str):
            raise DataError(
                f"the source of {key!r} is {fields}, with unknown keys {unknown}; expected array: NAME and, "
                f"optionally, {', '.join(list(cls.__dataclass_fields__)[1:])}"
            )
        return cls(**fields)

    def take(self, values: Any, where: str) -> np.ndarray:
        """The key's values (N, ...), float32, of an array (N, ...).

        Raises:
            DataError: no real numbers, no such columns, or another shape than asked for.
        """
        values = np.asarray(values)
        if values.dtype.kind not in "biuf" or values.ndim < 1:
            raise DataError(f"{where} holds {values.dtype}, expected real numbers, one record per step")
        if self.columns is not None:
            try:
                values = values[:, list(self.columns)]
            except (IndexError, TypeError) as error:
                raise DataError(f"{where} has shape {values.shape}, no columns {list(self.columns)}") from error
        if self.rotation_6d:
            try:
                values = to_rotation_6d(values)
            except (ValueError, IndexError) as error:
                raise DataError(f"{where} has shape {values.shape}, which rotation_6d cannot take: {error}") from error
        if self.shape is not None:
            shape = tuple(self.shape)
            if math.prod(values.shape[1:]) != math.prod(shape):
                raise DataError(
                    f"{where} has the shape {values.shape[1:]} per step{' in these columns' if self.columns else ''}, "
                    f"the configuration asks for {shape}; correct it, or take the right numbers by columns"
                )
            values = values.reshape(len(values), *shape)
        with np.errstate(over="ignore"):  # what is too large for float32 is named as not finite
            return values.astype(np.float32)


def read_zarr(path: str | Path, sources: Mapping[str, str | Mapping[str, Any]]) -> Demonstrations:
    """Read a replay buffer in the published layout: ``data/<name>`` arrays and ``meta/episode_ends``.

    Args:
        path: the zarr folder, or a ``.zarr.zip`` file of it.
        sources: key -> array name, or a mapping of the fields of :class:`Source`. Must have ``"action"``.

    Raises:
        DataError: no such folder or array, arrays of different lengths or of other shapes than asked for, or a value
            that is not finite.
    """
    path, taken = Path(path), {key: Source.parse(key, given) for key, given in sources.items()}
    if not path.is_dir() and not (path.is_file() and path.suffix == ".zip"):
        raise DataError(
            f"no data set at {str(path)!r}; give the path of a zarr replay buffer, data.path=FOLDER or FILE.zarr.zip"
        )
    try:
        store: Any = zarr.storage.ZipStore(str(path), mode="r") if path.is_file() else str(path)
        root = zarr.open_group(store, mode="r")
    except Exception as error:  # of many kinds: zarr's own, zipfile's, json's
        raise DataError(f"{str(path)!r} is no zarr group with data/ and meta/ ({error})") from error
    ends = _episode_ends(_array(root, "meta", "episode_ends", path), path)
    arrays = {}
    for key, source in taken.items():
        where = f"{path}: data/{source.array}"
        values = source.take(_array(root, "data", source.array, path), where)
        if len(values) != ends[-1]:
            raise DataError(f"{where} has {len(values)} steps, meta/episode_ends calls for {ends[-1]}")
        bad = np.flatnonzero(~np.isfinite(values.reshape(len(values), -1)).all(1))
        if len(bad):
            raise DataError(
                f"{where} has {len(bad)} steps with a value that is not finite, the first at step {bad[0]} "
                f"(episode {np.searchsorted(ends, bad[0], side='right')}); drop or mend those episodes"
            )
        arrays[key] = torch.from_numpy(values)
    return Demonstrations(arrays, ends)


def read_hdf5(path: str | Path, sources: Mapping[str, Any], mask: str | None = None) -> Demonstrations:
    """Read a robomimic HDF5 file: ``data/demo_i/actions`` and ``data/demo_i/obs/<name>``.

    Args:
        path: the file.
        sources: as :func:`read_zarr` takes them; an array's name is ``actions`` or ``obs/<name>``.
        mask: only the demonstrations that ``mask/<mask>`` lists, such as ``train``.

    Raises:
        DataError: no such file, array or mask, arrays of different lengths or of other shapes than asked for, or a
            value that is not finite.
    """
    import h5py

    path, taken = Path(path), {key: Source.parse(key, given) for key, given in sources.items()}
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
                for key, source in taken.items():
                    values = source.take(demo[source.array][:], f"{path}: {name}/{source.array}")
                    if len(values) != lengths[-1] or not np.isfinite(values).all():
                        raise DataError(
                            f"{path}: {name}/{source.array} has {len(values)} steps for {lengths[-1]} actions, or a "
                            "value that is not finite; drop or mend this demonstration"
                        )
                    parts[key].append(values)
    except DataError:
        raise
    except Exception as error:  # of many kinds, where a file is damaged
        raise DataError(f"{path} does not hold what was asked for in robomimic's layout: {error}") from error
    if not lengths:
        raise DataError(f"{path} holds no demonstrations{f' under mask {mask!r}' if mask else ''}")
    arrays = {key: torch.from_numpy(np.concatenate(values)) for key, values in parts.items()}
    return Demonstrations(arrays, np.cumsum(lengths))


def _codecs(array: Any) -> list[str]:
    """Numcodecs' names of what an array of zarr's format 2 is packed by; format 3 has no unsafe ones."""
    packed = [*(array.filters or ()), *(getattr(array, "compressors", None) or (getattr(array, "compressor", None),))]
    return [codec.codec_id for codec in packed if hasattr(codec, "codec_id")]


def _array(root: zarr.Group, group: str, name: str, path: Path) -> Any:
    try:
        array: Any = root[f"{group}/{name}"]
        unsafe = [codec for codec in _codecs(array) if codec not in CODECS]
        if unsafe:
            raise DataError(
                f"{path}: {group}/{name} is packed by {unsafe}, expected some of {sorted(CODECS)}. Others may run what "
                "the file says; write the array anew with one of these"
            )
        return array[:]
    except DataError:
        raise
    except KeyError as error:
        there = sorted(root[group].array_keys()) if group in root else []  # type: ignore[union-attr]
        raise DataError(f"{path} has no array {group}/{name}; {group}/ holds {there}. Name one of them") from error
    except Exception as error:  # of many kinds, where a chunk is damaged
        raise DataError(f"{path}: {group}/{name} cannot be read ({error}); copy the data set again") from error


def _episode_ends(given: Any, path: Path) -> np.ndarray:
    """(E,) int64, of (E,) or of a column (E, 1)."""
    ends = np.asarray(given)
    ends = ends[:, 0] if ends.ndim == 2 and ends.shape[1] == 1 else ends
    whole = ends.ndim == 1 and ends.size > 0 and ends.dtype.kind in "iuf" and (ends == np.floor(ends)).all()
    if not whole or (np.diff(ends.astype(np.int64), prepend=0) < 1).any():
        raise DataError(f"{path}: meta/episode_ends is {ends[:4]}…, expected increasing step counts, one per episode")
    return ends.astype(np.int64)
