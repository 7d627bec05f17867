"""Damaged, edited and forged policy folders, at random.

Each case writes a small policy to a scratch folder, damages it, and loads it. A load must either raise a short
:class:`parapolicy.CheckpointError` within two seconds, or give a policy that is equal to the bit: to the one that was
written, or, where the damage forged the digests too or the files are from before them, to what the files say.
"""

import hashlib
import json
import struct
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from numpy.random import Generator
from safetensors.torch import load_file, safe_open, save

import parapolicy
from parapolicy.checkpoint import native
from tests.helpers import small_policy

CONFIG, WEIGHTS = native.CONFIG, native.WEIGHTS
SECONDS, CHARACTERS = 2.0, 500

Files = dict[str, bytes]  # by name
Damage = Callable[[Generator, Files], Files]


@cache
def saved_policy(seed: int = 0, **changes: Any) -> Files:
    """The files of a small policy."""
    torch.manual_seed(seed)
    with TemporaryDirectory() as folder:
        parapolicy.save_policy(small_policy(**changes), folder)
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def parts(files: Files) -> tuple[dict[str, Any], dict[str, torch.Tensor], dict[str, str]]:
    """The configuration, the tensors and the weights' metadata."""
    with TemporaryDirectory() as folder:
        path = Path(folder, WEIGHTS)
        path.write_bytes(files[WEIGHTS])
        with safe_open(path, "pt") as weights:
            metadata = weights.metadata() or {}
        return json.loads(files[CONFIG]), {k: v.clone() for k, v in load_file(path).items()}, metadata


def without_digests(files: Files) -> Files:
    """As they were written before there were digests."""
    config, tensors, _ = parts(files)
    config.pop(native.WEIGHTS_DIGEST, None)
    return {CONFIG: json.dumps(config).encode(), WEIGHTS: save(tensors)}


def with_digests(config: Any, tensors: dict[str, torch.Tensor]) -> Files:
    """As a forger writes them: whatever they hold, both digests are right."""
    spec = json.dumps(native._whole(json.loads(json.dumps(config["spec"]))), sort_keys=True, separators=(",", ":"))
    weights = save(tensors, {native.SPEC_DIGEST: hashlib.sha256(spec.encode()).hexdigest()})
    config = {**config, native.WEIGHTS_DIGEST: hashlib.sha256(weights).hexdigest()}
    return {CONFIG: json.dumps(config).encode(), WEIGHTS: weights}


def flip(data: bytes, position: int, mask: int) -> bytes:
    return data[:position] + bytes([data[position] ^ mask]) + data[position + 1 :]


def load(path: Path, characters: int = CHARACTERS) -> parapolicy.Policy | None:
    """The policy, or None where it is refused as it should be.

    Raises:
        AssertionError: it is refused in another way, too slowly, or in more ``characters`` than these.
    """
    begin, policy, message = time.process_time(), None, ""
    try:
        policy = parapolicy.load_policy(path, sampler="sequential", device="cpu", engine="eager")
    except parapolicy.CheckpointError as error:
        message = str(error).replace(str(path), "")
    assert len(message) < characters, f"a message of {len(message)} characters"
    assert time.process_time() - begin < SECONDS, f"took {time.process_time() - begin:.1f} s"
    return policy


def assert_equal(first: parapolicy.Policy, second: parapolicy.Policy) -> None:
    """Specs, their order of observations, weights, normalizers and a chunk, to the bit."""
    assert first.spec.to_dict() == second.spec.to_dict(), "another spec"
    for one, other in ((first.network, second.network), (first.normalizer, second.normalizer)):
        ours, theirs = one.state_dict(), other.state_dict()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(value, theirs[name]) for name, value in ours.items()), "other weights"
    chunks = []
    for policy in (first, second):
        observation = {
            key: np.zeros((policy.spec.obs_steps(key), *f.shape)) for key, f in policy.spec.observation.items()
        }
        try:
            chunks.append(policy.predict(observation).trajectory)
        except FloatingPointError:  # said aloud
            chunks.append(np.zeros(0))
    assert np.array_equal(*chunks), "another chunk"


def write(folder: Path, files: Files) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in (CONFIG, WEIGHTS):
        (folder / name).unlink(missing_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


# Damage of the bytes


def _flip_config(rng: Generator, files: Files) -> Files:
    data = files[CONFIG]
    return {**files, CONFIG: flip(data, int(rng.integers(len(data))), int(rng.integers(1, 256)))}


def _flip_weights(rng: Generator, files: Files) -> Files:
    data = files[WEIGHTS]
    header = 8 + int.from_bytes(data[:8], "little")
    end = [8, header, len(data)][rng.integers(3)]
    return {**files, WEIGHTS: flip(data, int(rng.integers(end)), int(rng.integers(1, 256)))}


def _splice(rng: Generator, files: Files) -> Files:
    """Bytes left out, put in, or written over; in one of the files."""
    name = str(rng.choice([CONFIG, WEIGHTS]))
    data, length = files[name], int(rng.integers(1, 40))
    at = int(rng.integers(len(data)))
    new = [b"", rng.bytes(length), data[at : at + length] * 2][rng.integers(3)]
    return {**files, name: data[:at] + new + data[at + length * int(rng.integers(2)) :]}


def _truncate(rng: Generator, files: Files) -> Files:
    name = str(rng.choice([CONFIG, WEIGHTS]))
    return {**files, name: files[name][: rng.integers(len(files[name]))]}


def _swap(rng: Generator, files: Files) -> Files:
    """A file of another policy, of another release, or of the other name."""
    other = saved_policy(1, control_hz=20) if rng.integers(2) else saved_policy(2)
    old = json.loads(files[CONFIG])
    old = {"format": old["format"], "version": 1, "spec": old["spec"]}
    old["spec"]["observation"] = {entry["key"]: entry["shape"] for entry in old["spec"]["observation"]}
    return [
        {**files, CONFIG: other[CONFIG]},
        {**files, WEIGHTS: other[WEIGHTS]},
        {CONFIG: files[WEIGHTS], WEIGHTS: files[CONFIG]},
        {**files, CONFIG: json.dumps(old, sort_keys=True).encode()},
        {name: data for name, data in files.items() if name != rng.choice([CONFIG, WEIGHTS])},
    ][rng.integers(5)]


# Edits of what they hold


class Twin(str):
    """A key that a map can hold twice."""

    __hash__ = object.__hash__
    __eq__ = object.__eq__


def _nodes(value: Any) -> list[Any]:
    """All maps and lists within a value."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [value] * isinstance(value, dict | list) + [node for v in inner for node in _nodes(v)]


def _odd_value(rng: Generator, value: Any) -> Any:
    """Something that could stand in a value's place."""
    huge = int("9" * int(rng.integers(1, 4000)))
    nested: Any = value
    for _ in range(int(rng.integers(1, 300))):
        nested = [nested]
    numbers = [0, 1, -1, 1.5, 1e-320, 1e39, huge, -huge, float("nan"), float("inf"), 2**31, 2**63, 10_000]
    others = [
        None,
        True,
        False,
        "",
        "x" * int(rng.integers(1, 10_000)),
        [],
        {},
        [value],
        {"a": value},
        nested,
        "\ud800",
    ]
    if isinstance(value, int | float) and abs(value) < 2**64:
        others += [str(value), float(value), bool(value), value + 1, -value, value * 2]
    if isinstance(value, list):
        others += [value * int(rng.integers(2, 1000)), value[::-1], value[1:]]
    choices = [*numbers, *others]
    return choices[rng.integers(len(choices))]


def edit(rng: Generator, config: Any) -> Any:
    """One to three edits of a JSON text, in place: keys renamed, left out, doubled, reordered; values changed."""
    for _ in range(int(rng.integers(1, 4))):
        nodes = [node for node in _nodes(config) if node]
        if not nodes:
            break
        node = nodes[rng.integers(len(nodes))]
        if isinstance(node, list):
            i = int(rng.integers(len(node)))
            node[i] = _odd_value(rng, node[i])
            continue
        key = list(node)[rng.integers(len(node))]
        match rng.integers(7):
            case 0:
                del node[key]
            case 1:
                text = str(key)
                at = int(rng.integers(len(text) + 1))
                node[text[:at] + str(rng.choice(["", "_", "x"])) + text[at + 1 :]] = node.pop(key)
            case 2:
                node[Twin(key)] = node[key] if rng.integers(2) else _odd_value(rng, node[key])
            case 3:
                shuffled = [(k, node.pop(k)) for k in rng.permutation(list(node)).tolist() if k in node]
                node.update(shuffled)
            case _:
                node[key] = _odd_value(rng, node[key])
    return config


def edit_tensors(rng: Generator, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """One tensor left out, renamed, of another type or shape, or with another value; or two in each other's place."""
    name, other = rng.choice(list(tensors), 2, replace=False).tolist()
    value = tensors.pop(name)
    kinds = [torch.float64, torch.float16, torch.bfloat16, torch.int32, torch.bool, torch.uint8]
    match rng.integers(6):
        case 0:
            return tensors
        case 1:
            return {**tensors, f"{name}{rng.integers(10)}": value}
        case 2:
            return {**tensors, name: value.to(kinds[rng.integers(len(kinds))])}
        case 3:
            shapes = [value.flatten(), value[None], value[:0], value.movedim(0, -1).contiguous(), value.flatten()[:1]]
            return {**tensors, name: shapes[rng.integers(len(shapes))]}
        case 4 if value.numel():
            odd = [torch.nan, torch.inf, 0.0, 1e-39, 3e38, -1.0][rng.integers(6)]
            value.flatten()[rng.integers(value.numel())] = odd
            return {**tensors, name: value}
        case _:
            return {**tensors, name: tensors[other], other: value}


def _edit_config(rng: Generator, files: Files) -> Files:
    return {**files, CONFIG: json.dumps(edit(rng, json.loads(files[CONFIG]))).encode()}


def _edit_weights(rng: Generator, files: Files) -> Files:
    _, tensors, metadata = parts(files)
    return {**files, WEIGHTS: save(edit_tensors(rng, tensors), metadata if rng.integers(2) else None)}


def _forge_config(rng: Generator, files: Files) -> Files:
    config, tensors, _ = parts(files)
    edit(rng, config["spec"])
    return with_digests(config, tensors)


def _forge_weights(rng: Generator, files: Files) -> Files:
    config, tensors, _ = parts(files)
    return with_digests(config, edit_tensors(rng, tensors))


def _forge_header(rng: Generator, files: Files) -> Files:
    """A header of the weights with edits of its own, and the digest of what comes out."""
    data = files[WEIGHTS]
    length = int.from_bytes(data[:8], "little")
    header = json.dumps(edit(rng, json.loads(data[8 : 8 + length]))).encode()
    weights = struct.pack("<Q", len(header)) + header + data[8 + length :]
    config = {**json.loads(files[CONFIG]), native.WEIGHTS_DIGEST: hashlib.sha256(weights).hexdigest()}
    return {CONFIG: json.dumps(config).encode(), WEIGHTS: weights}


def _damage_old(rng: Generator, files: Files) -> Files:
    """Files without digests, with any of the other damages."""
    damage = [_flip_config, _flip_weights, _splice, _truncate, _swap, _edit_config, _edit_weights][rng.integers(7)]
    return damage(rng, without_digests(files))


def _case(name: str, damage: Damage, forged: bool) -> Callable[[Generator, Path], str]:
    def run(rng: Generator, scratch: Path) -> str:
        state = rng.bit_generator.state
        folder = scratch / "damaged"
        try:
            written = saved_policy()
            loaded = load(write(folder, damage(rng, written)))
            if loaded is None:
                return "refused"
            if forged:  # what was loaded is saved as it is
                parapolicy.save_policy(loaded, scratch / "whole")
            else:
                write(scratch / "whole", written)
            expected = load(scratch / "whole")
            assert expected is not None, "what was loaded cannot be saved and loaded again"
            assert_equal(loaded, expected)
        except Exception as error:
            raise AssertionError(
                f"{name}: {type(error).__name__}: {error!s:.1000}; the folder is {folder}. To repeat it: "
                f"rng = numpy.random.default_rng(); rng.bit_generator.state = {state}; CASES[{name!r}](rng, scratch)"
            ) from error
        return "equal"

    return run


CASES: dict[str, Callable[[Generator, Path], str]] = {
    name: _case(name, damage, forged)
    for name, damage, forged in [
        ("checkpoint: a byte of config.json", _flip_config, False),
        ("checkpoint: a byte of the weights", _flip_weights, False),
        ("checkpoint: a run of bytes", _splice, False),
        ("checkpoint: a truncated file", _truncate, False),
        ("checkpoint: another file", _swap, False),
        ("checkpoint: an edited config.json", _edit_config, False),
        ("checkpoint: edited tensors", _edit_weights, False),
        ("checkpoint: an edited spec with right digests", _forge_config, True),
        ("checkpoint: edited tensors with right digests", _forge_weights, True),
        ("checkpoint: an edited header with right digests", _forge_header, True),
        ("checkpoint: damage of files without digests", _damage_old, True),
    ]
}
