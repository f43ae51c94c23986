"""Owns the reading of files: safe where they may change under us, and few open at a time.

Input: paths. Reads go through `pread` on one descriptor, never mmap: a mapped file that is cut
short kills the process, one that is overwritten gives mixed values without an error.
"""

import contextlib
import errno
import hashlib
import os
import stat
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, Protocol

from ensemblekit.errors import DamagedError, InputError, MachineError

_BLOCK = 1 << 20
_OPEN_FLAGS = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0)
_MACHINE_ERRNOS = {
    errno.EACCES,
    errno.EPERM,
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EROFS,
    errno.EIO,
    errno.EMFILE,
    errno.ENFILE,
    errno.ENOMEM,
    errno.EFBIG,
    errno.EBUSY,
}


class Fingerprint(NamedTuple):
    """What must stay the same for two reads to be reads of the same file."""

    device: int
    inode: int
    size: int
    mtime_ns: int


def from_os_error(error: OSError, path: Path, *, doing: str) -> Exception:
    """The exception of ours that says what `error` means for `path`."""
    reason = error.strerror or str(error)
    if error.errno in _MACHINE_ERRNOS or doing not in ("open", "read"):  # an output is no input
        hints = {errno.ENOSPC: "free some space or choose another -o", errno.EACCES: "see ls -l"}
        hint = hints.get(error.errno or 0)
        return MachineError(f"cannot {doing} {path}: {reason}", hint=hint)
    return InputError(f"cannot {doing} {path}: {reason}")


class Readable(Protocol):
    """What containers read from: a file, a part of one, or bytes that lay in one."""

    path: Path
    fingerprint: Fingerprint

    @property
    def file(self) -> "Source":
        """The file that the bytes come from."""

    @property
    def size(self) -> int:
        """Bytes that can be read."""

    def read(self, offset: int, length: int) -> bytes:
        """Exactly `length` bytes from `offset`; `DamagedError` where there are fewer."""

    def read_into(self, view: memoryview, offset: int) -> None:
        """Fill `view` with the bytes from `offset` on."""


class Source:
    """One regular file, opened once at a time and checked to stay what it was.

    The descriptor is opened on demand and may be closed by the pool between reads; every
    reopening and `check_unchanged` compare device, inode, size and mtime with the first look.

    Args:
        path: The file. Links are followed; FIFOs, sockets, devices and folders are refused.

    Raises:
        InputError: Not a regular file.
        MachineError: The operating system refused.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        descriptor, self.fingerprint = _open_regular(path)
        _POOL.adopt(self, descriptor)

    @property
    def file(self) -> "Source":
        """The file itself; a `Window` names the file that it is a part of."""
        return self

    @property
    def size(self) -> int:
        """Bytes in the file when it was first opened."""
        return self.fingerprint.size

    def read(self, offset: int, length: int) -> bytes:
        """Exactly `length` bytes from `offset`.

        Raises:
            DamagedError: The file ends before.
        """
        if length < 0 or offset < 0 or offset + length > self.size:
            raise DamagedError(
                f"{self.path}: ends too early: bytes {offset} to {offset + length} are promised, "
                f"the file has {self.size}",
                hint="the file is truncated; copy it again or leave it out with --exclude",
            )
        buffer = bytearray(length)
        self.read_into(memoryview(buffer), offset)
        return bytes(buffer)

    def read_into(self, view: memoryview, offset: int) -> None:
        """Fill `view` with the bytes from `offset` on.

        Raises:
            DamagedError: The file ends before the view is full.
        """
        done = 0
        descriptor = _POOL.take(self)
        try:
            while done < len(view):
                got = os.preadv(descriptor, [view[done:]], offset + done)
                if got == 0:
                    raise DamagedError(
                        f"{self.path}: was cut short while it was being read "
                        f"(at byte {offset + done} of {self.size})",
                        hint="wait until the writer is done and run the command again",
                    )
                done += got
        except OSError as error:
            raise from_os_error(error, self.path, doing="read") from error
        finally:
            _POOL.give_back(self)

    def check_unchanged(self) -> None:
        """Raise if the file is no longer what it was when it was opened.

        Raises:
            DamagedError: Size or modification time differ, or the path is another file now.
        """
        descriptor = _POOL.take(self)
        try:
            now = _fingerprint(os.fstat(descriptor))
        finally:
            _POOL.give_back(self)
        with contextlib.suppress(OSError):  # deleted since: what was read is what it was
            there = _fingerprint(self.path.stat())
            now = there if there[:2] != now[:2] else now
        if now != self.fingerprint:
            raise _changed(self.path)

    def close(self) -> None:
        """Give the descriptor back; a later read opens the file again."""
        _POOL.close(self)


class Window:
    """A part of a source that is read as if it were a file of its own, such as a tar member.

    Args:
        source: The file.
        start: First byte of the part.
        size: Bytes in the part.
        name: What to call it in messages, behind the file's path.

    Raises:
        DamagedError: The part does not lie within the file.
    """

    def __init__(self, source: Source, start: int, size: int, name: str) -> None:
        if start < 0 or size < 0 or start + size > source.size:
            raise DamagedError(
                f"{source.path}: '{name}' should be bytes {start} to {start + size}, "
                f"the file has {source.size}",
                hint="copy it again, or leave it out with --exclude",
            )
        self.source = source
        self.start = start
        self._size = size
        self.path = source.path / name
        self.fingerprint = source.fingerprint

    @property
    def file(self) -> Source:
        """The file that this is a part of."""
        return self.source

    @property
    def size(self) -> int:
        """Bytes in the part."""
        return self._size

    def read(self, offset: int, length: int) -> bytes:
        """Exactly `length` bytes from `offset` within the part."""
        if length < 0 or offset < 0 or offset + length > self.size:
            raise DamagedError(
                f"{self.path}: ends too early: bytes {offset} to {offset + length} are promised, "
                f"it has {self.size}"
            )
        return self.source.read(self.start + offset, length)

    def read_into(self, view: memoryview, offset: int) -> None:
        """Fill `view` with the bytes from `offset` within the part."""
        self.source.read_into(view, self.start + offset)


class _DescriptorPool:
    """Keeps at most `limit` sources open, the least recently used ones closed first."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._open: OrderedDict[Source, int] = OrderedDict()
        self._busy: dict[Source, int] = {}
        self._closing: set[Source] = set()
        self._lock = threading.Lock()

    def adopt(self, source: Source, descriptor: int) -> None:
        with self._lock:
            self._open[source] = descriptor
            self._evict()

    def take(self, source: Source) -> int:
        """The descriptor, which stays open until it is given back."""
        with self._lock:
            if source not in self._open:
                descriptor, fingerprint = _open_regular(source.path)
                if fingerprint != source.fingerprint:
                    os.close(descriptor)
                    raise _changed(source.path)
                self._open[source] = descriptor
            self._open.move_to_end(source)
            self._busy[source] = self._busy.get(source, 0) + 1
            self._evict()
            return self._open[source]

    def give_back(self, source: Source) -> None:
        """One reader is done; the last one closes what was to be closed meanwhile."""
        with self._lock:
            self._busy[source] -= 1
            if not self._busy[source]:
                del self._busy[source]
                if source in self._closing:
                    self._closing.discard(source)
                    os.close(self._open.pop(source))

    def close(self, source: Source) -> None:
        """Close now, or when the last reader is done: the number may be another file's then."""
        with self._lock:
            if source in self._busy:
                self._closing.add(source)
            elif source in self._open:
                os.close(self._open.pop(source))

    def _evict(self) -> None:
        if len(self._open) <= self._limit:
            return
        for source in list(self._open):
            if len(self._open) <= self._limit:
                return
            if source not in self._busy:
                os.close(self._open.pop(source))


def _most_open() -> int:
    """Half of what the system allows a process, so that others in it have theirs."""
    try:
        import resource
    except ImportError:  # Windows
        return 128
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 4096 if soft == resource.RLIM_INFINITY else max(8, min(soft // 2, 4096))


_POOL = _DescriptorPool(limit=_most_open())


def _fingerprint(status: os.stat_result) -> Fingerprint:
    return Fingerprint(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


def _changed(path: Path) -> DamagedError:
    return DamagedError(
        f"{path}: changed while it was being read",
        hint="wait until the writer is done and run the command again",
    )


def _open_regular(path: Path) -> tuple[int, Fingerprint]:
    try:
        descriptor = os.open(path, _OPEN_FLAGS)
    except OSError as error:
        raise from_os_error(error, path, doing="open") from error
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        raise InputError(
            f"{path}: is {_kind(status.st_mode)}, not a regular file",
            hint="name checkpoint files or folders of them",
        )
    return descriptor, _fingerprint(status)


def _kind(mode: int) -> str:
    for test, name in (
        (stat.S_ISDIR, "a folder"),
        (stat.S_ISFIFO, "a FIFO"),
        (stat.S_ISSOCK, "a socket"),
        (stat.S_ISCHR, "a character device"),
        (stat.S_ISBLK, "a block device"),
    ):
        if test(mode):
            return name
    return "something else"


def sha256(source: Source, stopped: Callable[[], bool] = lambda: False) -> str:
    """Hex SHA-256 of the file's bytes; of nothing in particular when `stopped` says so midway."""
    digest = hashlib.sha256()
    for part in blocks(source, 0, source.size):
        if stopped():
            break
        digest.update(part)
    return digest.hexdigest()


def blocks(source: Readable, start: int, length: int) -> Iterator[memoryview]:
    """The bytes from `start` on, a megabyte at a time; each block is good until the next one."""
    buffer = memoryview(bytearray(min(_BLOCK, length)))
    for done in range(0, length, _BLOCK):
        part = buffer[: min(_BLOCK, length - done)]
        source.read_into(part, start + done)
        yield part
