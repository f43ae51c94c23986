"""Owns the writing of files and folders that appear under their name complete or not at all.

Input: paths. Bytes go to a temporary name in the same folder, are synced and renamed.
"""

import contextlib
import ctypes
import errno
import os
import re
import secrets
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ensemblekit.errors import UsageError
from ensemblekit.files import Source, from_os_error

_LITTER_S = 60  # a new file may not have its lock yet


class AtomicFile:
    """A file that appears under its name complete or not at all.

    Bytes go to a temporary file in the same folder. `seal` makes them durable and lets the caller
    read them back, `rename` shows them; leaving the context before that removes them.

    Args:
        path: The final name; its folder must exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.temporary = temporary_name(path)
        self._descriptor = -1

    def __enter__(self) -> "AtomicFile":
        _drop_litter(self.path)
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0)
        self._descriptor = self._guarded("create", lambda: os.open(self.temporary, flags, 0o666))
        lock(self._descriptor)
        return self

    def __exit__(self, *_: object) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
        with contextlib.suppress(FileNotFoundError):
            self.temporary.unlink()

    def write_at(self, data: bytes | memoryview, offset: int) -> None:
        """Write all of `data` at `offset`; calls may come from several threads."""
        view = memoryview(data).cast("B")
        done = 0
        while done < len(view):
            part, place = view[done:], offset + done
            try:
                done += os.pwrite(self._descriptor, part, place)
            except OSError as error:
                raise from_os_error(error, self.path, doing="write") from error

    def seal(self) -> Source:
        """Make the bytes durable and return the temporary file for reading back."""
        self._guarded("sync", lambda: os.fsync(self._descriptor))
        return Source(self.temporary)

    def rename(self) -> None:
        """Put the file under its final name."""
        self._guarded("rename", lambda: os.replace(self.temporary, self.path))

    def _guarded(self, doing: str, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except OSError as error:
            raise from_os_error(error, self.path, doing=doing) from error


def temporary_name(path: Path) -> Path:
    """A hidden name beside a path that nothing else uses."""
    return path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")


def lock(descriptor: int) -> bool:
    """Whether the file or folder is ours alone until it is closed; true where nothing can tell."""
    try:
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except (ImportError, OSError):
        return True
    return True


def _drop_litter(path: Path) -> None:
    """What processes that were killed left of an output; those that live hold a lock."""
    ours = re.compile(re.escape(f".{path.name}.") + r"[0-9a-f]{12}\.tmp")
    with contextlib.suppress(ImportError, OSError):
        import fcntl

        for other in [entry for entry in os.scandir(path.parent) if ours.fullmatch(entry.name)]:
            with contextlib.suppress(OSError):  # in use, gone meanwhile, or another user's
                flags = os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW
                descriptor = os.open(other.path, flags)
                try:
                    old = time.time() - other.stat(follow_symlinks=False).st_mtime > _LITTER_S
                    if old and other.is_file(follow_symlinks=False):
                        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                        os.unlink(other.path)
                finally:
                    os.close(descriptor)


def replace_folder(new: Path, path: Path) -> None:
    """Put the folder `new` under the name `path`; what was there is gone afterwards.

    An old folder and the new one change names in one step where the system can do that, so that
    there is a whole folder under the name at any time.

    Raises:
        MachineError: The operating system refused; the old folder is still there.
    """
    try:
        if not path.exists():
            os.rename(new, path)
            return
        if _exchange(new, path):
            shutil.rmtree(new)
            return
        aside = temporary_name(path)
        os.rename(path, aside)
        try:
            os.rename(new, path)
        except BaseException:
            os.rename(aside, path)
            raise
        shutil.rmtree(aside)
    except OSError as error:
        raise from_os_error(error, path, doing="rename") from error


def _exchange(one: Path, other: Path) -> bool:
    """Two names change places; False where the system or the file system cannot."""
    libc = ctypes.CDLL(None, use_errno=True)
    names = os.fsencode(one), os.fsencode(other)
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE (and macOS' RENAME_SWAP)
    if sys.platform == "darwin":
        failed = libc.renamex_np(names[0], names[1], exchange)
    elif hasattr(libc, "renameat2"):
        failed = libc.renameat2(here, names[0], here, names[1], exchange)
    else:
        return False
    if not failed:
        return True
    if ctypes.get_errno() in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        return False
    code = ctypes.get_errno()
    raise OSError(code, os.strerror(code), str(other))


def sync_folder(folder: Path) -> None:
    """Make a folder's entries durable; some network file systems cannot."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Hold the folder's lock, so that two writers' files never mix; sync its entries at the end."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except PermissionError:  # one may write there, and not look
        yield
        return
    try:
        with contextlib.suppress(ImportError, OSError):  # no fcntl, or a file system without locks
            import fcntl

            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
        with contextlib.suppress(OSError):  # some network file systems cannot sync a folder
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_output(path: Path, *, inputs: list[Path], force: bool, folder: bool = False) -> None:
    """Refuse an output that would overwrite something it must not.

    Args:
        path: The output.
        inputs: Files that are read.
        force: An existing output may be replaced.
        folder: The output is a folder.

    Raises:
        UsageError: Its folder is missing, the output is (or holds) an input, it exists without
            `force`, or is a folder where a file is wanted, or a file where a folder is.
    """
    if not path.parent.is_dir():
        raise UsageError(
            f"output folder {path.parent} does not exist",
            hint=None if path.parent.exists() else f"mkdir -p {shlex.quote(str(path.parent))}",
        )
    if not os.path.lexists(path):
        return
    if path.is_dir() != folder:
        kind, wanted = ("a file", "a folder") if folder else ("a folder", "a file")
        raise UsageError(f"output {path} is {kind}", hint=f"name {wanted} with -o")
    if path.exists() and not (path.is_dir() or path.is_file()):
        raise UsageError(
            f"output {path} is neither a file nor a folder", hint="name another with -o"
        )
    held = {path, *path.iterdir()} if folder else {path}
    for source in inputs:
        if source.exists() and any(p.exists() and p.samefile(source) for p in held):
            raise UsageError(
                f"output {path} is also an input ({source}); reading it would destroy it",
                hint="choose another name with -o",
            )
    if not force:
        raise UsageError(
            f"output {path} exists already",
            hint="choose another name with -o, or --force to replace it",
        )
