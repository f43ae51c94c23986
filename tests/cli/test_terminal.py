"""Pipes that close, terminals with and without colour, and what starting up imports."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from ..helpers import command, environment, write_series

pty = pytest.importorskip("pty", reason="terminals of this kind exist on Unix only")
COLOUR = re.compile(r"\x1b\[[0-9;]*[39][0-7][0-9;]*m")
LINES = {
    "help": ["--help"],
    "inspect": ["inspect", "ckpts"],
    "inspect-json": ["inspect", "ckpts", "--json"],
    "average": ["average", "ckpts", "--force"],
}


@pytest.fixture
def work(tmp_path: Path) -> Path:
    write_series(tmp_path / "ckpts", 3, batch_norm=True)
    return tmp_path


def quiet_end(done: subprocess.CompletedProcess[str]) -> None:
    for word in ("Traceback", "Exception ignored", "bug in ensemblekit"):
        assert word not in done.stderr, done.stderr


@pytest.mark.parametrize("name", sorted(LINES))
def test_reader_that_has_gone(work: Path, name: str) -> None:
    """As in `ensemblekit ... | head -0`."""
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "wb") as closed:
        done = subprocess.run(
            command(*LINES[name]), stdout=closed, stderr=subprocess.PIPE, text=True, cwd=work,
            env=environment(), timeout=60,
        )  # fmt: skip
    quiet_end(done)
    assert done.returncode in (0, 141), done.stderr


@pytest.mark.parametrize(
    "redirection, expected", [(">&-", {0}), (">&- 2>&-", {0}), (">/dev/full", {4}), ("2>&-", {0})]
)
@pytest.mark.parametrize("name", ["inspect", "average"])
def test_nowhere_to_print(work: Path, name: str, redirection: str, expected: set[int]) -> None:
    if "/dev/full" in redirection and not Path("/dev/full").exists():
        pytest.skip("no /dev/full")
    done = subprocess.run(
        ["sh", "-c", f"{shlex.join(command(*LINES[name]))} {redirection}"],
        capture_output=True, text=True, cwd=work, env=environment(), timeout=60,
    )  # fmt: skip
    quiet_end(done)
    assert done.returncode in expected, done.stderr


def on_terminal(args: list[str], cwd: Path, **variables: str) -> str:
    master, slave = pty.openpty()
    try:
        with subprocess.Popen(
            command(*args), stdout=slave, stderr=slave, stdin=slave, cwd=cwd,
            env=environment(TERM="xterm-256color", **variables),
        ) as process:  # fmt: skip
            os.close(slave)
            shown = b""
            while True:
                try:
                    part = os.read(master, 65536)
                except OSError:  # how Linux says that the other end is closed
                    break
                if not part:
                    break
                shown += part
            assert process.wait(timeout=60) in (0, 2)
        return shown.decode()
    finally:
        os.close(master)


@pytest.mark.parametrize("args", [LINES["average"], LINES["inspect"], ["average", "nosuch"]])
def test_no_color(work: Path, args: list[str]) -> None:
    """https://no-color.org"""
    assert not COLOUR.search(on_terminal(args, work, NO_COLOR="1"))


def test_color_on_a_terminal_only(work: Path) -> None:
    assert COLOUR.search(on_terminal(LINES["average"], work))
    done = subprocess.run(
        command(*LINES["average"]), capture_output=True, text=True, cwd=work, env=environment()
    )
    assert "\x1b" not in done.stdout + done.stderr


def imported(args: list[str], cwd: Path) -> set[str]:
    """Top-level names of everything that the command imports."""
    line = command(*args)
    line = line if line[0] == sys.executable else [sys.executable, *line]
    done = subprocess.run(
        [line[0], "-X", "importtime", *line[1:]], capture_output=True, text=True, cwd=cwd,
        env=environment(), timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return {
        text.rpartition("|")[2].strip().partition(".")[0]
        for text in done.stderr.splitlines()
        if text.startswith("import time:")
    }


@pytest.mark.parametrize(
    "args, kept_out",
    [
        (["--help"], {"torch", "numpy", "rich"}),
        (["--version"], {"torch", "numpy", "rich"}),
        (["average", "--help"], {"torch", "numpy"}),
        (["inspect", "--help"], {"torch", "numpy"}),
        (["average", "ckpts"], {"torch", "rich", "sklearn", "onnx"}),
        (["inspect", "ckpts"], {"torch", "sklearn", "onnx"}),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else "",
)
def test_imports(work: Path, args: list[str], kept_out: set[str]) -> None:
    names = imported(args, work)
    assert "click" in names
    assert not names & kept_out
