"""Libraries that crash, hang or print are asked in another process, and the others still answer."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from ensemblekit.commands.probing import ask

BROKEN = {
    "good": "__version__ = '1.2'",
    "noisy": "print('{\"error\": \"not an answer\"}', flush=True)\nimport os; os.write(1, b'x\\n')",
    "missing": "import surely_no_such_module",
    "long": "raise ImportError('first line\\nsecond line')",
    "leaves": "import sys; sys.exit(3)",
    "aborts": "import os; os.abort()",
    "quits": "import os; os._exit(7)",
    "hangs": "import time; time.sleep(600)",
    "forks": "import subprocess, time; subprocess.Popen(['sleep', '600']); time.sleep(600)",
}


@pytest.fixture
def broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, text in BROKEN.items():
        (tmp_path / f"lib_{name}.py").write_text(text)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(
    "name, expected",
    [
        ("good", None),
        ("noisy", None),
        ("missing", "ModuleNotFoundError: No module named 'surely_no_such_module'"),
        ("long", "ImportError: first line"),
        ("leaves", "SystemExit: 3"),
        ("aborts", "its import ends the process (Aborted"),
        ("quits", "its import ends the process (exit 7)"),
    ],
)
def test_what_an_import_can_do(broken: Path, name: str, expected: str | None) -> None:
    answers = ask([f"lib_{name}", "lib_good"])
    error = answers[f"lib_{name}"].error
    assert (error is None) if expected is None else str(error).startswith(expected)
    assert answers["lib_good"].facts == {"version": "1.2"}


@pytest.mark.parametrize("name", ["hangs", "forks"])
def test_an_import_that_does_not_end(broken: Path, name: str) -> None:
    start = time.monotonic()
    answers = ask([f"lib_{name}", "lib_good"], timeout_s=2)
    assert time.monotonic() - start < 30
    assert answers[f"lib_{name}"].error == "its import did not end within 2 s"
    assert answers["lib_good"].error is None


def test_a_file_here_is_no_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "numpy.py").write_text("raise ImportError('of the working directory')")
    monkeypatch.chdir(tmp_path)
    assert ask(["numpy"])["numpy"].error is None


def test_progress_and_order(broken: Path) -> None:
    told: list[str] = []
    ask(["lib_quits", "lib_good"], progress=lambda what, *_: told.append(what))
    assert told == ["importing lib_quits", "importing lib_good"]
    assert ask([]) == {}
