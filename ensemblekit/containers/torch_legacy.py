"""Owns torch's format before zip: five pickles in a row, then each storage behind its length.

Input: an open file. The pickles are magic number, protocol, system facts, the object, and the keys of
the storages in the order in which they follow; so the object is read twice, the second time knowing
where each storage lies. Written by `torch.save(..., _use_new_zipfile_serialization=False)`.
"""

from typing import Any

from ensemblekit.containers import Extent, Tree, Unusable, pickle_vm
from ensemblekit.containers.pickle_globals import Storage, StorageLookup, find_storage
from ensemblekit.dtypes import DTYPES
from ensemblekit.errors import DamagedError, UnsupportedError
from ensemblekit.files import Readable

MAGIC = 0x1950A86A20F9469CFC6C
_PROTOCOL = 1001
_HEAD = b"l\xfc\x9cF\xf9 j\xa8P\x19."
_FIRST_READ = 1 << 20
_MAX_PICKLE = 256 << 20
_HINT = "copy it again, or leave it out with --exclude"


def sniff(source: Readable) -> bool:
    """Whether the file begins with the pickled magic number, in any protocol."""
    head = source.read(0, min(32, source.size))
    return _HEAD in head or head.startswith(b"L119547037146038801333356")


def read(source: Readable) -> Tree:
    """Describe the object that `torch.save` wrote.

    Raises:
        DamagedError: The file ends early or is not sound.
        HostileError: One of its pickles calls into the interpreter or the operating system.
    """
    stream = _Stream(source)
    if stream.next() != MAGIC or stream.next() != _PROTOCOL:
        raise _damaged(source, "its magic number or protocol is not torch's")
    facts = stream.next()
    if isinstance(facts, dict) and facts.get("little_endian") is False:
        raise UnsupportedError(
            f"{source.path}: was written in big-endian byte order",
            hint="load and save it again with torch on this machine",
        )
    itemsizes: dict[str, int] = {}

    def note(key: str, numel: int, itemsize: int) -> Unusable:
        itemsizes.setdefault(key, itemsize)  # its length is counted in elements of its first user
        return Unusable("has no storage yet")

    body = stream.place
    stream.next(note)
    keys = stream.next()
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise _damaged(source, "its list of storages is none")
    extents = _walk(source, stream.place, keys, itemsizes)

    def find(key: str, numel: int, itemsize: int) -> Extent | Unusable:
        extent = extents.get(key)
        if extent is None:
            return Unusable(f"lies in a missing storage '{key}'", _HINT, damaged=True)
        if extent.nbytes != numel * itemsize:
            text = f"lies in storage '{key}' of {extent.nbytes} bytes"
            return Unusable(f"{text}, the pickle says {numel * itemsize}", _HINT, damaged=True)
        return extent

    stream.place = body
    return Tree("torch-legacy", stream.next(find), {}, (source.file,))


def _walk(
    source: Readable, place: int, keys: list[str], itemsizes: dict[str, int]
) -> dict[str, Extent]:
    """Where each storage lies: eight bytes of length in elements, then the elements."""
    extents: dict[str, Extent] = {}
    for key in keys:
        if key not in itemsizes or key in extents:
            raise _damaged(source, f"storage '{key}' is listed, but no tensor uses it")
        numel = int.from_bytes(source.read(place, 8), "little", signed=True)
        nbytes = numel * itemsizes[key]
        place += 8
        if numel < 0 or place + nbytes > source.size:
            raise _damaged(
                source, f"storage '{key}' should have {nbytes} bytes from byte {place} on"
            )
        extents[key] = Extent(source, place, nbytes, None)
        place += nbytes
    if place != source.size:
        raise _damaged(source, f"{source.size - place} bytes lie behind the last storage")
    return extents


class _Stream:
    """Pickles one after the other; no one says how long each is."""

    def __init__(self, source: Readable) -> None:
        self.source = source
        self.place = 0

    def next(self, storage: StorageLookup = pickle_vm.no_storage) -> Any:
        """The object of the pickle at `place`, which moves behind it."""
        length = _FIRST_READ
        while True:
            rest = self.source.size - self.place
            data = self.source.read(self.place, min(length, rest))
            try:
                value, used = pickle_vm.load_prefix(
                    data,
                    where=str(self.source.path),
                    storage=storage,
                    persistent=lambda identity: _persistent(identity, storage),
                )
            except pickle_vm.EndsTooEarlyError:
                if length >= min(rest, _MAX_PICKLE):
                    raise
                length *= 8
                continue
            self.place += used
            return value


def _persistent(identity: Any, lookup: StorageLookup) -> Any:
    """A module's class, with its source behind it; a storage; or a view of one (before 0.4)."""
    if isinstance(identity, tuple) and len(identity) == 4 and identity[0] == "module":
        return identity[1]
    storage = find_storage(identity, lookup)
    view = identity[5] if isinstance(storage, Storage) and len(identity) > 5 else None
    if not isinstance(storage, Storage) or view is None:
        return storage
    sound = isinstance(view, tuple) and len(view) == 3 and all(type(n) is int for n in view[1:])
    itemsize = DTYPES[storage.dtype or "uint8"].itemsize
    start, nbytes = (n * itemsize for n in view[1:]) if sound else (-1, -1)
    whole = storage.extent
    if start < 0 or nbytes < 0 or start + nbytes > whole.nbytes:
        return Unusable("lies in a view outside of its storage", _HINT, damaged=True)
    return storage._replace(extent=whole._replace(start=whole.start + start, nbytes=nbytes))


def _damaged(source: Readable, what: str) -> DamagedError:
    return DamagedError(f"{source.path}: damaged torch file (old format): {what}", hint=_HINT)
