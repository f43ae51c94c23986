"""`ensemblekit average` as installed: what it prints, writes, refuses and answers with."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from ..helpers import (
    contents,
    files_of,
    make_arrays,
    numbers_of,
    run,
    run_json,
    sha256,
    write_safetensors,
    write_series,
    write_torch,
)

KEYS = {
    "schema_version", "output", "sha256", "method", "snapshots", "skipped", "tensors",
    "parameters", "batch_norm", "evaluation", "warnings",
}  # fmt: skip


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """A working directory with six snapshots in `ckpts`."""
    write_series(tmp_path / "ckpts", 6)
    return tmp_path


@pytest.fixture
def bn_work(tmp_path: Path) -> Path:
    """The same with BatchNorm, whose averaged statistics bring a warning."""
    write_series(tmp_path / "ckpts", 3, batch_norm=True)
    return tmp_path


def test_in_words(work: Path) -> None:
    done = run("average", "ckpts", cwd=work)
    assert done.returncode == 0
    assert done.stdout == (
        "averaged 6 snapshots (uniform, 112 parameters) -> averaged.safetensors\n"
    )
    assert done.stderr == ""
    assert load_file(work / "averaged.safetensors").keys() == make_arrays(1).keys()


def test_json(work: Path) -> None:
    (work / "ckpts" / "notes.txt").write_text("")
    value = run_json("average", "ckpts", "-o", "out.safetensors", cwd=work)
    assert value.keys() >= KEYS
    assert value["sha256"] == sha256(work / "out.safetensors")
    assert numbers_of(files_of(value)) == [1, 2, 3, 4, 5, 6]
    assert all({"path", "step", "coefficient"} <= item.keys() for item in value["snapshots"])
    assert value["skipped"] == [{"path": "ckpts/notes.txt", "reason": "not a checkpoint"}]
    assert value["batch_norm"].items() >= {"layers": 0, "policy": "none", "samples": 0}.items()
    manifest = json.loads((work / "out.safetensors.json").read_text())
    assert manifest["command"] == [
        "ensemblekit", "average", "ckpts", "-o", "out.safetensors", "--json",
    ]  # fmt: skip


@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_dry_run(work: Path, flags: list[str]) -> None:
    before = contents(work)
    done = run("average", "ckpts", "--dry-run", *flags, cwd=work)
    assert done.returncode == 0
    assert contents(work) == before
    assert done.stdout.count("snap_") == 6
    if not flags:
        assert done.stdout.splitlines()[-1].startswith("would average 6 snapshots")
        assert "0.166667 x ckpts/snap_1.safetensors  at 1" in done.stdout


def test_existing_output(work: Path) -> None:
    (work / "averaged.safetensors").write_text("precious")
    before = contents(work)
    done = run("average", "ckpts", cwd=work)
    assert done.returncode == 2
    assert "averaged.safetensors exists" in done.stderr
    assert "--force" in done.stderr
    error = run_json("average", "ckpts", cwd=work, exit_code=2)["error"]
    assert error["kind"] == "usage"
    assert "--force" in error["hint"]
    assert contents(work) == before
    assert run("average", "ckpts", "--force", cwd=work).returncode == 0
    assert contents(work) != before


def test_up_to_date(work: Path) -> None:
    assert run("average", "ckpts", cwd=work).returncode == 0
    before = contents(work)
    done = run("average", "ckpts", cwd=work)
    assert done.returncode == 0
    assert done.stdout.startswith("up to date: 6 snapshots")
    assert contents(work) == before
    write_safetensors(work / "ckpts" / "snap_3.safetensors", make_arrays(33))
    assert run("average", "ckpts", cwd=work).returncode == 2
    assert run("average", "ckpts", "--force", cwd=work).returncode == 0
    assert contents(work)["averaged.safetensors"] != before["averaged.safetensors"]


def test_strict(bn_work: Path) -> None:
    before = contents(bn_work)
    done = run("average", "ckpts", "--strict", cwd=bn_work)
    assert done.returncode == 5
    assert "BatchNorm" in done.stderr
    assert contents(bn_work) == before
    error = run_json("average", "ckpts", "--strict", cwd=bn_work, exit_code=5)["error"]
    assert error["kind"] == "check-failed"
    assert run("average", "ckpts", "--strict", "--bn", "average", cwd=bn_work).returncode == 0


def test_bn_error(bn_work: Path) -> None:
    done = run("average", "ckpts", "--bn", "error", cwd=bn_work)
    assert done.returncode == 5
    assert "--train-data" in done.stderr


def test_quiet(bn_work: Path) -> None:
    loud = run("average", "ckpts", "-o", "a.safetensors", cwd=bn_work)
    quiet = run("-q", "average", "ckpts", "-o", "b.safetensors", cwd=bn_work)
    assert loud.stderr.startswith("warning: 1 BatchNorm layers keep averaged statistics")
    assert quiet.stderr == ""
    assert quiet.stdout.replace("b.safe", "a.safe") == loud.stdout


SELECTIONS: dict[str, tuple[list[str], list[int]]] = {
    "last": (["ckpts", "--last", "2"], [5, 6]),
    "every": (["ckpts", "--every", "2"], [2, 4, 6]),
    "every-last": (["ckpts", "--every", "2", "--last", "2"], [4, 6]),
    "from": (["ckpts", "--from-step", "4"], [4, 5, 6]),
    "between": (["ckpts", "--from-step", "2", "--to-step", "3"], [2, 3]),
    "exclude": (["ckpts", "--exclude", "*_[12].*"], [3, 4, 5, 6]),
    "exclude-twice": (["ckpts", "--exclude", "*_1.*", "--exclude", "*_6.*"], [2, 3, 4, 5]),
    "glob": (["ckpts/snap_[246].safetensors"], [2, 4, 6]),
    "deep-glob": (["**/snap_[35].*"], [3, 5]),
    "files": (["ckpts/snap_6.safetensors", "ckpts/snap_1.safetensors"], [1, 6]),
    "file-twice": (["ckpts/snap_2.safetensors", "ckpts/../ckpts/snap_2.safetensors"], [2]),
}


@pytest.mark.parametrize("name", sorted(SELECTIONS))
def test_selection(work: Path, name: str) -> None:
    flags, expected = SELECTIONS[name]
    value = run_json("average", *flags, "--dry-run", cwd=work)
    assert numbers_of(files_of(value)) == expected


def test_an_average_among_them_does_not_disturb_the_order(work: Path) -> None:
    """A file without a number is left out first, and only then the order is looked for."""
    line = ("average", "ckpts", "-o", "ckpts/averaged.safetensors")
    assert run(*line, cwd=work).returncode == 0
    os.link(work / "ckpts" / "snap_4.safetensors", work / "ckpts" / "best.safetensors")
    value = run_json("average", "ckpts", "--last", "2", "--dry-run", cwd=work)
    assert numbers_of(files_of(value)) == [5, 6]
    assert run(*line, cwd=work).stdout.startswith("up to date")


BEST = {
    "max": (["--best", "2", "--by", "val_acc"], [2, 3]),
    "min": (["--best", "1", "--by", "val_loss"], [2]),
    "said": (["--best", "1", "--by", "val_acc:min"], [1]),
    "ema": (["--weights", "ema"], [1, 2, 3]),
    "key": (["--weights", "model"], [1, 2, 3]),
}


@pytest.mark.parametrize("name", sorted(BEST))
def test_selection_by_content(tmp_path: Path, name: str) -> None:
    import torch

    for k, accuracy in ((1, 0.5), (2, 0.9), (3, 0.7)):
        state = {"w": torch.full((3,), float(k))}
        value = {"model": state, "ema": {"w": state["w"] * 10}, "epoch": k}
        value |= {"val_acc": accuracy, "val_loss": 1 - accuracy}
        write_torch(tmp_path / f"snap_{k}.pt", value)
    flags, expected = BEST[name]
    value = run_json("average", "*.pt", *flags, cwd=tmp_path)
    assert numbers_of(files_of(value)) == expected
    scale = 1 if name == "key" else 10
    mean = scale * sum(expected) / len(expected)
    assert load_file(tmp_path / "averaged.safetensors")["w"].tolist() == [mean] * 3


@pytest.mark.parametrize("flags", [["--method", "weighted"], []])
def test_coefficients(work: Path, flags: list[str]) -> None:
    line = ["average", "ckpts", "--last", "3", *flags, "--coefficients", "1,2, 1", "--dry-run"]
    value = run_json(*line, cwd=work)
    assert value["method"] == "weighted"
    assert [item["coefficient"] for item in value["snapshots"]] == [0.25, 0.5, 0.25]


WRONG: dict[str, tuple[list[str], str]] = {
    "coefficients-count": (["--coefficients", "1,2"], "6 snapshots"),
    "coefficients-word": (["--coefficients", "1,x"], "list of numbers"),
    "coefficients-inf": (["--coefficients", "inf,-inf,1,1,1,1"], "finite"),
    "coefficients-huge": (["--coefficients", "1e308,1e308,1,1,1,1"], "finite|large"),
    "metric": (["--best", "1", "--by", "val_acc"], "no metric 'val_acc'"),
    "weights": (["--weights", "ema"], "has no weights 'ema'"),
    "data-without-model": (["--val-data", "x.npz"], "--model"),
}


@pytest.mark.parametrize("name", sorted(WRONG))
def test_wrong_usage(work: Path, name: str) -> None:
    flags, words = WRONG[name]
    before = contents(work)
    done = run("average", "ckpts", *flags, cwd=work)
    assert done.returncode == (3 if name == "weights" else 2), done.stderr
    assert any(word in done.stderr for word in words.split("|")), done.stderr
    assert contents(work) == before


@pytest.mark.parametrize("link", [os.link, os.symlink, None])
def test_output_is_an_input(work: Path, link: Callable[[Path, Path], None] | None) -> None:
    out = "ckpts/snap_1.safetensors"
    if link:
        link(work / "ckpts" / "snap_1.safetensors", work / "out.safetensors")
        out = "out.safetensors"
    before = contents(work)
    done = run("average", "ckpts", "-o", out, "--force", cwd=work)
    assert done.returncode == 2
    assert "input" in done.stderr
    assert contents(work) == before


ODD_NAMES = [
    "snap 1.safetensors",
    "snap\n2.safetensors",
    "snap\x1b[2J3.safetensors",
    "snap[bold]4.safetensors",
    "snap[5].safetensors",
    os.fsdecode(b"snap\xff6.safetensors"),
    "-7.safetensors",
]


@pytest.mark.parametrize("line", [("inspect",), ("average", "--dry-run")], ids=lambda x: x[0])
def test_odd_file_names(tmp_path: Path, line: tuple[str, ...]) -> None:
    (tmp_path / "ckpts").mkdir()
    for k, name in enumerate(ODD_NAMES):
        write_safetensors(tmp_path / "ckpts" / name, make_arrays(k))
    value = run_json(*line, "ckpts", cwd=tmp_path)
    assert {Path(item["path"]).name for item in value["snapshots"]} == set(ODD_NAMES)
    done = run(*line, "ckpts", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "snap[bold]4" in done.stdout
    assert "\x1b" not in done.stdout
