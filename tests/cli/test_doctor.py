"""`ensemblekit doctor`, `--version` and the completion of shells, as installed."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ensemblekit import __version__
from ensemblekit.cli.main import COMMANDS

from ..helpers import command, environment, run, run_json


def test_the_block(tmp_path: Path) -> None:
    done = run("doctor", cwd=tmp_path)
    assert done.returncode == 0
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["ensemblekit", __version__]
    labels = [line[:13].strip() for line in lines]
    for label in ("Python", "platform", "processor", "torch", "ONNX Runtime", "libraries"):
        assert label in labels
    assert "torch 2." in done.stdout
    assert any(line.partition(" ")[2].startswith("problem") for line in lines)


def test_problems_do_not_change_the_exit_code(tmp_path: Path) -> None:
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib/scipy.py").write_text("raise RuntimeError('broken on purpose')")
    env = {"PYTHONPATH": str(tmp_path / "lib")}
    value = run_json("doctor", cwd=tmp_path, env=env)
    [found] = [p for p in value["problems"] if p["what"].startswith("scipy ")]
    assert "RuntimeError: broken on purpose" in found["what"]
    assert found["fix"].startswith("pip install --force-reinstall scipy==")


def test_wrong_usage(tmp_path: Path) -> None:
    assert run("doctor", "--nosuch", cwd=tmp_path).returncode == 2
    assert run_json("doctor", "more", cwd=tmp_path, exit_code=2)["error"]["kind"] == "usage"


def test_it_imports_no_library_itself(tmp_path: Path) -> None:
    """A library that crashes on import would take the report with it."""
    program = (
        "import sys; from ensemblekit.cli.main import run; code = run(['doctor', '--json']);"
        "print(code, [n for n in ('torch', 'numpy', 'onnx', 'rich') if n in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path,
        env=environment(), timeout=120,
    )  # fmt: skip
    assert done.stdout.splitlines()[-1] == "0 []", done.stderr


def test_version(tmp_path: Path) -> None:
    lines = run("--version", cwd=tmp_path).stdout.splitlines()
    assert lines[0] == f"ensemblekit {__version__}"
    assert lines[1] == f"Python {sys.version.split()[0]}"
    names = [line.split()[0] for line in lines[2:]]
    assert {"torch", "numpy", "click"} <= set(names)
    assert all(len(line.split()) == 2 for line in lines)


def complete(*words: str, cwd: Path) -> list[str]:
    """What the shell is told of the last word."""
    done = subprocess.run(
        command(), capture_output=True, text=True, cwd=cwd, timeout=60,
        env=environment(
            _ENSEMBLEKIT_COMPLETE="bash_complete", COMP_WORDS="\n".join(words),
            COMP_CWORD=str(len(words) - 1),
        ),
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.splitlines()


@pytest.mark.parametrize(
    "words, expected",
    [
        ([""], [f"plain,{name}" for name in COMMANDS]),
        (["av"], ["plain,average"]),
        (["--ver"], ["plain,--version", "plain,--verbose"]),
        (["average", "--metho"], ["plain,--method"]),
        (["average", "--method", "wsm"], ["plain,wsm-linear", "plain,wsm-1-sqrt"]),
        (["average", "ck"], ["file,ck"]),
        (["average", "ckpts", "-o", "ou"], ["file,ou"]),
        (["compare", "--model", "tr"], ["file,tr"]),
        (["compare", "-o", "co"], ["dir,co"]),
        (["verify", "mo"], ["file,mo"]),
        (["verify", "model.onnx", "ck"], ["file,ck"]),
        (["-v", "--config", "en"], ["file,en"]),
        (["nosuch", "--x"], []),
    ],
    ids=" ".join,
)
def test_completion(tmp_path: Path, words: list[str], expected: list[str]) -> None:
    found = complete("ensemblekit", *words, cwd=tmp_path)
    assert [line for line in found if line] == expected


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_source(tmp_path: Path, shell: str) -> None:
    if shell == "bash" and shutil.which("bash") is None:
        pytest.skip("no bash here")
    done = run(cwd=tmp_path, env={"_ENSEMBLEKIT_COMPLETE": f"{shell}_source"})
    assert done.returncode == 0
    assert f"_ENSEMBLEKIT_COMPLETE={shell}_complete" in done.stdout


def test_an_unknown_shell(tmp_path: Path) -> None:
    done = run(cwd=tmp_path, env={"_ENSEMBLEKIT_COMPLETE": "bahs_source"})
    assert (done.returncode, done.stdout) == (2, "")
    assert "bash_source" in done.stderr


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash here")
def test_in_a_real_bash(tmp_path: Path) -> None:
    """The function that the script defines, called as bash calls it."""
    script = (
        'eval "$(_ENSEMBLEKIT_COMPLETE=bash_source ensemblekit)"\n'
        "COMP_WORDS=(ensemblekit insp) COMP_CWORD=1\n"
        "_ensemblekit_completion ensemblekit\n"
        'echo "${COMPREPLY[@]}"\n'
    )
    (tmp_path / "bin").mkdir()
    wrapper = tmp_path / "bin/ensemblekit"
    wrapper.write_text(f'#!/bin/sh\nexec {" ".join(command())} "$@"\n')
    wrapper.chmod(0o755)
    env = environment()
    done = subprocess.run(
        ["bash", "--norc", "-c", script], capture_output=True, text=True, cwd=tmp_path, timeout=60,
        env={**env, "PATH": f"{wrapper.parent}:{env['PATH']}"},
    )  # fmt: skip
    assert done.stdout.strip() == "inspect", done.stderr
