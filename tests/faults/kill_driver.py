"""Runs `average` again and again, each time with a fault at the next call that writes.

Started by `test_kill` and `test_kill_outputs` as a script: kind of fault, the folder to work in,
and for other outputs than the usual one its name and flags. It forks for each run, so that a run
may kill itself and the imports are paid once. Prints one JSON list.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ensemblekit import atomic
from ensemblekit.cli.main import run
from ensemblekit.commands import average as _  # noqa: F401 (imported before the first fork)

PATCHED = ("pwrite", "fsync", "replace", "rename", "mkdir")
ALSO_KILLED = ("unlink", "rmdir")  # they fail on no full disk, and nobody is interrupted in them
OUTPUT = "averaged.safetensors"
MOST = 120


def fail_at(nth: int, kind: str) -> None:
    """Let the n-th call of any patched function do the fault first."""
    fault = FAULTS[kind]
    seen = 0

    def patched(honest: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            nonlocal seen
            seen += 1
            if seen == nth:
                fault()
            return honest(*args, **options)

        return call

    for name in (*PATCHED, *(ALSO_KILLED if kind == "kill" else ())):
        setattr(os, name, patched(getattr(os, name)))
    atomic._exchange = patched(atomic._exchange)


def full() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


FAULTS: dict[str, Callable[[], None]] = {
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "full": full,
    "interrupt": lambda: os.kill(os.getpid(), signal.SIGINT),
    "terminate": lambda: os.kill(os.getpid(), signal.SIGTERM),
}


def forked(line: list[str], prepare: Callable[[], None] | None = None) -> int:
    """Exit code of `line` in a process of its own, negative for a signal."""
    pid = os.fork()
    if pid == 0:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        silent = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silent, 1)
        if prepare:
            prepare()
        code = run(line)
        sys.stderr.flush()
        os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def state() -> dict[str, str]:
    """Every file below the output's folder as text that JSON can hold, and the empty folders."""
    found = {}
    for path in sorted(Path("out").rglob("*")):
        if path.is_file():
            found[str(path.relative_to("out"))] = path.read_bytes().decode("latin-1")
        elif not any(path.iterdir()):
            found[f"{path.relative_to('out')}/"] = ""
    return found


def main(kind: str, folder: str, output: str = OUTPUT, *flags: str) -> None:
    os.chdir(folder)
    found = []
    plain = ["average", "ckpts", "-o", f"out/{output}"]
    Path("out").mkdir()
    assert forked([*plain, "--last", "2"]) == 0
    Path("out").rename("old")
    both = (False, True) if output == OUTPUT else (kind == "kill",)
    for old in both if kind in ("kill", "full") else (True,):
        line = [*plain, *flags, *(["--force"] if old else [])]
        for nth in range(1, MOST):
            shutil.rmtree("out", ignore_errors=True)
            if old:
                shutil.copytree("old", "out")
            else:
                Path("out").mkdir()
            before = state()
            code = forked(line, lambda n=nth: fail_at(n, kind))  # type: ignore[misc]
            after = state()
            again = forked(line)
            row = {"old": old, "nth": nth, "code": code, "again": again}
            found.append({**row, "before": before, "after": after, "finished": state()})
            if code == 0 and kind != "full":
                break
            if code == 0 and nth > 1 and found[-2]["code"] == 0:
                break
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main(*sys.argv[1:])
