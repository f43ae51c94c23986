"""Runs `average` again and again, each time with one input changed at the next read.

Started by `test_changing` as a script: kind of change, the folder to work in, the file's name. It
forks for each run, so that the imports are paid once. Prints one JSON list.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ensemblekit.cli.main import run
from ensemblekit.commands import average as _  # noqa: F401 (imported before the first fork)

LINE = ["average", "ckpts", "-o", "out/averaged.safetensors", "--force"]
MOST = 80


def overwrite(path: Path) -> None:
    """Other bytes of the same length, in place."""
    with path.open("r+b") as file:
        data = file.read()
        file.seek(0)
        file.write(bytes(b ^ 0x01 for b in data))


def replace(path: Path) -> None:
    """Another sound checkpoint under the same name."""
    shutil.copyfile("other", "other.copy")
    Path("other.copy").replace(path)


def grow(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"\0" * 1000)


CHANGES: dict[str, Callable[[Path], Any]] = {
    "truncate": lambda path: os.truncate(path, path.stat().st_size // 2),
    "empty": lambda path: os.truncate(path, 0),
    "overwrite": overwrite,
    "replace": replace,
    "delete": lambda path: path.unlink(),
    "grow": grow,
}


def change_at(nth: int, change: Callable[[], object]) -> None:
    """Let the n-th read be preceded by `change`."""
    honest, seen = os.preadv, 0

    def preadv(descriptor: int, buffers: Sequence[Any], offset: int) -> int:
        nonlocal seen
        seen += 1
        if seen == nth:
            change()
        if seen >= nth:
            Path("reached").touch()
        return honest(descriptor, buffers, offset)

    os.preadv = preadv  # type: ignore[assignment]


def forked(prepare: Callable[[], None]) -> int:
    """Exit code of a run in a process of its own, negative for a signal."""
    pid = os.fork()
    if pid == 0:
        silent = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silent, 1)
        prepare()
        code = run(LINE)
        sys.stderr.flush()
        os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def output() -> str | None:
    path = Path("out/averaged.safetensors")
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else None


def main(kind: str, folder: str, name: str) -> None:
    os.chdir(folder)
    found = []
    for nth in range(MOST):
        for fresh in ("ckpts", "out"):
            shutil.rmtree(fresh, ignore_errors=True)
        shutil.copytree("good", "ckpts")
        Path("out").mkdir()
        Path("reached").unlink(missing_ok=True)
        path = Path("ckpts") / name
        os.utime(path, (1, 1))
        code = forked(lambda n=nth, p=path: change_at(n, lambda: CHANGES[kind](p)))  # type: ignore[misc]
        left = sorted(p.name for p in Path("out").iterdir())
        found.append({"nth": nth, "code": code, "output": output(), "left": left})
        if not Path("reached").exists():
            break
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main(*sys.argv[1:])
