"""Owns tar archives: NeMo's `.nemo`, which holds one checkpoint, and torch's format of 2016.

Input: an open file. Nothing is extracted; members are read where they lie.
"""

import struct
import tarfile
from io import RawIOBase
from typing import Any

from ensemblekit import containers
from ensemblekit.containers import Extent, Tree, Unusable, checked_spec, pickle_vm
from ensemblekit.containers.pickle_globals import Global, brief
from ensemblekit.dtypes import DTYPES, STORAGES
from ensemblekit.errors import DamagedError, UnsupportedError, listing
from ensemblekit.files import Readable, Window

_MAX_MEMBERS = 10_000
_MAX_HEADER = 1 << 20
_MAX_PICKLE = 64 << 20
_CHECKPOINTS = (".ckpt", ".pt", ".pth", ".safetensors", ".bin")
_OLD_TORCH = {"sys_info", "pickle", "storages", "tensors"}
_HINT = "copy it again, or leave it out with --exclude"


def sniff(source: Readable) -> bool:
    """Whether the first block is a tar header."""
    if source.size < 512:
        return False
    return source.read(257, 5) == b"ustar" or _is_old_header(source.read(0, 512))


def read(source: Readable) -> Tree:
    """Describe the checkpoint in the archive.

    Raises:
        DamagedError: The archive is not sound.
        UnsupportedError: It holds no checkpoint, or several.
    """
    if source is not source.file:
        raise UnsupportedError(f"{source.path}: is a tar archive within another file")
    members = _members(source)
    if set(members) >= _OLD_TORCH:
        return Tree("torch-tar", _OldTorch(source, members).read(), {}, (source.file,))
    inside = [name for name in members if name.endswith(_CHECKPOINTS)]
    if len(inside) != 1:
        raise UnsupportedError(
            f"{source.path}: a tar archive with {len(inside)} checkpoints in it "
            f"(members: {listing(members)})",
            hint=f"unpack it and name the checkpoint: tar -xf {source.path.name}",
        )
    tree = containers.read(members[inside[0]])
    return Tree(f"tar+{tree.container}", tree.root, tree.metadata, tree.sources)


def _members(source: Readable) -> dict[str, Window]:
    found: dict[str, Window] = {}
    try:
        with tarfile.open(fileobj=_Stream(source), mode="r:") as archive:
            for count, member in enumerate(archive):
                if count > _MAX_MEMBERS:
                    raise _damaged(source, f"more than {_MAX_MEMBERS} members")
                if not member.isreg() or member.issparse():
                    continue
                name = member.name.removeprefix("./")
                if name in found:
                    raise _damaged(source, f"member '{name}' stands twice")
                found[name] = Window(source.file, member.offset_data, member.size, name)
            rest = source.size - archive.offset
        if source.read(archive.offset, min(512, rest)).strip(b"\0"):
            raise _damaged(
                source, f"no member begins at byte {archive.offset}, nor does it end there"
            )
    except (tarfile.TarError, ValueError, OverflowError, RecursionError) as error:
        raise _damaged(source, str(error)) from error
    return found


class _Stream(RawIOBase):
    """The file as `tarfile` wants it: seekable, read in pieces."""

    def __init__(self, source: Readable) -> None:
        self._source = source
        self._place = 0

    def read(self, size: int = -1) -> bytes:
        rest = max(self._source.size - self._place, 0)
        length = rest if size < 0 else min(size, rest)
        if length > _MAX_HEADER:  # only headers are read through here
            raise tarfile.ReadError(f"a header of {length} bytes")
        data = self._source.read(self._place, length) if length else b""
        self._place += length
        return data

    def seek(self, offset: int, whence: int = 0) -> int:
        base = {0: 0, 1: self._place, 2: self._source.size}[whence]
        self._place = base + offset
        return self._place

    def tell(self) -> int:
        return self._place

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True


class _OldTorch:
    """Four members: facts, storages with their data, tensors that point to them, the object."""

    def __init__(self, source: Readable, members: dict[str, Window]) -> None:
        self.source = source
        self.members = members
        self.storages: dict[str, tuple[Extent, str]] = {}
        self.tensors: dict[str, Any] = {}

    def read(self) -> Any:
        try:
            self._read_storages()
            self._read_tensors()
        except (struct.error, TypeError, ValueError, KeyError) as error:
            raise _damaged(self.source, f"its tables are not sound ({error})") from error
        member = self.members["pickle"]
        data = member.read(0, min(member.size, _MAX_PICKLE))

        def tensor(identity: Any) -> Any:
            if isinstance(identity, tuple) and identity:
                return identity[0]  # a module's class, with its source behind it
            return self.tensors.get(_key(identity), Unusable("is missing", _HINT, damaged=True))

        return pickle_vm.load_prefix(
            data, where=str(member.path), storage=pickle_vm.no_storage, persistent=tensor
        )[0]

    def _read_storages(self) -> None:
        member = self.members["storages"]
        table = _Table(member)
        for _ in range(table.pickled_count()):
            key, _location, kind = table.pickled()
            dtype = STORAGES[kind.name] if isinstance(kind, Global) else ""
            numel = table.unpack("<q")
            start = table.place
            nbytes = numel * DTYPES[dtype].itemsize
            table.skip(nbytes)
            extent = Extent(member, start, nbytes, None)
            self.storages[_key(key)] = (extent, dtype)
        for key, root, offset, numel in table.pickled():
            whole, dtype = self.storages[_key(root)]
            if not type(offset) is type(numel) is int:
                raise ValueError("a view without a place")
            start, nbytes = (n * DTYPES[dtype].itemsize for n in (offset, numel))
            if start < 0 or nbytes < 0 or start + nbytes > whole.nbytes:
                raise ValueError(f"a view of {numel} elements at {offset}")
            part = whole._replace(start=whole.start + start, nbytes=nbytes)
            self.storages[_key(key)] = (part, dtype)

    def _read_tensors(self) -> None:
        table = _Table(self.members["tensors"])
        for _ in range(table.pickled_count()):
            key, storage, _kind = table.pickled()
            extent, dtype = self.storages[_key(storage)]
            dimensions = table.unpack("<i")
            table.skip(4)
            if not 0 <= dimensions <= 64:
                raise ValueError(f"{dimensions} dimensions")
            shape = tuple(table.unpack("<q") for _ in range(dimensions))
            stride = tuple(table.unpack("<q") for _ in range(dimensions))
            offset = table.unpack("<q")
            self.tensors[_key(key)] = checked_spec(
                dtype=dtype, shape=shape, stride=stride, offset=offset, extent=extent
            )


class _Table:
    """Pickles and numbers, one behind the other."""

    def __init__(self, member: Window) -> None:
        self.member = member
        self.place = 0

    def pickled(self) -> Any:
        rest, length = self.member.size - self.place, 4096
        while True:
            data = self.member.read(self.place, min(length, rest))
            try:
                value, used = pickle_vm.load_prefix(
                    data, where=str(self.member.path), storage=pickle_vm.no_storage
                )
            except pickle_vm.EndsTooEarlyError:
                if length >= min(rest, _MAX_PICKLE):
                    raise
                length *= 8
                continue
            self.place += used
            return value

    def pickled_count(self) -> int:
        count = self.pickled()
        if type(count) is not int or not 0 <= count <= self.member.size:
            raise ValueError(f"a count of {brief(count)}")
        return count

    def unpack(self, form: str) -> int:
        size = struct.calcsize(form)
        value = int(struct.unpack(form, self.member.read(self.place, size))[0])
        self.place += size
        return value

    def skip(self, length: int) -> None:
        if length < 0 or self.place + length > self.member.size:
            raise ValueError(f"{length} bytes at {self.place} of {self.member.size}")
        self.place += length


def _key(value: Any) -> str:
    """A storage or tensor is known by a number, which the object's pickle writes as text."""
    return str(value) if isinstance(value, int | str) else ""


def _is_old_header(block: bytes) -> bool:
    """A header from before ustar: its checksum fits."""
    try:
        tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except (tarfile.TarError, ValueError):
        return False
    return True


def _damaged(source: Readable, what: str) -> DamagedError:
    return DamagedError(f"{source.path}: damaged tar archive: {what}", hint=_HINT)
