"""The cache: logs that survive a stop anywhere, statistics, and a limit of size."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from ensemblekit import cache as cache_module
from ensemblekit.cache import Cache, Log, default_root
from ensemblekit.errors import MachineError

from .helpers import ROOT

ROOM = 1 << 30
HOLDER = """
import sys
from pathlib import Path
from ensemblekit.cache import Log
log = Log(Path(sys.argv[1]))
print("open", flush=True)
sys.stdin.read()
"""


def code(n: int) -> bytes:
    return bytes([n]) * 16


def record(n: int, rows: int = 4) -> bytes:
    return np.random.default_rng(n).normal(size=(rows, 3)).astype(np.float32).tobytes()


def filled(folder: Path, batches: int = 3) -> Path:
    """A log with that many records of four rows, closed and complete."""
    log = Log(folder)
    for n in range(batches):
        log.append(code(n), record(n), 4)
    log.finish(batches)
    log.close()
    return folder


def values(*batches: int) -> np.ndarray:
    return np.frombuffer(b"".join(record(n) for n in batches), np.float32).reshape(-1, 3)


STATISTICS = {
    "bn1.running_mean": np.random.default_rng(0).normal(size=40),
    "layer/0.running_var": np.ones((), np.float64),
    "samples": np.array(517),
    "notes": np.array(["one", "Größe"], "U"),
}


class Opened:
    """A log that is closed when the test ends."""

    def __init__(self, folder: Path) -> None:
        self.log = Log(folder)

    def __enter__(self) -> Log:
        return self.log

    def __exit__(self, *_: object) -> None:
        self.log.close()


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[Path]:
    """A log that another process has open."""
    folder = filled(tmp_path / "root" / "held")
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"open\n"
        yield folder


class TestLog:
    def test_what_was_appended_is_there_again(self, tmp_path: Path) -> None:
        filled(tmp_path / "log")
        with Opened(tmp_path / "log") as log:
            assert len(log) == 3
            assert log.digests == [code(0), code(1), code(2)]
            assert [line[2] for line in log.lines] == [4, 4, 4]
            assert log.records() == [record(0), record(1), record(2)]
            np.testing.assert_array_equal(log.rows(np.float32, 3), values(0, 1, 2))
            assert log.rows(np.float16, 2).shape == (36, 2)
            assert log.complete

    def test_a_new_log_is_empty(self, tmp_path: Path) -> None:
        with Opened(tmp_path / "deep" / "log") as log:
            assert (len(log), log.nbytes, log.complete, log.records()) == (0, 0, False, [])
            assert log.rows(np.float32, 3).shape == (0, 3)

    def test_records_can_be_read_before_they_are_flushed(self, tmp_path: Path) -> None:
        with Opened(tmp_path / "log") as log:
            log.append(code(0), record(0), 4)
            np.testing.assert_array_equal(log.rows(np.float32, 3), values(0))
            log.append(code(1), record(1), 4)
            assert log.records() == [record(0), record(1)]

    def test_records_of_different_sizes(self, tmp_path: Path) -> None:
        parts = [b"", b"x", b"y" * 1000, b""]
        with Opened(tmp_path / "log") as log:
            for n, part in enumerate(parts):
                log.append(code(n), part, n)
        with Opened(tmp_path / "log") as log:
            assert log.records() == parts

    def test_rows_belong_to_the_reader(self, tmp_path: Path) -> None:
        with Opened(filled(tmp_path / "log")) as log:
            log.rows(np.float32, 3)[:] = 0
            np.testing.assert_array_equal(log.rows(np.float32, 3), values(0, 1, 2))

    def test_large_logs_are_mapped(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(cache_module, "_SMALL", 16)
        with Opened(filled(tmp_path / "log")) as log:
            found = log.rows(np.float32, 3)
            assert isinstance(found, np.memmap)
            np.testing.assert_array_equal(found, values(0, 1, 2))
            found[:] = 0  # a private copy
            np.testing.assert_array_equal(log.rows(np.float32, 3), values(0, 1, 2))
            del found

    def test_clear(self, tmp_path: Path) -> None:
        with Opened(filled(tmp_path / "log")) as log:
            log.clear()
            assert (len(log), log.nbytes, log.complete) == (0, 0, False)
            log.append(code(9), record(9), 4)
        with Opened(tmp_path / "log") as log:
            assert log.digests == [code(9)]
            np.testing.assert_array_equal(log.rows(np.float32, 3), values(9))
            assert not log.complete

    def test_finish_drops_what_is_beyond(self, tmp_path: Path) -> None:
        with Opened(filled(tmp_path / "log")) as log:
            log.finish(1)
            assert log.records() == [record(0)]
            log.append(code(5), record(5), 4)
            assert not log.complete
            log.finish(2)
        with Opened(tmp_path / "log") as log:
            assert log.records() == [record(0), record(5)]
            assert log.complete

    def test_without_the_mark_it_is_not_complete(self, tmp_path: Path) -> None:
        with Opened(tmp_path / "log") as log:
            log.append(code(0), record(0), 4)
        with Opened(tmp_path / "log") as log:
            assert (len(log), log.complete) == (1, False)

    def test_more_records_make_it_incomplete(self, tmp_path: Path) -> None:
        with Opened(filled(tmp_path / "log")) as log:
            log.append(code(3), record(3), 4)
            assert not log.complete
        with Opened(tmp_path / "log") as log:
            assert (len(log), log.complete) == (4, False)


class TestDamage:
    """Whatever was lost or changed: what is left is sound, and the log goes on from there."""

    def left(self, folder: Path, batches: int) -> None:
        with Opened(folder) as log:
            assert log.records() == [record(n) for n in range(batches)]
            assert not log.complete
            log.append(code(7), record(7), 4)
            log.finish(batches + 1)
        with Opened(folder) as log:
            assert log.records() == [*(record(n) for n in range(batches)), record(7)]
            assert log.complete

    @pytest.mark.parametrize("size", [0, 1, 47, 48, 95, 96, 143])
    def test_records_cut_short(self, tmp_path: Path, size: int) -> None:
        os.truncate(filled(tmp_path / "log") / "records", size)
        self.left(tmp_path / "log", size // 48)

    @pytest.mark.parametrize("size", [0, 1, 31, 32, 63, 64, 95])
    def test_index_cut_short(self, tmp_path: Path, size: int) -> None:
        os.truncate(filled(tmp_path / "log") / "index", size)
        self.left(tmp_path / "log", size // 32)

    @pytest.mark.parametrize("place", [0, 47, 48, 100, 143])
    def test_a_byte_of_a_record_changed(self, tmp_path: Path, place: int) -> None:
        path = filled(tmp_path / "log") / "records"
        data = bytearray(path.read_bytes())
        data[place] ^= 1
        path.write_bytes(bytes(data))
        self.left(tmp_path / "log", place // 48)

    @pytest.mark.parametrize("place", [16, 20, 23, 28, 50])  # end of the record, and its checksum
    def test_a_byte_of_the_index_changed(self, tmp_path: Path, place: int) -> None:
        path = filled(tmp_path / "log") / "index"
        data = bytearray(path.read_bytes())
        data[place] ^= 1
        path.write_bytes(bytes(data))
        self.left(tmp_path / "log", place // 32)

    def test_a_file_is_gone(self, tmp_path: Path) -> None:
        for name in ("records", "index"):
            (filled(tmp_path / name) / name).unlink()
            self.left(tmp_path / name, 0)

    def test_noise(self, tmp_path: Path) -> None:
        folder = filled(tmp_path / "log")
        (folder / "index").write_bytes(np.random.default_rng(0).bytes(32 * 50 + 5))
        self.left(folder, 0)

    def test_bytes_behind_the_last_record_go(self, tmp_path: Path) -> None:
        """A stop between a record and the line that speaks of it."""
        folder = filled(tmp_path / "log")
        for name in ("records", "index"):
            with (folder / name).open("ab") as file:
                file.write(b"half")
        with Opened(folder) as log:
            assert log.records() == [record(0), record(1), record(2)]
        assert (folder / "records").stat().st_size == 3 * 48
        assert (folder / "index").stat().st_size == 3 * 32

    def test_a_killed_process_leaves_what_it_flushed(self, tmp_path: Path) -> None:
        script = """
import os, signal, sys
from pathlib import Path
from ensemblekit.cache import Log
log = Log(Path(sys.argv[1]))
for n in range(5):
    log.append(bytes([n]) * 16, bytes([n]) * 100_000, 1)
    if n == 2:
        log.flush()
os.kill(os.getpid(), signal.SIGKILL)
"""
        done = subprocess.run(
            [sys.executable, "-c", script, str(tmp_path / "log")],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        assert done.returncode == -signal.SIGKILL
        with Opened(tmp_path / "log") as log:
            assert 3 <= len(log) <= 5
            assert log.records() == [bytes([n]) * 100_000 for n in range(len(log))]


class TestSharing:
    def test_a_second_handle_is_refused(self, tmp_path: Path) -> None:
        with Opened(tmp_path / "log"), pytest.raises(BlockingIOError):
            Log(tmp_path / "log")

    def test_another_process_has_it(self, holder: Path) -> None:
        with pytest.raises(BlockingIOError):
            Log(holder)

    def test_a_log_in_use_is_replaced_by_a_private_one(self, holder: Path) -> None:
        before = (holder / "records").read_bytes()
        with Cache(holder.parent, ROOM) as cache:
            log = cache.log(holder.name)
            assert len(log) == 0
            assert holder.parent not in log.folder.parents
            log.append(code(1), record(1), 4)
            log.finish(1)
            assert cache.log(holder.name) is log
        assert not log.folder.exists()
        assert (holder / "records").read_bytes() == before

    def test_two_caches_in_one_process(self, tmp_path: Path) -> None:
        with Cache(tmp_path, ROOM) as first, Cache(tmp_path, ROOM) as second:
            one, other = first.log("a"), second.log("a")
            one.append(code(1), record(1), 4)
            other.append(code(2), record(2), 4)
            assert one.records() == [record(1)]
            assert other.records() == [record(2)]
        with Cache(tmp_path, ROOM) as cache:
            assert cache.log("a").records() == [record(1)]

    def test_nothing_is_kept_without_a_root(self) -> None:
        with Cache(None, ROOM) as cache:
            folder = cache.log("a").folder
            cache.keep_statistics("b", {"x": np.ones(2)})
            assert cache.statistics("b") is None
            assert folder.exists()
        assert not folder.parent.exists()

    def test_what_is_not_to_be_kept_lies_elsewhere(self, tmp_path: Path) -> None:
        with Cache(tmp_path, ROOM) as cache:
            log = cache.log("a", keep=False)
            log.append(code(0), record(0), 4)
        assert list(tmp_path.iterdir()) == []
        assert not log.folder.exists()


class TestSize:
    def entries(self, root: Path, names: str = "abcd") -> None:
        """Logs of 240 bytes, the first used longest ago."""
        now = time.time()
        for age, name in enumerate(reversed(names)):
            folder = filled(root / name)
            os.utime(folder, (now - 1000 * (age + 1),) * 2)

    def names(self, root: Path) -> str:
        return "".join(sorted(path.name for path in root.iterdir()))

    @pytest.mark.parametrize(
        "limit, left", [(960, "abcd"), (959, "bcd"), (720, "bcd"), (480, "cd"), (240, "d"), (0, "")]
    )
    def test_what_was_not_used_for_longest_goes(
        self, tmp_path: Path, limit: int, left: str
    ) -> None:
        self.entries(tmp_path)
        with Cache(tmp_path, limit):
            pass
        assert self.names(tmp_path) == left

    def test_reading_is_using(self, tmp_path: Path) -> None:
        self.entries(tmp_path)
        with Cache(tmp_path, 480) as cache:
            assert cache.log("a").complete
        assert self.names(tmp_path) == "ad"

    def test_statistics_count_and_are_used_too(self, tmp_path: Path) -> None:
        with Cache(tmp_path, ROOM) as cache:
            for name in ("bn-old", "bn-used", "bn-new"):
                cache.keep_statistics(name, {"x": np.ones(1000)})
        size = (tmp_path / "bn-old" / "statistics.npz").stat().st_size
        for age, name in enumerate(("bn-new", "bn-old", "bn-used")):
            os.utime(tmp_path / name, (time.time() - 1000 * (age + 1),) * 2)
        with Cache(tmp_path, 2 * size) as cache:
            assert cache.statistics("bn-used") is not None
        assert sorted(path.name for path in tmp_path.iterdir()) == ["bn-new", "bn-used"]

    def test_what_another_process_uses_stays(self, holder: Path) -> None:
        self.entries(holder.parent, "ab")
        os.utime(holder, (1000, 1000))
        with Cache(holder.parent, 250):
            pass
        assert self.names(holder.parent) == "held"

    def test_what_is_not_the_caches_own_stays(self, tmp_path: Path) -> None:
        """`--cache-dir` may name a folder that holds other things."""
        other = tmp_path / "checkpoints"
        (other / "deep").mkdir(parents=True)
        (other / "step_1.pt").write_bytes(bytes(10_000))
        (other / "index").write_bytes(bytes(100))
        (tmp_path / "notes.txt").write_text("mine")
        os.utime(other, (1000, 1000))
        self.entries(tmp_path)
        with Cache(tmp_path, 480):
            pass
        left = {path.name for path in tmp_path.iterdir()}
        assert left == {"c", "d", "checkpoints", "notes.txt"}
        assert (other / "step_1.pt").stat().st_size == 10_000

    def test_a_file_among_the_logs_changes_nothing(self, tmp_path: Path) -> None:
        self.entries(tmp_path)
        for n in range(20):  # wherever the listing of the folder has them
            (tmp_path / f"stray{n}").write_bytes(b"")
        with Cache(tmp_path, 480):
            pass
        assert not {"a", "b"} & {path.name for path in tmp_path.iterdir()}

    def test_a_root_that_was_never_made(self, tmp_path: Path) -> None:
        with Cache(tmp_path / "none", 0):
            pass
        assert not (tmp_path / "none").exists()


class TestStatistics:
    def test_round_trip(self, tmp_path: Path) -> None:
        with Cache(tmp_path, ROOM) as cache:
            assert cache.statistics("bn-a") is None
            cache.keep_statistics("bn-a", STATISTICS)
        with Cache(tmp_path, ROOM) as cache:
            found = cache.statistics("bn-a")
        assert found is not None
        assert list(found) == list(STATISTICS)
        for name, value in STATISTICS.items():
            np.testing.assert_array_equal(found[name], value)
            assert found[name].dtype == value.dtype

    def test_kept_anew(self, tmp_path: Path) -> None:
        with Cache(tmp_path, ROOM) as cache:
            for n in (1, 2):
                cache.keep_statistics("bn-a", {"x": np.full(3, n)})
            found = cache.statistics("bn-a")
            assert found is not None
            assert found["x"].tolist() == [2, 2, 2]
        assert [path.name for path in (tmp_path / "bn-a").iterdir()] == ["statistics.npz"]

    @pytest.mark.parametrize("part", [0.0, 0.01, 0.3, 0.6, 0.95, 0.999])
    def test_cut_short(self, tmp_path: Path, part: float) -> None:
        with Cache(tmp_path, ROOM) as cache:
            cache.keep_statistics("bn-a", STATISTICS)
            path = tmp_path / "bn-a" / "statistics.npz"
            os.truncate(path, int(path.stat().st_size * part))
            assert cache.statistics("bn-a") is None
            cache.keep_statistics("bn-a", STATISTICS)
            assert cache.statistics("bn-a") is not None

    @pytest.mark.parametrize("seed", range(8))
    def test_overwritten(self, tmp_path: Path, seed: int) -> None:
        """Sound values or none; never a crash, never other numbers."""
        rng = np.random.default_rng(seed)
        with Cache(tmp_path, ROOM) as cache:
            cache.keep_statistics("bn-a", STATISTICS)
            path = tmp_path / "bn-a" / "statistics.npz"
            sound = path.read_bytes()
            for _ in range(40):
                data = bytearray(sound)
                place = int(rng.integers(0, len(data) - 4))
                data[place : place + 4] = rng.bytes(4)
                path.write_bytes(bytes(data))
                found = cache.statistics("bn-a")
                for name, value in STATISTICS.items():
                    if found is not None and name in found:
                        np.testing.assert_array_equal(found[name], value)

    @pytest.mark.parametrize("content", [b"", b"text", b"PK\x03\x04", b"\x80\x04K\x01.", bytes(99)])
    def test_something_else(self, tmp_path: Path, content: bytes) -> None:
        (tmp_path / "bn-a").mkdir()
        (tmp_path / "bn-a" / "statistics.npz").write_bytes(content)
        assert Cache(tmp_path, ROOM).statistics("bn-a") is None


class TestMachine:
    @pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write")
    def test_a_folder_that_cannot_be_written(self, tmp_path: Path) -> None:
        root = tmp_path / "root"
        root.mkdir(mode=0o500)
        self.refused(root)

    def test_a_file_in_the_way(self, tmp_path: Path) -> None:
        root = tmp_path / "root"
        root.write_text("a file")
        self.refused(root)

    def refused(self, root: Path) -> None:
        cache = Cache(root, ROOM)
        for use in (lambda: cache.log("a"), lambda: cache.keep_statistics("b", {"x": np.ones(1)})):
            with pytest.raises(MachineError) as caught:
                use()
            assert caught.value.exit_code == 4
            assert str(root) in caught.value.message
            assert "--cache-dir" in str(caught.value.hint)

    @pytest.mark.skipif(sys.platform != "linux", reason="needs a limit of file sizes")
    def test_a_full_disk(self, tmp_path: Path) -> None:
        """The error says what failed; closing says nothing more, and what was sound stays."""
        script = """
import resource, signal, sys
from pathlib import Path
from ensemblekit.cache import Cache
from ensemblekit.errors import MachineError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))
try:
    with Cache(Path(sys.argv[1]), 1 << 30) as cache:
        log = cache.log("a")
        for n in range(100):
            log.append(bytes([n]) * 16, bytes([n]) * 1000, 1)
            log.flush()
except MachineError as error:
    print(error.message)
"""
        done = subprocess.run(
            [sys.executable, "-c", script, str(tmp_path / "root")],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        assert "cannot be written" in done.stdout
        assert not done.stderr
        with Opened(tmp_path / "root" / "a") as log:
            assert 20 <= len(log) <= 30
            assert log.records() == [bytes([n]) * 1000 for n in range(len(log))]

    def test_where_it_lies(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        assert default_root() == tmp_path / "ensemblekit"
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setenv("HOME", str(tmp_path))
        assert default_root() == tmp_path / ".cache" / "ensemblekit"
