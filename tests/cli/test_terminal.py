"""Pipes that close, terminals with and without colour, and what starting up imports."""

from __future__ import annotations

import json
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
    "redirection, expected",
    [
        (">&-", {0}),
        (">&- 2>&-", {0}),
        (">/dev/full", {4}),
        ("2>&-", {0}),
    ],
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


ERRORS = ["average", "nosuch"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
@pytest.mark.parametrize(
    "args, redirection, code, words",
    [
        (ERRORS, "2>/dev/full", 2, ""),
        ([*ERRORS, "--json"], ">/dev/full", 2, "error: nosuch"),
        ([*ERRORS, "--json"], ">/dev/full 2>/dev/full", 2, ""),
        ([*ERRORS, "--json"], ">/dev/full 2>&-", 2, ""),
        (["average", "ckpts", "--bn", "error"], "2>/dev/full", 5, ""),
        (["average", "--nosuch"], "2>/dev/full", 2, ""),
        ([*LINES["average"], "--json"], ">/dev/full", 4, "No space left"),
        ([*LINES["average"], "--json"], ">/dev/full 2>/dev/full", 4, ""),
        (LINES["inspect-json"], ">/dev/full", 4, "No space left"),
        (["--help"], ">/dev/full", 4, "No space left"),
        (["--version"], ">/dev/full", 4, "No space left"),
        ([], ">/dev/full", 4, "No space left"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_disk_that_is_full_behind_a_stream(
    work: Path, args: list[str], redirection: str, code: int, words: str
) -> None:
    """An error that nobody can read keeps its exit code."""
    done = subprocess.run(
        ["sh", "-c", f"{shlex.join(command(*args))} {redirection}"],
        capture_output=True, text=True, cwd=work, env=environment(), timeout=60,
    )  # fmt: skip
    quiet_end(done)
    assert done.returncode == code, done.stderr
    assert words in done.stderr
    assert done.stdout == ""


PRINTS = """
import os, subprocess, sys
from ensemblekit.cli import show
print("before")
with show.own_stdout():
    print("printed")
    os.write(1, b"written\\n")
    subprocess.run([sys.executable, "-c", "print('of another process')"])
    sys.stdout.write("no newline")
    try:
        with show.own_stdout():
            os.write(1, b"within\\n")
            raise ValueError
    except ValueError:
        os.write(1, b"still\\n")
print("after")
subprocess.run([sys.executable, "-c", "print('ours again')"])
"""
OURS = ["before", "after", "ours again"]
THEIRS = ["printed", "written", "of another process", "no newline", "within", "still"]


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_stdout_is_ours(unbuffered: str) -> None:
    """What user code prints by any way goes to stderr."""
    done = subprocess.run(
        [sys.executable, "-c", PRINTS], capture_output=True, text=True,
        env=environment(PYTHONUNBUFFERED=unbuffered),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.split("\n")) == sorted([*OURS, ""])
    assert all(text in done.stderr for text in THEIRS)


BUFFERED = """
import ctypes, sys
from ensemblekit.cli import show
kept = sys.stdout
with show.own_stdout():
    {}
print("ours")
"""


@pytest.mark.parametrize(
    "statement",
    ["print('theirs', file=kept)", "ctypes.CDLL(None).printf(b'theirs\\n')"],
    ids=["Python", "C"],
)
def test_what_is_still_in_a_buffer_is_not_ours(statement: str) -> None:
    """Such as a logging handler made before, or a library that uses C's stdio."""
    done = subprocess.run(
        [sys.executable, "-c", BUFFERED.format(statement)], capture_output=True, text=True,
        env=environment(PYTHONUNBUFFERED=""),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout == "ours\n"


def test_stdout_that_is_closed(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        "import os, sys\nfrom ensemblekit.cli.main import run\n"
        "sys.exit(run(['average', 'nosuch', '--json']))\n"
    )
    for redirection in (">&-", ">&- 2>&-", "2>&-"):
        done = subprocess.run(
            ["sh", "-c", f"{shlex.join([sys.executable, str(program)])} {redirection}"],
            capture_output=True, text=True, cwd=tmp_path, env=environment(), timeout=60,
        )  # fmt: skip
        quiet_end(done)
        assert done.returncode == 2
        if redirection == "2>&-":
            assert json.loads(done.stdout)["error"]["kind"] == "usage"


def test_reader_of_the_help_that_has_gone(work: Path) -> None:
    """`ensemblekit | head -0`"""
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "wb") as closed:
        done = subprocess.run(
            command(), stdout=closed, stderr=subprocess.PIPE, text=True, env=environment()
        )
    quiet_end(done)
    assert done.returncode in (0, 141)


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
