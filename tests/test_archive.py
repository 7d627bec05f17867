"""The zip container of torch.save: what it never writes is refused before it is read."""

import pickle
import struct
import warnings
import zipfile
from pathlib import Path
from typing import Any

import pytest

from parapolicy import CheckpointError
from parapolicy.checkpoint import archive as archive_module
from parapolicy.checkpoint.archive import Archive
from tests.torch_files import load, write_zip


def _zip_of(tmp_path: Path, names: dict[str, bytes], **settings: Any) -> Path:
    path = tmp_path / "x.ckpt"
    with zipfile.ZipFile(path, "w", **settings) as file:
        for name, data in names.items():
            file.writestr(name, data)
    return path


GOOD = {"archive/data.pkl": b"N."}


def test_a_plain_zip_of_torch_loads(tmp_path: Path) -> None:
    assert load(_zip_of(tmp_path, GOOD)) is None


@pytest.mark.parametrize(
    "extra",
    [
        "archive/../evil",
        "archive//evil",
        "/evil",
        "other/evil",
        "evil",
        "archive/a\\b",
        "archive/C:/evil",
        "archive/./evil",
        "archive/a\nb",
    ],
)
def test_names_that_leave_the_folder_are_refused(tmp_path: Path, extra: str) -> None:
    with pytest.raises(CheckpointError, match=r"x\.ckpt: .*torch\.save"):
        load(_zip_of(tmp_path, {**GOOD, extra: b"N."}))


@pytest.mark.parametrize("names", [{"archive/version": b"3"}, {**GOOD, "b/data.pkl": b"N."}, {"data.pkl": b"N."}])
def test_other_zip_files_are_refused(tmp_path: Path, names: dict[str, bytes]) -> None:
    with pytest.raises(CheckpointError, match=r"x\.ckpt: a zip file, but not of torch\.save"):
        load(_zip_of(tmp_path, names))


def test_deflated_entries_are_refused_unread(tmp_path: Path) -> None:
    path = _zip_of(tmp_path, {**GOOD, "archive/data/0": bytes(10**8)}, compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(CheckpointError, match="compressed"):
        load(path)


def test_an_entry_that_stands_there_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x"
    with zipfile.ZipFile(path, "w") as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        file.writestr("archive/data.pkl", b"N.")
        file.writestr("archive/data.pkl", b"K\x01.")
    with pytest.raises(CheckpointError, match="twice"):
        load(path)


def test_overlapping_entries_are_refused(tmp_path: Path) -> None:
    path = _zip_of(tmp_path, {**GOOD, "archive/data/0": bytes(1000), "archive/data/1": bytes(1000)})
    data = bytearray(path.read_bytes())
    entries = [i for i in range(len(data)) if data[i : i + 4] == b"PK\x01\x02"]
    data[entries[2] + 42 : entries[2] + 46] = data[entries[1] + 42 : entries[1] + 46]
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="overlap"):
        load(path)


def test_another_byte_order_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="byte order is b'big'"):
        load(_zip_of(tmp_path, {**GOOD, "archive/byteorder": b"big"}))


def test_too_many_entries_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive_module, "MAX_ENTRIES", 2)
    with pytest.raises(CheckpointError, match="it has 3 entries, expected at most 2"):
        load(_zip_of(tmp_path, {**GOOD, "archive/a": b"", "archive/b": b""}))


def test_a_huge_pickle_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive_module, "MAX_PICKLE", 10)
    with pytest.raises(CheckpointError, match="its pickle has"):
        load(write_zip(tmp_path / "x", b"N" * 20))


def test_files_with_64_bit_directories(tmp_path: Path) -> None:
    """Files above 4 GB have them; here the numbers are small."""
    path = _zip_of(tmp_path, {**GOOD, "archive/data/0": b"abcd"})
    data = path.read_bytes()
    at = data.rindex(b"PK\x05\x06")
    _, _, _, _, count, _, offset, _ = struct.unpack("<4s4H2LH", data[at:])
    directory, last = bytearray(data[offset:at]), data[offset:at].rindex(b"PK\x01\x02")
    header = directory[last + 42 : last + 46]
    directory[last + 42 : last + 46] = b"\xff" * 4
    directory[last + 30 : last + 32] = struct.pack("<H", 12)
    directory += struct.pack("<HHQ", 1, 8, int.from_bytes(header, "little"))
    end_64 = struct.pack("<4sQ2H2L4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, count, count, len(directory), offset)
    locator = struct.pack("<4sLQL", b"PK\x06\x07", 0, offset + len(directory), 1)
    end = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 0xFFFF, 0xFFFF, 2**32 - 1, 2**32 - 1, 0)
    path.write_bytes(data[:offset] + directory + end_64 + locator + end)
    with Archive(path) as archive:
        entry = archive.entry("data/0")
        assert entry is not None
        found = bytearray(4)
        archive.read_into(entry, memoryview(found))
    assert bytes(found) == b"abcd"


FOREIGN = {
    b"": "it is empty",
    b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n": "Git LFS",
    b"<!doctype html><html>": "a web page",
    pickle.dumps({"a": 1}): "a plain pickle",
    b"\xfd7zXZ\x00": "a compressed file",
    b"PK\x03\x04 and no end": "without its end",
    b"something": "not a checkpoint: it begins with b'something'",
}


@pytest.mark.parametrize("content", FOREIGN)
def test_other_files_are_refused_by_what_they_are(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "other.ckpt"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"other\.ckpt: .*{FOREIGN[content]}"):
        load(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"missing\.ckpt cannot be read: No such file"):
        load(tmp_path / "missing.ckpt")
