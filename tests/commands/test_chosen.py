"""`average --candidate NAME --from comparison.json`: what was measured, or an error that says so."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from ensemblekit import average
from ensemblekit.candidates import Candidate, Row, mean_row
from ensemblekit.commands import chosen
from ensemblekit.errors import CheckFailedError, IncompatibleError, InputError, UsageError

from ..comparing import compared, problem
from ..helpers import contents, run, run_json, sha256, write_safetensors, write_series

Json = dict[str, Any]
ABSENT = object()


def comparison(folder: Path, *candidates: Candidate) -> Path:
    """As much of a comparison.json as is read here, over the files of a folder."""
    files = sorted(folder.glob("*.safetensors"))
    value = {
        "schema_version": 1,
        "snapshots": [{"name": f.name, "weights": "model", "sha256": sha256(f)} for f in files],
        "candidates": [
            {
                "name": one.name,
                "candidate": one.to_json(),
                "batch_norm": {"policy": one.batch_norm[0], "samples": 0},
            }
            for one in candidates
        ],
    }
    path = folder.parent / "comparison.json"
    path.write_text(json.dumps(value))
    return path


SOUP = Candidate("soup", (Row((1.0, 0.0, 2.0), 3.0),), ("averaged",))
PAIR = Candidate("pair", (mean_row(3), mean_row(3)), ("averaged", "averaged"), "mean")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A comparison beside `run/` with three snapshots."""
    return comparison(write_series(tmp_path / "run", 3, batch_norm=True), SOUP, PAIR)


def test_a_measured_candidate(tmp_path: Path, source: Path) -> None:
    made = average(tmp_path / "run", tmp_path / "out.safetensors", candidate=("soup", source))
    assert [s["coefficient"] for s in made.snapshots] == [1 / 3, 2 / 3]
    first, third = (load_file(tmp_path / f"run/snap_{k}.safetensors") for k in (1, 3))
    found = load_file(tmp_path / "out.safetensors")
    for key in ("fc.weight", "bn.running_var"):
        exact = (first[key].astype(np.float64) + 2 * third[key].astype(np.float64)) / 3
        assert found[key].tolist() == exact.astype(np.float32).tolist()
    again = average(tmp_path / "run", tmp_path / "out.safetensors", candidate=("soup", source))
    assert again.up_to_date
    with pytest.raises(UsageError, match="ensemble of 2"):
        average(tmp_path / "run", candidate=("pair", source))


def test_more_snapshots_do_no_harm_and_missing_ones_are_named(tmp_path: Path, source: Path) -> None:
    write_series(tmp_path / "run", 5, batch_norm=True)
    assert len(average(tmp_path / "run", candidate=("soup", source)).snapshots) == 2
    (tmp_path / "run/snap_2.safetensors").unlink()
    assert len(average(tmp_path / "run", candidate=("soup", source)).snapshots) == 2
    (tmp_path / "run/snap_3.safetensors").unlink()
    with pytest.raises(IncompatibleError, match=r"snap_3\.safetensors"):
        average(tmp_path / "run", candidate=("soup", source))


# ---------------------------------------------------------------------------------------- --strict


@pytest.fixture
def warned(tmp_path: Path) -> Path:
    """A comparison of snapshots that have nothing to do with each other."""
    (tmp_path / "run").mkdir()
    for k in range(3):
        arrays = {"w": np.random.default_rng(k).normal(size=(20, 20)).astype(np.float32)}
        write_safetensors(tmp_path / f"run/snap_{k}.safetensors", arrays)
    return comparison(tmp_path / "run", Candidate("uniform", (mean_row(3),), ("none",)))


@pytest.mark.parametrize("dry_run", [False, True])
@pytest.mark.parametrize("name", ["out.pt", "out.safetensors", "out"])
def test_strict_of_what_is_up_to_date(
    tmp_path: Path, warned: Path, name: str, dry_run: bool
) -> None:
    taken, out = ("uniform", warned), tmp_path / name
    with pytest.raises(CheckFailedError, match="different basins"):
        average(tmp_path / "run", out, candidate=taken, strict=True)
    assert not out.exists()
    average(tmp_path / "run", out, candidate=taken)
    before = contents(tmp_path)
    again = average(tmp_path / "run", out, candidate=taken, dry_run=dry_run)
    assert again.up_to_date
    assert any("different basins" in text for text in again.warnings)
    with pytest.raises(CheckFailedError, match="different basins"):
        average(tmp_path / "run", out, candidate=taken, strict=True, dry_run=dry_run)
    assert contents(tmp_path) == before


def test_strict_on_the_command_line(tmp_path: Path, warned: Path) -> None:
    line = ["average", "run", "--candidate", "uniform", "--from", warned.name, "-o", "out.pt"]
    assert run(*line, cwd=tmp_path).returncode == 0
    assert run(*line, cwd=tmp_path).stdout.startswith("up to date")
    done = run(*line, "--strict", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (5, "")
    assert "error: --strict: different basins" in done.stderr


# ------------------------------------------------------------------------------ damaged comparisons


def put(value: Any, *place: str | int) -> Callable[[Json], Any]:
    """Something else in one place; `ABSENT` takes away what is there."""

    def change(whole: Json) -> None:
        at: Any = whole
        for step in place[:-1]:
            at = at[step]
        if value is ABSENT:
            del at[place[-1]]
        else:
            at[place[-1]] = value

    return change


ROW = ("candidates", 0)
CANDIDATE = (*ROW, "candidate")
SNAPSHOTS = ("snapshots",)
DAMAGED: dict[str, Callable[[Json], Any]] = {
    "no rows": put(ABSENT, *CANDIDATE, "rows"),
    "empty rows": put([], *CANDIDATE, "rows"),
    "text for rows": put("abc", *CANDIDATE, "rows"),
    "text for a row": put(["abc"], *CANDIDATE, "rows"),
    "text for coefficients": put("111", *CANDIDATE, "rows", 0, "coefficients"),
    "text for a coefficient": put("1", *CANDIDATE, "rows", 0, "coefficients", 0),
    "short row": put([3.0], *CANDIDATE, "rows", 0, "coefficients"),
    "long row": put([1, 1, 1, 0], *CANDIDATE, "rows", 0, "coefficients"),
    "another divisor": put(4.0, *CANDIDATE, "rows", 0, "divisor"),
    "no divisor": put(ABSENT, *CANDIDATE, "rows", 0, "divisor"),
    "no batch_norm of the candidate": put(ABSENT, *CANDIDATE, "batch_norm"),
    "short batch_norm": put([], *CANDIDATE, "batch_norm"),
    "long batch_norm": put(["none", "none"], *CANDIDATE, "batch_norm"),
    "unknown policy": put(["bogus"], *CANDIDATE, "batch_norm"),
    "list for a policy": put([[]], *CANDIDATE, "batch_norm"),
    "combiner of one model": put("mean", *CANDIDATE, "combiner"),
    "no combiner": put(ABSENT, *CANDIDATE, "combiner"),
    "no name": put(ABSENT, *CANDIDATE, "name"),
    "no candidate": put(ABSENT, *CANDIDATE),
    "number for a candidate": put(3, *CANDIDATE),
    "null for a candidate": put(None, *CANDIDATE),
    "list for a candidate": put([], *CANDIDATE),
    "no batch_norm": put(ABSENT, *ROW, "batch_norm"),
    "text for batch_norm": put("averaged", *ROW, "batch_norm"),
    "no samples": put(ABSENT, *ROW, "batch_norm", "samples"),
    "text for samples": put("many", *ROW, "batch_norm", "samples"),
    "null for samples": put(None, *ROW, "batch_norm", "samples"),
    "no name of the row": put(ABSENT, *ROW, "name"),
    "number for the row": put(3, *ROW),
    "no candidates": put(ABSENT, "candidates"),
    "number for candidates": put(3, "candidates"),
    "text for candidates": put("abc", "candidates"),
    "no snapshots": put(ABSENT, *SNAPSHOTS),
    "empty snapshots": put([], *SNAPSHOTS),
    "number for snapshots": put(3, *SNAPSHOTS),
    "one snapshot less": put(ABSENT, *SNAPSHOTS, 2),
    "number for a snapshot": put(3, *SNAPSHOTS, 1),
    "no weights": put(ABSENT, *SNAPSHOTS, 1, "weights"),
    "no sha256": put(ABSENT, *SNAPSHOTS, 1, "sha256"),
    "no name of a snapshot": put(ABSENT, *SNAPSHOTS, 1, "name"),
    "another sha256": put("0" * 64, *SNAPSHOTS, 0, "sha256"),
    "other weights": put("ema", *SNAPSHOTS, 0, "weights"),
    "another version": put(2, "schema_version"),
    "no version": put(ABSENT, "schema_version"),
    "number for a sha256": put(3, *SNAPSHOTS, 0, "sha256"),
    "null for a sha256": put(None, *SNAPSHOTS, 0, "sha256"),
    "list for a sha256": put([], *SNAPSHOTS, 0, "sha256"),
    "list for weights": put([], *SNAPSHOTS, 0, "weights"),
    "endless samples": put(float("inf"), *ROW, "batch_norm", "samples"),
    "endless coefficient": put(10**400, *CANDIDATE, "rows", 0, "coefficients", 0),
    "endless divisor": put(10**400, *CANDIDATE, "rows", 0, "divisor"),
}


@pytest.mark.parametrize("name", sorted(DAMAGED))
def test_a_damaged_comparison(tmp_path: Path, source: Path, name: str) -> None:
    value = json.loads(source.read_text())
    DAMAGED[name](value)
    source.write_text(json.dumps(value))
    with pytest.raises(InputError, match=r"comparison\.json") as raised:
        average(tmp_path / "run", tmp_path / "out.pt", candidate=("soup", source))
    assert raised.value.exit_code == 3
    assert not (tmp_path / "out.pt").exists()


@pytest.mark.parametrize("text", ["", "{", "null", "3", "[]", "{}", '"text"', "[" * 100_000])
def test_files_that_are_no_comparison(tmp_path: Path, source: Path, text: str) -> None:
    source.write_text(text)
    with pytest.raises(InputError, match=r"no comparison\.json of ensemblekit"):
        average(tmp_path / "run", candidate=("soup", source))


def test_said_once_on_the_command_line(tmp_path: Path, source: Path) -> None:
    value = json.loads(source.read_text())
    put("abc", *CANDIDATE, "rows")(value)
    source.write_text(json.dumps(value))
    line = ["average", "run", "--candidate", "soup", "--from", source.name, "-o", "out.pt"]
    done = run(*line, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: comparison.json: soup is damaged")
    error = run_json(*line, cwd=tmp_path, exit_code=3)["error"]
    assert error["kind"] == "bad-input"
    assert not (tmp_path / "out.pt").exists()


# ---------------------------------------------------------- statistics, of a comparison of `compare`


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("measured")
    one = problem("classes", 3)
    compared(folder / "ckpts", one, folder / "out", candidates="averages")
    return folder


STATISTICS: dict[str, Callable[[Json], Any]] = {
    "none": put(ABSENT, "batch_norm_statistics"),
    "null": put(None, "batch_norm_statistics"),
    "another digest": put("0" * 64, "batch_norm_statistics", "sha256"),
    "a short list of snapshots": put(ABSENT, "snapshots", 0),
    "number": put(3, "batch_norm_statistics"),
    "text": put("abc", "batch_norm_statistics"),
    "list": put([], "batch_norm_statistics"),
    "no digest": put({}, "batch_norm_statistics"),
}


@pytest.mark.parametrize(
    "name",
    sorted(STATISTICS),
)
def test_damaged_statistics(measured: Path, name: str) -> None:
    value = json.loads((measured / "out/comparison.json").read_text())
    path = measured / "out/damaged.json"
    path.write_text(json.dumps(value))
    assert average(measured / "ckpts", candidate=("uniform+bn", path)).state is not None
    changed = copy.deepcopy(value)
    STATISTICS[name](changed)
    path.write_text(json.dumps(changed))
    with pytest.raises(InputError):
        average(measured / "ckpts", candidate=("uniform+bn", path))


def test_every_row_of_a_comparison_is_taken(measured: Path) -> None:
    """The minimal comparisons above have no key that those of `compare` lack."""
    value = chosen.read(measured / "out/comparison.json")
    singles = [row["name"] for row in value["candidates"] if row["kind"] != "ensemble"]
    assert len(singles) > 3
    for name in singles:
        assert average(measured / "ckpts", candidate=(name, measured / "out")).state is not None
