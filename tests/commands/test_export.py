"""`export` called from Python: the file, run by ONNX Runtime alone, is the model that was asked for."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from ensemblekit import ModelOptions
from ensemblekit.commands import average as averaging
from ensemblekit.commands import export as exporting_command
from ensemblekit.commands.export import ExportOptions, export
from ensemblekit.errors import (
    CheckFailedError,
    EnsembleKitError,
    InputError,
    MachineError,
    UsageError,
)
from ensemblekit.graphs import choosing, saving
from ensemblekit.selection import Selection
from ensemblekit.verification import Verification
from tests import comparing
from tests.comparing import PROBLEMS, Problem, compared, problem, save
from tests.exporting import (
    Named,
    Pictures,
    Words,
    average,
    contract,
    dicts,
    exported,
    facts,
    left_in,
    manifest,
    onnx_run,
    outputs,
    pairs,
    pictures,
    randomised,
    recomputed,
    sha256,
    sigmoid,
    softmax,
    words,
)

torch.set_num_threads(1)
CLOSE = {"rtol": 1e-4, "atol": 2e-5}
QUICK = {"exporter": "torchscript"}  # where it does not matter which


@pytest.fixture(scope="module")
def points() -> Problem:
    return problem("classes")


@pytest.fixture(scope="module")
def test_x() -> torch.Tensor:
    x: torch.Tensor = PROBLEMS["classes"]().data["test"][0]
    return x


@pytest.fixture(scope="module")
def images() -> Problem:
    own = {split: pictures(split) for split in comparing.SPLITS}
    return comparing.trained(Problem("classification", Pictures, own), snapshots=3)


def accuracy(said: Any, data: Any) -> float:
    return float((said.argmax(1) == data[1].numpy()).mean())


# ------------------------------------------------------------------------------- averages


def test_an_average_with_its_batch_norm_recomputed(
    points: Problem, test_x: torch.Tensor, tmp_path: Path
) -> None:
    path, result = exported(tmp_path, points, data=("train", "val"))
    state = recomputed(points.make, average(points.weights), points.data["train"][0])
    np.testing.assert_allclose(onnx_run(path, test_x), outputs(points.make, state, test_x), **CLOSE)
    assert result.candidate["batch_norm"] == ["recomputed"]
    assert result.warnings == []
    found = result.verification
    assert found["real"]
    assert found["passed"]
    assert found["decision_flips"] == 0
    wanted = accuracy(onnx_run(path, points.data["val"][0]), points.data["val"])
    assert found["metric_torch"] == found["metric_onnx"] == pytest.approx(wanted, abs=1e-9)
    assert left_in(tmp_path) == ["ckpts", "model.onnx", "model.onnx.json"]


def test_without_training_data_the_averaged_statistics_are_told(
    points: Problem, test_x: torch.Tensor, tmp_path: Path
) -> None:
    path, result = exported(tmp_path, points, **QUICK)
    state = average(points.weights)
    np.testing.assert_allclose(onnx_run(path, test_x), outputs(points.make, state, test_x), **CLOSE)
    assert result.candidate["batch_norm"] == ["averaged"]
    (warning,) = [text for text in result.warnings if "BatchNorm" in text]
    assert "--train-data" in warning
    assert "--bn average" in warning


def test_convolutions_with_batch_norm(
    images: Problem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choosing, "_WORTH", 1e9)  # the folded graph is taken, however fast
    x = images.data["test"][0]
    path, result = exported(tmp_path, images, data=("train", "val"))
    state = recomputed(images.make, average(images.weights), images.data["train"][0])
    np.testing.assert_allclose(onnx_run(path, x), outputs(images.make, state, x), **CLOSE)
    assert result.verification["classes_seen"] == 3
    assert result.folded == 1
    assert "BatchNormalization" not in {n.op_type for n in onnx.load(path).graph.node}


def test_one_checkpoint(points: Problem, test_x: torch.Tensor, tmp_path: Path) -> None:
    save(tmp_path / "ckpts", points.weights)
    path, result = exported(
        tmp_path, points, checkpoints=tmp_path / "ckpts" / "snap_2.pt", data=("train", "val")
    )
    made = outputs(points.make, points.weights[1], test_x)
    np.testing.assert_allclose(onnx_run(path, test_x), made, **CLOSE)
    assert Path(result.candidate["name"]).name == "snap_2.pt"
    assert result.candidate["batch_norm"] == ["none"], "its own statistics are kept"
    assert result.warnings == []


def test_what_average_wrote(points: Problem, test_x: torch.Tensor, tmp_path: Path) -> None:
    save(tmp_path / "ckpts", points.weights)
    model = ModelOptions(
        model=points.make(),
        device="cpu",
        train_data=points.data["train"],
        val_data=points.data["val"],
    )
    there = averaging.average(tmp_path / "ckpts", tmp_path / "averaged.safetensors", model=model)
    assert there.batch_norm["policy"] == "recomputed"
    path, result = exported(tmp_path, points, checkpoints=tmp_path / "averaged.safetensors")
    state = recomputed(points.make, average(points.weights), points.data["train"][0])
    np.testing.assert_allclose(onnx_run(path, test_x), outputs(points.make, state, test_x), **CLOSE)
    assert result.warnings == []


def test_coefficients(points: Problem, test_x: torch.Tensor, tmp_path: Path) -> None:
    numbers = (1.0, 0.0, 2.0, 0.5)
    path, result = exported(tmp_path, points, coefficients=numbers, bn="average", **QUICK)
    made = outputs(points.make, average(points.weights, numbers), test_x)
    np.testing.assert_allclose(onnx_run(path, test_x), made, **CLOSE)
    assert result.candidate["rows"][0]["coefficients"] == list(numbers)
    with pytest.raises(UsageError, match=r"(?s)2.*4"):
        exported(tmp_path, points, "b.onnx", coefficients=(1.0, 2.0))


@pytest.mark.parametrize(
    "selection, taken",
    [(Selection(last=2), (2, 3)), (Selection(exclude=("snap_1*", "*_3.pt")), (1, 3))],
)
def test_selection(
    points: Problem,
    test_x: torch.Tensor,
    tmp_path: Path,
    selection: Selection,
    taken: tuple[int, ...],
) -> None:
    path, result = exported(tmp_path, points, selection=selection, bn="average", **QUICK)
    made = outputs(points.make, average([points.weights[k] for k in taken]), test_x)
    np.testing.assert_allclose(onnx_run(path, test_x), made, **CLOSE)
    assert [Path(p).name for p in result.snapshots] == [f"snap_{k + 1}.pt" for k in taken]


# ------------------------------------------------------------------------------ ensembles


def votes(members: list[Any]) -> Any:
    hot = [np.eye(z.shape[1])[z.argmax(1)] for z in members]
    return np.sum(hot, axis=0) + 0.5 * np.mean([softmax(z) for z in members], axis=0)


COMBINED = {
    "mean": lambda members: np.log(np.mean([softmax(z) for z in members], axis=0)),
    "mean-logits": lambda members: np.log(
        softmax(np.mean([np.log(softmax(z)) for z in members], axis=0))
    ),
    "vote": votes,
}


@pytest.mark.parametrize("combiner", COMBINED)
def test_an_ensemble(points: Problem, test_x: torch.Tensor, tmp_path: Path, combiner: str) -> None:
    quick = {} if combiner == "mean" else QUICK
    path, result = exported(tmp_path, points, ensemble=True, combiner=combiner, **quick)
    members = [outputs(points.make, w, test_x) for w in points.weights]
    np.testing.assert_allclose(onnx_run(path, test_x), COMBINED[combiner](members), **CLOSE)
    assert result.candidate["combiner"] == combiner
    assert len(result.candidate["rows"]) == 4
    assert result.warnings == []


def test_a_fused_ensemble_of_convolutions(images: Problem, tmp_path: Path) -> None:
    x = images.data["test"][0]
    path, result = exported(tmp_path, images, ensemble=True, fuse="on")
    members = [outputs(images.make, w, x) for w in images.weights]
    np.testing.assert_allclose(onnx_run(path, x), COMBINED["mean"](members), **CLOSE)
    assert result.fused > 0


def test_an_ensemble_of_one_is_the_checkpoint(points: Problem, tmp_path: Path) -> None:
    x = points.data["test"][0]
    path, _ = exported(tmp_path, points, ensemble=True, selection=Selection(last=1), **QUICK)
    np.testing.assert_allclose(
        onnx_run(path, x), outputs(points.make, points.weights[3], x), **CLOSE
    )


def test_probabilities(points: Problem, test_x: torch.Tensor, tmp_path: Path) -> None:
    for name, options in {"a": {"bn": "average"}, "e": {"ensemble": True}}.items():
        path, result = exported(
            tmp_path, points, f"{name}.onnx", output_kind="probabilities", **QUICK, **options
        )
        made = onnx_run(path, test_x)
        np.testing.assert_allclose(made.sum(1), 1, atol=1e-5)
        assert result.outputs[0]["name"] == "probabilities"
        members = [outputs(points.make, w, test_x) for w in points.weights]
        single = softmax(outputs(points.make, average(points.weights), test_x))
        wanted = single if name == "a" else np.mean([softmax(z) for z in members], axis=0)
        np.testing.assert_allclose(made, wanted, **CLOSE)


@pytest.mark.parametrize("kind", ["logits", "probabilities"])
def test_an_average_and_an_ensemble_are_called_alike(
    points: Problem, tmp_path: Path, kind: str
) -> None:
    one, _ = exported(tmp_path, points, "a.onnx", bn="average", output_kind=kind, **QUICK)
    many, _ = exported(tmp_path, points, "e.onnx", ensemble=True, output_kind=kind, **QUICK)
    assert contract(one) == contract(many)
    assert contract(one) == [
        ("input", "tensor(float)", ["batch", 5]),
        (kind, "tensor(float)", ["batch", 4]),
    ]


@pytest.mark.parametrize("combiner", ["weighted", "temperature", "stack-ridge", "stack-logistic"])
def test_a_fitted_combiner_needs_a_comparison(
    points: Problem, tmp_path: Path, combiner: str
) -> None:
    with pytest.raises(UsageError, match=combiner) as caught:
        exported(tmp_path, points, ensemble=True, combiner=combiner)
    assert "--candidate" in str(caught.value.hint)
    assert left_in(tmp_path) == ["ckpts"]


# ---------------------------------------------------------- what compare measured, again


@pytest.fixture(scope="module")
def comparison(points: Problem, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compared")
    compared(folder / "ckpts", points, folder / "comparison")
    return folder


def rows_of(folder: Path) -> dict[str, dict[str, Any]]:
    value = json.loads((folder / "comparison" / "comparison.json").read_text())
    return {row["name"]: row for row in value["candidates"]}


def by_hand(points: Problem, row: dict[str, Any], x: torch.Tensor) -> Any:
    """The candidate's outputs, from its rows and the combiner's numbers."""
    members = []
    kinds = row["candidate"]["batch_norm"]
    for one, kind in zip(row["candidate"]["rows"], kinds, strict=True):
        state = average(points.weights, one["coefficients"])
        if kind == "recomputed":
            state = recomputed(points.make, state, points.data["train"][0])
        members.append(outputs(points.make, state, x))
    name, numbers = row["combiner"], row["combiner_params"]
    if name is None:
        return members[0]
    if name in COMBINED:
        return COMBINED[name](members)
    p = np.stack([softmax(z) for z in members])
    if name == "weighted":
        return np.log(np.tensordot(numbers["weights"], p, 1))
    if name == "temperature":
        return np.log(softmax(np.log(p.mean(0)) / numbers["temperature"]))
    seen = np.concatenate(list(p), axis=1)
    if numbers["of"] == "log-probabilities":
        seen = np.log(seen)
    made = seen @ np.array(numbers["coef"]).T + numbers["intercept"]
    return np.log(softmax(made)) if name == "stack-logistic" else made


@pytest.mark.parametrize(
    "name",
    ["snap_4.pt", "snap_2.pt+bn", "uniform", "uniform+bn",
     "ensemble-of-2-soups+bn", "ensemble-greedy", "ensemble-weighted", "ensemble-vote",
     "ensemble-temperature", "ensemble-stack-logistic", "ensemble-stack-ridge", "swag-lowrank+bn"],
)  # fmt: skip
def test_a_measured_candidate(
    points: Problem, comparison: Path, test_x: torch.Tensor, tmp_path: Path, name: str
) -> None:
    row = rows_of(comparison)[name]
    path, result = exported(
        tmp_path, points, checkpoints=comparison / "ckpts", model={"test_data": points.data["test"]},
        candidate=(name, str(comparison / "comparison" / "comparison.json")), **QUICK,
    )  # fmt: skip
    made = onnx_run(path, test_x)
    np.testing.assert_allclose(made, by_hand(points, row, test_x), rtol=1e-3, atol=1e-4)
    measured = {e["split"]: e for e in row["evaluations"]}
    assert accuracy(made, points.data["test"]) == pytest.approx(
        measured["test"]["accuracy"], abs=1e-9
    )
    if not measured["val"].get("cross_fitted"):
        assert result.verification["metric_onnx"] == pytest.approx(measured["val"]["accuracy"])
    if measured["test"]["nll"] is not None:
        truth = points.data["test"][1].numpy()
        own = softmax(made)[np.arange(len(truth)), truth]
        assert -np.log(own).mean() == pytest.approx(measured["test"]["nll"], abs=1e-4)
    assert result.candidate["combiner_params"] == row["combiner_params"]
    assert result.candidate["name"] == name


def test_a_candidate_that_cannot_be_taken(
    points: Problem, comparison: Path, tmp_path: Path
) -> None:
    source = str(comparison / "comparison")
    with pytest.raises(UsageError, match="unifrom") as caught:
        exported(tmp_path, points, candidate=("unifrom", source))
    assert "uniform" in str(caught.value.hint)
    state = torch.load(tmp_path / "ckpts" / "snap_4.pt")
    state["state_dict"]["0.bias"] += 1
    torch.save(state, tmp_path / "ckpts" / "snap_4.pt")
    with pytest.raises(InputError, match=r"snap_4\.pt.*changed"):
        exported(tmp_path, points, candidate=("snap_4.pt", source))
    assert left_in(tmp_path) == ["ckpts"]


def test_a_comparison_that_is_not_there(points: Problem, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such file") as caught:
        exported(tmp_path, points, candidate=("uniform", "nowhere.json"))
    assert "compare" in str(caught.value.hint)


# ---------------------------------------------------------------------------- other tasks


def first_inputs(one: Problem) -> dict[str, torch.Tensor]:
    data = one.data["test"]
    if isinstance(data, list):
        return {k: v for k, v in data[0].items() if k != "labels"}
    return {"input": data[0]}


TASKS = ["named dict", "object", "multilabel", "regression", "one value",
         "segmentation", "half size", "token dicts", "token pairs"]  # fmt: skip


@pytest.mark.parametrize("name", TASKS)
def test_an_ensemble_of_every_task(tmp_path: Path, name: str) -> None:
    one = problem(name)
    quick = {} if name == "token dicts" else QUICK  # it leaves an input unused
    path, result = exported(tmp_path, one, ensemble=True, selection=Selection(last=2), **quick)
    given = first_inputs(one)
    members = []
    for state in one.weights[2:]:
        model = one.make().eval().double()
        model.load_state_dict(state)
        doubles = {k: v.double() if v.is_floating_point() else v for k, v in given.items()}
        with torch.no_grad():
            made = comparing.call(model, doubles if len(given) > 1 else tuple(doubles.values()))
        members.append(made.numpy())
    if one.task == "regression":
        wanted = np.mean(members, axis=0)
    elif one.task == "multilabel":
        p = np.mean([sigmoid(z) for z in members], axis=0)
        wanted = np.log(p) - np.log(1 - p)
    else:
        axis = -1 if one.task == "tokens" else 1
        wanted = np.log(np.mean([softmax(z, axis) for z in members], axis=0))
    session_inputs = [slot["name"] for slot in result.inputs]
    assert session_inputs == (list(given) if len(given) > 1 else ["input"])
    found = onnx_run(path, **{k: given[k] for k in session_inputs})
    assert found.shape == wanted.shape
    np.testing.assert_allclose(found, wanted, **CLOSE)
    assert result.outputs[0]["name"] == ("output" if one.task == "regression" else "logits")
    assert result.verification["passed"]
    figures = comparing.figures(one, one.weights[2:], "val")
    wanted_metric = figures.get("mse" if one.task == "regression" else "accuracy")
    if name == "half size":
        assert result.verification["metric_onnx"] is None
    elif wanted_metric is not None:
        assert result.verification["metric_onnx"] == pytest.approx(wanted_metric, rel=1e-4)


def test_an_input_that_the_model_does_not_use(tmp_path: Path) -> None:
    """The older exporter drops it from the graph."""
    one = problem("token dicts")
    given = first_inputs(one)
    try:
        path, _ = exported(tmp_path, one, selection=Selection(last=1), **QUICK)
    except EnsembleKitError as error:
        assert "attention_mask" in f"{error.message} {error.hint}"  # noqa: PT017
    else:
        assert onnx_run(path, **given).shape[:2] == given["input_ids"].shape


@pytest.mark.parametrize("name", ["one value", "segmentation", "token dicts", "multilabel"])
def test_one_checkpoint_of_every_task(tmp_path: Path, name: str) -> None:
    one = problem(name)
    path, result = exported(tmp_path, one, selection=Selection(last=1))
    given = first_inputs(one)
    with torch.no_grad():
        model = one.make().eval()
        model.load_state_dict(one.weights[-1])
        wanted = comparing.call(model, given if len(given) > 1 else tuple(given.values())).numpy()
    np.testing.assert_allclose(onnx_run(path, **given), wanted, **CLOSE)
    figures = comparing.figures(one, one.weights[-1:], "val")
    metric = "mse" if one.task == "regression" else "accuracy"
    assert result.verification["metric"] == metric
    assert result.verification["metric_torch"] == pytest.approx(figures[metric], rel=1e-4)


def test_probabilities_of_labels_and_pixels(tmp_path: Path) -> None:
    for name in ("multilabel", "segmentation"):
        one = problem(name)
        (tmp_path / name).mkdir()
        path, _ = exported(
            tmp_path / name, one, selection=Selection(last=1), output_kind="probabilities", **QUICK
        )
        x = one.data["test"][0]
        logits = outputs(one.make, one.weights[-1], x)
        wanted = sigmoid(logits) if name == "multilabel" else softmax(logits)
        np.testing.assert_allclose(onnx_run(path, x), wanted, **CLOSE)


def test_a_regression_has_no_probabilities(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="probabilities"):
        exported(tmp_path, problem("regression"), bn="average", output_kind="probabilities")
    assert left_in(tmp_path) == ["ckpts"]


def test_scores_are_no_probabilities(points: Problem, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="vote"):
        exported(tmp_path, points, ensemble=True, combiner="vote", output_kind="probabilities")


@pytest.mark.parametrize(
    "name, combiner",
    [("regression", "mean-logits"), ("regression", "vote"), ("segmentation", "vote"),
     ("segmentation", "mean-logits"), ("token pairs", "vote")],
)  # fmt: skip
def test_a_combiner_that_the_task_has_not(tmp_path: Path, name: str, combiner: str) -> None:
    """`combiners.COMBINERS` says where each is defined; elsewhere it gives other numbers."""
    with pytest.raises(UsageError, match=combiner):
        exported(tmp_path, problem(name), ensemble=True, combiner=combiner, **QUICK)
    assert left_in(tmp_path) == ["ckpts"]


# ------------------------------------------------------------------- how the file is called


def test_keys_of_dict_batches(tmp_path: Path) -> None:
    own = {split: dicts(split) for split in comparing.SPLITS}
    one = Problem("classification", Named, own, tuple(randomised(Named)))
    path, result = exported(tmp_path, one, ensemble=True)
    assert [slot["name"] for slot in result.inputs] == ["left", "right"]
    left, right = own["test"][0]["left"], own["test"][0]["right"]
    members = [outputs(Named, w, left, right) for w in one.weights]
    made = onnx_run(path, left=left, right=right)
    np.testing.assert_allclose(made, COMBINED["mean"](members), **CLOSE)


def test_names_of_parameters_of_several_inputs(tmp_path: Path) -> None:
    own = {split: pairs(split) for split in comparing.SPLITS}
    one = Problem("classification", Named, own, tuple(randomised(Named)))
    path, result = exported(tmp_path, one, **QUICK)
    assert [slot["name"] for slot in result.inputs] == ["left", "right"]
    left, right, _ = own["test"][0]
    made = onnx_run(path, left=left, right=right)
    np.testing.assert_allclose(made, outputs(Named, average(one.weights), left, right), **CLOSE)
    again, _ = exported(
        tmp_path, one, "renamed.onnx", **QUICK,
        inputs=("a:float32[batch,5]", "b:float32[batch,2]"),
    )  # fmt: skip
    np.testing.assert_allclose(onnx_run(again, a=left, b=right), made, **CLOSE)


@pytest.fixture(scope="module")
def texts() -> Problem:
    own = {split: words(split) for split in comparing.SPLITS}
    return Problem("classification", Words, own, tuple(randomised(Words)))


@pytest.mark.parametrize("exporter, ensemble", [("dynamo", True), ("torchscript", False)])
def test_another_open_axis(texts: Problem, tmp_path: Path, exporter: str, ensemble: bool) -> None:
    path, result = exported(
        tmp_path, texts, inputs=("ids:int64[batch,seq]",), ensemble=ensemble, exporter=exporter
    )
    assert result.inputs[0] == {"name": "ids", "type": "tensor(int64)", "shape": ["batch", "seq"]}
    for size, length in ((1, 1), (2, 30), (5, 3)):
        ids = torch.randint(0, 9, (size, length), generator=torch.Generator().manual_seed(size))
        members = [outputs(Words, w, ids) for w in texts.weights]
        wanted = (
            COMBINED["mean"](members) if ensemble else outputs(Words, average(texts.weights), ids)
        )
        np.testing.assert_allclose(onnx_run(path, ids), wanted, **CLOSE)


def test_lengths_that_differ_and_nobody_said_so(texts: Problem, tmp_path: Path) -> None:
    """The file takes the first batch's length alone: a check fails, and says how to open it."""
    with pytest.raises(CheckFailedError) as caught:
        exported(tmp_path, texts, **QUICK)
    assert "--input" in f"{caught.value.message} {caught.value.hint}"
    assert left_in(tmp_path) == ["ckpts"]


@pytest.mark.parametrize("exporter", ["dynamo", "torchscript"])
def test_without_data(texts: Problem, tmp_path: Path, exporter: str) -> None:
    path, result = exported(
        tmp_path, texts, data=(), inputs=("ids:int64[batch,seq=6]",), exporter=exporter
    )
    found = result.verification
    assert found["real"] is False
    assert found["metric"] is None
    assert found["metric_torch"] is None
    assert found["classes_seen"] > 1
    assert any("--val-data" in text for text in result.warnings)
    ids = torch.randint(0, 9, (3, 11))
    np.testing.assert_allclose(
        onnx_run(path, ids), outputs(Words, average(texts.weights), ids), **CLOSE
    )


@pytest.mark.parametrize("exporter", ["dynamo", "torchscript"])
def test_a_batch_size_of_the_users_choice(texts: Problem, tmp_path: Path, exporter: str) -> None:
    """`ids:int64[4,7]` says that nothing is open."""
    path, result = exported(tmp_path, texts, data=(), inputs=("ids:int64[4,7]",), exporter=exporter)
    assert result.inputs[0]["shape"] == [4, 7]
    ids = torch.randint(0, 9, (4, 7))
    np.testing.assert_allclose(
        onnx_run(path, ids), outputs(Words, average(texts.weights), ids), **CLOSE
    )


BAD_INPUTS: dict[str, tuple[tuple[str, ...], type[Exception], str]] = {
    "no type": (("x",), UsageError, "NAME:TYPE"),
    "no sizes": (("x:float32",), UsageError, "NAME:TYPE"),
    "no name": ((":float32[batch,5]",), UsageError, "NAME:TYPE"),
    "no such type": (("x:float31[batch,5]",), UsageError, "float31"),
    "size zero": (("x:float32[batch,0]",), UsageError, "0"),
    "negative": (("x:float32[batch,-5]",), UsageError, "-5"),
    "words": (("x:float32[batch,five six]",), UsageError, "five six"),
    "size of a word": (("x:float32[batch=many,5]",), UsageError, "batch=many"),
    "another type": (("x:int64[batch,5]",), InputError, "float32"),
    "another rank": (("x:float32[batch,5,5]",), InputError, r"\[\d+, 5\]"),
    "another size": (("x:float32[batch,6]",), InputError, r"\[\d+, 5\]"),
    "one too many": (("x:float32[batch,5]", "y:float32[batch,5]"), UsageError, "2 of --input"),
    "no axis": (("x:float32[]",), InputError, r"\[\d+, 5\]"),
}


@pytest.mark.parametrize("case", BAD_INPUTS)
def test_inputs_that_do_not_fit(points: Problem, tmp_path: Path, case: str) -> None:
    specs, kind, word = BAD_INPUTS[case]
    with pytest.raises(kind, match=word):
        exported(tmp_path, points, inputs=specs, bn="average")
    assert left_in(tmp_path) == ["ckpts"]


def test_a_name_that_the_batches_do_not_have(tmp_path: Path) -> None:
    one = Problem("classification", Named, {"val": dicts("val")}, tuple(randomised(Named)))
    with pytest.raises(UsageError, match=r"middle.*left, right"):
        exported(tmp_path, one, inputs=("left:float32[batch,5]", "middle:float32[batch,2]"))


def test_the_same_name_twice(tmp_path: Path) -> None:
    one = Problem("classification", Named, {"val": pairs("val")}, tuple(randomised(Named)))
    with pytest.raises(UsageError, match="left"):
        exported(tmp_path, one, inputs=("left:float32[batch,5]", "left:float32[batch,2]"), **QUICK)


def test_generated_samples_that_the_model_does_not_take(points: Problem, tmp_path: Path) -> None:
    with pytest.raises(InputError):
        exported(tmp_path, points, data=(), bn="average", inputs=("x:float32[batch,6]",))
    assert left_in(tmp_path) == ["ckpts"]


# -------------------------------------------------------------------- facts, sizes, precisions


def test_the_manifest_and_the_metadata(points: Problem, tmp_path: Path) -> None:
    path, result = exported(
        tmp_path, points, bn="average", metadata={"mean": "0.5", "colour": "gr\u00fcn"}, **QUICK
    )
    found = facts(path)
    assert (found["mean"], found["colour"]) == ("0.5", "gr\u00fcn")
    own = json.loads(found["ensemblekit"])
    assert own["candidate"] == result.candidate
    assert [s["file"] for s in own["snapshots"]] == [f"snap_{n}.pt" for n in range(1, 5)]
    assert (own["output"], own["task"], own["precision"]) == ("logits", "classification", "fp32")
    beside = manifest(path)
    assert beside["sha256"] == result.sha256 == sha256(path)
    wanted = [sha256(tmp_path / "ckpts" / f"snap_{n}.pt") for n in range(1, 5)]
    assert [one["sha256"] for one in beside["request"]["inputs"]] == wanted
    assert {"torch", "onnx", "onnxruntime", "ensemblekit"} <= set(beside["versions"])
    assert beside["verification"] == result.verification
    assert beside["candidate"] == result.candidate
    assert str(tmp_path) not in path.read_bytes().decode("latin-1"), "a path of this machine"


@pytest.mark.parametrize("opset", [18, 23])
def test_operator_sets(points: Problem, tmp_path: Path, opset: int) -> None:
    path, result = exported(tmp_path, points, bn="average", opset=opset)
    found = {o.domain: o.version for o in onnx.load(path).opset_import}
    assert result.opset == found[""] == opset
    with pytest.raises(UsageError, match="--opset"):
        ExportOptions(opset=opset - 18 or 24)


@pytest.mark.parametrize("precision", ["fp16", "int8-dynamic", "int8-static"])
def test_precisions(points: Problem, test_x: torch.Tensor, tmp_path: Path, precision: str) -> None:
    path, result = exported(
        tmp_path, points, data=("train", "val"), precision=precision, selection=Selection(last=1),
        **QUICK,
    )  # fmt: skip
    made = onnx_run(path, test_x)
    wanted = outputs(points.make, points.weights[-1], test_x)
    assert (made.argmax(1) == wanted.argmax(1)).mean() > 0.93
    assert np.abs(made - wanted).max() < 0.15 * np.abs(wanted).max()
    assert np.abs(made - wanted).max() > 0
    assert result.precision == precision
    assert contract(path)[0][1] == "tensor(float)"
    assert json.loads(facts(path)["ensemblekit"])["precision"] == precision


def test_a_precision_that_the_provider_has_not(points: Problem, tmp_path: Path) -> None:
    """ONNX Runtime multiplies no matrices in bfloat16 on a CPU; the user is told what to change."""
    with pytest.raises(CheckFailedError, match=r"session.*Gemm") as caught:
        exported(tmp_path, points, precision="bf16", bn="average")
    assert "--provider" in str(caught.value.hint)
    assert left_in(tmp_path) == ["ckpts"]


def test_static_ranges_need_training_data(points: Problem, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="training data"):
        exported(tmp_path, points, precision="int8-static")


class Wide(torch.nn.Sequential):
    def __init__(self) -> None:
        super().__init__(torch.nn.Linear(5, 64), torch.nn.ReLU(), torch.nn.Linear(64, 64))


def test_weights_in_a_file_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with more than 2 GB."""
    one = Problem("classification", Wide, PROBLEMS["classes"]().data, tuple(randomised(Wide, 2)))
    x = one.data["test"][0]
    monkeypatch.setitem(saving.save.__kwdefaults__, "external_above", 1000)
    path, result = exported(tmp_path, one, triton=str(tmp_path / "models"), **QUICK)
    assert result.external_data == "model.onnx.data"
    assert (tmp_path / "model.onnx.data").stat().st_size >= 64 * 64 * 4
    wanted = outputs(Wide, average(one.weights), x)
    np.testing.assert_allclose(onnx_run(path, x), wanted, **CLOSE)
    served = tmp_path / "models" / "model" / "1" / "model.onnx"
    np.testing.assert_allclose(onnx_run(served, x), wanted, **CLOSE)
    monkeypatch.setitem(saving.save.__kwdefaults__, "external_above", 1 << 40)
    path, result = exported(tmp_path, one, force=True, **QUICK)
    assert result.external_data is None
    assert left_in(tmp_path) == ["ckpts", "model.onnx", "model.onnx.json", "models"]
    np.testing.assert_allclose(onnx_run(path, x), wanted, **CLOSE)


def test_damaged_external_data_is_not_up_to_date(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = Problem("classification", Wide, PROBLEMS["classes"]().data, tuple(randomised(Wide, 2)))
    save(tmp_path / "ckpts", one.weights)
    (tmp_path / "net.py").write_text(
        "from tests.commands.test_export import Wide\nfrom tests.comparing import points\n"
    )
    monkeypatch.setitem(saving.save.__kwdefaults__, "external_above", 1000)
    model = {"model": f"{tmp_path}/net.py:Wide", "val_data": f"{tmp_path}/net.py:points"}
    path, first = exported(tmp_path, one, data=(), model=model, **QUICK)
    _, again = exported(tmp_path, one, data=(), model=model, **QUICK)
    assert again.up_to_date
    data = tmp_path / str(first.external_data)
    data.write_bytes(data.read_bytes()[:-100])
    try:
        _, again = exported(tmp_path, one, data=(), model=model, **QUICK)
        assert not again.up_to_date
    except UsageError as error:
        assert "exists already" in error.message  # noqa: PT017
    assert path.exists()


# ------------------------------------------------------------------ a graph that is not the model


@pytest.fixture
def sabotage(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The first `count` verifications see a graph with one weight changed."""
    settings: dict[str, Any] = {"count": 1, "seen": []}
    real = exporting_command.verify

    def spoiled(path: Path, *args: Any, **kwargs: Any) -> Verification:
        settings["seen"].append([n.op_type for n in onnx.load(str(path)).graph.node])
        if len(settings["seen"]) <= settings["count"]:
            model = onnx.load(str(path))
            for tensor in model.graph.initializer:
                if len(tensor.dims) == 2:
                    values = onnx.numpy_helper.to_array(tensor).copy()
                    values[0] += 10
                    tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
            onnx.save(model, str(path))
        return real(path, *args, **kwargs)

    monkeypatch.setattr(exporting_command, "verify", spoiled)
    return settings


def test_a_wrong_graph_gives_way_to_the_plain_one(
    points: Problem, test_x: torch.Tensor, tmp_path: Path, sabotage: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(choosing, "_WORTH", 1e9)  # the folded graph is always taken first
    path, result = exported(tmp_path, points, bn="average")
    assert [(a["exporter"], a["folded"], a["passed"]) for a in result.attempts] == [
        ("dynamo", 1, False),
        ("dynamo", 0, True),
    ]
    assert "differ" in str(result.attempts[0]["reason"])
    assert result.attempts[1]["reason"] is None
    assert (result.exporter, result.folded) == ("dynamo", 0)
    assert any("an attempt failed" in text for text in result.warnings)
    made = outputs(points.make, average(points.weights), test_x)
    np.testing.assert_allclose(onnx_run(path, test_x), made, **CLOSE)
    assert left_in(tmp_path) == ["ckpts", "model.onnx", "model.onnx.json"]


@pytest.mark.parametrize("ensemble", [False, True])
def test_wrong_graphs_give_way_to_the_other_exporter(
    points: Problem, test_x: torch.Tensor, tmp_path: Path, sabotage: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch, ensemble: bool,
) -> None:  # fmt: skip
    monkeypatch.setattr(choosing, "_WORTH", 1e9)
    sabotage["count"] = 2
    path, result = exported(tmp_path, points, bn="average", ensemble=ensemble)
    assert [a["exporter"] for a in result.attempts] == ["dynamo", "dynamo", "torchscript"]
    assert [a["passed"] for a in result.attempts] == [False, False, True]
    assert result.exporter == "torchscript"
    members = [outputs(points.make, w, test_x) for w in points.weights]
    single = outputs(points.make, average(points.weights), test_x)
    wanted = COMBINED["mean"](members) if ensemble else single
    np.testing.assert_allclose(onnx_run(path, test_x), wanted, **CLOSE)


@pytest.mark.parametrize("keep", [False, True])
def test_when_all_graphs_are_wrong(
    points: Problem, tmp_path: Path, sabotage: dict[str, Any], keep: bool
) -> None:
    sabotage["count"] = 100
    with pytest.raises(CheckFailedError, match=r"numbers: outputs differ"):
        exported(tmp_path, points, bn="average", keep_failed=keep)
    assert len(sabotage["seen"]) >= 3
    assert left_in(tmp_path) == ["ckpts"] + ["model.failed.onnx"] * keep


def test_an_older_output_survives_a_failed_check(
    points: Problem, tmp_path: Path, sabotage: dict[str, Any]
) -> None:
    sabotage["count"] = 100
    (tmp_path / "model.onnx").write_text("older")
    with pytest.raises(CheckFailedError):
        exported(tmp_path, points, bn="average", force=True, **QUICK)
    assert (tmp_path / "model.onnx").read_text() == "older"
    assert left_in(tmp_path) == ["ckpts", "model.onnx"]


def test_an_exporter_that_fails_gives_way(
    points: Problem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = torch.onnx.export

    def failing(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("dynamo"):
            raise RuntimeError("no such operator here")
        return real(*args, **kwargs)

    monkeypatch.setattr(torch.onnx, "export", failing)
    _, result = exported(tmp_path, points, bn="average")
    assert [a["exporter"] for a in result.attempts] == ["dynamo", "torchscript"]
    assert "no such operator here" in str(result.attempts[0]["reason"])
    assert result.exporter == "torchscript"


# --------------------------------------------------------------------- writes that do not succeed


def full(*_: Any, **__: Any) -> Any:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("where", ["graph", "manifest", "sync", "rename", "triton"])
def test_a_full_disk(
    points: Problem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    save(tmp_path / "ckpts", points.weights)
    for name in ("model.onnx", "model.onnx.json"):
        (tmp_path / name).write_text(f"older {name}")
    before = left_in(tmp_path)
    options: dict[str, Any] = {}
    if where == "graph":
        monkeypatch.setattr(saving.ir, "save", full)
    elif where == "sync":
        monkeypatch.setattr(saving, "_sync", full)
    elif where == "triton":
        options["triton"] = str(tmp_path / "models")
        monkeypatch.setattr("ensemblekit.commands.triton.shutil.copyfile", full)
    else:
        name, suffix = ("write_text", ".json") if where == "manifest" else ("replace", ".onnx")
        real = getattr(Path, name)

        def limited(self: Path, *args: Any, **kwargs: Any) -> Any:
            return full() if self.name.endswith(suffix) else real(self, *args, **kwargs)

        monkeypatch.setattr(Path, name, limited)
    with pytest.raises(MachineError, match="No space left"):
        exported(tmp_path, points, bn="average", force=True, **QUICK, **options)
    assert left_in(tmp_path) == before
    for name in ("model.onnx", "model.onnx.json"):
        assert (tmp_path / name).read_text() == f"older {name}"


@pytest.mark.parametrize("where", ["torch.onnx.export", "verify", "publish"])
def test_an_interrupt_leaves_nothing(
    points: Problem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    def interrupted(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    place = {
        "torch.onnx.export": (torch.onnx, "export"),
        "verify": (exporting_command, "verify"),
        "publish": (saving, "_sync"),
    }[where]
    monkeypatch.setattr(*place, interrupted)
    with pytest.raises(KeyboardInterrupt):
        exported(tmp_path, points, bn="average", **QUICK, triton=str(tmp_path / "models"))
    assert left_in(tmp_path) == ["ckpts"]


# -------------------------------------------------------------------------- options, and the rest


@pytest.mark.parametrize(
    "options",
    [
        {"ensemble": True, "coefficients": (1.0, 1.0)},
        {"ensemble": True, "candidate": ("a", "b")},
        {"coefficients": (1.0,), "candidate": ("a", "b")},
        {"exporter": "jit"},
        {"fuse": "maybe"},
        {"precision": "fp8"},
        {"combiner": "medain"},
        {"opset": 17},
        {"opset": 24},
    ],
)
def test_options_that_exclude_each_other(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        ExportOptions(**options)


def test_an_unknown_provider_and_output_kind(points: Problem, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="rocm"):
        exported(tmp_path, points, provider="rocm")
    with pytest.raises(UsageError, match="odds"):
        exported(tmp_path, points, output_kind="odds", bn="average")


def test_the_callers_model_is_left_as_it_is(points: Problem, tmp_path: Path) -> None:
    save(tmp_path / "ckpts", points.weights)
    model = points.make().train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    threads, grad = torch.get_num_threads(), torch.is_grad_enabled()
    export(
        tmp_path / "ckpts",
        tmp_path / "m.onnx",
        model=ModelOptions(model=model, device="cpu", val_data=points.data["val"]),
        options=ExportOptions(bn="average", **QUICK),
    )
    assert model.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert (threads, grad) == (torch.get_num_threads(), torch.is_grad_enabled())


def test_the_same_inputs_give_the_same_bytes(points: Problem, tmp_path: Path) -> None:
    """Both runs are of one choice of graph: which is faster is measured."""
    one, _ = exported(tmp_path, points, "a.onnx", bn="average", **QUICK)
    other, _ = exported(tmp_path, points, "b.onnx", bn="average", **QUICK)
    same = [onnx.load(path) for path in (one, other)]
    if len(same[0].graph.node) == len(same[1].graph.node):
        assert sha256(one) == sha256(other)
