"""The restricted reader of files of torch.save: nothing runs, everything is bounded, honest values come through."""

import random
import time
import tracemalloc
import zipfile
from collections import OrderedDict, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from parapolicy import CheckpointError
from parapolicy.checkpoint.archive import Archive
from parapolicy.checkpoint.inert import Instance, UnsafeValue, read_array
from parapolicy.checkpoint.pickles import MAX_OPCODES, unpickle
from parapolicy.checkpoint.stand_ins import NUMPY
from tests.torch_files import (
    EVERYTHING,
    as_config,
    load,
    pickle_global,
    rewrite,
    saved,
    stand_ins,
    storage,
    tensor,
    text,
    write_zip,
)


def save(path: Path, value: Any, **settings: Any) -> Path:
    torch.save(value, path, **settings)
    return path


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_plain_values_come_through(tmp_path: Path, protocol: int) -> None:
    shared = [1, "ü"]
    value = {
        "none": None, "yes": True, "no": False, "whole": [0, 255, 256, 70_000, -5, 2**40, -(2**70)], "real": 0.1,
        "text": "a" * 300, "bytes": b"\x80\x00", "tuples": ((), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)),
        "ordered": OrderedDict(a=1), "default": defaultdict(list, b=2), "shared": [shared, shared], 3: "key",
        ("a", 1): "tuple", "empty": [{}, [], b""],
    }  # fmt: skip
    found = load(save(tmp_path / "x", value, pickle_protocol=protocol))
    assert found == value
    assert list(found) == list(value)
    assert type(found["yes"]) is bool


def test_what_is_shared_stays_shared_and_may_contain_itself(tmp_path: Path) -> None:
    cyclic: list[Any] = [1]
    cyclic.append(cyclic)
    with Archive(save(tmp_path / "x", {"cyclic": cyclic, "again": cyclic})) as archive:
        found = unpickle(archive, {})
    assert found["cyclic"] is found["again"]
    assert found["cyclic"][1] is found["cyclic"]


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool]
)
def test_tensors_of_every_kind(tmp_path: Path, dtype: torch.dtype) -> None:
    base = (torch.arange(24) % 3).to(dtype)
    views = {
        "plain": base, "matrix": base.view(4, 6), "transposed": base.view(4, 6).t(), "part": base[5:9],
        "column": base.view(4, 6)[:, 2], "scalar": base[1], "empty": base[:0], "empty too": base.new_empty(3, 0),
        "expanded": base[:2, None].expand(2, 5),
    }  # fmt: skip
    found = load(save(tmp_path / "x", views))
    for name, view in views.items():
        assert torch.equal(found[name], view), name
        assert found[name].dtype is dtype
        assert found[name].is_contiguous()


def test_state_dicts_and_optimisers(tmp_path: Path) -> None:
    layer = torch.nn.Linear(3, 2)
    optimiser = torch.optim.AdamW(layer.parameters())
    layer(torch.ones(3)).sum().backward()
    optimiser.step()
    saved_state = {"model": layer.state_dict(), "optimizer": optimiser.state_dict(), "parameter": layer.weight}
    found = load(save(tmp_path / "x", saved_state))
    assert torch.equal(found["model"]["weight"], layer.weight)
    assert torch.equal(found["parameter"], layer.weight.detach())
    assert torch.equal(found["optimizer"]["state"][0]["exp_avg"], optimiser.state_dict()["state"][0]["exp_avg"])


@pytest.mark.parametrize("core", ["numpy.core", "numpy._core"])
@pytest.mark.parametrize(
    "number", [np.float64(0.1), np.float32(0.5), np.int64(-7), np.bool_(True), np.uint8(200), np.array(2.5, ">f8")[()]]
)
def test_numbers_of_numpy(tmp_path: Path, core: str, number: Any) -> None:
    path = save(tmp_path / "x", {"best": number})
    with zipfile.ZipFile(path) as file:
        pickled = file.read("x/data.pkl")
    changed = pickled.replace(b"numpy._core", b"numpy.core").replace(b"numpy.core", core.encode())
    found = load(rewrite(path, tmp_path / "y", {"data.pkl": changed}))["best"]
    assert found == number.item()
    assert type(found) is type(number.item())


@pytest.mark.parametrize(
    "array", [np.arange(6.0).reshape(2, 3), np.asfortranarray(np.arange(6).reshape(2, 3)), np.ones((0, 2), "f4")]
)
def test_arrays_of_numpy(tmp_path: Path, array: np.ndarray) -> None:
    found = read_array(load(save(tmp_path / "x", [array]))[0])
    assert found.dtype == array.dtype
    assert np.array_equal(found, array)


@pytest.mark.parametrize(
    "array", [np.array([None]), np.array(["text"]), np.zeros(2, [("a", "f4")]), np.zeros(2, "M8[s]")]
)
def test_arrays_of_other_things_than_numbers_are_refused(tmp_path: Path, array: np.ndarray) -> None:
    with pytest.raises((UnsafeValue, CheckpointError)):
        read_array(load(save(tmp_path / "x", [array]))[0])


def test_objects_of_omegaconf_are_taken_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    classes = stand_ins(monkeypatch)
    path = save(tmp_path / "x", {"cfg": as_config(classes, {"a": [1, {"b": "c"}]})})
    node = load(path)["cfg"]
    assert isinstance(node, Instance)
    assert node.name == "omegaconf.dictconfig.DictConfig"
    assert node.state["_content"]["a"].state["_content"][0].state["_val"] == 1
    with Archive(path) as archive, pytest.raises(CheckpointError, match=r"omegaconf\.dictconfig\.DictConfig"):
        unpickle(archive, NUMPY)  # each format names its own


class _Runs:
    def __init__(self, function: Any, *args: Any) -> None:
        self.call = function, args

    def __reduce__(self) -> Any:
        return self.call


def _touch(path: str) -> None:
    Path(path).touch()


@pytest.mark.parametrize("protocol", [2, 4])
def test_a_call_is_refused_and_not_made(tmp_path: Path, protocol: int) -> None:
    marker = tmp_path / "marker"
    for value in (_Runs(_touch, str(marker)), {"a": [_Runs(_touch, str(marker))]}, _Runs(eval, "1"), _Runs(getattr, 1)):
        path = save(tmp_path / "x", value, pickle_protocol=protocol)
        with pytest.raises(CheckpointError, match=r"it holds the global '(tests.test_pickles._touch|\w+\.\w+)'"):
            load(path)
    assert not marker.exists()


DAMAGED = {
    "a name": pickle_global("torch.FloatStorage") + b")R.",
    "a number": b"K\x01)R.",
    "a text": text("os.system") + b")R.",
    "a class": pickle_global("builtins.dict") + b")R.",
    "an object of a name": pickle_global("builtins.dict") + b")\x81.",
    "an object of a number": b"K\x01)\x81.",
    "an object of a call": pickle_global("collections.OrderedDict") + b")\x81.",
    "an object of a made type": pickle_global("dill._dill._load_type") + text("dict") + b"\x85R)\x81.",
    "a type of code": pickle_global("dill._dill._load_type") + text("CodeType") + b"\x85R.",
    "arguments that are no tuple": pickle_global("collections.OrderedDict") + b"]R.",
    "a state for a dictionary": b"}}b.",
    "a state for a list": b"]}b.",
    "a state for a name": pickle_global("builtins.dict") + b"}b.",
    "two states": pickle_global("omegaconf.nodes.AnyNode") + b")\x81}b}b.",
    "an instruction of protocol 0": b"I1\n.",
    "INST": b"(ios\nsystem\n.",
    "OBJ": b"(" + pickle_global("builtins.dict") + b"o.",
    "EXT1": b"\x82\x01.",
    "a set": b"\x8f.",
    "items for a list": b"](NNu.",
    "an odd item": b"}(Nu.",
    "an item for a name": pickle_global("builtins.dict") + b"NNs.",
    "an append to a tuple": b")Na.",
    "a key that is a list": b"}]Ns.",
    "a key that is a dictionary": b"}}Ns.",
    "a key of many parts": b"}(" + b"N" * 100 + b"tNs.",
    "a key of many levels": b"}" + b")\x85\x85\x85\x85\x85\x85" + b"Ns.",
    "a huge key": b"}" + b"\x8a\x20" + b"\x7f" * 32 + b"Ns.",
    "an empty stack": b".",
    "a mark for a value": b"(.",
    "no mark": b"Nt.",
    "no end": b"N",
    "nothing": b"",
    "an unknown memo": b"h\x05.",
    "a text beyond the end": b"X\xff\xff\xff\xffa.",
    "a text of negative size": b"\x8b\xff\xff\xff\xffa.",
    "a text that is no text": b"X\x02\x00\x00\x00\xff\xfe.",
    "a long name": b"c" + b"a" * 5000 + b"\nb\n.",
    "a name without end": b"cos",
    "a name that is a number": b"K\x01K\x02\x93.",
    "bytes that are no bytes": pickle_global("_codecs.encode") + text("ሴ") + text("latin1") + b"\x86R.",
    "bytes by another codec": pickle_global("_codecs.encode") + text("a") + text("rot13") + b"\x86R.",
    "an ordered dictionary of something": pickle_global("collections.OrderedDict") + b"]\x85R.",
    "a default dictionary of a number": pickle_global("collections.defaultdict") + b"K\x01\x85R.",
    "a foreign reference": text("module") + b"Q.",
    "a storage that is missing": storage("7", 1) + b".",
    "a storage outside of the file": storage("../version", 2, "torch.ByteStorage") + b".",
    "a storage of another size": storage("0", 3) + b".",
    "a storage of another type": storage("0", 4, "torch.DoubleStorage") + b".",
    "a storage of something": storage("0", 4, "builtins.dict") + b".",
    "a tensor of nothing": pickle_global("torch._utils._rebuild_tensor_v2") + b")R.",
    "a tensor beyond its storage": tensor("0", 4, 1, (4,), (1,)) + b".",
    "a stride beyond the storage": tensor("0", 4, 0, (2, 2), (3, 1)) + b".",
    "a tensor of the same number again and again": tensor("0", 4, 0, (2**30, 2**30), (0, 0)) + b".",
    "a tensor with a negative stride": tensor("0", 4, 3, (4,), (-1,)) + b".",
    "a tensor with a negative size": tensor("0", 4, 0, (-1, -4), (1, 1)) + b".",
    "a tensor with a negative offset": tensor("0", 4, -1, (4,), (1,)) + b".",
    "a tensor of many axes": tensor("0", 4, 0, (1,) * 40, (1,) * 40) + b".",
    "a tensor with too few strides": tensor("0", 4, 0, (2, 2), (1,)) + b".",
    "a tensor with hooks": tensor("0", 4, 0, (4,), (1,), hooks=b"}NNs") + b".",
    "a tensor with a number for hooks": tensor("0", 4, 0, (4,), (1,), hooks=b"K\x01") + b".",
    "a parameter of nothing": pickle_global("torch._utils._rebuild_parameter") + b"N\x89}\x87R.",
    "a number of numpy of an object": pickle_global("numpy.core.multiarray.scalar") + b"NN\x86R.",
    "an array of numpy's matrix": pickle_global("numpy.core.multiarray._reconstruct") + b"N\x85R.",
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_pickle_is_refused_by_name(tmp_path: Path, name: str) -> None:
    path = write_zip(tmp_path / "bad.ckpt", b"\x80\x02" + DAMAGED[name], {"0": bytes(16)})
    with pytest.raises(CheckpointError, match=r"bad\.ckpt: (it holds|its pickle is damaged)"):
        load(path)


ANY_NODE, ORDERED = pickle_global("omegaconf.nodes.AnyNode"), pickle_global("collections.OrderedDict")
ENCODE, REBUILD = pickle_global("_codecs.encode"), pickle_global("torch._utils._rebuild_tensor_v2")


def _kept(*values: bytes) -> bytes:
    """Values kept in the memo as 1, 2, …, and taken off the stack."""
    return b"".join(value + b"q" + bytes([i + 1]) + b"0" for i, value in enumerate(values))


BOMBS = {
    "dictionaries": b"}" * (MAX_OPCODES - 2) + b".",
    "many instructions": b"N0" * MAX_OPCODES + b".",
    "objects": _kept(ANY_NODE) + b"h\x01)\x81}b" * (MAX_OPCODES // 6) + b".",
    "ordered dictionaries": _kept(ORDERED) + b"h\x01)R" * (MAX_OPCODES // 4) + b".",
    "tensors": _kept(storage("0", 4), REBUILD, ORDERED + b")R", b"K\x04\x85", b"K\x01\x85")
    + b"h\x02(h\x01K\x00h\x04h\x05\x89h\x03tR" * (MAX_OPCODES // 10) + b".",
    "copies of a long text": _kept(text("a" * 2**20), ENCODE, text("latin1")) + b"h\x02h\x01h\x03\x86R" * 10_000 + b".",
    "long tuples of one thing": _kept(b"]") + b"(" + b"h\x01" * (MAX_OPCODES - 100) + b"t.",
    "lists within lists": _kept(b"]") + b"h\x01\x85q\x01" * 100_000 + b"0.",
    "tuples as keys": b"}" + _kept(b"(" + b"K\x01" * 14 + b"t") + b"h\x01Ns" * 100_000 + b".",
    "wide text": text("a" * 2**22 + "\U0001f600") + b".",
}  # fmt: skip


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_cost_little(tmp_path: Path, name: str) -> None:
    path = write_zip(tmp_path / "bomb", b"\x80\x02" + BOMBS[name], {"0": bytes(16)})
    begin = time.process_time()
    try:
        with Archive(path) as archive:
            unpickle(archive, EVERYTHING)
    except CheckpointError:
        pass
    assert time.process_time() - begin < 2  # seconds
    tracemalloc.start()
    try:
        with Archive(path) as archive:
            unpickle(archive, EVERYTHING)
    except CheckpointError:
        pass
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 2 * path.stat().st_size + 40e6


def test_reading_a_storage_again_and_again_is_bounded(tmp_path: Path) -> None:
    one = torch.zeros(100_000)
    path = save(tmp_path / "x", [one[i:] for i in range(100)])
    with pytest.raises(CheckpointError, match="share their storages too often"):
        load(path)


def test_every_flipped_bit_and_every_cut_is_refused_or_harmless(tmp_path: Path) -> None:
    """Hundreds of damages: an error that names the file, or the same values."""
    value = {"a": torch.arange(5.0), "b": [1, "x"]}
    whole, rng, path = saved(value), random.Random(0), tmp_path / "damaged.ckpt"
    refused: list[str] = []
    for trial in range(600):
        data = bytearray(whole)
        if trial % 4:
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        else:
            del data[rng.randrange(len(data)) :]
        path.write_bytes(data)
        try:
            found = load(path)
        except CheckpointError as error:
            refused.append(str(error))
            continue
        assert torch.equal(found["a"], value["a"])
        assert found["b"] == value["b"]
    assert len(refused) > 200
    assert all("damaged.ckpt: " in message for message in refused)


def test_random_pickles_never_do_more_than_fail(tmp_path: Path) -> None:
    """Mutations of an honest pickle, with right checksums."""
    value = {"a": torch.arange(6.0).view(2, 3), "b": OrderedDict(x=[1, (2.0, "t")]), "c": np.float64(1)}
    source = save(tmp_path / "x", value)
    with zipfile.ZipFile(source) as file:
        whole = file.read("x/data.pkl")
    rng, target = random.Random(1), tmp_path / "y"
    refused: list[str] = []
    for _ in range(600):
        data = bytearray(whole)
        for _ in range(rng.randrange(1, 4)):
            at = rng.randrange(len(data))
            data[at : at + rng.randrange(3)] = rng.choice(
                [b"", rng.randbytes(1), b"R", b"b", b"\x81", b"Q", b"0", b"(", b"t"]
            )
        rewrite(source, target, {"data.pkl": bytes(data)})
        try:
            with Archive(target) as archive:
                unpickle(archive, EVERYTHING)
        except CheckpointError as error:
            refused.append(str(error))
    assert len(refused) > 300
    assert all(str(target) in message for message in refused)
