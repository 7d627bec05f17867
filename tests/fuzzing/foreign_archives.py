"""Damaged files of torch.save: small checkpoints of real-stanford/diffusion_policy and of robomimic.

Where bytes are changed and their checksum is not, the reader must notice. Where the checksum is made right again, the
pickle, the archive's entries or the values in it are damaged, and what is taken must be what the file then says.
"""

import copy
import functools
import json
import pickletools
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from numpy.random import Generator

import parapolicy
from parapolicy.checkpoint.archive import Archive
from parapolicy.checkpoint.pickles import unpickle
from tests import stanford_files, test_robomimic_pth
from tests.fuzzing import _foreign
from tests.fuzzing.checkpoints import edit, edit_tensors, flip
from tests.torch_files import EVERYTHING

Payload = dict[str, Any]
ROBOMIMIC_PARTS = ("config", "env_metadata", "shape_metadata", "action_normalization_stats")


@functools.cache
def payload(kind: str) -> Payload:
    """What a small checkpoint holds: ``unet`` and ``transformer`` of real-stanford, ``robomimic``."""
    if kind == "robomimic":
        torch.manual_seed(0)
        made = test_robomimic_pth.low_dim()
        made["model"] = {name: {k: _foreign.even(v) for k, v in part.items()} for name, part in made["model"].items()}
        made["config"]["observation"]["encoder"]["rgb"] = {"core_class": "VisualCore"}
        return made
    network = stanford_files.UNET if kind == "unet" else stanford_files.TRANSFORMER
    _, built = stanford_files.network_of(network, {"obs": (3,)})
    config = stanford_files.lowdim_config(unet=kind == "unet", num_inference_steps=5)
    state = stanford_files.model_state(built) | stanford_files.normaliser_state(obs=3, action=2)
    state = {name: value if "mask" in name else _foreign.even(value) for name, value in state.items()}
    return {"cfg": config, "state_dicts": {"ema_model": state, "model": {}}, "pickles": {"epoch": b"\x80\x04K\x05."}}


def write(path: Path, made: Payload) -> Path:
    torch.save({k: json.dumps(v) if k == "config" else v for k, v in made.items()}, path)
    return path


@functools.cache
def sound(kind: str) -> tuple[bytes, parapolicy.Policy, _foreign.Facts]:
    """A whole file, its policy and what it says."""
    with tempfile.TemporaryDirectory() as folder:
        path = write(Path(folder, "sound"), payload(kind))
        policy = _foreign.load(path)
        assert policy is not None
        return path.read_bytes(), policy, facts(path)


def facts(path: Path) -> _foreign.Facts:
    """What a file says."""
    with Archive(path) as archive:
        value = unpickle(archive, EVERYTHING)
        if isinstance(value.get("config"), str):
            value["config"] = json.loads(value["config"])
        return _foreign.flatten(value)


# Each damage writes a file.


def _bytes(rng: Generator, path: Path, kind: str) -> None:
    """Bytes of the file changed, cut off, left out or put in; checksums are as they were."""
    path.write_bytes(_damaged(rng, sound(kind)[0]))


def _damaged(rng: Generator, data: bytes) -> bytes:
    at, length = int(rng.integers(len(data))), int(rng.integers(1, 40))
    match rng.integers(6):
        case 0:
            return data[:at]
        case 1:
            return data[:at] + data[at + length :]
        case 2:
            return data[:at] + rng.bytes(length) + data[at:]
        case 3:  # near the end, where the directory is
            at = len(data) - 1 - int(rng.integers(min(len(data), 3000)))
    return flip(data, at, int(rng.integers(1, 256)))


def _entries(rng: Generator, path: Path, kind: str) -> None:
    """Entries swapped, left out, renamed, doubled, shortened, lengthened, compressed or in another order."""
    path.write_bytes(sound(kind)[0])
    with zipfile.ZipFile(path) as file:
        entries = [(name, file.read(name)) for name in file.namelist()]
    i, j = rng.choice(len(entries), 2, replace=False).tolist()
    (name, data), (other, theirs) = entries[i], entries[j]
    method = zipfile.ZIP_STORED
    match rng.integers(8):
        case 0 if len(data) != len(theirs):  # of one length, nothing could tell them apart
            entries[i], entries[j] = (name, theirs), (other, data)
        case 1:
            del entries[i]
        case 2:
            root, _, rest = name.partition("/")
            entries[i] = f"{root}/{rest}{rng.integers(10)}" if rng.integers(2) else f"x/{rest}", data
        case 3:
            entries.append((name, theirs))
        case 4:
            entries[i] = name, data[: -int(rng.integers(1, 9))]
        case 5:
            entries[i] = name, data + rng.bytes(int(rng.integers(1, 9)))
        case 6:
            method = zipfile.ZIP_DEFLATED
        case _:
            entries = [entries[k] for k in rng.permutation(len(entries))]
    _pack(path, entries, method)


def _pack(path: Path, entries: list[tuple[str, bytes]], method: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(path, "w", method) as file:
        for name, data in entries:
            file.writestr(name, data)


def _pickle(rng: Generator, path: Path, kind: str) -> None:
    """Bytes or instructions of the pickle changed, with the right checksum."""
    path.write_bytes(sound(kind)[0])
    with zipfile.ZipFile(path) as file:
        entries = {name: file.read(name) for name in file.namelist()}
    (name,) = (name for name in entries if name.endswith("/data.pkl"))
    data = entries[name]
    if rng.integers(2):
        for _ in range(int(rng.integers(1, 4))):
            data = _damaged(rng, data) if data else data
    else:
        starts = [at for _, _, at in pickletools.genops(data)]
        parts = [data[a:b] for a, b in zip(starts, [*starts[1:], len(data)], strict=True)]
        i, j = rng.integers(len(parts), size=2).tolist()
        match rng.integers(4):
            case 0:
                del parts[i]
            case 1:
                parts.insert(j, parts[i])
            case 2:
                parts[i], parts[j] = parts[j], parts[i]
            case _:
                parts[i] = parts[j]
        data = b"".join(parts)
    _pack(path, [*{**entries, name: data}.items()])


def _plain(value: Any) -> Any:
    """Keys as torch.save can pickle them; of two equal ones the last counts."""
    if isinstance(value, dict):
        return {str(key): _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, list) else value


def _values(rng: Generator, path: Path, kind: str) -> None:
    """The configuration edited."""
    made = payload(kind)
    names = ROBOMIMIC_PARTS if kind == "robomimic" else ("cfg",)
    change = edit if rng.integers(2) else _foreign.set_other
    edited = change(rng, copy.deepcopy({name: made[name] for name in names}))
    config = {"config": edited.pop("config")} if "config" in edited else {}  # JSON text, where a key can stand twice
    write(path, {**{k: v for k, v in made.items() if k not in names}, **_plain(edited), **config})


def _tensors(rng: Generator, path: Path, kind: str) -> None:
    """A tensor left out, renamed, of another shape or type, not finite, or in another's place."""
    made = payload(kind)
    part, name = ("model", "ema") if kind == "robomimic" else ("state_dicts", "ema_model")
    before = made[part][name]
    after = before
    while _foreign.same_structure(before, after):  # another number in a weight's place cannot be noticed
        after = edit_tensors(rng, {k: v.clone() for k, v in before.items()})
    write(path, {**made, part: {**made[part], name: after}})


def _case(damage: Callable[[Generator, Path, str], None], kinds: tuple[str, ...]) -> Callable[[Generator, Path], str]:
    def run(rng: Generator, scratch: Path) -> str:
        kind, path = kinds[rng.integers(len(kinds))], scratch / "damaged"
        _, original, before = sound(kind)
        damage(rng, path, kind)
        found = _foreign.load(path)
        if found is None:
            return "refused"
        # What bytes with wrong checksums say is nothing: such a file may only be the whole one.
        return _foreign.judge(original, found, before, lambda: before if damage is _bytes else facts(path), scratch)

    return run


CASES: dict[str, Callable[[Generator, Path], str]] = {
    f"{name}: {what}": _case(damage, kinds)
    for name, kinds in {"real-stanford": ("unet", "transformer"), "robomimic": ("robomimic",)}.items()
    for what, damage in {
        "bytes of the file": _bytes,
        "entries of the archive": _entries,
        "a damaged pickle with right checksums": _pickle,
        "edited settings": _values,
        "edited tensors": _tensors,
    }.items()
}
