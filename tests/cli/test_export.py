"""`ensemblekit export` and `verify` as a user meets them: exit codes, one object, nothing left over."""

from __future__ import annotations

import importlib
import json
import os
import resource
import shlex
import shutil
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

from ensemblekit.cli.main import run
from tests import comparing, helpers
from tests.comparing import PROBLEMS, Problem, save
from tests.exporting import (
    CODE,
    RESULT,
    VERIFICATION,
    average,
    contract,
    facts,
    onnx_run,
    outputs,
    randomised,
    sha256,
)

torch.set_num_threads(1)

VAL = ["--val-data", "net.py:data"]
TRAIN = ["--train-data", "net.py:data"]
CPU = ["--device", "cpu"]
MODEL = ["--model", "net.py:mlp", *CPU]
QUICK = ["--exporter", "torchscript", "--fuse", "off"]
EXPORT = ["export", "ckpts", *MODEL, *VAL, *QUICK]
LAST = [*EXPORT, "--last", "1"]
FILES = ["model.onnx", "model.onnx.json"]


@pytest.fixture(scope="module")
def snapshots() -> tuple[comparing.Weights, ...]:
    return comparing.trained(PROBLEMS["classes"](), snapshots=3).weights


@pytest.fixture(scope="module")
def plain() -> tuple[comparing.Weights, ...]:
    one = Problem("classification", lambda: comparing.mlp(norm=False), PROBLEMS["classes"]().data)
    return comparing.trained(one, snapshots=2).weights


@pytest.fixture
def here(
    tmp_path: Path,
    snapshots: Sequence[comparing.Weights],
    plain: Sequence[comparing.Weights],
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Path]:
    """A working directory with `net.py`, `ckpts/`, and `plain/` without BatchNorm."""
    place = tmp_path / "work"
    place.mkdir()
    (place / "net.py").write_text(CODE)
    save(place / "ckpts", snapshots)
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


Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(capfd: pytest.CaptureFixture[str]) -> Call:
    """The command in this process: exit code, stdout, stderr, C++ libraries' words included."""

    def called(*args: object) -> tuple[int, str, str]:
        capfd.readouterr()
        code = run([str(a) for a in args])
        seen = capfd.readouterr()
        assert "This is a bug" not in seen.err, seen.err
        return code, seen.out, seen.err

    return called


def left_behind(place: Path) -> list[str]:
    """What is in the working directory and was not there before."""
    return sorted({p.name for p in place.iterdir()} - {"net.py", "ckpts", "plain", "__pycache__"})


def test_points() -> torch.Tensor:
    x: torch.Tensor = PROBLEMS["classes"]().data["test"][0]
    return x


test_points.__test__ = False  # type: ignore[attr-defined]  # data


# ------------------------------------------------------------------------------ what works


def test_the_installed_command(here: Path, snapshots: Sequence[comparing.Weights]) -> None:
    line = ["export", "ckpts", *MODEL, *TRAIN, *VAL]
    done = helpers.run(*line, cwd=here)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("verified on cpu: ")
    assert lines[1].startswith("accuracy: ")
    assert lines[-1].startswith("exported average (fp32, ")
    assert lines[-1].endswith("-> model.onnx")
    for noise in ("Warning", "[torch.onnx]", "onnxscript", "Captured", "DeprecationWarning"):
        assert noise not in done.stdout + done.stderr
    assert left_behind(here) == FILES
    found = json.loads(Path("model.onnx.json").read_text())
    assert found["command"] == ["ensemblekit", *line]
    assert found["sha256"] == sha256("model.onnx")

    checked = helpers.run("verify", "model.onnx", "ckpts", *MODEL, *TRAIN, *VAL, cwd=here)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert checked.stdout.startswith("verified on cpu: ")
    assert left_behind(here) == FILES


def test_json(here: Path, call: Call) -> None:
    code, out, err = call("export", "ckpts", *MODEL, *TRAIN, *VAL, "--json", *QUICK)
    assert (code, err) == (0, "")
    assert len(out.splitlines()) == 1
    value = json.loads(out)
    assert value.keys() >= RESULT
    assert value["schema_version"] == 1
    assert value["output"] == "model.onnx"
    assert value["sha256"] == sha256("model.onnx")
    assert value["opset"] == 20
    assert value["inputs"] == [{"name": "input", "type": "tensor(float)", "shape": ["batch", 5]}]
    assert value["outputs"] == [{"name": "logits", "type": "tensor(float)", "shape": ["batch", 4]}]
    found = value["verification"]
    assert found.keys() >= VERIFICATION
    assert found["provider"] == "cpu"
    assert {1, 2} < set(found["batch_sizes"])
    assert found["passed"] is True
    assert found["decision_flips"] == 0
    assert 0 <= found["max_abs_diff"] < 1e-4
    x, y = PROBLEMS["classes"]().data["val"]
    accuracy = float((onnx_run("model.onnx", x).argmax(1) == y.numpy()).mean())
    assert found["metric_onnx"] == pytest.approx(accuracy)
    assert value["bytes"] == Path("model.onnx").stat().st_size


def test_samples_are_counted_once(here: Path, call: Call) -> None:
    """200 samples are 200 samples, in however many batch sizes the first ones are run."""
    _, out, _ = call(*LAST, "--json")
    assert json.loads(out)["verification"]["samples"] == 200


def test_progress_and_warnings_go_to_stderr(here: Path, call: Call) -> None:
    code, out, err = call(*EXPORT)
    assert code == 0
    assert "BatchNorm" in err
    assert "BatchNorm" not in out
    assert "verifying" not in out
    code, out, err = call("-q", *EXPORT, "-o", "b.onnx")
    assert (code, err) == (0, "")
    assert "exported" in out


def test_what_the_users_code_prints_is_not_data(here: Path, call: Call) -> None:
    code, out, err = call(
        "export", "plain", "--model", "net.py:Chatty", *CPU, *VAL, *QUICK, "--json"
    )
    assert code == 0, out
    assert json.loads(out)["verification"]["passed"]
    assert "the model says hello" in err


def test_a_dry_run_leaves_nothing(here: Path, call: Call) -> None:
    code, out, _ = call(*LAST, "--dry-run", "--triton", "models")
    assert code == 0
    assert "would export" in out
    assert left_behind(here) == []
    code, out, _ = call(*LAST, "--dry-run", "--json")
    value = json.loads(out)
    assert (code, value["output"]) == (0, None)
    assert value["verification"]["passed"]
    assert left_behind(here) == []


@pytest.mark.parametrize(
    "args, word",
    [
        ([*EXPORT], "BatchNorm"),
        (
            ["export", "plain", "--model", "net.py:Plain", *CPU, *QUICK,
             "--input", "x:float32[batch,5]"],
            "generated",
        ),
    ],
    ids=["averaged statistics", "generated samples"],
)  # fmt: skip
def test_strict(here: Path, call: Call, args: list[str], word: str) -> None:
    """What is printed as a warning without the flag is a failure with it, and nothing is written."""
    code, _, err = call(*args, "--dry-run")
    assert code == 0
    assert "warning" in err
    code, out, _ = call(*args, "--strict", "--json")
    assert code == 5
    message = json.loads(out)["error"]["message"]
    assert "--strict" in message
    assert word in message
    assert left_behind(here) == []


def test_strict_is_not_forgotten_by_up_to_date(here: Path, call: Call) -> None:
    assert call(*EXPORT)[0] == 0
    assert call(*EXPORT)[0] == 0
    assert call(*EXPORT, "--strict")[0] == 5


def test_class_names_and_facts(here: Path, call: Call) -> None:
    Path("names.txt").write_text("cat\ndog\nowl\nfrö\n", encoding="utf-8")
    Path("names.json").write_text('["cat", "dog", "owl", "frö"]', encoding="utf-8")
    for n, file in enumerate(("names.txt", "names.json")):
        args = [
            "-o",
            f"{n}.onnx",
            "--class-names",
            file,
            "--meta",
            "mean=0.5,0.4",
            "--meta",
            "a=b=c",
        ]
        assert call(*LAST, *args)[0] == 0
        found = facts(f"{n}.onnx")
        assert json.loads(found["class_names"]) == ["cat", "dog", "owl", "frö"]
        assert (found["mean"], found["a"]) == ("0.5,0.4", "b=c")


@pytest.mark.parametrize("names", [["a", "b", "c"], ["a", "b", "c", "d", "e"], []])
@pytest.mark.parametrize("kind", [[], ["--ensemble", "--output-kind", "probabilities"]])
def test_class_names_of_another_count(
    here: Path, call: Call, names: list[str], kind: list[str]
) -> None:
    Path("names.json").write_text(json.dumps(names))
    code, out, err = call(*EXPORT, *kind, "--class-names", "names.json")
    assert (code, out) == (2, "")
    assert f"--class-names: {len(names)} names for 4 classes" in err
    assert left_behind(here) == ["names.json"]


def test_settings_from_the_environment(
    here: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ENSEMBLEKIT_OUTPUT_KIND", "probabilities")
    monkeypatch.setenv("ENSEMBLEKIT_OUTPUT", "other.onnx")
    assert call(*LAST)[0] == 0
    assert contract("other.onnx")[-1][0] == "probabilities"


# ---------------------------------------------------------------------------- up to date


def test_up_to_date(here: Path, call: Call) -> None:
    Path("names.txt").write_text("a\nb\nc\nd\n")
    line = [*LAST, "--class-names", "names.txt"]
    assert call(*line)[0] == 0
    before = helpers.contents(here)
    code, out, err = call(*line)
    assert code == 0
    assert "up to date" in out
    assert "exporting" not in err
    code, out, _ = call(*line, "--json")
    value = json.loads(out)
    assert value["up_to_date"]
    assert value.keys() >= RESULT
    assert helpers.contents(here) == before

    for more in (["--meta", "a=b"], ["--output-kind", "probabilities"], ["--opset", "19"],
                 ["--last", "2"], ["--limit", "50"], ["--precision", "fp16"]):  # fmt: skip
        code, _, err = call(*line, *more)
        assert code == 2, more
        assert "exists already" in err
    assert helpers.contents(here) == before
    assert call(*line, "--meta", "a=b", "--force")[0] == 0
    assert facts("model.onnx")["a"] == "b"


def changed_checkpoint() -> None:
    state = torch.load("ckpts/snap_3.pt")
    state["state_dict"]["0.bias"] += 1
    torch.save(state, "ckpts/snap_3.pt")


def changed_model() -> None:
    with Path("net.py").open("a") as file:
        file.write("\n# another thought\n")


def changed_names() -> None:
    Path("names.txt").write_text("w\nx\ny\nz\n")


def changed_output() -> None:
    path = Path("model.onnx")
    path.write_bytes(path.read_bytes()[:-3])


def lost_manifest() -> None:
    Path("model.onnx.json").unlink()


@pytest.mark.parametrize(
    "change", [changed_checkpoint, changed_model, changed_names, changed_output, lost_manifest]
)
def test_changed_inputs_are_not_up_to_date(
    here: Path, call: Call, change: Callable[[], None]
) -> None:
    Path("names.txt").write_text("a\nb\nc\nd\n")
    line = [*LAST, "--class-names", "names.txt"]
    assert call(*line)[0] == 0
    change()
    code, out, err = call(*line)
    assert code == 2, out
    assert "exists already" in err
    assert "--force" in err
    code, out, _ = call(*line, "--force")
    assert code == 0
    assert "up to date" not in out
    assert call(*line)[1].count("up to date") == 1


def test_a_lost_triton_folder_is_not_up_to_date(here: Path, call: Call) -> None:
    line = [*LAST, "--triton", "models"]
    assert call(*line)[0] == 0
    shutil.rmtree("models")
    code, out, _ = call(*line)
    assert Path("models/model/config.pbtxt").exists() or code == 2, out


# ------------------------------------------------------------------------------- bad input

PLAIN = ["export", "plain", *CPU, *VAL, "--model"]
SPEC = ["--input", "x:float32[batch,5]"]
WRONG: dict[str, tuple[list[str], int, list[str]]] = {
    "no model": (["export", "ckpts", *CPU, *SPEC], 2, ["--model"]),
    "no model, data": (["export", "ckpts", *CPU, *VAL], 2, ["--model"]),
    "no data": (["export", "ckpts", *MODEL], 2, ["--val-data", "--input"]),
    "no checkpoints": (["export", "nowhere", *MODEL, *VAL], 2, ["nowhere"]),
    "another ending": ([*EXPORT, "-o", "model.pt"], 2, ["model.pt", ".onnx"]),
    "no name": ([*EXPORT, "-o", ""], 2, [".onnx"]),
    "no such folder": ([*EXPORT, "-o", "no/such/m.onnx"], 2, ["no/such", "mkdir"]),
    "a folder": ([*EXPORT, "-o", "folder.onnx"], 2, ["folder.onnx", "folder"]),
    "an output that exists": ([*EXPORT, "-o", "there.onnx"], 2, ["there.onnx", "--force"]),
    "data that exist": ([*EXPORT, "-o", "data.onnx"], 2, ["data.onnx.data", "--force"]),
    "an output that is an input": (
        ["export", "input.onnx", *MODEL, *VAL, "-o", "input.onnx", "--force"],
        2,
        ["input.onnx", "also an input"],
    ),
    "an unknown provider": ([*EXPORT, "--provider", "rocm"], 2, ["rocm", "cuda"]),
    "an unknown precision": ([*EXPORT, "--precision", "fp8"], 2, ["fp8", "fp16"]),
    "an unknown exporter": ([*EXPORT, "--exporter", "jit"], 2, ["jit", "dynamo"]),
    "an unknown combiner": ([*EXPORT, "--ensemble", "--combiner", "medain"], 2, ["medain", "mean"]),
    "a combiner of nothing": ([*EXPORT, "--combiner", "vote"], 2, ["--combiner", "--ensemble"]),
    "a fitted combiner": (
        [*EXPORT, "--ensemble", "--combiner", "temperature"],
        2,
        ["temperature", "--candidate"],
    ),
    "two kinds": ([*EXPORT, "--ensemble", "--coefficients", "1,1,1"], 2, ["--ensemble", "--coefficients"]),
    "coefficients for others": ([*EXPORT, "--coefficients", "1,1"], 2, ["2", "3"]),
    "coefficients in words": ([*EXPORT, "--coefficients", "a,b,c"], 2, ["a,b,c"]),
    "coefficients of nothing": ([*EXPORT, "--coefficients", "1,-1,0"], 2, ["zero"]),
    "a candidate from nowhere": ([*EXPORT, "--candidate", "uniform"], 2, ["--from"]),
    "a comparison without a candidate": ([*EXPORT, "--from", "x.json"], 2, ["--candidate"]),
    "no such comparison": (
        [*EXPORT, "--candidate", "uniform", "--from", "x.json"],
        2,
        ["x.json", "compare"],
    ),
    "no comparison": ([*EXPORT, "--candidate", "uniform", "--from", "net.py"], 3, ["net.py"]),
    "static without data": ([*EXPORT, "--precision", "int8-static"], 2, ["--train-data"]),
    "an opset of old": ([*EXPORT, "--opset", "11"], 2, ["--opset", "18"]),
    "--bn error": ([*EXPORT, "--bn", "error"], 5, ["BatchNorm"]),
    "--bn recompute": ([*EXPORT, "--bn", "recompute"], 2, ["--train-data"]),
    "a spec without a type": ([*EXPORT, "--input", "x"], 2, ["NAME:TYPE[SIZES]"]),
    "a spec of another type": ([*EXPORT, "--input", "x:int64[batch,5]"], 3, ["x", "float32"]),
    "a spec of another rank": ([*EXPORT, "--input", "x:float32[batch,2,5]"], 3, ["x", "float32"]),
    "a spec that the model does not take": (
        ["export", "ckpts", *MODEL, "--bn", "average", "--input", "x:float32[batch,7]"],
        3,
        ["7", "5"],
    ),
    "a fact without a value": ([*EXPORT, "--meta", "mean"], 2, ["mean", "NAME=VALUE"]),
    "our own fact": ([*EXPORT, "--meta", "ensemblekit=1"], 2, ["ensemblekit"]),
    "no class names": ([*EXPORT, "--class-names", "nowhere.txt"], 2, ["nowhere.txt"]),
    "class names that are no list": ([*EXPORT, "--class-names", "map.json"], 2, ["map.json"]),
    "class names that are no text": ([*EXPORT, "--class-names", "input.onnx"], 2, ["input.onnx"]),
    "probabilities of a regression": (
        ["export", "plain", "--model", "net.py:Plain", *CPU, "--val-data", "net.py:values",
         "--output-kind", "probabilities"],
        2,
        ["probabilities", "regression"],
    ),
    "another model": ([*EXPORT, "--model-arg", "classes=3"], 3, ["3.weight", "(3, 12)"]),
    "data of another shape": ([*EXPORT, "--val-data", "net.py:wide"], 3, ["10"]),
    "data that raise": ([*EXPORT, "--val-data", "net.py:raises"], 3, ["the images are gone"]),
    "a model that raises": ([*PLAIN, "net.py:Raises"], 3, ["the model has no idea"]),
    "a model that raises, and no data": (
        ["export", "plain", *CPU, *SPEC, "--model", "net.py:Raises"],
        3,
        ["the model has no idea"],
    ),
    "a model that says NaN": ([*PLAIN, "net.py:NaN"], 3, ["NaN"]),
    "a model that says NaN, and no data": (
        ["export", "plain", *CPU, *SPEC, "--model", "net.py:NaN"],
        3,
        ["NaN"],
    ),
    "control flow on values": ([*PLAIN, "net.py:Branches"], 3, ["cannot be exported", "control flow"]),
    "a frozen batch": ([*PLAIN, "net.py:FrozenSteps"], 5, ["frozen", "len(x)", "--keep-failed"]),
    "a frozen batch, by the older exporter": (
        [*PLAIN, "net.py:Frozen", "--exporter", "torchscript"],
        5,
        ["batch", "x.shape[0]"],
    ),
    "a Triton model that is there": (
        [*LAST, "--triton", "served"],
        2,
        ["served/model", "--force"],
    ),
    "no task": (
        ["export", "plain", *CPU, "--model", "net.py:Plain", "--val-data", "net.py:unlabelled",
         "--task", "sums"],
        2,
        ["sums"],
    ),
    "no labels": ([*EXPORT, "--val-data", "net.py:unlabelled"], 3, ["label"]),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_bad_input(here: Path, call: Call, case: str) -> None:
    """The message says what and where; nothing is written, and nothing else is said."""
    args, code, words = WRONG[case]
    for name in ("there.onnx", "data.onnx.data"):
        Path(name).write_text("precious")
    Path("folder.onnx").mkdir()
    shutil.copyfile("ckpts/snap_1.pt", "input.onnx")
    Path("map.json").write_text('{"a": 1}')
    Path("served/model").mkdir(parents=True)
    before = helpers.contents(here)
    found, out, err = call(*args, "--json")
    assert found == code, out + err
    assert len(out.splitlines()) == 1
    value = json.loads(out)
    assert set(value) == {"schema_version", "error"}
    text = f"{value['error']['message']} {value['error']['hint']}"
    for word in words:
        assert word in text
    assert value["error"]["hint"] or len(value["error"]["message"]) > 20
    now = helpers.contents(here)
    assert {k: v for k, v in now.items() if "__pycache__" not in k} == before
    assert not [p for p in here.rglob("*") if p.name.endswith(".tmp")]
    assert err == "", err


def test_a_failed_graph_is_kept_on_request(here: Path, call: Call) -> None:
    code, _, err = call(*PLAIN, "net.py:FrozenSteps", "--keep-failed")
    assert code == 5
    assert "model.failed.onnx" in err
    assert left_behind(here) == ["model.failed.onnx"]
    assert contract("model.failed.onnx")


def test_a_frozen_batch_says_so_in_either_exporter(here: Path, call: Call) -> None:
    for exporter in ("dynamo", "torchscript"):
        code, _, err = call(*PLAIN, "net.py:FrozenSteps", "--exporter", exporter)
        assert code in (3, 5), err
        assert left_behind(here) == []


def test_a_provider_that_is_not_there(here: Path) -> None:
    """One message, and no C++ beside it."""
    import onnxruntime

    if torch.cuda.is_available():
        pytest.skip("it is there")
    before = helpers.contents(here)
    done = helpers.run(*EXPORT, "--provider", "cuda", cwd=here)
    assert done.returncode == 4, done.stderr
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    assert lines[0].startswith("error: ")
    assert "cuda" in lines[0]
    assert [line.split(":")[0] for line in lines] in (["error"], ["error", "hint"]), done.stderr
    assert helpers.contents(here) == before
    assert "CPUExecutionProvider" in onnxruntime.get_available_providers()


# ------------------------------------------------------------- the machine, and Ctrl-C


def limited(size: int) -> Callable[[], None]:
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


@pytest.mark.parametrize("size", [700, 1700])
def test_a_full_disk(here: Path, size: int) -> None:
    """In the graph, or in the manifest: the older output stays."""
    for name in FILES:
        Path(name).write_text(f"older {name}")
    done = subprocess.run(
        helpers.command(*LAST, "--force", "--json"), cwd=here, env=helpers.environment(),
        capture_output=True, text=True, preexec_fn=limited(size), timeout=60,
    )  # fmt: skip
    assert done.returncode == 4, done.stdout + done.stderr
    error = json.loads(done.stdout)["error"]
    assert error["kind"] == "machine"
    assert "model.onnx" in error["message"]
    assert left_behind(here) == FILES
    assert [Path(name).read_text() for name in FILES] == [f"older {name}" for name in FILES]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write")
def test_a_folder_that_cannot_be_written(here: Path, call: Call) -> None:
    Path("locked").mkdir(mode=0o555)
    code, out, _ = call(*LAST, "-o", "locked/m.onnx", "--json")
    assert code == 4
    assert "locked" in json.loads(out)["error"]["message"]


def test_a_system_that_cannot_be_written(here: Path, call: Call) -> None:
    code, out, _ = call(*LAST, "-o", "/sys/m.onnx", "--json")
    assert code == 4
    assert "/sys/m.onnx" in json.loads(out)["error"]["message"]


def default_signals() -> None:
    """Shells start what stands before `&` with SIGINT ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signal(here: Path, number: signal.Signals, code: int) -> None:
    """While the file in its workshop is verified; the older output stays."""
    Path("model.onnx").write_text("older")
    line = ["export", "plain", "--model", "net.py:Plain", *CPU, *QUICK, "--force",
            "--val-data", "net.py:napping"]  # fmt: skip
    with subprocess.Popen(
        helpers.command(*line), cwd=here, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, env=helpers.environment(NAP="0.15"), preexec_fn=default_signals,  # noqa: PLW1509
    ) as process:  # fmt: skip
        while process.poll() is None and not list(here.glob(".model.onnx.*/model.onnx")):
            time.sleep(0.01)
        process.send_signal(number)
        start = time.monotonic()
        out, errors = process.communicate(timeout=60)
    assert process.returncode == code, errors
    assert time.monotonic() - start < 3
    assert out == ""
    assert "Traceback" not in errors
    assert "nothing half-written" in errors
    assert [name for name in left_behind(here) if name != "begun"] == ["model.onnx"]
    assert Path("model.onnx").read_text() == "older"


INTERRUPTED = """
import os, signal, sys

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "torch.distributed.fsdp" and "torch._dynamo" in sys.modules:
            sys.meta_path.remove(self)
            open("begun", "w").close()
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Finder())
from ensemblekit.cli.main import main
main()
"""


def test_an_interrupt_that_torch_swallows(here: Path) -> None:
    """Importing `torch._dynamo`, half a second, turns Ctrl-C into a module without attributes."""
    line = ["export", "plain", "--model", "net.py:Plain", *CPU, *VAL, "--ensemble"]
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, *line], cwd=here, capture_output=True, text=True,
        env=helpers.environment(), preexec_fn=default_signals, timeout=60,
    )  # fmt: skip
    if not Path("begun").exists():
        pytest.skip("this torch imports other modules")
    # Python ends by the signal itself where it went through `exec`; a shell calls both 130
    assert done.returncode in (130, -signal.SIGINT), done.stderr
    assert "error" not in done.stderr
    assert "nothing half-written" in done.stderr
    assert left_behind(here) == ["begun"]


# ---------------------------------------------------------------------------------- Triton


def parsed(text: str) -> dict[str, Any]:
    """config.pbtxt in its text format: messages as dicts, repeated fields as lists."""
    words = shlex.split(text.replace("[", " [ ").replace("]", " ] ").replace(",", " , ")
                        .replace("{", " { ").replace("}", " } "), posix=True)  # fmt: skip

    def value() -> Any:
        word = words.pop(0)
        if word == "{":
            return message("}")
        if word == "[":
            found = []
            while words[0] != "]":
                if words[0] == ",":
                    words.pop(0)
                found.append(value())
            words.pop(0)
            return found
        return word

    def message(end: str | None) -> dict[str, Any]:
        found: dict[str, Any] = {}
        while words and words[0] != end:
            key = words.pop(0)
            assert key.rstrip(":").replace("_", "").isalpha(), key
            assert key.endswith(":") or words[0] in ("{", "["), key
            found[key.rstrip(":")] = value()
        if end is not None:
            words.pop(0)
        return found

    whole = message(None)
    assert not words
    return whole


def test_a_triton_repository(here: Path, call: Call) -> None:
    line = [*LAST, "-o", "birds.onnx", "--triton", "models"]
    code, out, _ = call(*line, "--json")
    assert code == 0, out
    assert json.loads(out)["triton"] == "models/birds"
    files = sorted(str(p.relative_to("models")) for p in Path("models").rglob("*") if p.is_file())
    assert files == ["birds/1/model.onnx", "birds/config.pbtxt"]
    assert sha256("models/birds/1/model.onnx") == sha256("birds.onnx")
    found = parsed(Path("models/birds/config.pbtxt").read_text())
    assert found["name"] == "birds"
    assert found["backend"] == "onnxruntime"
    assert int(found["max_batch_size"]) > 0
    assert found["input"] == [{"name": "input", "data_type": "TYPE_FP32", "dims": ["5"]}]
    assert found["output"] == [{"name": "logits", "data_type": "TYPE_FP32", "dims": ["4"]}]
    assert found["dynamic_batching"] == {}
    assert found["instance_group"] == [{"kind": "KIND_CPU"}]

    assert call(*LAST, "-o", "birds.onnx", "--triton", "models", "--meta", "a=b")[0] == 2
    assert facts("birds.onnx").get("a") is None
    assert call(*line, "--meta", "a=b", "--force")[0] == 0
    assert facts("models/birds/1/model.onnx")["a"] == "b"


def test_a_triton_model_of_a_fixed_batch(here: Path, call: Call) -> None:
    line = ["export", "plain", "--model", "net.py:Plain", *CPU, *QUICK, "--triton", "models"]
    code, out, err = call(*line, "--input", "x:float32[4,5]", "--json")
    assert code == 0, out + err
    found = parsed(Path("models/model/config.pbtxt").read_text())
    assert found["max_batch_size"] == "0"
    assert found["input"][0]["dims"] == ["4", "5"]
    assert found["output"][0]["dims"] == ["4", "4"]
    assert "dynamic_batching" not in found


def test_a_triton_model_of_two_inputs(here: Path, call: Call) -> None:
    from tests.exporting import Named

    save(here / "named", randomised(Named))
    code, out, err = call(
        "export", "named", "--model", "net.py:Pair", *CPU, *QUICK, "--triton", "models",
        "--input", "left:float32[batch,5]", "--input", "right:float32[batch,2]", "--json",
    )  # fmt: skip
    assert code == 0, out + err
    found = parsed(Path("models/model/config.pbtxt").read_text())
    assert [(i["name"], i["dims"]) for i in found["input"]] == [("left", ["5"]), ("right", ["2"])]


@pytest.mark.parametrize("nature", ["file", "missing parent"])
def test_a_triton_folder_that_cannot_be(here: Path, call: Call, nature: str) -> None:
    Path("models").write_text("precious") if nature == "file" else None
    target = "models" if nature == "file" else "/sys/models"
    code, out, _ = call(*LAST, "--triton", target, "--json")
    assert code in (2, 4), out
    assert target in json.loads(out)["error"]["message"]
    assert left_behind(here) == (["models"] if nature == "file" else [])


# ---------------------------------------------------------------------------------- verify


def test_verify_of_what_is_no_onnx(here: Path, call: Call) -> None:
    for name in ("net.py", "ckpts/snap_1.pt"):
        code, out, err = call("verify", name, "ckpts", *MODEL, *VAL, "--json")
        assert (code, err) == (5, "")
        failed = json.loads(out)["verification"]["failed"]
        assert failed["check"] == "file"
        assert call("verify", name, "ckpts", *MODEL, *VAL)[0] == 5


def test_verify_says_what_it_found(here: Path, call: Call) -> None:
    assert call(*EXPORT, "--ensemble", "--output-kind", "probabilities")[0] == 0
    before = helpers.contents(here)
    args = ["model.onnx", "ckpts", *MODEL, *VAL]
    code, out, err = call("verify", *args)
    assert (code, err) == (0, ""), out
    assert out.startswith("verified on cpu")
    code, out, _ = call("verify", *args, "--json")
    value = json.loads(out)
    assert code == 0
    assert value["schema_version"] == 1
    assert value["file"] == "model.onnx"
    assert value["verification"].keys() >= VERIFICATION
    assert value["candidate"]["name"] == "ensemble"
    code, out, _ = call("verify", *args, "--json", "--ensemble", "--combiner", "mean-logits")
    value = json.loads(out)
    assert code == 5
    assert value["verification"]["failed"]["check"] == "numbers"
    assert value["verification"]["passed"] is False
    code, out, _ = call("verify", *args, "--coefficients", "1,1,1", "--bn", "average")
    assert code == 5
    assert "numbers: outputs differ" in out
    assert helpers.contents(here) == before


VERIFY_WRONG: dict[str, tuple[list[str], int, list[str]]] = {
    "no such file": (["nowhere.onnx", "ckpts", *MODEL, *VAL], 2, ["nowhere.onnx"]),
    "a folder": (["ckpts", "ckpts", *MODEL, *VAL], 2, ["ckpts"]),
    "no checkpoints": (["a.onnx"], 2, ["CHECKPOINTS"]),
    "no model": (["a.onnx", "ckpts", *SPEC], 2, ["--model"]),
    "no data": (["a.onnx", "ckpts", *MODEL], 2, ["--val-data"]),
    "a provider": (["a.onnx", "ckpts", *MODEL, *VAL, "--provider", "rocm"], 2, ["rocm"]),
    "two kinds": (
        ["a.onnx", "ckpts", *MODEL, *VAL, "--ensemble", "--coefficients", "1,1,1"],
        2,
        ["--ensemble"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", VERIFY_WRONG)
def test_verify_of_bad_input(here: Path, call: Call, case: str) -> None:
    args, code, words = VERIFY_WRONG[case]
    Path("a.onnx").write_bytes(b"no ONNX file")
    found, out, err = call("verify", *args, "--json")
    assert found == code, out + err
    error = json.loads(out)["error"]
    for word in words:
        assert word in f"{error['message']} {error['hint']}"


def test_average_then_export(
    here: Path, call: Call, snapshots: Sequence[comparing.Weights]
) -> None:
    """The two commands one after the other, as the README has them."""
    assert call("average", "ckpts", "-o", "averaged.safetensors", "--bn", "average")[0] == 0
    assert call("export", "averaged.safetensors", *MODEL, *VAL, *QUICK)[0] == 0
    x = test_points()
    wanted = outputs(comparing.mlp, average(snapshots), x)
    np.testing.assert_allclose(onnx_run("model.onnx", x), wanted, rtol=1e-4, atol=2e-5)
    assert left_behind(here) == ["averaged.safetensors", "averaged.safetensors.json", *FILES]


def test_the_command_that_compare_prints(here: Path, call: Call) -> None:
    """As it is printed, with what only the user knows behind it."""
    code, out, _ = call("compare", "ckpts", "-o", "out", *MODEL, *TRAIN, *VAL)
    assert code == 0
    name = json.loads(Path("out/comparison.json").read_text())["decision"]["ship"]
    code, out, err = call(*EXPORT, "--candidate", name, "--from", "out/comparison.json", "--json")
    assert code == 0, out + err
    assert json.loads(out)["candidate"]["name"] == name
