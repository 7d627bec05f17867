"""The zip container of ``torch.save``, with uncompressed entries, which are checked before they are read.

Python's ``zipfile`` inflates whatever a file asks for and builds an object per entry before anything can be counted.
So this module reads the central directory itself, within bounds (PKWARE's APPNOTE, sections 4.3.12 to 4.3.16). No entry
is unpacked to a path: names are only looked up.
"""

import os
import re
import struct
import zlib
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, NamedTuple

from parapolicy.errors import CheckpointError

MAX_ENTRIES, MAX_DIRECTORY = 50_000, 2**24  # entries, and bytes of their directory
MAX_PICKLE = 2**24  # bytes; the largest published checkpoints have 0.3 MB
MAX_REREAD = 4  # times the file's size that tensors which share storages may read in total
CHUNK = 2**24  # bytes read at once
NO_ZIP_64 = 0xFFFFFFFF

_END = struct.Struct("<4s4H2LH")  # end of central directory
_END_64, _LOCATOR_64 = struct.Struct("<4sQ2H2L4Q"), struct.Struct("<4sLQL")
_CENTRAL, _LOCAL = struct.Struct("<4s6H3L5H2L"), struct.Struct("<4s5H3L2H")


class Entry(NamedTuple):
    """One stored entry: where its local header begins, its length in bytes and its CRC-32."""

    header: int
    size: int
    crc: int


class Archive:
    """A file written by ``torch.save``, open for reading.

    Args:
        path: the file.

    Raises:
        CheckpointError: not such a file, a damaged one, or one with entries that ``torch.save`` never writes.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        try:
            self._file: BinaryIO = self.path.open("rb")
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
        try:
            self.size = os.fstat(self._file.fileno()).st_size
            self._left = MAX_REREAD * self.size
            self._entries, self._root = self._read_directory()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> "Archive":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def entry(self, name: str) -> Entry | None:
        """The entry of a name below the archive's top folder, or None."""
        return self._entries.get(f"{self._root}/{name}")

    def pickle(self) -> bytearray:
        """The bytes of the pickled object."""
        entry = self._entries[f"{self._root}/data.pkl"]
        if entry.size > MAX_PICKLE:
            raise self.error(f"its pickle has {entry.size} bytes, expected at most {MAX_PICKLE}")
        data = bytearray(entry.size)
        self.read_into(entry, memoryview(data))
        return data

    def read_into(self, entry: Entry, target: memoryview) -> None:
        """Read an entry into a buffer of its size, and check its checksum."""
        self._left -= entry.size
        if self._left < 0:
            raise self.error("its tensors share their storages too often; save it again")
        data = self._data_offset(entry)
        self._file.seek(data)
        crc = done = 0
        while done < entry.size:
            part = target[done : done + CHUNK]
            count = self._file.readinto(part)  # type: ignore[attr-defined]
            if not count:
                raise self.error("it ends early; copy it again")
            crc = zlib.crc32(part[:count], crc)
            done += count
        if crc != entry.crc:
            raise self.error("the checksum of an entry does not match: the file is damaged; copy it again")

    def error(self, message: str) -> CheckpointError:
        """An error that names the file."""
        return CheckpointError(f"{self.path}: {message:.600}")

    def _data_offset(self, entry: Entry) -> int:
        header = self._at(entry.header, _LOCAL.size)
        signature, *_, name, extra = _LOCAL.unpack(header)
        begin = entry.header + _LOCAL.size + int(name) + int(extra)
        if signature != b"PK\x03\x04" or begin + entry.size > self.size:
            raise self.error("an entry lies outside of the file; copy it again")
        return begin

    def _at(self, offset: int, size: int) -> bytes:
        if offset < 0 or offset + size > self.size:
            raise self.error("its directory points outside of the file: it is damaged; copy it again")
        self._file.seek(offset)
        return self._file.read(size)

    def _read_directory(self) -> tuple[dict[str, Entry], str]:
        offset, size, count = self._find_directory()
        if count > MAX_ENTRIES or size > MAX_DIRECTORY:
            raise self.error(f"it has {count} entries, expected at most {MAX_ENTRIES}")
        directory, entries, at = self._at(offset, size), dict[str, Entry](), 0
        for _ in range(count):
            if at + _CENTRAL.size > size:
                raise self.error("its directory ends early; copy it again")
            name, entry, at = self._read_entry(directory, at)
            if name in entries:
                raise self.error(f"the entry {name!r} occurs twice; save it again")
            entries[name] = entry
        end = offset
        for entry in sorted(entries.values(), reverse=True):
            if entry.header + _LOCAL.size + entry.size > end:
                raise self.error("its entries overlap, which torch.save never writes; copy it again")
            end = entry.header
        roots = [name.removesuffix("/data.pkl") for name in entries if re.fullmatch(r"[^/]+/data\.pkl", name)]
        if len(roots) != 1 or any(not name.startswith(f"{roots[0]}/") for name in entries):
            raise self.error("a zip file, but not of torch.save: expected one folder with data.pkl")
        self._check_order(entries.get(f"{roots[0]}/byteorder"))
        return entries, roots[0]

    def _read_entry(self, directory: bytes, at: int) -> tuple[str, Entry, int]:
        fields = _CENTRAL.unpack_from(directory, at)
        signature, flags, method, crc, packed, size = (fields[i] for i in (0, 3, 4, 7, 8, 9))
        name_size, extra_size, comment_size, header = *fields[10:13], fields[16]
        at += _CENTRAL.size
        end = at + name_size + extra_size + comment_size
        raw, extra = directory[at : at + name_size], directory[at + name_size : at + name_size + extra_size]
        name = raw.decode("utf-8", "replace")
        if signature != b"PK\x01\x02" or end > len(directory):
            raise self.error("its directory is damaged; copy it again")
        if NO_ZIP_64 in (packed, size, header):
            size, packed, header = self._zip_64(extra, size, packed, header)
        parts = name.split("/")
        if not name.isprintable() or "\\" in name or ":" in name or {"", ".", ".."} & set(parts):
            raise self.error(f"the entry {name!r:.80} has a name that torch.save never writes")
        if method or flags & 1 or packed != size:
            raise self.error(f"the entry {name!r:.80} is compressed or encrypted, which torch.save never writes")
        return name, Entry(header, size, crc), end

    def _zip_64(self, extra: bytes, size: int, packed: int, header: int) -> tuple[int, int, int]:
        """Size, packed size and offset. Those that need 64 bits are in an extra field, in this order."""
        at = 0
        while at + 4 <= len(extra):
            kind, length = struct.unpack_from("<HH", extra, at)
            if kind == 1:
                numbers = list(struct.unpack_from(f"<{length // 8}Q", extra[at + 4 : at + 4 + length].ljust(length)))
                values = [numbers.pop(0) if v == NO_ZIP_64 and numbers else v for v in (size, packed, header)]
                return values[0], values[1], values[2]
            at += 4 + length
        return size, packed, header

    def _find_directory(self) -> tuple[int, int, int]:
        """Offset and size in bytes of the central directory, and its number of entries."""
        begin = max(0, self.size - _END.size - 2**16)
        tail = self._at(begin, self.size - begin)
        if not self.size:
            raise self.error("it is empty; copy it again")
        if self._at(0, min(4, self.size)) != b"PK\x03\x04":
            raise self.error(_foreign(self._at(0, min(200, self.size))))
        at = tail.rfind(b"PK\x05\x06")
        if at < 0 or at + _END.size > len(tail):
            raise self.error("a zip file without its end (an interrupted copy); copy it again")
        _, _, _, _, count, size, offset, _ = _END.unpack_from(tail, at)
        if count == 0xFFFF or NO_ZIP_64 in (size, offset):
            where = begin + at - _LOCATOR_64.size
            locator = _LOCATOR_64.unpack(self._at(where, _LOCATOR_64.size))
            if locator[0] != b"PK\x06\x07":
                raise self.error("its directory is damaged; copy it again")
            end = _END_64.unpack(self._at(locator[2], _END_64.size))
            if end[0] != b"PK\x06\x06":
                raise self.error("its directory is damaged; copy it again")
            count, size, offset = end[7], end[8], end[9]
        return offset, size, count

    def _check_order(self, entry: Entry | None) -> None:
        if entry is None:
            return
        order = bytearray(min(entry.size, 16))
        if entry.size <= 16:
            self.read_into(entry, memoryview(order))
        if bytes(order) != b"little":
            raise self.error(
                f"its byte order is {bytes(order)!r}, expected b'little'; save it on a little-endian machine"
            )


def holds(path: Path, *names: bytes) -> bool:
    """Whether a path is a file of torch.save whose pickle contains all of the names."""
    if not path.is_file():
        return False
    try:
        with Archive(path) as archive:
            pickled = archive.pickle()
            return all(name in pickled for name in names)
    except CheckpointError:
        return False


def _foreign(head: bytes) -> str:
    """A description of a file that is not a zip file."""
    if head.startswith(b"version https://git-lfs"):
        return "a pointer of Git LFS instead of the file; run `git lfs pull` in its repository"
    if head.lstrip()[:1] == b"<":
        return "a web page, not a checkpoint (a failed download); download it again"
    if head.startswith((b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")):
        return (
            "a plain pickle (torch.save before version 1.6, or pickle.dump), expected torch's zip format; if you trust "
            "it, load it with torch and save it again with torch.save"
        )
    if head.startswith(b"\xfd7zXZ") or head.startswith(b"\x1f\x8b"):
        return "a compressed file; unpack it first"
    return f"not a checkpoint: it begins with {head[:16]!r}, expected a zip file of torch.save"
