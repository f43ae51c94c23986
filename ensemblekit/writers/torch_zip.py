"""Owns the writing side of torch's zip archives: a pickle, and one record for each storage.

Input: a content. Records are stored, not deflated, and begin at multiples of 64 bytes, as torch's
own do; tied tensors share a record. Format: APPNOTE.TXT of PKWARE, with zip64 throughout.
"""

import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from ensemblekit.containers.torch_zip import OUR_RECORD
from ensemblekit.dtypes import DTYPES
from ensemblekit.writers import Content, Layout
from ensemblekit.writers.pickling import Ordered, Stored, pickled

_ALIGNMENT = 64
_DOS_DATE = 0x21  # 1 January 1980, no clock: the same weights make the same file
_FULL = 0xFFFFFFFF  # "see the zip64 field"


@dataclass(frozen=True)
class _Record:
    """One entry of the archive: a tensor's bytes (`key`), or its own (`data`)."""

    name: str
    header: int
    start: int
    nbytes: int
    data: bytes | None = None
    key: str | None = None


def layout(content: Content) -> Layout:
    """A state dict by itself."""
    return archive(content, Ordered(stored(content)))


def stored(content: Content) -> dict[str, Any]:
    """Each key's tensor, which names its record."""
    first = {key: group[0] for group in content.ties for key in group}
    owners = [key for key in content.signature if first.get(key, key) == key]
    records = {key: str(place) for place, key in enumerate(owners)}
    return {
        key: Stored(records[first.get(key, key)], shape, dtype, DTYPES[dtype].itemsize)
        for key, (shape, dtype) in content.signature.items()
    }


def archive(content: Content, root: Any) -> Layout:
    """Where everything goes when `root` is pickled beside the tensors' records."""
    parts: list[tuple[str, bytes | None, str | None, int]] = [
        ("data.pkl", pickled(root), None, 0),
        ("byteorder", b"little", None, 0),
        ("version", b"3\n", None, 0),
    ]
    if "ensemblekit" in content.metadata:
        parts.append((OUR_RECORD, content.metadata["ensemblekit"].encode(), None, 0))
    first = {key: group[0] for group in content.ties for key in group}
    owners = [key for key in content.signature if first.get(key, key) == key]
    for place, key in enumerate(owners):
        shape, dtype = content.signature[key]
        parts.append((f"data/{place}", None, key, prod(shape) * DTYPES[dtype].itemsize))
    records, end = [], 0
    for short, data, owner, size in parts:
        nbytes = size if data is None else len(data)
        name = f"archive/{short}"
        start = end + 30 + len(name) + 20 + 4  # header, name, zip64 field, head of the padding
        start += -start % _ALIGNMENT
        records.append(_Record(name, end, start, nbytes, data, owner))
        end = start + nbytes
    places = {r.key: (r.start, r.nbytes) for r in records if r.key is not None}

    def frame(checksums: Mapping[str, int]) -> list[tuple[int, bytes]]:
        found, directory = [], b""
        for record in records:
            crc = checksums[record.key] if record.key else zlib.crc32(record.data or b"")
            found.append((record.header, _local(record, crc) + (record.data or b"")))
            directory += _central(record, crc)
        return [*found, (end, directory + _ends(len(records), len(directory), end))]

    return Layout(places, frame)


def _fields(crc: int, name: str) -> bytes:
    """What both headers share: version 4.5, UTF-8 names, stored, sizes in the zip64 field."""
    return struct.pack("<HHHHHIIIH", 45, 0x800, 0, 0, _DOS_DATE, crc, _FULL, _FULL, len(name))


def _local(record: _Record, crc: int) -> bytes:
    sizes = struct.pack("<HHQQ", 1, 16, record.nbytes, record.nbytes)
    used = record.header + 30 + len(record.name) + len(sizes) + 4
    padding = record.start - used
    extra = sizes + b"FB" + struct.pack("<H", padding) + b"Z" * padding  # torch's mark of padding
    head = b"PK\x03\x04" + _fields(crc, record.name) + struct.pack("<H", len(extra))
    return head + record.name.encode() + extra


def _central(record: _Record, crc: int) -> bytes:
    extra = struct.pack("<HHQQQ", 1, 24, record.nbytes, record.nbytes, record.header)
    head = b"PK\x01\x02" + struct.pack("<H", 45) + _fields(crc, record.name)
    rest = struct.pack("<HHHHII", len(extra), 0, 0, 0, 0, _FULL)
    return head + rest + record.name.encode() + extra


def _ends(count: int, size: int, start: int) -> bytes:
    """The end of the directory: zip64's, where that is, and the old one, which points there."""
    zip64 = struct.pack("<4sQHHIIQQQQ", b"PK\x06\x06", 44, 45, 45, 0, 0, count, count, size, start)
    locator = struct.pack("<4sIQI", b"PK\x06\x07", 0, start + size, 1)
    old = struct.pack("<4sHHHHIIH", b"PK\x05\x06", 0, 0, 0xFFFF, 0xFFFF, _FULL, _FULL, 0)
    return zip64 + locator + old
