"""Where settings come from: flag, environment, file in the working directory, default."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest

from ..helpers import files_of, numbers_of, run, run_json, write_series

FILE = "ensemblekit.toml"
PROJECT = "pyproject.toml"


@pytest.fixture
def work(tmp_path: Path) -> Path:
    write_series(tmp_path / "ckpts", 5)
    return tmp_path


def taken(work: Path, *flags: str, env: Mapping[str, str] | None = None) -> list[int]:
    """Numbers of the snapshots that a dry run takes."""
    value = run_json("average", "ckpts", "--dry-run", *flags, cwd=work, env=env)
    return numbers_of(files_of(value))


@pytest.mark.parametrize(
    "file, env, flags, expected",
    [
        ("", {}, [], [1, 2, 3, 4, 5]),
        ("last = 3", {}, [], [3, 4, 5]),
        ("last = 3", {"ENSEMBLEKIT_LAST": "2"}, [], [4, 5]),
        ("last = 3", {"ENSEMBLEKIT_LAST": "2"}, ["--last", "1"], [5]),
        ("", {"ENSEMBLEKIT_LAST": "2"}, [], [4, 5]),
        ("[average]\nlast = 3", {}, [], [3, 4, 5]),
        ("last = 2\n[average]\nlast = 3", {}, [], [3, 4, 5]),
        ("[inspect]\nlast = 2", {}, [], [1, 2, 3, 4, 5]),
        ("deep = true", {}, [], [1, 2, 3, 4, 5]),
        ("from-step = 4", {}, [], [4, 5]),
        ('exclude = ["*_1.*", "*_2.*"]', {}, [], [3, 4, 5]),
        ('exclude = "*_1.*"', {}, [], [2, 3, 4, 5]),
        ('coefficients = "1,0,0,0,1"', {}, [], [1, 2, 3, 4, 5]),
    ],
)
def test_precedence(
    work: Path, file: str, env: dict[str, str], flags: list[str], expected: list[int]
) -> None:
    (work / FILE).write_text(file)
    assert taken(work, *flags, env=env) == expected


def test_pyproject(work: Path) -> None:
    (work / PROJECT).write_text("[project]\nname = 'x'\n[tool.ensemblekit]\nlast = 2\n")
    assert taken(work) == [4, 5]
    (work / FILE).write_text("last = 1")
    assert taken(work) == [5]


def test_named_file(work: Path) -> None:
    (work / FILE).write_text("last = 1")
    (work / "other.toml").write_text("last = 2")
    done = run("--config", "other.toml", "average", "ckpts", "--dry-run", cwd=work)
    assert "would average 2 snapshots" in done.stdout
    assert run("--config", "nosuch.toml", "average", "ckpts", cwd=work).returncode == 2


@pytest.mark.parametrize("name", [FILE, PROJECT])
def test_never_from_beside_the_checkpoints(work: Path, name: str) -> None:
    text = "last = 1\nnonsense = 3\n"
    (work / "ckpts" / name).write_text(text if name == FILE else f"[tool.ensemblekit]\n{text}")
    assert taken(work) == [1, 2, 3, 4, 5]


def test_json_by_setting(work: Path) -> None:
    (work / FILE).write_text("json = true")
    done = run("average", "ckpts", "--dry-run", cwd=work)
    assert done.stdout.startswith('{"schema_version": 1')


@pytest.mark.parametrize(
    "file, text, env",
    [
        (FILE, "json = true", {}),
        (FILE, "[average]\njson = true", {}),
        (PROJECT, "[tool.ensemblekit]\njson = true", {}),
        (FILE, "", {"ENSEMBLEKIT_JSON": "1"}),
    ],
)
@pytest.mark.parametrize(
    "line, kind, code",
    [
        (["average", "nosuch"], "usage", 2),
        (["average", "ckpts", "--nosuch"], "usage", 2),
        (["average", "ckpts", "--bn", "error"], "check-failed", 5),
        (["average", "junk.pt"], "damaged", 3),
    ],
    ids=["path", "option", "check", "file"],
)
def test_errors_are_json_by_setting(
    tmp_path: Path, file: str, text: str, env: dict[str, str], line: list[str], kind: str, code: int
) -> None:
    write_series(tmp_path / "ckpts", batch_norm=True)
    (tmp_path / "junk.pt").write_bytes(b"PK\x03\x04junk")
    (tmp_path / file).write_text(text)
    done = run(*line, cwd=tmp_path, env=env)
    assert (done.returncode, done.stderr) == (code, ""), done.stdout + done.stderr
    assert json.loads(done.stdout)["error"]["kind"] == kind


def test_json_of_another_command_is_its_own(work: Path) -> None:
    (work / FILE).write_text("[inspect]\njson = true")
    done = run("average", "nosuch", cwd=work)
    assert done.stdout == ""
    assert done.stderr.startswith("error: nosuch")
    assert run("inspect", "nosuch", cwd=work).stdout.startswith('{"schema_version": 1')


WRONG = {
    "unknown": ("lsat = 3", "'last'"),
    "unknown-in-table": ("[average]\nlsat = 3", "'last'"),
    "unknown-table": ("[averge]\nlast = 3", "averge"),
    "argument": ('checkpoints = ["elsewhere"]', "checkpoints"),
    "not-toml": ("last == 3", FILE),
    "not-utf8": ("last = 3 # \udcff", FILE),
    "word": ('last = "three"', f"{FILE}: last = 'three'"),
    "fraction": ("last = 2.5", "whole number"),
    "list": ("last = [3]", "--last|last"),
    "table": ("last = {a = 3}", "--last|last"),
    "date": ("from-step = 1979-05-27", "--from-step|from-step"),
    "truth": ("last = true", "--last|last"),
    "choice": ('method = "unifrom"', f"{FILE}: method = 'unifrom'"),
    "near": ('method = "unifrom"', "did you mean 'uniform'?"),
    "size": ('max-shard-size = "5 apples"', "max-shard-size = '5 apples'"),
    "numbers": ('coefficients = "1;2"', "coefficients = '1;2'"),
    "value-for-table": ("average = 3", "average"),
}


@pytest.mark.parametrize("name", sorted(WRONG))
def test_wrong_settings(work: Path, name: str) -> None:
    text, words = WRONG[name]
    (work / FILE).write_bytes(text.encode("utf-8", "surrogateescape"))
    done = run("average", "ckpts", "--dry-run", cwd=work)
    assert done.returncode == 2, done.stdout + done.stderr
    assert any(word in done.stderr for word in words.split("|")), done.stderr


@pytest.mark.parametrize("text", ["tool = 3", "[tool]\nensemblekit = 3", "[[tool.ensemblekit]]"])
def test_odd_pyproject(work: Path, text: str) -> None:
    """Whatever stands there, it is no bug of ours."""
    (work / PROJECT).write_text(text)
    assert run("average", "ckpts", "--dry-run", cwd=work).returncode in (0, 2)


def test_wrong_environment(work: Path) -> None:
    done = run("average", "ckpts", "--dry-run", cwd=work, env={"ENSEMBLEKIT_LAST": "x"})
    assert done.returncode == 2
    assert "ENSEMBLEKIT_LAST: 'x'" in done.stderr
    done = run("average", "ckpts", "--dry-run", cwd=work, env={"ENSEMBLEKIT_BN": "averge"})
    assert "did you mean 'average'? It is a variable of the environment" in done.stderr


@pytest.mark.parametrize("size", ["1000000", '"1MB"', '"1000000"'])
def test_sizes_and_lists_of_numbers(work: Path, size: str) -> None:
    (work / FILE).write_text(f'[average]\nmax-shard-size = {size}\ncoefficients = "1,2"\nlast = 2')
    done = run("average", "ckpts", "-o", "folder", "--json", cwd=work)
    assert done.returncode == 0, done.stderr
    found = [one["coefficient"] for one in json.loads(done.stdout)["snapshots"]]
    assert found == pytest.approx([1 / 3, 2 / 3])
