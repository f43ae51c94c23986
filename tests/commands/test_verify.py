"""`verify` called from Python: the right file passes, any other one fails, and says at which check."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch

from ensemblekit import ModelOptions
from ensemblekit.commands.export import ExportOptions
from ensemblekit.commands.verify import VerifyResult, verify_file
from ensemblekit.errors import EnsembleKitError, UsageError
from ensemblekit.graphs import saving
from ensemblekit.selection import Selection
from tests import comparing
from tests.comparing import PROBLEMS, Problem, compared, problem, save
from tests.exporting import exported, left_in, model_of, randomised

torch.set_num_threads(1)
QUICK = {"exporter": "torchscript"}


@pytest.fixture(scope="module")
def points() -> Problem:
    return problem("classes")


@pytest.fixture(scope="module")
def made(points: Problem, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `ckpts` and one file of each kind."""
    folder = tmp_path_factory.mktemp("made")
    exported(folder, points, "recomputed.onnx", data=("train", "val"), **QUICK)
    exported(folder, points, "averaged.onnx", bn="average", **QUICK)
    exported(folder, points, "ensemble.onnx", ensemble=True, output_kind="probabilities", **QUICK)
    exported(folder, points, "vote.onnx", ensemble=True, combiner="vote", **QUICK)
    exported(folder, points, "last.onnx", selection=Selection(last=1), precision="fp16", **QUICK)
    return folder


def verified(
    file: Path,
    one: Problem,
    checkpoints: Any = None,
    *,
    data: Sequence[str] = ("val",),
    selection: Selection | None = None,
    output_kind: str | None = None,
    precision: str | None = None,
    **options: Any,
) -> VerifyResult:
    given = {f"{split}_data": one.data[split] for split in data}
    return verify_file(
        file,
        checkpoints or file.parent / "ckpts",
        model=ModelOptions(model=one.make(), device="cpu", **given, **one.options),
        options=ExportOptions(**options),
        selection=selection,
        output_kind=output_kind,
        precision=precision,
    )


def said(result: VerifyResult) -> str | None:
    """The check that said no."""
    assert (result.verification["failed"] is None) == result.verification["passed"]
    json.dumps(result.to_json(), allow_nan=False)
    failed = result.verification["failed"]
    return None if failed is None else str(failed["check"])


# --------------------------------------------------------------------------- by its own facts


@pytest.mark.parametrize("name", ["averaged", "ensemble", "vote"])
def test_a_file_passes_by_what_it_says_itself(points: Problem, made: Path, name: str) -> None:
    before = left_in(made)
    result = verified(made / f"{name}.onnx", points)
    assert said(result) is None, result.verification
    assert result.verification["real"]
    assert result.verification["samples"] >= 200
    assert result.verification["metric_torch"] == result.verification["metric_onnx"]
    assert len(result.candidate["rows"]) == (1 if name == "averaged" else 4)
    assert left_in(made) == before


def test_recomputed_statistics_take_the_training_data_again(points: Problem, made: Path) -> None:
    assert said(verified(made / "recomputed.onnx", points, data=("train", "val"))) is None


def test_recomputed_statistics_without_training_data(points: Problem, made: Path) -> None:
    """The file cannot be compared: averaged statistics are another model. The user is told why."""
    try:
        result = verified(made / "recomputed.onnx", points)
    except EnsembleKitError as error:
        text = f"{error.message} {error.hint}"
    else:
        assert said(result) == "numbers"
        text = " ".join(result.warnings)
    assert "--train-data" in text


def test_the_precision_is_taken_from_the_file(points: Problem, made: Path) -> None:
    file = made / "last.onnx"
    assert said(verified(file, points, selection=Selection(last=1))) is None
    strict = verified(file, points, selection=Selection(last=1), precision="fp32")
    assert said(strict) == "numbers"


def test_the_kind_of_output_is_taken_from_the_file(points: Problem, made: Path) -> None:
    assert said(verified(made / "ensemble.onnx", points, output_kind="logits")) == "interface"
    assert (
        said(verified(made / "averaged.onnx", points, output_kind="probabilities")) == "interface"
    )


def test_on_generated_samples(points: Problem, made: Path) -> None:
    result = verified(made / "averaged.onnx", points, data=(), inputs=("input:float32[batch,5]",))
    assert said(result) is None
    assert result.verification["real"] is False
    assert result.verification["metric"] is None


def test_an_input_by_another_name(points: Problem, made: Path) -> None:
    result = verified(made / "averaged.onnx", points, inputs=("image:float32[batch,5]",))
    assert said(result) == "interface"
    assert "image" in result.verification["failed"]["reason"]


@pytest.mark.parametrize("name", ["regression", "multilabel", "token pairs", "segmentation"])
def test_other_tasks(tmp_path: Path, name: str) -> None:
    one = problem(name)
    file, _ = exported(tmp_path, one, ensemble=True, selection=Selection(last=2), **QUICK)
    assert said(verified(file, one, selection=Selection(last=2))) is None
    other = verified(file, one, selection=Selection(last=2), coefficients=(1.0, 1.0), bn="average")
    assert said(other) == "numbers"


# ----------------------------------------------------------------------------- another model


def test_a_file_of_other_checkpoints(points: Problem, made: Path, tmp_path: Path) -> None:
    """Same names, other weights: a later run."""
    later = comparing.trained(PROBLEMS["classes"](), seed=5)
    save(tmp_path / "ckpts", later.weights)
    for name in ("averaged", "ensemble", "vote"):
        result = verified(made / f"{name}.onnx", points, tmp_path / "ckpts")
        assert said(result) == "numbers"
        assert "allowed" in result.verification["failed"]["reason"]
        assert result.verification["max_abs_diff"] > 1e-3


def test_a_file_of_another_combiner(points: Problem, made: Path) -> None:
    result = verified(made / "vote.onnx", points, ensemble=True, combiner="mean-logits")
    assert said(result) == "numbers"


def test_fewer_checkpoints_than_the_file_has(points: Problem, made: Path) -> None:
    """It does not pass, and the reason is not left to be guessed."""
    try:
        result = verified(made / "ensemble.onnx", points, selection=Selection(last=3))
    except EnsembleKitError as error:
        text = f"{error.message} {error.hint}"
    else:
        assert not result.verification["passed"]
        text = " ".join([*result.warnings, result.verification["failed"]["reason"]])
    assert "snap_1.pt" in text


def test_more_checkpoints_than_the_file_has(points: Problem, made: Path) -> None:
    """It says which of them it is made of: it passes, or it is said that others were named."""
    try:
        result = verified(made / "last.onnx", points)
    except EnsembleKitError as error:
        assert "snap_4.pt" in f"{error.message} {error.hint}"  # noqa: PT017
    else:
        assert result.verification["passed"], result.verification["failed"]


@pytest.fixture(scope="module")
def comparison(points: Problem, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compared")
    compared(folder / "ckpts", points, folder / "comparison")
    return folder


@pytest.mark.parametrize(
    "name", ["ensemble-temperature", "ensemble-greedy", "snap_3.pt", "ensemble-of-2-soups+bn"]
)
def test_a_file_of_a_measured_candidate(points: Problem, comparison: Path, name: str) -> None:
    """By the comparison, and by what the file says where nothing else is needed."""
    source = (name, str(comparison / "comparison"))
    file = comparison / f"{name}.onnx"
    if not file.exists():
        exported(comparison, points, file.name, candidate=source, **QUICK)
    assert said(verified(file, points, candidate=source)) is None
    try:
        result = verified(file, points)
    except EnsembleKitError as error:
        text = f"{error.message} {error.hint}"
        assert "--candidate" in text or "snap_" in text
    else:
        assert result.verification["passed"], (result.candidate["name"], result.verification)


# ------------------------------------------------------------------------ files that are not right


def test_no_such_file(points: Problem, made: Path) -> None:
    for name in ("nowhere.onnx", "ckpts"):
        with pytest.raises(UsageError, match=name):
            verified(made / name, points)


def damaged(file: Path, place: Path, how: str) -> Path:
    data = file.read_bytes()
    changes = {
        "empty": b"",
        "text": b"this is no graph at all",
        "half": data[: len(data) // 2],
        "one byte short": data[:-1],
        "zeros": bytes(len(data)),
        "another format": b"PK\x03\x04" + data,
    }
    place.write_bytes(changes[how])
    return place


@pytest.mark.parametrize(
    "how", ["empty", "text", "half", "one byte short", "zeros", "another format"]
)
def test_a_damaged_file(points: Problem, made: Path, tmp_path: Path, how: str) -> None:
    file = damaged(made / "averaged.onnx", tmp_path / "m.onnx", how)
    result = verified(file, points, made / "ckpts", bn="average")
    assert said(result) in ("file", "session", "interface")


def test_one_weight_changed(points: Problem, made: Path, tmp_path: Path) -> None:
    model = onnx.load(made / "averaged.onnx")
    tensor = next(t for t in model.graph.initializer if len(t.dims) == 2)
    values = onnx.numpy_helper.to_array(tensor).copy()
    values[0, 0] += 0.5
    tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    onnx.save(model, tmp_path / "m.onnx")
    assert said(verified(tmp_path / "m.onnx", points, made / "ckpts")) == "numbers"


def test_a_file_of_someone_else(points: Problem, made: Path, tmp_path: Path) -> None:
    """Exported by torch alone; what it should be is what the flags say."""
    model = model_of(points.make, points.weights[1])
    x = points.data["val"][0][:3]
    for name, axes in (("open", {"input": {0: "batch"}}), ("frozen", None)):
        torch.onnx.export(
            model, (x,), str(tmp_path / f"{name}.onnx"), dynamo=False, input_names=["input"],
            output_names=["logits"], dynamic_axes=axes,
        )  # fmt: skip
    one = made / "ckpts" / "snap_2.pt"
    assert said(verified(tmp_path / "open.onnx", points, one)) is None
    result = verified(tmp_path / "frozen.onnx", points, one)
    assert said(result) == "interface"
    assert "frozen at 3" in result.verification["failed"]["reason"]


def with_facts(file: Path, place: Path, **changes: Any) -> Path:
    model = onnx.load(file)
    (own,) = [p for p in model.metadata_props if p.key == "ensemblekit"]
    found = json.loads(own.value)
    for key, value in changes.items():
        if key in found["candidate"]:
            found["candidate"][key] = value
        else:
            found[key] = value
    own.value = json.dumps(found)
    onnx.save(model, place)
    return place


ROW = {"coefficients": [1.0, 0.0, 0.0, 0.0], "divisor": 1.0}
FACTS: dict[str, dict[str, Any]] = {
    "a precision that is a number": {"precision": 5},
    "no such precision": {"precision": "fp1"},
    "no such output": {"output": ["logits"]},
    "candidate is a number": {"candidate": 7},
    "candidate is a list": {"candidate": []},
    "candidate is empty": {"candidate": {}},
    "snapshots are a number": {"snapshots": 7},
    "rows are a text": {"rows": "abc"},
    "no rows": {"rows": [], "batch_norm": []},
    "a row for more": {"rows": [{"coefficients": [1.0] * 7, "divisor": 7.0}]},
    "a row for fewer": {"rows": [{"coefficients": [1.0], "divisor": 1.0}]},
    "a row of nothing": {"rows": [{"coefficients": [0.0] * 4, "divisor": 0.0}]},
    "a row of NaN": {"rows": [{"coefficients": [float("nan")] * 4, "divisor": 1.0}]},
    "no such combiner": {"rows": [ROW, ROW], "batch_norm": ["none"] * 2, "combiner": "medain"},
    "a combiner without its numbers": {
        "rows": [ROW, ROW], "batch_norm": ["none"] * 2, "combiner": "weighted",
    },
    "numbers of another size": {
        "rows": [ROW, ROW], "batch_norm": ["none"] * 2, "combiner": "weighted",
        "combiner_params": {"weights": [0.2, 0.3, 0.5]},
    },
    "numbers that are none": {
        "rows": [ROW, ROW], "batch_norm": ["none"] * 2, "combiner": "temperature",
        "combiner_params": {"temperature": "hot"},
    },
    "numbers that are a list": {
        "rows": [ROW, ROW], "batch_norm": ["none"] * 2, "combiner": "mean", "combiner_params": [],
    },
    "members without a combiner": {"rows": [ROW, ROW], "batch_norm": ["none"] * 2},
    "no such statistics": {"batch_norm": ["invented"]},
}  # fmt: skip


@pytest.mark.parametrize("case", FACTS)
def test_facts_that_are_not_ours(points: Problem, made: Path, tmp_path: Path, case: str) -> None:
    """Whoever wrote the file can have written anything: an outcome or an error, and no traceback."""
    file = with_facts(made / "averaged.onnx", tmp_path / "m.onnx", **FACTS[case])
    try:
        said(verified(file, points, made / "ckpts"))
    except EnsembleKitError as error:
        assert error.exit_code in (2, 3, 5)  # noqa: PT017


class Wide(torch.nn.Sequential):
    def __init__(self) -> None:
        super().__init__(torch.nn.Linear(5, 64), torch.nn.ReLU(), torch.nn.Linear(64, 64))


@pytest.fixture
def external(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Problem]:
    one = Problem("classification", Wide, PROBLEMS["classes"]().data, tuple(randomised(Wide, 2)))
    monkeypatch.setitem(saving.save.__kwdefaults__, "external_above", 1000)
    file, result = exported(tmp_path, one, **QUICK)
    assert result.external_data is not None
    return file, one


def test_external_data(external: tuple[Path, Problem]) -> None:
    file, one = external
    assert said(verified(file, one)) is None
    data = file.with_name("model.onnx.data")
    whole = data.read_bytes()
    data.write_bytes(whole[:-10])
    assert said(verified(file, one)) == "file"
    data.unlink()
    result = verified(file, one)
    assert said(result) == "file"
    assert "model.onnx.data" in result.verification["failed"]["reason"]
    data.write_bytes(whole[::-1])
    assert said(verified(file, one)) == "numbers"


@pytest.mark.parametrize(
    "entries",
    [
        {},
        {"location": "../other.data"},
        {"location": "/etc/passwd"},
        {"location": "model.onnx.data", "offset": "x"},
        {"location": "model.onnx.data", "offset": "-1"},
        {"location": "model.onnx.data", "length": "99999999999999999999"},
        {"location": ""},
    ],
    ids=str,
)
def test_external_data_elsewhere(
    external: tuple[Path, Problem], tmp_path: Path, entries: dict[str, str]
) -> None:
    file, one = external
    shutil.copyfile(file.with_name("model.onnx.data"), tmp_path.parent / "other.data")
    model = onnx.load(file, load_external_data=False)
    tensor = next(t for t in model.graph.initializer if t.external_data)
    del tensor.external_data[:]
    for key, value in entries.items():
        tensor.external_data.add(key=key, value=value)
    file.write_bytes(model.SerializeToString())
    assert said(verified(file, one)) in ("file", "session")
