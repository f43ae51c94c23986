"""Files that change under the reader are noticed; outputs appear complete or not at all."""

from __future__ import annotations

import errno
import hashlib
import os
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ensemblekit import files
from ensemblekit.atomic import AtomicFile, check_output, locked_folder
from ensemblekit.errors import DamagedError, InputError, MachineError, UsageError
from ensemblekit.files import Source, from_os_error, sha256

DATA = bytes(range(256)) * 16


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "file.bin").write_bytes(DATA)
    return tmp_path / "file.bin"


@pytest.fixture
def small_pool(monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(files, "_POOL", files._DescriptorPool(limit=4))
    return 4


def open_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


needs_proc = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts descriptors")


# --- reading


@pytest.mark.parametrize("offset, length", [(0, 0), (0, 10), (255, 2), (4095, 1), (4096, 0)])
def test_read(path: Path, offset: int, length: int) -> None:
    source = Source(path)
    assert source.size == len(DATA)
    assert source.read(offset, length) == DATA[offset : offset + length]
    source.check_unchanged()


@pytest.mark.parametrize("offset, length", [(0, 4097), (4096, 1), (-1, 4), (0, -1), (2**70, 1)])
def test_read_beyond_the_end(path: Path, offset: int, length: int) -> None:
    with pytest.raises(DamagedError, match="ends too early"):
        Source(path).read(offset, length)


def test_empty_file(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    source = Source(tmp_path / "empty")
    assert source.size == 0
    assert source.read(0, 0) == b""
    assert sha256(source) == hashlib.sha256().hexdigest()


@pytest.mark.parametrize("size", [0, 1, (1 << 20) - 1, 1 << 20, (1 << 20) + 1])
def test_sha256(tmp_path: Path, size: int) -> None:
    content = os.urandom(size)
    (tmp_path / "file").write_bytes(content)
    assert sha256(Source(tmp_path / "file")) == hashlib.sha256(content).hexdigest()


def test_short_reads_are_continued(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = os.preadv

    def few(descriptor: int, views: list[memoryview], offset: int) -> int:
        return whole(descriptor, [views[0][:7]], offset)

    monkeypatch.setattr(os, "preadv", few)
    assert Source(path).read(3, 1000) == DATA[3:1003]


def truncate(path: Path) -> None:
    os.truncate(path, 100)


def overwrite(path: Path) -> None:
    with path.open("r+b") as file:
        file.write(b"x" * 50)
    os.utime(path, ns=(1, 1))  # within one tick of the clock the time might not move


def append(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"x")


def replace(path: Path) -> None:
    other = path.with_name("other")
    other.write_bytes(b"z" * len(DATA))
    other.replace(path)


def delete(path: Path) -> None:
    path.unlink()


@pytest.mark.parametrize("change", [truncate, overwrite, append])
def test_changed_while_open(path: Path, change: Callable[[Path], None]) -> None:
    source = Source(path)
    change(path)
    with pytest.raises(DamagedError, match="changed while it was being read"):
        source.check_unchanged()


def test_cut_short_while_open(path: Path) -> None:
    source = Source(path)
    truncate(path)
    with pytest.raises(DamagedError, match=r"cut short while it was being read \(at byte 100 of"):
        source.read(0, 4096)


@pytest.mark.parametrize("change", [truncate, overwrite, append, replace])
def test_changed_while_closed(path: Path, change: Callable[[Path], None]) -> None:
    source = Source(path)
    source.close()
    change(path)
    with pytest.raises(DamagedError, match="changed while it was being read"):
        source.read(0, 10)


def test_deleted_while_closed(path: Path) -> None:
    source = Source(path)
    source.close()
    delete(path)
    with pytest.raises(InputError, match="cannot open"):
        source.read(0, 10)


@pytest.mark.parametrize("change", [replace, delete])
def test_old_file_is_read_to_its_end(path: Path, change: Callable[[Path], None]) -> None:
    """The name means another file now; the open one is still whole, and what is read is its."""
    source = Source(path)
    change(path)
    assert source.read(0, 4096) == DATA


def test_replaced_while_open(path: Path) -> None:
    """`check_unchanged` promises to notice when "the path is another file now"."""
    source = Source(path)
    replace(path)
    with pytest.raises(DamagedError, match="changed while it was being read"):
        source.check_unchanged()


def make_fifo(path: Path) -> None:
    os.mkfifo(path)


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as unix:
        os.chdir(path.parent)  # the name of a socket has 108 bytes at most
        unix.bind(path.name)


def make_folder(path: Path) -> None:
    path.mkdir()


def make_device(path: Path) -> None:
    path.symlink_to("/dev/null")


@pytest.mark.parametrize(
    "make, message",
    [
        (make_fifo, "is a FIFO"),
        (make_folder, "is a folder"),
        (make_device, "is a character device"),
        (make_socket, "cannot open"),
    ],
)
def test_not_a_regular_file(
    tmp_path: Path, make: Callable[[Path], None], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "thing")
    start = time.monotonic()
    with pytest.raises(InputError, match=message):
        Source(tmp_path / "thing")
    assert time.monotonic() - start < 1


def test_links_are_followed(path: Path) -> None:
    path.with_name("link").symlink_to(path)
    assert Source(path.with_name("link")).fingerprint == Source(path).fingerprint


def test_missing_file_and_circular_link(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    for name in ("missing", "loop"):
        with pytest.raises(InputError, match="cannot open"):
            Source(tmp_path / name)


@pytest.mark.parametrize(
    "number, kind",
    [
        (errno.EACCES, MachineError),
        (errno.ENOSPC, MachineError),
        (errno.EROFS, MachineError),
        (errno.EIO, MachineError),
        (errno.EMFILE, MachineError),
        (errno.ENOENT, InputError),
        (errno.ENAMETOOLONG, InputError),
        (errno.ELOOP, InputError),
    ],
)
def test_errors_of_the_system(number: int, kind: type[Exception]) -> None:
    error = from_os_error(OSError(number, os.strerror(number)), Path("file"), doing="open")
    assert type(error) is kind
    assert str(error) == f"cannot open file: {os.strerror(number)}"


# --- the pool of descriptors


def many(folder: Path, count: int) -> list[Source]:
    for i in range(count):
        (folder / f"{i}.bin").write_bytes(bytes([i % 256]) * 5000)
    return [Source(folder / f"{i}.bin") for i in range(count)]


@needs_proc
@pytest.mark.usefixtures("small_pool")
def test_few_descriptors_for_many_sources(tmp_path: Path) -> None:
    before = open_descriptors()
    sources = many(tmp_path, 40)
    assert open_descriptors() - before <= 4
    for i, source in enumerate(sources):
        assert source.read(10, 3) == bytes([i]) * 3
    assert open_descriptors() - before <= 4
    for source in sources:
        source.close()
    assert open_descriptors() == before


@needs_proc
@pytest.mark.usefixtures("small_pool")
def test_least_recently_used_is_closed_first(tmp_path: Path) -> None:
    first, *others = many(tmp_path, 4)
    first.read(0, 1)
    fresh = many(tmp_path / ".", 2)
    assert first in files._POOL._open
    assert others[0] not in files._POOL._open
    assert all(source in files._POOL._open for source in fresh)


@needs_proc
@pytest.mark.usefixtures("small_pool")
def test_threads_read_their_own_files(tmp_path: Path) -> None:
    sources = many(tmp_path, 30)
    before = open_descriptors()

    def read(task: int) -> bool:
        i = (task * 7) % 30
        return sources[i].read(task % 4000, 900) == bytes([i]) * 900

    with ThreadPoolExecutor(12) as pool:
        assert all(pool.map(read, range(3000)))
    assert open_descriptors() <= before + 12
    sources[0].read(0, 1)
    assert len(files._POOL._open) <= 4
    assert not files._POOL._busy


@pytest.mark.usefixtures("small_pool")
def test_closing_twice(path: Path) -> None:
    source = Source(path)
    source.close()
    source.close()
    assert source.read(0, 4) == DATA[:4]


def test_closing_while_another_thread_reads(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`close` frees a descriptor that is in use; the number may be another file's by then."""
    path.with_name("other").write_bytes(b"?" * len(DATA))
    source = Source(path)
    plain = os.preadv
    opened: list[int] = []

    def interrupted(descriptor: int, views: list[memoryview], offset: int) -> int:
        if not opened:
            done = plain(descriptor, [views[0][:100]], offset)
            source.close()  # as another thread may
            opened.append(os.open(path.with_name("other"), os.O_RDONLY))
            return done
        return plain(descriptor, views, offset)

    monkeypatch.setattr(os, "preadv", interrupted)
    try:
        assert source.read(0, 1000) == DATA[:1000]
    finally:
        os.close(opened[0])


# --- writing


def test_file_appears_complete(tmp_path: Path) -> None:
    target = tmp_path / "out.bin"
    with AtomicFile(target) as file:
        file.write_at(b"world", 6)
        file.write_at(memoryview(b"hello "), 0)
        assert not target.exists()
        sealed = file.seal()
        assert sealed.read(0, 11) == b"hello world"
        sealed.close()
        file.rename()
    assert target.read_bytes() == b"hello world"
    assert [p.name for p in tmp_path.iterdir()] == ["out.bin"]


def test_file_is_as_readable_as_any_other(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    with AtomicFile(tmp_path / "out") as file:
        file.rename()
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "plain").stat().st_mode


def write(file: AtomicFile) -> None:
    file.write_at(b"half", 0)


def seal(file: AtomicFile) -> None:
    write(file)
    file.seal()


@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize("raised", [RuntimeError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("step", [lambda file: None, write, seal])
def test_crash_between_steps(
    tmp_path: Path,
    step: Callable[[AtomicFile], None],
    raised: type[BaseException],
    existing: bool,
) -> None:
    target = tmp_path / "out.bin"
    if existing:
        target.write_bytes(b"old")

    def crash() -> None:
        with AtomicFile(target) as file:
            step(file)
            raise raised

    with pytest.raises(raised):
        crash()
    assert [p.read_bytes() for p in tmp_path.iterdir()] == ([b"old"] if existing else [])


@pytest.mark.parametrize(
    "call, doing",
    [("open", "create"), ("pwrite", "write"), ("fsync", "sync"), ("replace", "rename")],
)
def test_system_says_no(
    tmp_path: Path, call: str, doing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, call, full)

    def attempt() -> None:
        with AtomicFile(tmp_path / "out.bin") as file:
            file.write_at(b"x", 0)
            file.seal()
            file.rename()

    with pytest.raises(MachineError, match=f"cannot {doing} .*out.bin: No space left"):
        attempt()
    monkeypatch.undo()
    assert list(tmp_path.iterdir()) == []


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: whole(fd, data[:5], at))
    with AtomicFile(tmp_path / "out") as file:
        file.write_at(DATA, 0)
        file.rename()
    assert (tmp_path / "out").read_bytes() == DATA


def test_many_threads_write_one_file(tmp_path: Path) -> None:
    with AtomicFile(tmp_path / "out") as file:
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda i: file.write_at(bytes([i]) * 1000, i * 1000), range(200)))
        file.rename()
    expected = b"".join(bytes([i]) * 1000 for i in range(200))
    assert (tmp_path / "out").read_bytes() == expected


def test_two_writers_have_two_temporary_files(tmp_path: Path) -> None:
    with AtomicFile(tmp_path / "out") as one, AtomicFile(tmp_path / "out") as two:
        assert one.temporary != two.temporary
        one.write_at(b"one", 0)
        two.write_at(b"two!", 0)
        one.rename()
        two.rename()
    assert (tmp_path / "out").read_bytes() == b"two!"
    assert len(list(tmp_path.iterdir())) == 1


def test_folder_is_held_by_one_at_a_time(tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    inside: list[str] = []

    def hold(name: str) -> None:
        with locked_folder(tmp_path):
            inside.append(f"{name} in")
            time.sleep(0.02)
            inside.append(f"{name} out")

    threads = [threading.Thread(target=hold, args=(str(i),)) for i in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    pairs = [(inside[i], inside[i + 1]) for i in range(0, 10, 2)]
    assert all(a.split()[0] == b.split()[0] for a, b in pairs)


@needs_proc
def test_lock_is_given_back_after_an_error(tmp_path: Path) -> None:
    before = open_descriptors()

    def fail() -> None:
        with locked_folder(tmp_path):
            raise RuntimeError

    for _ in range(2):
        with pytest.raises(RuntimeError):
            fail()
    assert open_descriptors() == before


# --- what must not be overwritten


def test_output_that_may_be_written(tmp_path: Path, path: Path) -> None:
    check_output(tmp_path / "new.bin", inputs=[path], force=False)
    (tmp_path / "old.bin").touch()
    check_output(tmp_path / "old.bin", inputs=[path], force=True)


def as_it_is(path: Path) -> Path:
    return path


def hard_link(path: Path) -> Path:
    os.link(path, path.with_name("hard"))
    return path.with_name("hard")


def soft_link(path: Path) -> Path:
    path.with_name("soft").symlink_to(path.name)
    return path.with_name("soft")


def through_the_parent(path: Path) -> Path:
    return path.parent / ".." / path.parent.name / path.name


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("alias", [as_it_is, hard_link, soft_link, through_the_parent])
def test_output_that_is_an_input(path: Path, alias: Callable[[Path], Path], force: bool) -> None:
    missing = path.with_name("gone")
    with pytest.raises(UsageError, match="is also an input"):
        check_output(alias(path), inputs=[missing, path], force=force)


@pytest.mark.parametrize(
    "name, message, hint",
    [
        ("file.bin", "exists already", "--force"),
        ("dangling", "exists already", "--force"),
        ("missing/out.bin", "does not exist", "mkdir"),
        (".", "is a folder", "-o"),
    ],
)
def test_output_that_may_not(path: Path, name: str, message: str, hint: str) -> None:
    path.with_name("dangling").symlink_to("nowhere")
    with pytest.raises(UsageError, match=message) as caught:
        check_output(path.parent / name, inputs=[], force=False)
    assert hint in str(caught.value.hint)


@pytest.mark.parametrize(
    "soft, most", [(16, 8), (64, 32), (1024, 512), (4, 8), (10**6, 4096), (None, 4096)]
)
def test_half_of_what_the_system_allows(
    monkeypatch: pytest.MonkeyPatch, soft: int | None, most: int
) -> None:
    """Also where that is little: libraries in this process open files, too."""
    resource = pytest.importorskip("resource")
    limit = resource.RLIM_INFINITY if soft is None else soft
    monkeypatch.setattr(resource, "getrlimit", lambda _: (limit, limit))
    assert files._most_open() == most


@pytest.mark.parametrize("kind", ["fifo", "device", "link to a device"])
@pytest.mark.parametrize("force", [False, True])
def test_output_that_is_no_file(tmp_path: Path, kind: str, force: bool) -> None:
    """A FIFO would wait for a reader, and a device is not to be replaced."""
    out = tmp_path / "out.bin"
    if kind == "fifo":
        os.mkfifo(out)
    elif kind == "device":
        out = Path(os.devnull)
    else:
        out.symlink_to(os.devnull)
    with pytest.raises(UsageError, match="neither a file nor a folder"):
        check_output(out, inputs=[], force=force)
