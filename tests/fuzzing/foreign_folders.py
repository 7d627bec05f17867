"""Damaged LeRobot folders, with statistics in processor files or among the weights.

A flipped bit of a number in a safetensors file gives another number, and nothing in the folder could tell. So only the
files' texts are damaged, which are config.json, processor files and headers of tensors, and whole files and tensors.
"""

import copy
import functools
import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from numpy.random import Generator
from safetensors.torch import load, load_file, save_file

import parapolicy
from tests.fuzzing import _foreign
from tests.fuzzing.checkpoints import edit, edit_tensors, flip
from tests.helpers import process_folder
from tests.lerobot_folders import CAMERAS, made_up
from tests.test_lerobot_folder import to_former

CONFIG, WEIGHTS = "config.json", "model.safetensors"
KINDS = ("processors", "buffers")


@functools.cache
def sound(kind: str) -> tuple[Path, parapolicy.Policy, _foreign.Facts]:
    """A whole folder, its policy and what it says: one of :data:`KINDS`, or ``cameras``."""
    torch.manual_seed(0)
    changes: dict[str, Any] = {"input_features": CAMERAS, "crop_shape": [36, 36]} if kind == "cameras" else {}
    folder, values, _ = made_up(process_folder() / kind, **changes)
    if kind == "buffers":
        modes = {"observation.state": "MIN_MAX", "action": "MIN_MAX"}
        to_former(folder, values, modes)
    for path in folder.glob("*.safetensors"):
        save_file({name: _foreign.even(value) for name, value in load_file(path).items()}, path)
    policy = _foreign.load(folder)
    assert policy is not None
    return folder, policy, facts(folder)


def facts(folder: Path) -> _foreign.Facts:
    """What a folder says."""
    found: dict[str, Any] = {}
    for path in folder.iterdir():
        if path.suffix == ".json":
            found[path.stem] = json.loads(path.read_text())
        elif path.name != WEIGHTS:
            found[path.stem] = load(path.read_bytes())
    return _foreign.flatten({**found, "weights file": load(Path(folder, WEIGHTS).read_bytes())})


# Each damage changes a copy.


def _texts(rng: Generator, folder: Path) -> None:
    """Bytes of a JSON file or of a header changed, left out or put in."""
    path = _choose(rng, folder, "")
    data = path.read_bytes()
    text = 8 + int.from_bytes(data[:8], "little") if path.suffix == ".safetensors" else len(data)
    at, length = int(rng.integers(text)), int(rng.integers(1, 40))
    match rng.integers(3):
        case 0:
            data = data[:at] + data[at + length :]
        case 1:
            data = data[:at] + rng.bytes(length) + data[at:]
        case _:
            data = flip(data, at, int(rng.integers(1, 256)))
    path.write_bytes(data)


def _files(rng: Generator, folder: Path) -> None:
    """A file cut, left out, in another's place, a link or a pipe."""
    path, other = _choose(rng, folder, ""), _choose(rng, folder, "")
    data = path.read_bytes()
    match rng.integers(6):
        case 0:
            path.write_bytes(data[: rng.integers(len(data))])
        case 1:
            path.unlink()
        case 2:
            path.write_bytes(other.read_bytes())
        case 3:
            path.unlink()
            path.symlink_to([other.name, "../elsewhere", "/etc/hostname", path.name][rng.integers(4)])
        case 4:
            path.unlink()
            os.mkfifo(path)
        case _:
            path.unlink()
            path.mkdir()


def _settings(rng: Generator, folder: Path) -> None:
    """A JSON file edited."""
    path = _choose(rng, folder, ".json")
    change = edit if rng.integers(2) else _foreign.set_other
    path.write_text(json.dumps(change(rng, json.loads(path.read_text()))))


def _tensors(rng: Generator, folder: Path) -> None:
    """A tensor left out, renamed, of another shape or type, not finite, or in another's place."""
    path = _choose(rng, folder, ".safetensors")
    before = load_file(path)
    after = before
    while _foreign.same_structure(before, after):  # another number in a weight's place cannot be noticed
        after = edit_tensors(rng, {name: value.clone() for name, value in before.items()})
    save_file({name: value.clone() for name, value in after.items()}, path)


def _headers(rng: Generator, folder: Path) -> None:
    """A header of tensors edited."""
    path = _choose(rng, folder, ".safetensors")
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.dumps(edit(rng, copy.deepcopy(json.loads(data[8 : 8 + length])))).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + data[8 + length :])


def _choose(rng: Generator, folder: Path, ending: str) -> Path:
    paths = sorted(path for path in folder.iterdir() if path.name.endswith(ending))
    return paths[rng.integers(len(paths))]


def _case(damage: Callable[[Generator, Path], None], kinds: tuple[str, ...]) -> Callable[[Generator, Path], str]:
    def run(rng: Generator, scratch: Path) -> str:
        whole, original, before = sound(kinds[rng.integers(len(kinds))])
        folder = scratch / "damaged"
        folder.mkdir()
        for path in whole.iterdir():  # nothing writes into a camera's weights: a link saves the copy
            (os.link if "cameras" in kinds and path.name == WEIGHTS else shutil.copy)(path, folder / path.name)
        damage(rng, folder)
        found = _foreign.load(folder)
        if found is None:
            return "refused"
        return _foreign.judge(original, found, before, lambda: facts(folder), scratch)

    return run


CASES: dict[str, Callable[[Generator, Path], str]] = {
    "LeRobot: bytes of texts and headers": _case(_texts, KINDS),
    "LeRobot: files": _case(_files, KINDS),
    "LeRobot: edited settings": _case(_settings, KINDS),
    "LeRobot: edited settings of cameras": _case(_settings, ("cameras",)),
    "LeRobot: edited tensors": _case(_tensors, KINDS),
    "LeRobot: edited headers": _case(_headers, KINDS),
}
