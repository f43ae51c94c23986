"""Signals while a large set is averaged, and two writers of one output."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from ensemblekit.candidates import mean_row
from ensemblekit.state import weighted_sums
from ensemblekit.writers import manifest_path

from ..helpers import (
    command,
    contents,
    environment,
    read_set,
    run,
    sha256,
    write_safetensors,
    write_series,
)

TENSOR_BYTES = 8 << 20
TENSORS = 8


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """6 x 64 MiB that take little disk: each tensor is some numbers before a hole."""
    folder = tmp_path_factory.mktemp("large")
    for k in range(6):
        rng = np.random.default_rng(k)
        keys = [f"layer{n}.weight" for n in range(TENSORS)]
        spans = {key: (n * TENSOR_BYTES, (n + 1) * TENSOR_BYTES) for n, key in enumerate(keys)}
        header = {
            key: {"dtype": "F32", "shape": [TENSOR_BYTES // 4], "data_offsets": span}
            for key, span in spans.items()
        }
        text = json.dumps(header).encode()
        with (folder / f"snap_{k}.safetensors").open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for begin, _ in spans.values():
                file.seek(8 + len(text) + begin)
                file.write(rng.normal(1, 0.1, 4096).astype(np.float32).tobytes())
            file.truncate(8 + len(text) + TENSORS * TENSOR_BYTES)
    return folder


def reading(pid: int) -> bool:
    """Whether it has a snapshot open, so that its handlers are surely in place."""
    folder = Path(f"/proc/{pid}/fd")
    if not folder.exists():
        time.sleep(1)
        return True
    with contextlib.suppress(OSError):
        return any("snap_" in str(link.readlink()) for link in folder.iterdir())
    return False


def writing(out: Path) -> bool:
    return any(path.stat().st_size > 0 for path in out.parent.glob(".out.safetensors.*.tmp"))


def default_signals() -> None:
    """Shells start what stands before `&` with SIGINT ignored, and `nohup` what it starts."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


SIGNALS = [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]


@pytest.mark.parametrize("number, code", SIGNALS)
@pytest.mark.parametrize("phase", ["reading", "writing"])
def test_signal(large: Path, tmp_path: Path, number: signal.Signals, code: int, phase: str) -> None:
    out = tmp_path / "out.safetensors"
    out.write_text("old")
    before = contents(tmp_path)
    with subprocess.Popen(
        command("average", large, "-o", out, "--force"), stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, env=environment(), preexec_fn=default_signals,  # noqa: PLW1509
    ) as process:  # fmt: skip

        def reached() -> bool:
            return reading(process.pid) if phase == "reading" else writing(out)

        while not reached() and process.poll() is None:
            time.sleep(0.002)
        process.send_signal(number)
        start = time.monotonic()
        _, errors = process.communicate(timeout=60)
    assert process.returncode == code, errors
    assert time.monotonic() - start < 2
    assert "Traceback" not in errors
    assert "nothing half-written" in errors
    assert contents(tmp_path) == before
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("number, code", SIGNALS)
def test_signal_as_json(large: Path, tmp_path: Path, number: signal.Signals, code: int) -> None:
    """Exactly one object, as always; that it is no result says the exit code, too."""
    with subprocess.Popen(
        command("average", large, "-o", tmp_path / "out.pt", "--json"), stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, env=environment(), preexec_fn=default_signals,  # noqa: PLW1509
    ) as process:  # fmt: skip
        while not reading(process.pid) and process.poll() is None:
            time.sleep(0.002)
        process.send_signal(number)
        output, errors = process.communicate(timeout=60)
    assert (process.returncode, errors.strip()) == (code, "")  # click ends the line of a `^C`
    value = json.loads(output)
    assert value.keys() == {"schema_version", "error"}
    assert value["error"]["kind"] == ("interrupted" if number == signal.SIGINT else "terminated")
    assert "nothing half-written" in value["error"]["message"]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT])
def test_a_signal_that_is_ignored(large: Path, tmp_path: Path, number: signal.Signals) -> None:
    """As `nohup` asks for, and a shell for a job in the background."""
    with subprocess.Popen(
        command("average", large, "-o", tmp_path / "out.pt"), stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, env=environment(),
        preexec_fn=lambda: signal.signal(number, signal.SIG_IGN),  # noqa: PLW1509
    ) as process:  # fmt: skip
        while not reading(process.pid) and process.poll() is None:
            time.sleep(0.002)
        process.send_signal(number)
        output, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert output.startswith("averaged 6 snapshots")


def test_an_interrupt_does_not_wait_for_all_tensors(tmp_path: Path) -> None:
    arrays = {f"layer{n}": np.full(4, n, np.float32) for n in range(100)}
    paths = [write_safetensors(tmp_path / f"{k}.safetensors", arrays) for k in range(2)]
    snapshots = read_set(*paths)
    seen = []

    def slow(key: str, _: int, __: object) -> None:
        seen.append(key)
        time.sleep(0.02)

    earlier = signal.signal(signal.SIGINT, signal.default_int_handler)
    timer = threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            weighted_sums(snapshots, [mean_row(2)], [slow], threads=2)
    finally:
        timer.cancel()
        signal.signal(signal.SIGINT, earlier)
    assert len(seen) < 50


def test_two_writers_never_mix(tmp_path: Path) -> None:
    write_series(tmp_path / "ckpts", 4, size=3000)
    lines = [["--method", "uniform"], ["--coefficients", "1,2,3,4"]]
    seen = set()
    for _ in range(4):
        both = [
            subprocess.Popen(
                command("average", "ckpts", "--force", *line), cwd=tmp_path, env=environment(),
                stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
            )
            for line in lines
        ]  # fmt: skip
        for process in both:
            _, errors = process.communicate(timeout=60)
            assert process.returncode == 0, errors
        out = tmp_path / "averaged.safetensors"
        manifest = json.loads(manifest_path(out).read_text())
        assert manifest["sha256"] == sha256(out)
        seen.add(manifest["method"])
    assert seen <= {"uniform", "weighted"}
    assert not list(tmp_path.glob(".*"))


def test_two_writers_without_force(tmp_path: Path) -> None:
    """One of them wins; the other says that the output exists, or that it is up to date."""
    write_series(tmp_path / "ckpts", 4, size=3000)
    lines = [["--method", "uniform"], ["--coefficients", "1,2,3,4"]]
    both = [
        subprocess.Popen(
            command("average", "ckpts", *line), cwd=tmp_path, env=environment(),
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )
        for line in lines
    ]  # fmt: skip
    assert sorted(process.wait(timeout=60) for process in both) == [0, 2]
    assert run("average", "ckpts", "--force", cwd=tmp_path).returncode == 0
