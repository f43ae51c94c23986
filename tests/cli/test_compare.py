"""`ensemblekit compare`: exit codes, one object on stdout, errors that help, and Ctrl-C."""

from __future__ import annotations

import importlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from ensemblekit.cli.main import run
from ensemblekit.commands.report_folder import read_statistics
from tests import comparing, helpers
from tests.comparing import CODE, PROBLEMS, Problem, save

torch.set_num_threads(1)

VAL = ["--val-data", "net.py:data"]
TEST = ["--test-data", "net.py:data"]
TRAIN = ["--train-data", "net.py:data"]
MODEL = ["--model", "net.py:mlp", "--device", "cpu"]
ALL = ["compare", "ckpts", "-o", "out", *MODEL, *TRAIN, *VAL, *TEST]
FEW = [*ALL, "--candidates", "singles,ensembles"]
FILES = {"comparison.json", "report.html", "report.md", "candidates.csv"}


@pytest.fixture(scope="module")
def snapshots() -> tuple[comparing.Weights, ...]:
    return comparing.trained(PROBLEMS["classes"](), snapshots=3).weights


@pytest.fixture
def here(
    tmp_path: Path, snapshots: Sequence[comparing.Weights], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Path]:
    """A working directory with `net.py`, `ckpts/`, and a cache of its own."""
    place = tmp_path / "work"
    place.mkdir()
    (place / "net.py").write_text(CODE)
    save(place / "ckpts", snapshots)
    monkeypatch.chdir(place)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    handler = signal.getsignal(signal.SIGTERM)
    yield place
    signal.signal(signal.SIGTERM, handler)
    for name, module in list(sys.modules.items()):
        if Path(getattr(module, "__file__", None) or "/").parent == place:
            del sys.modules[name]
    importlib.invalidate_caches()


Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    """The command in this process: exit code, stdout, stderr."""

    def called(*args: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = run([str(a) for a in args])
        seen = capsys.readouterr()
        return code, seen.out, seen.err

    return called


def read(out: Path = Path("out")) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((out / "comparison.json").read_text())
    return value


def left_behind(place: Path) -> list[str]:
    """What is in the working directory and was not there before."""
    return sorted({p.name for p in place.iterdir()} - {"net.py", "ckpts", "__pycache__"})


# ------------------------------------------------------------------------------ what works


def test_the_installed_command(here: Path) -> None:
    done = helpers.run(*ALL, cwd=here)
    assert done.returncode == 0, done.stderr
    value = read()
    decision = value["decision"]
    lines = [line.strip() for line in done.stdout.splitlines()]
    assert decision["headline"] in lines
    assert any("<- ship" in line and line.split()[0] == decision["ship"] for line in lines)
    assert any("baseline" in line and line.split()[0] == value["baseline"] for line in lines)
    assert all(f"- {text}" in lines for text in decision["because"])
    assert lines[-1] == "report: out/report.html"
    assert "forward passes" in done.stderr
    assert {p.name for p in Path("out").iterdir()} == {*FILES, "batch_norm.npz"}
    assert value["command"] == ["ensemblekit", *ALL]
    assert left_behind(here) == ["out"]


def test_json_is_what_is_written(here: Path, call: Call) -> None:
    code, out, _ = call(*FEW, "--json")
    assert code == 0
    assert json.loads(out) == read()


def test_quiet(here: Path, call: Call) -> None:
    code, out, err = call("-q", *FEW)
    assert (code, err) == (0, "")
    assert read()["decision"]["headline"] in out


def test_settings_from_the_environment(
    here: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ENSEMBLEKIT_CANDIDATES", "singles")
    monkeypatch.setenv("ENSEMBLEKIT_MARGIN", "1.5")
    assert call(*ALL)[0] == 0
    assert {row["kind"] for row in read()["candidates"]} == {"single"}
    assert read()["decision"]["margin"] == 1.5


def test_a_dry_run_does_nothing(here: Path, call: Call) -> None:
    code, out, err = call(*ALL, "--dry-run")
    assert code == 0
    assert "forward passes" in err
    assert out == ""
    assert left_behind(here) == []
    code, out, _ = call(*ALL, "--dry-run", "--json")
    assert code == 0
    assert isinstance(json.loads(out), dict), "--json prints one object, whatever happens"


def test_the_default_folder(here: Path, call: Call) -> None:
    args = [a for a in FEW if a not in ("-o", "out")]
    assert call(*args)[0] == 0
    assert left_behind(here) == ["comparison"]


def test_a_metric_by_target(here: Path, call: Call) -> None:
    assert call(*FEW, "--metric", "net.py:share")[0] == 0
    value = read()
    assert value["metric"]["name"] == "accuracy"
    for row in value["candidates"]:
        for e in row["evaluations"]:
            if e.get("cross_fitted"):  # there is no one combined output to call it with
                assert e["share"] is None
            else:
                assert e["share"] == pytest.approx(e["accuracy"])
    code, out, _ = call(*FEW, "--metric", "net.py:share")
    assert code == 0
    assert "up to date" in out, "a function in a file is the same function the next time"


@pytest.mark.parametrize("metric", ["nll", "brier"])
def test_a_metric_by_name(here: Path, call: Call, metric: str) -> None:
    assert call(*FEW, "--metric", metric)[0] == 0
    assert read()["metric"] == {"name": metric, "higher_is_better": False, "unit": ""}


def test_added_averages(here: Path, call: Call) -> None:
    assert call(*FEW, "--add", "mine=1,0,3", "--add", "other=0, 1, 1")[0] == 0
    rows = {row["name"]: row for row in read()["candidates"]}
    assert rows["mine"]["coefficients"] == [0.25, 0.75]
    assert rows["other"]["coefficients"] == [0.5, 0.5]


# ------------------------------------------------------------------------ the next command

PICKED: dict[str, tuple[list[str], str, set[int]]] = {  # flags, weights, snapshots that are left
    "exclude": (["--exclude", "snap_1*"], "ema_state_dict", {2, 3}),
    "exclude twice": (["--exclude", "snap_2.pt", "--exclude", "*_3.pt"], "ema_state_dict", {1}),
    "weights": (["--weights", "state_dict"], "state_dict", {1, 2, 3}),
    "weights by role": (["--weights", "model"], "state_dict", {1, 2, 3}),
    "both": (["--exclude", "snap_3.pt", "--weights", "state_dict"], "state_dict", {1, 2}),
    "last": (["--last", "2", "--weights", "ema"], "ema_state_dict", {2, 3}),
    "every": (["--every", "2"], "ema_state_dict", {1, 3}),
}


@pytest.fixture
def two_kinds(here: Path, snapshots: Sequence[comparing.Weights]) -> Path:
    """Each file has two sets of weights, all of them noisy: a mean is surely better than one."""
    generator = torch.Generator().manual_seed(0)

    def noisy() -> comparing.Weights:
        found = dict(snapshots[-1])
        for key, value in found.items():
            noise = torch.randn(value.shape, generator=generator)
            if "running" in key:
                found[key] = value * (0.2 * noise).exp()
            elif value.is_floating_point():
                found[key] = value + 0.6 * noise
        return found

    for number in (1, 2, 3):
        state = {"step": 100 * number, "state_dict": noisy(), "ema_state_dict": noisy()}
        torch.save(state, here / "ckpts" / f"snap_{number}.pt")
    return here


def assert_made(made: Path, row: dict[str, Any], weights: str) -> None:
    """The file holds the weights of the row, and the statistics that were measured."""
    states = [torch.load(path)[weights] for path in row["snapshots"]]
    assert len(states) == len(row["coefficients"])
    found = load_file(made)
    assert found.keys() == states[0].keys()
    fresh = read_statistics(Path("out"), read())
    own = [key for key in fresh if key.startswith(f"{row['name']}/0/")]
    assert bool(own) == (row["batch_norm"]["policy"] == "recomputed")
    for key, value in found.items():
        if f"{row['name']}/0/{key}" in fresh:
            measured = fresh[f"{row['name']}/0/{key}"].view(value.numpy().dtype)
            np.testing.assert_array_equal(value.numpy().ravel(), measured.ravel(), key)
        elif value.is_floating_point() and ("running" not in key or len(states) == 1):
            parts = zip(row["coefficients"], states, strict=True)
            mean = torch.stack([c * state[key].double() for c, state in parts]).sum(0)
            torch.testing.assert_close(value, mean.float(), rtol=1e-6, atol=1e-7, msg=key)


@pytest.mark.parametrize("case", PICKED)
def test_the_next_command_makes_what_was_measured(two_kinds: Path, call: Call, case: str) -> None:
    """Run as it is printed, whatever flags picked the snapshots."""
    flags, weights, left = PICKED[case]
    code, out, err = call(*ALL, *flags, "--candidates", "singles,averages", "--metric", "nll")
    assert code == 0, err
    value = read()
    assert {helpers.numbers_of([s["name"]])[0] for s in value["snapshots"]} == left
    (printed,) = [line for line in out.splitlines() if line.startswith("next: ")]
    words = shlex.split(printed.removeprefix("next: "))
    assert shlex.join(words) == value["decision"]["next"]
    assert words[:2] == ["ensemblekit", "average"]
    code, _, err = call(*words[1:])
    assert code == 0, err
    row = next(row for row in value["candidates"] if row["name"] == value["decision"]["ship"])
    assert row["kind"] == ("single" if len(left) == 1 else "averaged")
    (made,) = Path().glob("*.safetensors")
    assert_made(made, row, weights)


# --------------------------------------------------------------------- passes and the cache


def test_again(here: Path, call: Call) -> None:
    assert call(*ALL)[0] == 0
    before = helpers.contents(Path("out"))
    code, out, err = call(*ALL)
    assert code == 0
    assert "up to date" in out
    assert "forward passes" not in err
    code, out, _ = call(*ALL, "--json")
    assert json.loads(out) == read()
    assert helpers.contents(Path("out")) == before
    code, _, err = call(*ALL, "--margin", "0.3")
    assert code == 2
    assert "exists already" in err
    assert helpers.contents(Path("out")) == before


@pytest.mark.parametrize("name", ["report.html", "batch_norm.npz", "candidates.csv"])
def test_a_folder_that_is_not_whole_is_not_up_to_date(here: Path, call: Call, name: str) -> None:
    assert call(*ALL)[0] == 0
    Path("out", name).unlink()
    code, out, _ = call(*ALL)
    assert "up to date" not in out or Path("out", name).exists()
    assert code == 2 or Path("out", name).exists()


def test_changed_checkpoints_are_not_up_to_date(here: Path, call: Call) -> None:
    assert call(*FEW)[0] == 0
    state = torch.load("ckpts/snap_2.pt")
    state["state_dict"]["0.bias"] += 1
    torch.save(state, "ckpts/snap_2.pt")
    code, _, err = call(*FEW)
    assert code == 2
    assert "exists already" in err


def test_the_second_run_predicts_nothing(here: Path, call: Call) -> None:
    assert call(*ALL)[0] == 0
    first = read()
    assert first["passes"]["forward"] > 0
    assert first["passes"]["batch_norm"] > 0
    assert call(*ALL, "--force")[0] == 0
    again = read()
    assert again["passes"]["forward"] == 0
    assert again["passes"]["batch_norm"] == 0
    assert again["passes"]["reused"] >= first["passes"]["forward"]
    told = ("name", "rows", "evaluations", "gain", "combiner_params")
    rows = [[{k: row[k] for k in told} for row in c["candidates"]] for c in (first, again)]
    assert rows[0] == rows[1]
    assert left_behind(here) == ["out"]


def test_changed_code_is_predicted_anew(here: Path, call: Call) -> None:
    assert call(*FEW)[0] == 0
    with Path("net.py").open("a") as file:
        file.write("\n# another thought\n")
    assert call(*FEW, "--force")[0] == 0
    assert read()["passes"]["forward"] == 6


def test_no_cache_keeps_nothing(here: Path, call: Call) -> None:
    assert call(*ALL, "--cache-size", 0)[0] == 0
    cache = here.parent / "cache"
    assert not cache.exists() or not [p for p in cache.rglob("*") if p.is_file()]
    assert call(*ALL, "--cache-size", 0, "--force")[0] == 0
    assert read()["passes"]["forward"] > 0
    assert call(*FEW, "--cache-dir", "kept", "--force")[0] == 0
    assert [p for p in Path("kept").rglob("*") if p.is_file()]


def test_a_cache_that_is_too_small(here: Path, call: Call) -> None:
    code, _, err = call(*FEW, "--cache-size", "0.000001")
    assert code == 4
    assert "hint:" in err
    assert left_behind(here) == []


# ------------------------------------------------------------------------------- bad input

WRONG: dict[str, tuple[list[str], int, list[str]]] = {
    "no model": (["compare", "ckpts", "-o", "out", *VAL, *TEST], 2, ["--model"]),
    "no data": (["compare", "ckpts", "-o", "out", *MODEL], 2, ["--val-data"]),
    "training data alone": (["compare", "ckpts", "-o", "out", *MODEL, *TRAIN], 2, ["--val-data"]),
    "no checkpoints": ([*FEW, "nowhere"], 2, ["nowhere"]),
    "a narrower model": ([*FEW, "--model-arg", "classes=3"], 3, ["3.weight", "(4, 12)", "(3, 12)"]),
    "another model": ([*FEW, "--model-arg", "last=1"], 3, ["3.weight"]),
    "a model without BatchNorm": ([*FEW, "--model-arg", "norm=False"], 3, ["1.running_mean"]),
    "no such model": ([*FEW, "--model", "net.py:resnet"], 2, ["net.py", "resnet"]),
    "no such file": ([*FEW, "--model", "nets.py:mlp"], 2, ["nets.py"]),
    "an argument that it does not take": ([*FEW, "--model-arg", "depth=3"], 3, ["depth"]),
    "inputs of another shape": (
        [*FEW, "--val-data", "net.py:wide", "--test-data", "net.py:wide"],
        3,
        ["(128, 10)", "shapes"],
    ),
    "test inputs of another shape": ([*FEW, "--test-data", "net.py:wide"], 3, ["10"]),
    "labels above": ([*FEW, "--val-data", "net.py:beyond"], 3, ["1 to 4", "0 to 3"]),
    "labels below": ([*FEW, "--val-data", "net.py:below"], 3, ["-1 to 2", "0 to 3"]),
    "a label above in a late batch": (
        [*FEW, "--val-data", "net.py:beyond_late"],
        3,
        ["7", "0 to 3"],
    ),
    "labels above in the test data": ([*FEW, "--test-data", "net.py:beyond"], 3, ["1 to 4"]),
    "labels that are fractions": ([*FEW, "--val-data", "net.py:half_labels"], 3, ["labels"]),
    "no labels": ([*FEW, "--val-data", "net.py:unlabelled"], 3, ["no labels"]),
    "too few samples": ([*FEW, "--val-data", "net.py:few"], 3, ["val", "3 samples", "4 classes"]),
    "no samples": ([*FEW, "--val-data", "net.py:none"], 3, ["empty"]),
    "no test samples": ([*FEW, "--test-data", "net.py:none"], 3, ["empty"]),
    "no batches": ([*FEW, "--val-data", "net.py:no_batches"], 3, ["empty"]),
    "a model that says NaN": ([*FEW, "--model", "net.py:NotANumber"], 3, ["snap_1.pt", "NaN"]),
    "inputs that are NaN": ([*FEW, "--test-data", "net.py:not_numbers"], 3, ["NaN"]),
    "a loader that shuffles": (
        [*FEW, "--val-data", "net.py:loader?shuffle=True"],
        3,
        ["val", "shuffle=False"],
    ),
    "a loader that drops": (
        [*FEW, "--test-data", "net.py:loader?drop_last=True"],
        3,
        ["test", "8 of 200", "drop_last=False"],
    ),
    "augmented data": ([*FEW, "--val-data", "net.py:Noisy"], 3, ["val", "augment"]),
    "data that raise": ([*FEW, "--val-data", "net.py:raises"], 3, ["the images are gone"]),
    "data that are a number": ([*FEW, "--val-data", "net.py:number"], 2, ["int"]),
    "an unknown group": ([*FEW, "--candidates", "singels"], 2, ["singels", "singles"]),
    "no group": ([*FEW, "--candidates", ","], 2, ["--candidates"]),
    "an average of two numbers": ([*FEW, "--add", "mine=1,2"], 2, ["2", "3"]),
    "an average of words": ([*FEW, "--add", "mine=a,b,c"], 2, ["a,b,c"]),
    "an average without a name": ([*FEW, "--add", "1,2,3"], 2, ["--add", "NAME"]),
    "an average of nothing": ([*FEW, "--add", "mine=0,0,0"], 2, ["zero"]),
    "an average that is NaN": ([*FEW, "--add", "mine=nan,1,1"], 2, ["finite"]),
    "an average named like a snapshot": ([*FEW, "--add", "snap_1.pt=1,1,1"], 2, ["snap_1.pt"]),
    "an unknown metric": ([*FEW, "--metric", "acuracy"], 2, ["acuracy", "accuracy"]),
    "a metric of another task": ([*FEW, "--metric", "mse"], 2, ["mse", "accuracy"]),
    "a metric in no file": ([*FEW, "--metric", "mine.py:share"], 2, ["mine.py"]),
    "a metric that is not there": ([*FEW, "--metric", "net.py:nothing"], 2, ["nothing"]),
    "a metric that breaks": ([*FEW, "--metric", "net.py:broken"], 3, ["this metric is broken"]),
    "another task": ([*FEW, "--task", "regression"], 3, ["regression"]),
    "no such task": ([*FEW, "--task", "sums"], 2, ["sums"]),
    "a negative time": ([*FEW, "--max-latency-ms", "-1"], 2, ["--max-latency-ms"]),
    "a time that is NaN": ([*FEW, "--max-latency-ms", "nan"], 2, ["--max-latency-ms"]),
    "no members": ([*FEW, "--max-members", "0"], 2, ["--max-members"]),
    "negative bytes": ([*FEW, "--max-bytes", "-1"], 2, ["--max-bytes"]),
    "no bytes": ([*FEW, "--max-bytes", "0"], 2, ["--max-bytes"]),
    "odd bytes": ([*FEW, "--max-bytes", "5 apples"], 2, ["--max-bytes", "200MB"]),
    "nothing fits, with a unit": (
        [*FEW, "--max-bytes", "0.05 kB"],
        5,
        ["nothing fits", "raise the limit"],
    ),
    "a negative margin": ([*FEW, "--margin", "-0.1"], 2, ["--margin"]),
    "a margin that is NaN": ([*FEW, "--margin", "nan"], 2, ["--margin"]),
    "batches of nothing": ([*FEW, "--latency-batch", "0"], 2, ["--latency-batch"]),
    "a negative cache": ([*FEW, "--cache-size", "-1"], 2, ["--cache-size"]),
    "a cache that is NaN": ([*FEW, "--cache-size", "nan"], 2, ["--cache-size"]),
    "a cache without end": ([*FEW, "--cache-size", "inf"], 2, ["--cache-size"]),
    "BatchNorm of no samples": ([*FEW, "--bn-samples", "0"], 2, ["--bn-samples"]),
    "batches of no samples": ([*FEW, "--batch-size", "0"], 2, ["--batch-size"]),
    "an output inside nothing": ([*FEW, "-o", "no/such/out"], 2, ["no/such", "mkdir"]),
    "an output that is an input": ([*FEW, "-o", "ckpts/snap_1.pt", "--force"], 2, ["snap_1.pt"]),
    "an output that holds the inputs": ([*FEW, "-o", "ckpts", "--force"], 2, ["ckpts", "input"]),
    "an output that is code": ([*FEW, "-o", "net.py", "--force"], 2, ["net.py"]),
    "an output that is everything": ([*FEW, "-o", ".", "--force"], 2, ["input"]),
    "nothing fits": ([*FEW, "--max-bytes", "1"], 5, ["nothing fits", "bytes"]),
    "no gain": ([*ALL, "--candidates", "singles", "--require-gain"], 5, ["--require-gain"]),
    "a runtime that is not there": ([*FEW, "--runtime", "abacus"], 2, ["abacus", "torch"]),
}


SAYS_ENOUGH = ("must be", "valid", "expect", "write", "raised", "such as", "there is no file",
               "sum to zero", "has this name")  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_bad_input(here: Path, call: Call, case: str) -> None:
    """The message says what and where, the hint what to do; nothing is written."""
    args, code, words = WRONG[case]
    before = helpers.contents(here / "ckpts")
    found, out, err = call(*args, "--json")
    assert "This is a bug" not in err, err
    assert found == code, out + err
    value = json.loads(out)
    assert set(value) == {"schema_version", "error"}
    text = f"{value['error']['message']} {value['error']['hint']}"
    for word in words:
        assert word in text
    assert text.count("Traceback") == 0
    if code != 5:  # the report of a comparison that failed a check is there to be read
        assert left_behind(here) == []
    assert not [name for name in left_behind(here) if name.startswith(".")]
    assert helpers.contents(here / "ckpts") == before
    if case != "no gain":
        error = value["error"]
        assert error["hint"] or any(w in error["message"] for w in SAYS_ENOUGH), error["message"]


@pytest.mark.parametrize("split", ["val", "test"])
@pytest.mark.parametrize("target", ["beyond", "below", "beyond_late", "none", "few", "not_numbers", "wide", "half_labels", "unlabelled"])  # fmt: skip
def test_errors_of_data_say_which_data(here: Path, call: Call, target: str, split: str) -> None:
    """Two data sets are named on the line; the message says which of them is meant."""
    code, out, _ = call(*FEW, f"--{split}-data", f"net.py:{target}", "--json")
    error = json.loads(out)["error"]
    assert code == 3
    text = f"{error['message']} {error['hint']}"
    assert f"{split} data" in text or f"--{split}-data" in text or f":{target}" in text, text


def test_errors_without_json(here: Path) -> None:
    done = helpers.run(*FEW, "--val-data", "net.py:beyond", cwd=here)
    assert done.returncode == 3
    assert done.stdout == ""
    assert done.stderr.splitlines()[-1].startswith(("error: ", "hint: "))
    assert left_behind(here) == []


@pytest.mark.parametrize(
    "extra, code", [(["--max-bytes", "1"], 5), (["--candidates", "singles", "--require-gain"], 5)]
)
def test_a_failed_check_fails_again(here: Path, call: Call, extra: list[str], code: int) -> None:
    """Also where the report is there already."""
    for _ in range(2):
        found, _, err = call(*FEW, *extra)
        assert found == code, err
        assert "error: " in err
    if Path("out").exists():
        assert {p.name for p in Path("out").iterdir()} >= FILES


def test_strict(here: Path, call: Call) -> None:
    args = [a for a in FEW if a not in TRAIN[:1]]
    args = ["compare", "ckpts", "-o", "out", *MODEL, *VAL, *TEST, "--strict"]
    code, _, err = call(*args)
    assert code == 5
    assert "--strict" in err


def test_an_output_of_someone_else(here: Path, call: Call) -> None:
    Path("out").mkdir()
    Path("out", "thesis.tex").write_text("three years of work")
    for force in ([], ["--force"]):
        code, _, err = call(*FEW, *force)
        assert code == 2
        assert "out" in err
        assert "hint: " in err
        assert [p.name for p in Path("out").iterdir()] == ["thesis.tex"]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write")
def test_a_parent_that_cannot_be_written(here: Path, call: Call) -> None:
    Path("locked").mkdir(mode=0o555)
    code, out, _ = call(*FEW, "-o", "locked/out", "--json")
    assert code == 4
    assert "locked" in json.loads(out)["error"]["message"]


def test_a_cache_that_cannot_be_written(here: Path, call: Call) -> None:
    Path("file").write_text("")
    code, out, _ = call(*FEW, "--cache-dir", "file/cache", "--json")
    assert code == 4
    error = json.loads(out)["error"]
    assert "file/cache" in error["message"]
    assert "--cache-dir" in error["hint"]
    assert left_behind(here) == ["file"]


def test_an_output_inside_the_inputs(here: Path, call: Call) -> None:
    assert call(*FEW, "-o", "ckpts/report")[0] == 0
    code, out, _ = call(*FEW, "-o", "ckpts/report")
    assert code == 0
    assert "up to date" in out
    assert len(read(Path("ckpts/report"))["snapshots"]) == 3


# ---------------------------------------------------------------------------------- Ctrl-C


def default_signals() -> None:
    """Shells start what stands before `&` with SIGINT ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def seen(path: Path) -> list[tuple[str, str, str]]:
    """(snapshot, batch size, batch) of every forward pass of a batch of 10."""
    if not path.exists():
        return []
    lines = [line.split() for line in path.read_text().splitlines()]
    return [(a, b, c) for a, b, c in lines if b == "10"]


def test_an_interrupt_costs_little(here: Path) -> None:
    one = Problem("classification", lambda: comparing.mlp(norm=False), PROBLEMS["classes"]().data)
    save(here / "plain", comparing.trained(one, snapshots=3).weights)
    calls = here.parent / "calls"
    line = ["compare", "plain", "-o", "out", "--model", "net.py:Counting", "--device", "cpu",
            "--val-data", "net.py:slowly", "--candidates", "singles"]  # fmt: skip
    variables = {"CALLS": str(calls), "XDG_CACHE_HOME": str(here.parent / "cache")}
    with subprocess.Popen(
        helpers.command(*line), cwd=here, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, env=helpers.environment(**variables, NAP="0.1"), preexec_fn=default_signals,  # noqa: PLW1509
    ) as process:  # fmt: skip
        while len(seen(calls)) < 12 and process.poll() is None:
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        start = time.monotonic()
        out, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert time.monotonic() - start < 3
    assert out == ""
    assert "Traceback" not in errors
    assert "nothing half-written" in errors
    assert left_behind(here) == ["plain"]
    before = seen(calls)
    assert 12 <= len(before) < 60

    done = helpers.run(*line, cwd=here, env=variables)
    assert done.returncode == 0, done.stderr
    passed = seen(calls)
    first = passed[0][2]  # the probe looks at the first batch, in each run
    later = [one for one in passed if one[2] != first]
    # a batch counts when all three members have seen it: the one under way may be done again
    again = {batch for one in set(later) if later.count(one) > 1 for batch in one[2:]}
    assert len(again) <= 1, "a finished batch was predicted twice"
    assert len({batch for _, _, batch in passed}) == 20
    assert len(set(passed)) == 3 * 20
    assert read()["data"]["choosing"]["samples"] == 100
    assert left_behind(here) == ["out", "plain"]
