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
    "parameters", "batch_norm", "evaluation", "warnings", "notes",
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


def test_dry_run_of_what_is_there(work: Path) -> None:
    assert run("average", "ckpts", cwd=work).returncode == 0
    before = contents(work)
    done = run("average", "ckpts", "--dry-run", cwd=work)
    assert done.returncode == 0
    assert done.stdout.splitlines()[-1].startswith("up to date: 6 snapshots")
    assert run_json("average", "ckpts", "--dry-run", cwd=work)["up_to_date"]
    assert run("average", "ckpts", "--last", "2", "--dry-run", cwd=work).returncode == 2
    assert contents(work) == before


def test_strict_holds_for_a_dry_run(bn_work: Path) -> None:
    line = ("average", "ckpts", "--dry-run", "--strict")
    done = run(*line, cwd=bn_work)
    assert (done.returncode, done.stdout) == (5, "")
    assert run(*line, "--bn", "average", cwd=bn_work).returncode == 0
    assert run("average", "ckpts", cwd=bn_work).returncode == 0
    assert run(*line, cwd=bn_work).returncode == 5


@pytest.mark.parametrize("name", ["averaged.safetensors", "out.pt", "out"])
def test_all_that_a_shell_finds(work: Path, name: str) -> None:
    """`ckpts/*` of the second run names the output and the manifest of the first."""
    out = f"ckpts/{name}"
    for n in range(3):
        files = sorted(f"ckpts/{path.name}" for path in (work / "ckpts").iterdir())
        done = run("average", *files, "-o", out, "--dtype", "bfloat16", cwd=work)
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith("up to date: 6" if n else "averaged 6")
        assert (f"skipped {out}.json: what we noted of an output" in done.stderr) == (n > 0)


def test_an_output_of_another_type_among_the_checkpoints(work: Path) -> None:
    line = ("average", "ckpts", "-o", "ckpts/averaged.safetensors", "--dtype", "bfloat16")
    assert run(*line, cwd=work).returncode == 0
    assert run(*line, cwd=work).stdout.startswith("up to date")
    assert run("average", "ckpts", "-o", "other.pt", cwd=work).returncode == 0
    rows = run_json("inspect", "ckpts", cwd=work)["snapshots"]
    [own] = [row for row in rows if row["path"].endswith("averaged.safetensors")]
    assert (own["status"], own["reason"]) == ("skipped", "is an average already, says the file")


def test_early_snapshots_are_noted(tmp_path: Path) -> None:
    """A remark, no warning: `--strict` goes by warnings."""
    import torch

    (tmp_path / "ckpts").mkdir()
    for step in (100, 5000, 9000, 10_000):
        state = {"w": torch.ones(3) + step * 1e-6}
        write_torch(tmp_path / f"ckpts/snap_{step}.pt", {"model": state, "step": step})
    line = ("average", "ckpts", "--strict")
    value = run_json(*line, "-o", "a.pt", cwd=tmp_path)
    assert value["warnings"] == []
    [note] = value["notes"]
    assert "begin early (step 100 of 10000)" in note
    assert json.loads((tmp_path / "a.pt.json").read_text())["notes"] == [note]
    for more in ([], ["--dry-run"]):  # now it is up to date
        done = run(*line, "-o", "a.pt", *more, cwd=tmp_path)
        assert (done.returncode, done.stderr) == (0, note + "\n")
    assert run("-q", *line, "-o", "b.pt", cwd=tmp_path).stderr == ""
    assert run_json(*line, "-o", "c.pt", "--last", "3", cwd=tmp_path)["notes"] == []


def test_a_pattern_that_excludes_nothing(work: Path) -> None:
    line = ("average", "ckpts", "--exclude", "*_1.*", "--exclude", "snpa_*")
    done = run(*line, cwd=work)
    assert done.returncode == 0
    assert done.stderr.splitlines()[0] == "warning: --exclude 'snpa_*' matches none of the files"
    assert "averaged 5 snapshots" in done.stdout
    assert run(*line, "--strict", "-o", "b.pt", cwd=work).returncode == 5
    done = run("inspect", "ckpts", "--exclude", "snpa_*", cwd=work)
    assert "warning: --exclude 'snpa_*' matches none of the files" in done.stderr


@pytest.mark.parametrize("flag", ["-v", "--verbose", "-q", "--quiet", "--config"])
@pytest.mark.parametrize("name", ["average", "inspect"])
def test_a_flag_behind_the_command(work: Path, name: str, flag: str) -> None:
    done = run(name, "ckpts", flag, cwd=work)
    assert done.returncode == 2
    assert done.stderr == (
        f"error: {flag} stands before the command\nhint: ensemblekit {flag} {name} ...\n"
    )


@pytest.mark.parametrize("flag", ["--bn-layerwise", "--channels-last"])
def test_flags_of_what_is_not_done(bn_work: Path, flag: str) -> None:
    """Nothing is recomputed without data."""
    done = run("average", "ckpts", flag, cwd=bn_work)
    assert done.returncode == 2
    assert f"{flag} is about recomputing" in done.stderr
    assert "--train-data" in done.stderr


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
