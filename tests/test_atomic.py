"""Folders that change names in one step, what may be overwritten, and locks."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ensemblekit import atomic
from ensemblekit.atomic import (
    AtomicFile,
    check_output,
    locked_folder,
    replace_folder,
    sync_folder,
    temporary_name,
)
from ensemblekit.errors import MachineError, UsageError


def folder(path: Path, text: str) -> Path:
    (path / "deep").mkdir(parents=True)
    (path / "deep/file").write_text(text)
    return path


def text(path: Path) -> str:
    return (path / "deep/file").read_text()


def names(path: Path) -> list[str]:
    return sorted(p.name for p in path.iterdir())


@pytest.fixture(params=["exchange", "rename"])
def either(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With the system's exchange of names, and on a file system that has none."""
    if request.param == "rename":
        monkeypatch.setattr(atomic, "_exchange", lambda *_: False)
    return str(request.param)


def test_a_new_folder(tmp_path: Path, either: str) -> None:
    replace_folder(folder(tmp_path / "new", "new"), tmp_path / "out")
    assert text(tmp_path / "out") == "new"
    assert names(tmp_path) == ["out"]


def test_over_an_old_folder(tmp_path: Path, either: str) -> None:
    folder(tmp_path / "out", "old")
    (tmp_path / "out/more").write_text("")
    replace_folder(folder(tmp_path / "new", "new"), tmp_path / "out")
    assert text(tmp_path / "out") == "new"
    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == ["deep"]


def test_the_old_folder_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where names cannot be exchanged and the second rename fails."""
    monkeypatch.setattr(atomic, "_exchange", lambda *_: False)
    folder(tmp_path / "out", "old")
    new, honest = folder(tmp_path / "new", "new"), os.rename

    def refuse(source: Any, target: Any) -> None:
        if source == new:
            raise OSError(errno.ENOSPC, "no space")
        honest(source, target)

    monkeypatch.setattr(os, "rename", refuse)
    with pytest.raises(MachineError, match="rename"):
        replace_folder(new, tmp_path / "out")
    assert text(tmp_path / "out") == "old"
    assert names(tmp_path) == ["new", "out"]


class Libc:
    """A system call that fails."""

    def __init__(self, code: int) -> None:
        self.code = code

    def renameat2(self, *_: object) -> int:
        ctypes.set_errno(self.code)
        return -1

    renamex_np = renameat2


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOSYS, errno.ENOTSUP])
def test_a_file_system_without_exchange(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: Libc(code))
    folder(tmp_path / "out", "old")
    replace_folder(folder(tmp_path / "new", "new"), tmp_path / "out")
    assert text(tmp_path / "out") == "new"
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS, errno.EIO])
def test_a_system_that_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: Libc(code))
    folder(tmp_path / "out", "old")
    new = folder(tmp_path / "new", "new")
    with pytest.raises(MachineError):
        replace_folder(new, tmp_path / "out")
    assert text(tmp_path / "out") == "old"
    assert text(new) == "new"


def test_there_is_a_whole_folder_at_any_time(tmp_path: Path) -> None:
    out = folder(tmp_path / "out", "start")
    stop, missing, seen = threading.Event(), [], 0

    def watch() -> None:
        nonlocal seen
        while not stop.is_set():
            try:
                (out / "deep/file").read_text()
                seen += 1
            except OSError as error:
                missing.append(error)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        for n in range(60):
            replace_folder(folder(tmp_path / "new", str(n)), out)
    finally:
        stop.set()
        watcher.join()
    assert text(out) == "59"
    assert seen
    # a reader that holds the old folder while it is removed may miss its file, not the folder
    assert len(missing) < seen


# -------------------------------------------------------------------------------- what is refused


def refused(path: Path, words: str, *, inputs: list[Path] | None = None, **options: bool) -> None:
    given = {"force": False, "folder": False, **options}
    with pytest.raises(UsageError, match=words):
        check_output(path, inputs=inputs or [], **given)


@pytest.mark.parametrize("is_folder", [False, True])
def test_new_names_are_fine(tmp_path: Path, *, is_folder: bool) -> None:
    check_output(tmp_path / "out", inputs=[], force=False, folder=is_folder)
    refused(tmp_path / "no/out", "does not exist", folder=is_folder)


def test_what_exists(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    made = folder(tmp_path / "made", "")
    for path, is_folder in ((file, False), (made, True)):
        refused(path, "exists already", folder=is_folder)
        check_output(path, inputs=[], force=True, folder=is_folder)
    refused(file, "is a file", folder=True, force=True)
    refused(made, "is a folder", force=True)


LINKS: dict[str, Callable[[Path, Path], None]] = {"hard": os.link, "symbolic": os.symlink}


@pytest.mark.parametrize("kind", sorted(LINKS))
def test_inputs_by_another_name(tmp_path: Path, kind: str) -> None:
    source = tmp_path / "input"
    source.write_text("precious")
    (tmp_path / "made").mkdir()
    LINKS[kind](source, tmp_path / "link")
    LINKS[kind](source, tmp_path / "made/link")
    refused(tmp_path / "link", "also an input", inputs=[source], force=True)
    refused(tmp_path / "made", "also an input", inputs=[source], force=True, folder=True)
    refused(source, "also an input", inputs=[tmp_path / "link"], force=True)


def test_links_that_lead_nowhere(tmp_path: Path) -> None:
    (tmp_path / "out").symlink_to("nowhere")
    refused(tmp_path / "out", "exists already")
    refused(tmp_path / "out", "is a file", folder=True, force=True)
    (tmp_path / "made").mkdir()
    (tmp_path / "made/link").symlink_to("nowhere")
    check_output(tmp_path / "made", inputs=[tmp_path / "gone"], force=True, folder=True)


# ------------------------------------------------------------------------------------ small parts


def test_temporary_names_are_hidden_beside_and_new(tmp_path: Path) -> None:
    found = {temporary_name(tmp_path / "out.pt") for _ in range(50)}
    assert len(found) == 50
    assert {p.parent for p in found} == {tmp_path}
    assert all(p.name.startswith(".out.pt.") and p.suffix == ".tmp" for p in found)


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with AtomicFile(path) as file:
        file.write_at(b"world", 6)
        file.write_at(memoryview(b"hello "), 0)
        source = file.seal()
        assert source.read(0, 11) == b"hello world"
        source.close()
        assert not path.exists()
        file.rename()
    assert path.read_bytes() == b"hello world"


def test_an_interrupt_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"hello world")

    def interrupted() -> None:
        with AtomicFile(path) as file:
            file.write_at(b"other", 0)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_bytes() == b"hello world"
    assert names(tmp_path) == ["file"]


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, place: honest(fd, data[:3], place))
    with AtomicFile(tmp_path / "file") as file:
        file.write_at(bytes(range(100)), 5)
        file.rename()
    assert (tmp_path / "file").read_bytes() == bytes(5) + bytes(range(100))


def test_the_lock_of_a_folder_keeps_others_out(tmp_path: Path) -> None:
    order = []

    def second() -> None:
        with locked_folder(tmp_path):
            order.append("second")

    thread = threading.Thread(target=second)
    with locked_folder(tmp_path):
        thread.start()
        time.sleep(0.1)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]
    sync_folder(tmp_path)


def test_a_folder_that_cannot_be_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: int) -> None:
        raise OSError(errno.EINVAL, "not here")

    monkeypatch.setattr(os, "fsync", refuse)
    sync_folder(tmp_path)
    with locked_folder(tmp_path):
        shutil.rmtree(tmp_path, ignore_errors=True)


# --------------------------------------------------------------------- what killed processes left

LITTER = "0123456789ab"


def litter(path: Path, name: str, *, seconds: float = 3600) -> Path:
    """A file as SIGKILL leaves it, that many seconds ago."""
    made = path / name
    made.write_bytes(b"half")
    then = time.time() - seconds
    os.utime(made, (then, then))
    return made


def write(path: Path) -> None:
    with AtomicFile(path) as file:
        file.write_at(b"whole", 0)
        file.rename()


def test_old_litter_is_removed(tmp_path: Path) -> None:
    for name in (LITTER, "ffffffffffff", temporary_name(Path("out.pt")).name[8:20]):
        litter(tmp_path, f".out.pt.{name}.tmp")
    write(tmp_path / "out.pt")
    assert names(tmp_path) == ["out.pt"]


def test_young_litter_stays(tmp_path: Path) -> None:
    """Perhaps it is about to get its lock."""
    left = litter(tmp_path, f".out.pt.{LITTER}.tmp", seconds=30)
    write(tmp_path / "out.pt")
    assert left.read_bytes() == b"half"


@pytest.mark.parametrize("how", ["shared", "exclusive"])
def test_files_that_someone_writes_stay(tmp_path: Path, how: str) -> None:
    left = litter(tmp_path, f".out.pt.{LITTER}.tmp")
    descriptor = os.open(left, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX if how == "exclusive" else fcntl.LOCK_SH)
    try:
        write(tmp_path / "out.pt")
        assert left.exists()
    finally:
        os.close(descriptor)
    write(tmp_path / "out.pt")
    assert names(tmp_path) == ["out.pt"]


def test_a_file_under_way_is_locked(tmp_path: Path) -> None:
    """However long it takes: a second writer does not take it for litter."""
    with AtomicFile(tmp_path / "out.pt") as first:
        first.write_at(b"first", 0)
        os.utime(first.temporary, (0, 0))
        write(tmp_path / "out.pt")
        assert first.temporary.exists()
        first.seal().close()
        first.rename()
    assert (tmp_path / "out.pt").read_bytes() == b"first"


@pytest.mark.parametrize(
    "name",
    [
        ".out.pt.0123456789a.tmp",
        ".out.pt.0123456789abc.tmp",
        ".out.pt.0123456789AB.tmp",
        ".out.pt.0123456789ab.tmp2",
        ".out.pt.v2.0123456789ab.tmp",
        ".outXpt.0123456789ab.tmp",
        "out.pt.0123456789ab.tmp",
        ".out.0123456789ab.tmp",
    ],
)
def test_files_of_other_names_stay(tmp_path: Path, name: str) -> None:
    left = litter(tmp_path, name)
    write(tmp_path / "out.pt")
    assert left.exists()


def test_litter_that_is_no_file(tmp_path: Path) -> None:
    """Nothing waits for a FIFO, no link is followed, no folder goes."""
    precious = litter(tmp_path, "precious")
    (tmp_path / ".out.pt.000000000001.tmp").symlink_to("precious")
    (tmp_path / ".out.pt.000000000002.tmp").symlink_to("nowhere")
    os.mkfifo(tmp_path / ".out.pt.000000000003.tmp")
    os.utime(tmp_path / ".out.pt.000000000003.tmp", (0, 0))
    (tmp_path / ".out.pt.000000000004.tmp").mkdir()
    os.utime(tmp_path / ".out.pt.000000000004.tmp", (0, 0))
    write(tmp_path / "out.pt")
    assert precious.read_bytes() == b"half"
    assert (tmp_path / ".out.pt.000000000004.tmp").is_dir()
    assert (tmp_path / "out.pt").read_bytes() == b"whole"


def test_litter_of_names_with_magic_letters(tmp_path: Path) -> None:
    litter(tmp_path, f".o[1]*.pt.{LITTER}.tmp")
    other = litter(tmp_path, f".o1x.pt.{LITTER}.tmp")
    write(tmp_path / "o[1]*.pt")
    assert names(tmp_path) == [other.name, "o[1]*.pt"]


def test_a_folder_that_one_may_not_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One may write there nevertheless."""

    def refuse(*_: object, **__: object) -> Any:
        raise PermissionError(errno.EACCES, "no")

    monkeypatch.setattr(os, "scandir", refuse)
    write(tmp_path / "out.pt")
    honest = os.open

    def opened(path: Any, flags: int, *more: Any, **options: Any) -> int:
        if path == tmp_path:
            refuse()
        return honest(path, flags, *more, **options)

    monkeypatch.setattr(os, "open", opened)
    with locked_folder(tmp_path):
        pass
    monkeypatch.undo()
    assert (tmp_path / "out.pt").read_bytes() == b"whole"


def test_files_cannot_be_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on some network file systems: nobody can tell whose it is, so it stays."""
    left = litter(tmp_path, f".out.pt.{LITTER}.tmp")

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "no locks here")

    monkeypatch.setattr(fcntl, "flock", refuse)
    write(tmp_path / "out.pt")
    assert left.exists()
    assert (tmp_path / "out.pt").read_bytes() == b"whole"
