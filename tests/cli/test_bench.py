"""`ensemblekit bench` as a user meets it: tables, files, one JSON object, exit codes."""

from __future__ import annotations

import csv
import importlib.util
import json
import re
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from ensemblekit.cli.main import run
from tests import comparing, helpers
from tests.comparing import PROBLEMS, Weights, save
from tests.exporting import CODE, randomised

torch.set_num_threads(1)

CPU = ["--device", "cpu"]
MODEL = ["--model", "net.py:Plain", *CPU]
INPUT = ["--input", "x:float32[batch,5]"]
SHORT = ["--seconds", "0.01"]
TORCH = ["--runtime", "torch"]
BENCH = ["bench", "plain", *MODEL, *INPUT, *SHORT, "--batches", "1"]
FUSABLE = ["--runtime", "torch,torch-fused,onnxruntime"]

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def plain() -> list[Weights]:
    return randomised(lambda: comparing.mlp(norm=False))


@pytest.fixture
def here(tmp_path: Path, plain: list[Weights], monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory with `net.py` and `plain/`, three snapshots without BatchNorm."""
    place = tmp_path / "work"
    place.mkdir()
    (place / "net.py").write_text(CODE)
    save(place / "plain", plain)
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


@pytest.fixture
def call(capfd: pytest.CaptureFixture[str]) -> Call:
    """The command in this process: exit code, stdout, stderr, C++ libraries' words included."""

    def called(*args: object) -> tuple[int, str, str]:
        capfd.readouterr()
        code = run([str(a) for a in args])
        seen = capfd.readouterr()
        assert "This is a bug" not in seen.err, seen.err
        assert "Traceback" not in seen.out + seen.err
        return code, seen.out, seen.err

    return called


def left_behind(place: Path) -> list[str]:
    return sorted({p.name for p in place.iterdir()} - {"net.py", "plain", "__pycache__"})


def loaded(call: Call, *args: object) -> dict[str, Any]:
    code, out, _ = call(*args, "--json")
    assert code == 0
    assert len(out.splitlines()) == 1
    value: dict[str, Any] = json.loads(out)
    return value


# ------------------------------------------------------------------------------ what works


def test_the_installed_command(here: Path) -> None:
    done = helpers.run(*BENCH, *FUSABLE, cwd=here)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert re.search(r"candidate +runtime +precision +batch +p50 ms +\+- +p95 ms", lines[1])
    for name in ("single", "average", "ensemble of 3"):
        assert [line for line in lines if line.startswith(f" {name} ")]
    assert [line for line in lines if line.startswith("batch 1: ")]
    assert "threads, torch" in lines[-1]
    for noise in ("Warning", "[torch.onnx]", "onnxscript"):
        assert noise not in done.stdout + done.stderr
    assert left_behind(here) == []


def test_json(here: Path, call: Call) -> None:
    value = loaded(call, *BENCH, *TORCH, "--precision", "fp32,bf16", "--batches", "1,2")
    assert value["schema_version"] == 1
    rows = value["measurements"]
    assert [(r["precision"], r["batch_size"], r["candidate"]) for r in rows] == [
        (precision, size, name)
        for precision in ("fp32", "bf16")
        for size in (1, 2)
        for name in ("single", "average", "ensemble of 3")
    ]
    assert all(isinstance(row["p50_ms"], float) for row in rows)
    assert value["environment"]["device"] == "cpu"


def test_what_the_model_prints_is_not_data(here: Path, call: Call) -> None:
    (here / "net.py").write_text(CODE)
    value = loaded(call, *BENCH, *TORCH, "--model", "net.py:Chatty")
    assert len(value["measurements"]) == 3


@pytest.mark.parametrize(
    "flags, names",
    [
        (["--ensemble"], ["ensemble of 3"]),
        (["--ensemble", "--members", "2,3"], ["ensemble of 2", "ensemble of 3"]),
        (["--members", "1,2"], ["single", "average", "ensemble of 2"]),
        (["--coefficients", "1,1,2"], ["average"]),
        (["--coefficients", "0,0,1"], ["snap_3.pt"]),
        (["--last", "1"], ["single"]),
    ],
)
def test_candidates(here: Path, call: Call, flags: list[str], names: list[str]) -> None:
    value = loaded(call, *BENCH, *TORCH, *flags)
    assert [row["candidate"] for row in value["measurements"]] == names


def test_a_candidate_of_a_comparison(here: Path, call: Call) -> None:
    one = PROBLEMS["classes"]()
    save(here / "run", comparing.trained(one, snapshots=3).weights)
    data = ["--val-data", "net.py:data", "--train-data", "net.py:data"]
    model = ["--model", "net.py:mlp", *CPU]
    assert call("compare", "run", *model, *data, "-o", "cmp")[0] in (0, 5)
    compared = json.loads(Path("cmp/comparison.json").read_text())
    for kind in ("averaged", "ensemble"):
        candidate = next(c for c in compared["candidates"] if c["kind"] == kind)
        value = loaded(
            call, "bench", "run", *model, *data[:2], *SHORT, *TORCH, "--batches", "1",
            "--candidate", candidate["name"], "--from", "cmp/comparison.json",
        )  # fmt: skip
        (row,) = value["measurements"]
        assert row["candidate"] == candidate["name"]
        assert row["members"] == candidate["members"]
        assert row["agrees"] is True


def test_flags_of_measuring(here: Path, call: Call) -> None:
    value = loaded(
        call, *BENCH, *TORCH, "--threads", "2", "--cold", "--max-latency-ms", "1000", "--last", "1"
    )
    assert value["environment"]["threads"] == 2
    assert value["environment"]["caches"] == "cleared between runs"
    (target,) = value["within_latency"]
    assert target["candidate"] == "single"
    assert target["throughput_per_s"] > 1
    code, out, _ = call(*BENCH, *TORCH, "--max-latency-ms", "0.0000001")
    assert code == 0
    assert out.count("within 1e-07 ms: no row keeps it") == 3


def test_more_seconds_mean_more_runs(here: Path, call: Call) -> None:
    flags = [*BENCH, *TORCH, "--ensemble"]
    few, many = (
        loaded(call, *flags, "--seconds", seconds)["measurements"][0]["iterations"]
        for seconds in ("0.001", "0.1")
    )
    assert few < many


def test_members_that_cannot_be_fused_or_exported(here: Path, call: Call) -> None:
    (here / "net.py").write_text(
        CODE + "\n\nclass Waits(Plain):\n"
        "    def forward(self, x):\n"
        "        out = super().forward(x)\n"
        "        return out if float(out.sum()) < 1e9 else -out\n"
    )
    code, out, err = call(*BENCH, *FUSABLE, "--model", "net.py:Waits")
    assert code == 0, err
    assert "cannot be fused" in out
    value = loaded(call, *BENCH, "--runtime", "torch,torch-fused", "--model", "net.py:Waits")
    failed = [row for row in value["measurements"] if row["error"]]
    assert [(r["candidate"], r["runtime"]) for r in failed] == [("ensemble of 3", "torch-fused")]
    assert failed[0]["p50_ms"] is None


def test_torchs_own_remarks_are_not_the_users_business(here: Path) -> None:
    """Attention has a fast path without a rule for vmap, and torch asks for an issue on GitHub."""
    (here / "net.py").write_text(
        CODE + "\n\nclass Attends(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.encoder = nn.TransformerEncoderLayer(8, 2, 8, batch_first=True)\n"
        "        self.head = nn.Linear(8, 3)\n\n"
        "    def forward(self, x):\n"
        "        return self.head(self.encoder(x).mean(1))\n"
    )
    spec = importlib.util.spec_from_file_location("attends", "net.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    save(here / "run", randomised(module.Attends, 2))
    done = helpers.run(
        "bench", "run", "--model", "net.py:Attends", *CPU, "--input", "x:float32[batch,4,8]", *SHORT,
        "--runtime", "torch,torch-fused", "--ensemble", "--batches", "1", cwd=here,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    assert "other outputs" not in done.stdout


def test_an_output_that_is_no_number(here: Path, call: Call) -> None:
    value = loaded(call, *BENCH, *TORCH, "--model", "net.py:NaN")
    assert all(row["agrees"] is False for row in value["measurements"])
    assert value["summary"] == []


# ----------------------------------------------------------------------------------- files


def test_files(here: Path, call: Call) -> None:
    code, _, err = call(
        *BENCH, "--runtime", "torch,torch-fused", "--members", "1,2,3",
        "--export-markdown", "b.md", "--export-csv", "b.csv", "--export-html", "b.html",
    )  # fmt: skip
    assert code == 0, err
    assert left_behind(here) == ["b.csv", "b.html", "b.md"]
    with Path("b.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["candidate"], row["runtime"]) for row in rows] == [
        ("single", "torch"), ("average", "torch"),
        ("ensemble of 2", "torch"), ("ensemble of 2", "torch-fused"),
        ("ensemble of 3", "torch"), ("ensemble of 3", "torch-fused"),
    ]  # fmt: skip
    assert all(float(row["p50_ms"]) > 0 and row["error"] == "" for row in rows)
    lines = Path("b.md").read_text().splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert len(table) == 2 + len(rows)
    assert len({line.count("|") for line in table}) == 1
    assert "<h2>Latency over members</h2>" in Path("b.html").read_text()


@pytest.mark.parametrize("flag", ["--export-markdown", "--export-csv", "--export-html"])
def test_existing_files_are_kept(here: Path, call: Call, flag: str) -> None:
    Path("out").write_text("older")
    code, out, err = call(*BENCH, *TORCH, flag, "out")
    assert (code, out) == (2, "")
    assert "out exists already" in err
    assert Path("out").read_text() == "older"
    assert call(*BENCH, *TORCH, "--last", "1", flag, "out", "--force")[0] == 0
    assert Path("out").read_text() != "older"


@pytest.mark.parametrize("flag", ["--export-markdown", "--export-csv", "--export-html"])
def test_folders_that_are_missing(here: Path, call: Call, flag: str) -> None:
    code, out, err = call(*BENCH, *TORCH, flag, "nowhere/out")
    assert (code, out) == (2, "")
    assert "nowhere does not exist" in err
    assert left_behind(here) == []


# ------------------------------------------------------------------------------ what fails

BARE = ["bench", "plain", *SHORT, "--batches", "1"]


@pytest.mark.parametrize(
    "line, code, said",
    [
        ([*BENCH, "--runtime", "tourch"], 2, "unknown runtime 'tourch'; valid: torch, "),
        ([*BENCH, *TORCH, "--precision", "fp33"], 2, "unknown precision 'fp33'"),
        ([*BENCH, "--runtime", "torch-cudagraph"], 4, "CUDA graphs need --device cuda"),
        ([*BENCH, "--runtime", "torch,torch-cudagraph"], 4, "runtime 'torch-cudagraph' cannot"),
        ([*BENCH, "--provider", "cuda"], 4, "'cuda'"),
        ([*BENCH, "--provider", "cuda", "--runtime", "onnxruntime"], 4, "'cuda'"),
        ([*BENCH, "--runtime", "onnxruntime", "--precision", "tf32"], 4, "precision of GPUs"),
        ([*BENCH, *TORCH, "--precision", "tf32"], 4, "precision of GPUs"),
        ([*BARE, *CPU, *INPUT, *TORCH], 2, "--model"),
        ([*BARE, *MODEL, *TORCH], 2, "--input"),
        ([*BARE, *MODEL, "--input", "x:float32[batch,7]", *TORCH], 3, r"cannot take the data"),
        ([*BARE, *MODEL, "--val-data", "net.py:wide", *TORCH], 3, "cannot take the data"),
        ([*BARE, *MODEL, "--input", "x:float99[batch,5]", *TORCH], 2, "float99"),
        ([*BENCH, *TORCH, "--model", "net.py:Pair"], 3, "do not fit the model"),
        ([*BENCH, *TORCH, "--model", "net.py:Raises"], 3, "the model has no idea"),
        ([*BENCH, *TORCH, "--model", "net.py:nowhere"], 2, "nowhere"),
        (["bench", "nothing", *MODEL, *INPUT], 2, "nothing: no such file or folder"),
        ([*BENCH, *TORCH, "--batches", "x"], 2, "--batches x: expected whole numbers"),
        ([*BENCH, *TORCH, "--batches", "0"], 2, "0 is no number"),
        ([*BENCH, *TORCH, "--batches", ","], 2, "at least one batch size"),
        ([*BENCH, *TORCH, "--members", "9"], 2, "there are 3 checkpoints"),
        ([*BENCH, *TORCH, "--members", "-1"], 2, "-1 is no number"),
        ([*BENCH, *TORCH, "--seconds", "0"], 2, "must be more than 0"),
        ([*BENCH, *TORCH, "--seconds", "nan"], 2, "must be more than 0"),
        ([*BENCH, *TORCH, "--threads", "0"], 2, "threads"),
        ([*BENCH, *TORCH, "--max-latency-ms", "nan"], 2, "latency"),
        ([*BENCH, *TORCH, "--coefficients", "1,2"], 2, "2 coefficients for 3 snapshots"),
        ([*BENCH, *TORCH, "--coefficients", "a"], 2, "'a' is not a list of numbers"),
        ([*BENCH, *TORCH, "--ensemble", "--coefficients", "1,2,3"], 2, "only one of"),
        ([*BENCH, *TORCH, "--candidate", "single"], 2, "--from"),
        ([*BENCH, *TORCH, "--candidate", "x", "--from", "none.json"], 2, "none.json"),
        ([*BENCH, *TORCH, "--combiner", "nope"], 2, "unknown combiner 'nope'"),
        ([*BENCH, *TORCH, "--device", "cuda"], 4, "cuda"),
    ],
)
def test_exit_codes(here: Path, call: Call, line: list[str], code: int, said: str) -> None:
    if "cuda" in line and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    got, out, err = call(*line)
    assert (got, out) == (code, ""), err
    assert re.search(said, err), err
    assert len([text for text in err.splitlines() if text.startswith("error: ")]) == 1
    got, out, err = call(*line, "--json")
    assert got == code
    assert json.loads(out)["error"]["message"]


@pytest.mark.parametrize(
    "flags",
    [
        ["--last", "1", "--runtime", "torch-fused"],
        ["--last", "1", "--ensemble", *TORCH],
        ["--ensemble", "--members", "1", *TORCH],
        ["--combiner", "stack-ridge", *TORCH],
        ["--combiner", "vote", *TORCH],
        ["--batches", "1,1", *TORCH],
        ["--members", "2,2", *TORCH],
        ["--runtime", "torch,torch"],
        ["--precision", "fp32,fp32", *TORCH],
    ],
    ids=" ".join,
)
def test_odd_lines_are_no_bugs(here: Path, call: Call, flags: list[str]) -> None:
    code, out, err = call(*BENCH, *flags, "--json")
    assert code in (0, 2, 4), err
    rows = json.loads(out).get("measurements", [])
    places = [(r["candidate"], r["runtime"], r["precision"], r["batch_size"]) for r in rows]
    assert len(places) == len(set(places))  # nothing is measured twice


def test_quiet(here: Path, call: Call) -> None:
    code, out, err = call("-q", *BENCH, *TORCH)
    assert code == 0
    assert err == ""
    assert "single" in out
