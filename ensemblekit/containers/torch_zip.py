"""Owns torch's zip archive: our own walk over its directory, one pickle, stored records.

Input: an open file. `zipfile` trusts what it reads; here every record must be stored, lie
where both directories say, and touch its neighbours, so that no byte is seen by one reader only.
"""

import struct
import zlib
from typing import NamedTuple

from ensemblekit.containers import Extent, Tree, Unusable, pickle_vm
from ensemblekit.errors import DamagedError, UnsupportedError
from ensemblekit.files import Readable

_LOCAL = struct.Struct("<IHHHHHIIIHH")
_CENTRAL = struct.Struct("<IHHHHHHIIIHHHHHII")
_END = struct.Struct("<IHHHHIIH")
_END64_LOCATOR = struct.Struct("<IIQI")
_END64 = struct.Struct("<IQHHIIQQQQ")
_LOCAL_MAGIC, _CENTRAL_MAGIC, _END_MAGIC = 0x04034B50, 0x02014B50, 0x06054B50
_LOCATOR_MAGIC, _END64_MAGIC, _DESCRIPTOR_MAGIC = 0x07064B50, 0x06064B50, 0x08074B50
_MAX_DIRECTORY = 256 << 20
_MAX_PICKLE = 256 << 20
_EXPORTED = ("/archive_format", "serialized_exported_program.json")
_AHEAD = 512  # bytes
_HINT = "copy it again, or leave it out with --exclude"


class Record(NamedTuple):
    """One stored file of the archive."""

    name: str
    start: int
    nbytes: int
    crc32: int


OUR_RECORD = "ensemblekit.json"  # beside the weights in an average of ours; torch passes it over
_MOST_FACTS = 1 << 24


def sniff(source: Readable) -> bool:
    """Whether the file begins with a zip record."""
    return source.size >= 4 and source.read(0, 4) == b"PK\x03\x04"


def read(source: Readable) -> Tree:
    """Describe what `torch.save` put into the archive.

    Raises:
        DamagedError: The archive is not sound.
        HostileError: Its pickle calls into the interpreter or the operating system.
        UnsupportedError: A zip file of another kind, such as TorchScript.
    """
    records = {record.name: record for record in directory(source)}
    pickles = [name for name in records if name.count("/") == 1 and name.endswith("/data.pkl")]
    if any(name.count("/") == 1 and name.endswith("/constants.pkl") for name in records):
        raise _torchscript(source)
    if any(name.endswith(_EXPORTED) for name in records):
        raise UnsupportedError(
            f"{source.path}: is a torch.export archive: a program, not a plain checkpoint",
            hint="save the weights: torch.save(torch.export.load(path).state_dict, 'weights.pt')",
        )
    if len(pickles) != 1:
        raise UnsupportedError(
            f"{source.path}: is a zip file with {len(pickles)} data.pkl records; "
            "torch.save writes exactly one",
            hint=_HINT,
        )
    prefix = pickles[0].removesuffix("data.pkl")
    _check_byteorder(source, records.get(prefix + "byteorder"))
    # torch can be told not to compute CRCs; then all of them are zero
    has_crcs = any(record.crc32 for record in records.values())
    stream = _contents(source, records[pickles[0]], has_crcs=has_crcs)

    def storage(key: str, numel: int, itemsize: int) -> Extent | Unusable:
        nbytes = numel * itemsize
        record = records.get(f"{prefix}data/{key}")
        if record is None:
            return Unusable(f"lies in a missing record, data/{key}", _HINT, damaged=True)
        if record.nbytes != nbytes:
            return Unusable(
                f"lies in record data/{key} of {record.nbytes} bytes, the pickle says {nbytes}",
                _HINT,
                damaged=True,
            )
        crc32 = record.crc32 if has_crcs else None
        return Extent(source, record.start, record.nbytes, crc32)

    root = pickle_vm.load(stream, where=str(source.path), storage=storage)
    ours = records.get(f"{prefix}{OUR_RECORD}")
    metadata = {}
    if ours is not None and ours.nbytes <= _MOST_FACTS:
        text = _contents(source, ours, has_crcs=has_crcs).decode("utf-8", "replace")
        metadata = {"ensemblekit": text}
    return Tree("torch-zip", root, metadata, (source.file,))


def directory(source: Readable) -> list[Record]:
    """The records of the archive in file order, each checked against its own header.

    Raises:
        DamagedError: Compressed or encrypted records, duplicates, overlaps, gaps, bytes before
            or behind, or two directories that disagree.
    """
    count, start, size = _end(source)
    if size > _MAX_DIRECTORY:
        raise _damaged(source, f"its directory claims {size} bytes")
    data = source.read(start, size)
    entries: list[tuple[Record, int, int]] = []
    seen: set[str] = set()
    place = 0
    for _ in range(count):
        record, header, flags, place = _central(source, data, place)
        if record.name in seen:
            raise _damaged(source, f"record '{record.name}' stands twice")
        seen.add(record.name)
        entries.append((record, header, flags))
    if place != size:
        raise _damaged(source, f"its directory has {size - place} bytes too many")
    return _located(source, sorted(entries, key=lambda e: e[1]), start)


def _end(source: Readable) -> tuple[int, int, int]:
    """Number of entries, start and size of the central directory."""
    place = source.size - _END.size
    tail = source.read(max(place, 0), min(_END.size, source.size))
    if len(tail) < _END.size or not tail.startswith(b"PK\x05\x06"):
        raise _damaged(source, "its directory is missing at the end (truncated?)")
    _, disk, first_disk, here, count, size, start, comment = _END.unpack(tail)
    if disk or first_disk or here != count or comment:
        raise _damaged(source, "its end record spans disks or carries a comment")
    if place >= _END64_LOCATOR.size:
        locator = source.read(place - _END64_LOCATOR.size, _END64_LOCATOR.size)
        if locator.startswith(b"PK\x06\x07"):
            end64 = _END64_LOCATOR.unpack(locator)[2]
            place -= _END64_LOCATOR.size + _END64.size
            fields = _END64.unpack(source.read(max(place, 0), _END64.size))
            if end64 != place or fields[0] != _END64_MAGIC:
                raise _damaged(source, "its zip64 end record is missing")
            count, size, start = fields[7:10]
        elif count == 0xFFFF or 0xFFFFFFFF in (size, start):
            raise _damaged(source, "its zip64 locator is missing")
    if start + size != place:
        raise _damaged(source, f"its directory ends at {start + size}, expected {place}")
    return count, start, size


def _central(source: Readable, data: bytes, place: int) -> tuple[Record, int, int, int]:
    """One entry of the central directory: record, header offset, flags, next place."""
    if place + _CENTRAL.size > len(data):
        raise _damaged(source, "its directory ends in the middle of an entry")
    fields = _CENTRAL.unpack_from(data, place)
    magic, _, _, flags, method, _, _, crc, packed, size, n_name, n_extra, n_comment = fields[:13]
    header = fields[16]
    stop = place + _CENTRAL.size + n_name + n_extra + n_comment
    if magic != _CENTRAL_MAGIC or stop > len(data):
        raise _damaged(source, "its directory has a broken entry")
    body = data[place + _CENTRAL.size : stop]
    try:
        name = body[:n_name].decode("utf-8")
    except UnicodeDecodeError as error:
        raise _damaged(source, "a record name is not UTF-8") from error
    if flags & 0x1:
        raise _damaged(source, f"record '{name}' is encrypted")
    if method and "/code/" in name:
        raise _torchscript(source)
    if method:
        raise _damaged(source, f"record '{name}' is compressed; torch stores records as they are")
    extra = body[n_name : n_name + n_extra]
    size, packed, header = _zip64(source, name, extra, size, packed, header)
    if packed != size:
        raise _damaged(source, f"record '{name}' is stored, but {packed} bytes stand for {size}")
    return Record(name, 0, size, crc), header, flags, stop


def _zip64(
    source: Readable, name: str, extra: bytes, size: int, packed: int, header: int
) -> tuple[int, int, int]:
    """Replace fields of all ones by their 64-bit values, which stand in extra field 1."""
    place = 0
    while place + 4 <= len(extra):
        tag, length = struct.unpack_from("<HH", extra, place)
        if place + 4 + length > len(extra):
            raise _damaged(source, f"record '{name}' has a broken extra field")
        if tag == 1:
            values = iter(struct.unpack_from(f"<{length // 8}Q", extra, place + 4))
            try:
                size = next(values) if size == 0xFFFFFFFF else size
                packed = next(values) if packed == 0xFFFFFFFF else packed
                header = next(values) if header == 0xFFFFFFFF else header
            except StopIteration as error:
                raise _damaged(source, f"record '{name}' has a short zip64 field") from error
        place += 4 + length
    return size, packed, header


def _located(source: Readable, entries: list[tuple[Record, int, int]], stop: int) -> list[Record]:
    """Records with the place of their data; local headers must agree and leave no gaps."""
    found: list[Record] = []
    near = _Near(source)
    place = 0
    for record, header, flags in entries:
        if header != place:
            what = "overlaps the one before" if header < place else f"lies behind a gap at {place}"
            raise _damaged(source, f"record '{record.name}' {what}")
        local = _LOCAL.unpack(near.read(header, _LOCAL.size))
        magic, _, local_flags, method, _, _, crc, packed, size, n_name, n_extra = local
        name = near.read(header + _LOCAL.size, n_name)
        if magic != _LOCAL_MAGIC or name != record.name.encode() or method or local_flags != flags:
            raise _damaged(source, f"record '{record.name}' differs from its own header")
        streamed = bool(flags & 0x8)
        stated = (crc, size, packed)
        if not streamed and size != 0xFFFFFFFF and stated != (record.crc32, *[record.nbytes] * 2):
            raise _damaged(source, f"record '{record.name}' differs from its own header")
        start = header + _LOCAL.size + n_name + n_extra
        place = start + record.nbytes
        if place > stop:
            raise _damaged(source, f"record '{record.name}' runs into the directory")
        if streamed:
            place = _descriptor_end(source, near, record, place)
        found.append(record._replace(start=start))
    if place != stop:
        raise _damaged(source, f"{stop - place} bytes lie between the records and the directory")
    return found


class _Near:
    """Reads small parts of a file: the end of a record, and what stands before the next one."""

    def __init__(self, source: Readable) -> None:
        self._source = source
        self._start = 0
        self._data = b""

    def read(self, offset: int, length: int) -> bytes:
        """As `Source.read`; several such parts are one access to the file."""
        at = offset - self._start
        if at < 0 or at + length > len(self._data):
            ahead = max(length, min(_AHEAD, self._source.size - offset))
            self._start, at, self._data = offset, 0, self._source.read(offset, ahead)
        return self._data[at : at + length]


def _descriptor_end(source: Readable, near: _Near, record: Record, place: int) -> int:
    """End of the data descriptor behind a record: magic, CRC and two sizes of 4 or 8 bytes."""
    head = near.read(place, 16)
    magic, crc, packed, size = struct.unpack("<IIII", head)
    if (magic, crc) != (_DESCRIPTOR_MAGIC, record.crc32):
        raise _damaged(source, f"record '{record.name}' has a wrong data descriptor")
    if packed == size == record.nbytes:
        return place + 16
    if struct.unpack("<QQ", near.read(place + 8, 16)) == (record.nbytes, record.nbytes):
        return place + 24
    raise _damaged(source, f"record '{record.name}' has a wrong data descriptor")


def _contents(source: Readable, record: Record, *, has_crcs: bool) -> bytes:
    if record.nbytes > _MAX_PICKLE:
        raise UnsupportedError(
            f"{source.path}: its pickle has {record.nbytes} bytes (limit {_MAX_PICKLE}): it "
            "holds large data beside tensors",
            hint="save the model alone: torch.save(model.state_dict(), path)",
        )
    data = source.read(record.start, record.nbytes)
    if has_crcs and zlib.crc32(data) != record.crc32:
        raise _damaged(source, f"record '{record.name}' has a wrong CRC-32")
    return data


def _check_byteorder(source: Readable, record: Record | None) -> None:
    if record is None or record.nbytes > 16:
        return
    order = source.read(record.start, record.nbytes)
    if order.strip() != b"little":
        raise UnsupportedError(
            f"{source.path}: was written in {order.decode('ascii', 'replace')}-endian byte order",
            hint="load and save it again with torch on this machine",
        )


def _torchscript(source: Readable) -> UnsupportedError:
    return UnsupportedError(
        f"{source.path}: is a TorchScript archive: a program, not a plain checkpoint",
        hint="save the weights: torch.save(torch.jit.load(path).state_dict(), 'weights.pt')",
    )


def _damaged(source: Readable, what: str) -> DamagedError:
    return DamagedError(f"{source.path}: damaged zip archive: {what}", hint=_HINT)
