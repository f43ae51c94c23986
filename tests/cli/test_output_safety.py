"""Outputs as installed: two writers of one folder, signals between shards, a disk that says no."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import resource
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from ensemblekit import average
from ensemblekit.errors import MachineError
from ensemblekit.writers import digest, manifest_path

from ..helpers import (
    as_torch,
    command,
    contents,
    environment,
    make_arrays,
    run,
    run_json,
    write_safetensors,
    write_series,
    write_torch,
)

OUTPUTS = ["out.pt", "out.ckpt", "out"]


@pytest.fixture
def work(tmp_path: Path) -> Path:
    write_series(tmp_path / "ckpts", 4, size=3000)
    return tmp_path


def sound(out: Path) -> bool:
    return bool(json.loads(manifest_path(out).read_text())["sha256"] == digest(out))


def start(work: Path, *line: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command("average", "ckpts", *line), cwd=work, env=environment(),
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


@pytest.mark.parametrize("name", OUTPUTS)
def test_two_writers_never_mix(work: Path, name: str) -> None:
    lines = [["--method", "uniform"], ["--coefficients", "1,2,3,4", "--max-shard-size", "20KB"]]
    for _ in range(2):
        both = [start(work, "--force", "-o", name, *line) for line in lines]
        for process in both:
            _, errors = process.communicate(timeout=60)
            assert process.returncode == 0, errors
        assert sound(work / name)
    assert not list(work.glob(".*"))


def test_two_writers_of_the_same(work: Path) -> None:
    """Each says done, up to date, exists, or that another writes; the output is whole."""
    both = [start(work, "-o", "out", "--max-shard-size", "20KB") for _ in range(2)]
    codes = []
    for process in both:
        _, errors = process.communicate(timeout=60)
        codes.append(process.returncode)
        assert "Traceback" not in errors
    assert 0 in codes
    assert set(codes) <= {0, 2, 4}
    assert sound(work / "out")
    assert (
        run("average", "ckpts", "-o", "out", "--max-shard-size", "20KB", cwd=work).returncode == 0
    )
    assert not list(work.glob(".*"))


@pytest.mark.parametrize(
    "number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_stopped_between_shards(tmp_path: Path, number: signal.Signals, code: int) -> None:
    """What is finished stays, hidden; the same command goes on with it."""
    write_series(tmp_path / "ckpts", 4, size=400_000)
    line = ("average", "ckpts", "-o", "out", "--max-shard-size", "100KB")
    with subprocess.Popen(
        command(*line), cwd=tmp_path, env=environment(), stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),  # noqa: PLW1509
    ) as process:  # fmt: skip
        while process.poll() is None and not list(tmp_path.glob(".out.*.partial/progress.json")):
            time.sleep(0.001)
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
    if process.returncode == 0:
        pytest.skip("it was done before the signal came")
    assert process.returncode == code, errors
    assert "Traceback" not in errors
    assert not (tmp_path / "out").exists()
    [partial] = tmp_path.glob(".out.*.partial")
    done = {p.name: p.stat().st_ino for p in partial.glob("model-*")}
    assert done
    assert run(*line, cwd=tmp_path).returncode == 0
    found = {p.name: p.stat().st_ino for p in (tmp_path / "out").glob("model-*")}
    assert done.items() <= found.items()
    assert sound(tmp_path / "out")
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("name", OUTPUTS)
def test_a_disk_that_is_full(work: Path, name: str) -> None:
    """Files may grow to 30 KB here, and the output is larger."""

    def small() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))

    before = contents(work)
    done = subprocess.run(
        command("average", "ckpts", "-o", name), cwd=work, env=environment(), text=True,
        capture_output=True, preexec_fn=small, check=False,
    )  # fmt: skip
    assert done.returncode == 4, done.stderr
    assert contents(work) == before
    assert sorted(p.name for p in work.iterdir()) == ["ckpts"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes anywhere")
@pytest.mark.parametrize("name", OUTPUTS)
def test_a_folder_that_is_read_only(work: Path, name: str) -> None:
    (work / "there").mkdir(mode=0o555)
    error = run_json("average", "ckpts", "-o", f"there/{name}", cwd=work, exit_code=4)["error"]
    assert error["kind"] == "machine"
    assert not list((work / "there").iterdir())


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS, errno.EDQUOT])
@pytest.mark.parametrize("name", OUTPUTS)
def test_a_system_that_refuses(
    work: Path, monkeypatch: pytest.MonkeyPatch, name: str, code: int
) -> None:
    """As a read-only folder does, also for root."""
    honest_open, honest_mkdir = os.open, os.mkdir

    def refuse(path: Any) -> None:
        if "out" in Path(os.fsdecode(path)).name:
            raise OSError(code, os.strerror(code), str(path))

    def opened(path: Any, flags: int, *more: Any, **options: Any) -> int:
        if flags & os.O_CREAT:
            refuse(path)
        return honest_open(path, flags, *more, **options)

    def made(path: Any, *more: Any, **options: Any) -> None:
        refuse(path)
        honest_mkdir(path, *more, **options)

    monkeypatch.setattr(os, "open", opened)
    monkeypatch.setattr(os, "mkdir", made)
    with pytest.raises(MachineError):
        average(work / "ckpts", work / name)
    assert sorted(p.name for p in work.iterdir()) == ["ckpts"]


@pytest.mark.parametrize("name", OUTPUTS)
def test_an_output_that_exists(work: Path, name: str) -> None:
    line = ("average", "ckpts", "-o", name)
    assert run(*line, cwd=work).returncode == 0
    before = contents(work)
    done = run(*line, "--last", "2", cwd=work)
    assert done.returncode == 2
    assert "--force" in done.stderr
    assert contents(work) == before
    assert run(*line, "--last", "2", "--force", cwd=work).returncode == 0
    assert sound(work / name)
    assert contents(work).keys() == before.keys()


@pytest.mark.parametrize("name", ["mean_9.pt", "mean_9.ckpt", "folder"])
def test_an_output_that_is_an_input(work: Path, name: str) -> None:
    arrays = make_arrays(9, size=3000)
    if name == "folder":
        (work / name).mkdir()
        write_safetensors(work / name / "model.safetensors", arrays)
    else:
        write_torch(work / name, {key: as_torch(array) for key, array in arrays.items()})
    before = contents(work)
    done = run("average", name, "ckpts/snap_2.safetensors", "-o", name, "--force", cwd=work)
    assert done.returncode == 2
    assert "input" in done.stderr
    assert contents(work) == before


@pytest.mark.parametrize("name", ["out.pt", "out.safetensors", "out"])
def test_what_killed_runs_left_is_cleared_away(work: Path, name: str) -> None:
    """By the next run of that name that writes; not what a run that lives holds."""
    then = time.time() - 3600
    old, note, held, young = (
        work / f".{stem}.{k:012x}.tmp" for k, stem in enumerate((name, f"{name}.json", name, name))
    )
    for file in (old, note, held, young):
        file.write_bytes(b"half")
    for file in (old, note, held):
        os.utime(file, (then, then))
    descriptor = os.open(held, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        assert run("average", "ckpts", "-o", "another.pt", cwd=work).returncode == 0
        assert all(file.exists() for file in (old, note, held, young))
        assert run("average", "ckpts", "-o", name, cwd=work).returncode == 0
    finally:
        os.close(descriptor)
    folder = name == "out"  # whose files are written in a hidden folder of their own
    left = set(work.glob(".*.tmp"))
    assert left == ({old} if folder else set()) | {held, young}
    assert sound(work / name)


def test_killed_while_it_writes(tmp_path: Path) -> None:
    """What SIGKILL leaves is litter a minute later."""
    write_series(tmp_path / "ckpts", 4, size=2_000_000)
    line = ("average", "ckpts", "-o", "out.pt")
    with subprocess.Popen(
        command(*line), cwd=tmp_path, env=environment(), stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:  # fmt: skip
        while process.poll() is None and not list(tmp_path.glob(".out.pt.*.tmp")):
            time.sleep(0.001)
        process.kill()
    left = list(tmp_path.glob(".out.pt.*.tmp"))
    if not left:
        pytest.skip("it was done before the signal came")
    for file in left:
        os.utime(file, (0, 0))
    assert run(*line, "--force", cwd=tmp_path).returncode == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ckpts", "out.pt", "out.pt.json"]
