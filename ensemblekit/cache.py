"""Owns predictions on disk: append-only logs, one for each member and split, kept across runs.

Input: records made by `predict`. A log holds one record for each batch, with the digest of the
batch it was made from, so that a run can stop anywhere and go on, and so that changed data never
meet old predictions.
"""

import contextlib
import itertools
import os
import shutil
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from ensemblekit.errors import MachineError

_LINE = struct.Struct("<16sQII")  # digest of the batch, end of the record, its samples, its CRC
_DAMAGE = (  # whatever numpy and zipfile raise for bytes that are not what was written
    *(OSError, ValueError, EOFError, KeyError, IndexError, NotImplementedError, RuntimeError),
    *(SyntaxError, TypeError, struct.error, zipfile.BadZipFile, zlib.error),
)
_FILES = ("records", "index", "complete", "statistics.npz")
_SMALL = 16 << 20  # bytes that are read at once instead of being mapped


class Log:
    """One open log. Records are appended in the order of batches.

    Args:
        folder: Made if it is missing.

    Raises:
        MachineError: It cannot be written.
        BlockingIOError: Another process has it open.
    """

    def __init__(self, folder: Path) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._records = (folder / "records").open("a+b")
            self._index = (folder / "index").open("a+b")
        except OSError as error:
            raise _unwritable(folder, error) from error
        self.folder = folder
        self._mark = folder / "complete"
        try:
            _lock(self._index.fileno())
        except BlockingIOError:
            self._records.close()
            self._index.close()
            raise
        self.lines = self._sound_lines()
        if self._cut():  # what was lost is to be predicted again, and only that
            self._mark.unlink(missing_ok=True)
        self.complete = bool(self.lines) and self._mark.exists()
        os.utime(folder)  # the cache drops what was not used for longest

    def __len__(self) -> int:
        return len(self.lines)

    @property
    def digests(self) -> list[bytes]:
        """Of the batches that the records were made from."""
        return [line[0] for line in self.lines]

    @property
    def nbytes(self) -> int:
        """Bytes of all records."""
        return self.lines[-1][1] if self.lines else 0

    def append(self, digest: bytes, record: bytes, samples: int) -> None:
        """Add the record of the next batch."""
        try:
            self._records.write(record)
        except OSError as error:
            raise _unwritable(self.folder, error) from error
        self.lines.append((digest, self.nbytes + len(record), samples, zlib.crc32(record)))
        if self.complete:
            self.complete = False
            self._mark.unlink(missing_ok=True)

    def flush(self) -> None:
        """Put on disk what was appended: the records first, then the lines that speak of them."""
        try:
            self._records.flush()
            written = self._index.seek(0, os.SEEK_END) // _LINE.size
            self._index.write(b"".join(_LINE.pack(*line) for line in self.lines[written:]))
            self._index.flush()
        except OSError as error:
            raise _unwritable(self.folder, error) from error

    def finish(self, batches: int) -> None:
        """Say that the log holds all batches there are; what is beyond them goes."""
        self.flush()
        del self.lines[batches:]
        self._cut()
        self._mark.touch()
        self.complete = True

    def clear(self) -> None:
        """Forget all records."""
        self.flush()
        self._mark.unlink(missing_ok=True)
        self.complete = False
        del self.lines[:]
        self._cut()

    def rows(self, dtype: npt.DTypeLike, width: int) -> npt.NDArray[Any]:
        """All records as one array (rows, width); mapped when it is large."""
        self.flush()
        shape = (self.nbytes // (width * np.dtype(dtype).itemsize), width)
        if self.nbytes <= _SMALL:
            self._records.seek(0)
            return np.frombuffer(bytearray(self._records.read()), dtype).reshape(shape)
        return np.memmap(self.folder / "records", dtype, "c", shape=shape)

    def records(self) -> list[bytes]:
        """The records one by one."""
        self.flush()
        ends = [0, *(line[1] for line in self.lines)]
        self._records.seek(0)
        return [self._records.read(stop - start) for start, stop in itertools.pairwise(ends)]

    def close(self) -> None:
        """Flush and let go."""
        with contextlib.suppress(MachineError):
            self.flush()
        for file in (self._records, self._index):
            with contextlib.suppress(OSError):  # a full disk was told already
                file.close()

    def _sound_lines(self) -> list[tuple[bytes, int, int, int]]:
        """The lines whose records are whole: a crash or a damaged disk cuts the log there."""
        self._index.seek(0)
        data = self._index.read()
        data = data[: len(data) // _LINE.size * _LINE.size]
        sound: list[tuple[bytes, int, int, int]] = []
        size = self._records.seek(0, os.SEEK_END)
        self._records.seek(0)
        place = 0
        for line in _LINE.iter_unpack(data):
            if not place <= line[1] <= size:
                break
            record = self._records.read(line[1] - place)
            if zlib.crc32(record) != line[3]:
                break
            sound.append(line)
            place = line[1]
        return sound

    def _cut(self) -> bool:
        """Drop what lies behind the last line; whether anything went."""
        wanted = {self._records: self.nbytes, self._index: len(self.lines) * _LINE.size}
        found = {file: file.seek(0, os.SEEK_END) for file in wanted}
        for file, size in wanted.items():
            file.truncate(size)
        return found != wanted


class Cache:
    """A folder of logs and of BatchNorm statistics, with a limit of size.

    Args:
        root: Kept across runs; None for a temporary folder that goes with the run.
        limit_bytes: What was not used for longest is dropped beyond this size.
    """

    def __init__(self, root: Path | None, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self._temporary: Path | None = None
        self.root = root
        self._open: dict[str, Log] = {}

    def __enter__(self) -> "Cache":
        return self

    def __exit__(
        self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None
    ) -> None:
        for log in self._open.values():
            log.close()
        self._open.clear()
        if self._temporary is not None:
            shutil.rmtree(self._temporary, ignore_errors=True)
        if self.root is not None:
            _prune(self.root, self.limit_bytes)

    def log(self, key: str, *, keep: bool = True) -> Log:
        """The log of that key; a private one when `keep` is false or another process has it."""
        if key not in self._open:
            try:
                if self.root is None or not keep:
                    raise BlockingIOError
                self._open[key] = Log(self.root / key)
            except BlockingIOError:
                self._open[key] = Log(self._private() / key)
        return self._open[key]

    def statistics(self, key: str) -> dict[str, npt.NDArray[Any]] | None:
        """BatchNorm statistics of an earlier run."""
        path = None if self.root is None else self.root / key / "statistics.npz"
        if path is None or not path.is_file():
            return None
        try:
            with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
                found = {name: arrays[name] for name in arrays.files}
        except _DAMAGE:  # half-written, overwritten: made anew
            return None
        os.utime(path.parent)
        return found

    def keep_statistics(self, key: str, values: Mapping[str, npt.NDArray[Any]]) -> None:
        """Keep BatchNorm statistics for the next run."""
        if self.root is None:
            return
        folder = self.root / key
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=folder, delete=False, suffix=".tmp") as file:
                np.savez(file, **values)  # type: ignore[arg-type]  # names are ours, not options
            Path(file.name).replace(folder / "statistics.npz")
        except OSError as error:
            raise _unwritable(folder, error) from error

    def _private(self) -> Path:
        if self._temporary is None:
            self._temporary = Path(tempfile.mkdtemp(prefix="ensemblekit-"))
        return self._temporary


def default_root() -> Path:
    """Where predictions are kept: $XDG_CACHE_HOME/ensemblekit, or ~/.cache/ensemblekit."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path("~/.cache").expanduser())
    return Path(base) / "ensemblekit"


def _prune(root: Path, limit_bytes: int) -> None:
    entries = []
    with contextlib.suppress(OSError):
        for folder in root.iterdir():
            with contextlib.suppress(OSError):
                if not _ours(folder):
                    continue
                size = sum(file.stat().st_size for file in folder.iterdir())
                entries.append((folder.stat().st_mtime, size, folder))
    total = sum(size for _, size, _ in entries)
    for _, size, folder in sorted(entries):
        if total <= limit_bytes:
            return
        if _in_use(folder):
            continue
        shutil.rmtree(folder, ignore_errors=True)
        total -= size


def _ours(folder: Path) -> bool:
    """Whether we made it: the root may be a folder that holds other things."""
    if folder.is_symlink() or not folder.is_dir():
        return False
    return all(
        entry.is_file() and (entry.name in _FILES or entry.suffix == ".tmp")
        for entry in folder.iterdir()
    )


def _in_use(folder: Path) -> bool:
    try:
        with (folder / "index").open("rb") as file:
            _lock(file.fileno())
    except FileNotFoundError:
        return False
    except OSError:  # locked, or not ours to read
        return True
    return False


def _lock(descriptor: int) -> None:
    with contextlib.suppress(ImportError):
        import fcntl

        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise
        except OSError:  # a file system without locks
            return


def _unwritable(folder: Path, error: OSError) -> MachineError:
    return MachineError(
        f"the cache of predictions {folder} cannot be written: {error.strerror or error}",
        hint="name another folder: --cache-dir DIR",
    )
