"""Tasks: which part of an output is the logits, what the task is, and labels that fit it."""

from collections import OrderedDict, namedtuple
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from ensemblekit.batches import Batch, as_batch
from ensemblekit.errors import InputError, NotFiniteError, UsageError
from ensemblekit.tasks import TASKS, Form, class_log_probs, detect, logits_of

LOGITS = torch.tensor([[2.0, 0.0, -1.0], [0.0, 1.0, 0.0]])
OTHER = torch.zeros(2, 5)
Y = torch.tensor([0, 1])
Pair = namedtuple("Pair", "first second")  # as torchvision has them


class ModelOutput(OrderedDict[str, Any]):
    """Like transformers': a dict whose entries are attributes too."""

    def __getattr__(self, name: str) -> Any:
        if name not in self:
            raise AttributeError(name)
        return self[name]


@dataclass
class Plain:
    """Outputs of a kind of its own, logits under their usual name."""

    logits: torch.Tensor


@dataclass
class Strange:
    """Outputs of no known kind."""

    scores: torch.Tensor


@pytest.mark.parametrize(
    "outputs, key",
    [
        (LOGITS, None),
        ((LOGITS, OTHER), None),
        ([LOGITS], None),
        (Pair(LOGITS, OTHER), None),
        ({"logits": LOGITS, "hidden": OTHER}, None),
        ({"loss": OTHER, "out": LOGITS, "aux": OTHER}, None),
        ({"pred": LOGITS}, None),
        ({"logits": OTHER, "scores": LOGITS}, "scores"),
        (ModelOutput(loss=torch.tensor(1.0), logits=LOGITS), None),
        (ModelOutput(main=(LOGITS,), logits=OTHER)["main"], None),
        (Plain(LOGITS), None),
        (Strange(LOGITS), "scores"),
    ],
)
def test_logits_are_found(outputs: Any, key: str | None) -> None:
    assert logits_of(outputs, key) is LOGITS


@pytest.mark.parametrize(
    "outputs, key, words",
    [
        ({"a": LOGITS, "b": OTHER}, None, ("a, b", "--logits")),
        ({"logits": LOGITS}, "scores", ("logits", "scores", "--logits")),
        ({}, None, ("--logits",)),
        ("text", None, ("str",)),
        (None, None, ("NoneType",)),
        ((), None, ("tuple",)),
        ({"logits": [1, 2]}, None, ("list",)),
        (Strange(LOGITS), None, ("Strange",)),
        (Strange(LOGITS), "logits", ("Strange",)),
    ],
)
def test_outputs_without_logits(outputs: Any, key: str | None, words: tuple[str, ...]) -> None:
    with pytest.raises(InputError) as caught:
        logits_of(outputs, key)
    shown = f"{caught.value.message} {caught.value.hint}"
    assert not [word for word in words if word not in shown], shown


@pytest.mark.parametrize(
    "kind", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str
)
def test_log_probabilities(kind: torch.dtype) -> None:
    found = class_log_probs(LOGITS.to(kind), Y)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, LOGITS.log_softmax(1))
    assert torch.allclose(found.exp().sum(1), torch.ones(2))


@pytest.mark.parametrize(
    "kind", [torch.int64, torch.int32, torch.int8, torch.uint8, torch.uint16, torch.bool], ids=str
)
def test_labels_of_any_integer_type(kind: torch.dtype) -> None:
    class_log_probs(LOGITS, Y.to(kind))


def test_large_logits_do_not_overflow() -> None:
    found = class_log_probs(torch.tensor([[1e4, -1e4]]), torch.tensor([1]))
    assert found.tolist() == [[0.0, -2e4]]


@pytest.mark.parametrize(
    "logits, labels, words",
    [
        (LOGITS, None, "no labels"),
        (LOGITS, Y[:1], "do not fit"),
        (LOGITS, Y.float(), "do not fit"),
        (LOGITS, LOGITS, "do not fit"),
        (LOGITS, Y[:, None], "do not fit"),
        (LOGITS, torch.tensor([0, 3]), "labels run from 0 to 3, the model has classes 0 to 2"),
        (LOGITS, torch.tensor([-1, 1]), "labels run from -1"),
        (LOGITS[0], Y, "shape (3,)"),
        (LOGITS[:, :1], Y, "at least 2 classes"),
        (LOGITS[:, :, None], Y, "(2, 3, 1)"),
    ],
)
def test_what_is_no_classification(
    logits: torch.Tensor, labels: torch.Tensor | None, words: str
) -> None:
    with pytest.raises(InputError) as caught:
        class_log_probs(logits, labels)
    assert words in caught.value.message


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_logits_that_give_no_probability(value: str) -> None:
    logits = LOGITS.clone()
    logits[1, 1] = float(value)
    with pytest.raises(NotFiniteError):
        class_log_probs(logits, Y)


def test_a_class_that_is_ruled_out_is_fine() -> None:
    logits = LOGITS.clone()
    logits[:, 2] = float("-inf")
    assert torch.isfinite(class_log_probs(logits, Y)[:, :2]).all()


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def whole(high: int, *shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, high, shape, generator=torch.Generator().manual_seed(seed))


def batch_of(labels: torch.Tensor, inputs: torch.Tensor | None = None) -> Batch:
    return as_batch((torch.zeros(len(labels), 2) if inputs is None else inputs, labels))


class TestDetect:
    @pytest.mark.parametrize(
        "outputs, labels, task, classes",
        [
            (normal(6, 3), whole(3, 6), "classification", 3),
            (normal(6, 2), whole(2, 6), "classification", 2),
            ((normal(6, 3), OTHER), whole(3, 6).to(torch.uint8), "classification", 3),
            (normal(6, 3, 4, 4), whole(3, 6, 4, 4), "segmentation", 3),
            (normal(6, 3, 2, 2), whole(3, 6, 8, 8), "segmentation", 3),
            (normal(6, 5, 9), whole(9, 6, 5), "tokens", 9),
            (normal(6, 3), whole(2, 6, 3), "multilabel", 3),
            (normal(6, 3), whole(2, 6, 3).float(), "multilabel", 3),
            (normal(6), whole(2, 6).float(), "multilabel", 1),
            (normal(6, 1), whole(2, 6), "multilabel", 1),
            (normal(6, 3), normal(6, 3), "regression", 3),
            (normal(6, 1), normal(6), "regression", 1),
            (normal(6), normal(6, 1), "regression", 1),
            (normal(6), whole(9, 6) + 1, "regression", 1),
        ],
    )
    def test_from_shapes(self, outputs: Any, labels: torch.Tensor, task: str, classes: int) -> None:
        form = detect(outputs, batch_of(labels))
        assert (form.task, form.classes) == (task, classes)
        rows = form.targets(batch_of(labels)).values_R
        made = form.outputs(outputs, batch_of(labels))
        assert made.shape == (len(rows), classes)
        assert made.dtype == torch.float32

    @pytest.mark.parametrize(
        "outputs, labels",
        [
            (normal(6, 3), normal(6)),
            (normal(6, 3), whole(2, 5, 3)),
            (normal(6, 3, 4, 4), whole(3, 6)),
            (normal(6, 5, 9), normal(6, 5)),
            (normal(2, 2, 2, 2, 2), whole(2, 2)),
        ],
    )
    def test_what_fits_no_task(self, outputs: torch.Tensor, labels: torch.Tensor) -> None:
        with pytest.raises(InputError) as caught:
            detect(outputs, batch_of(labels))
        assert str(tuple(outputs.shape)) in caught.value.message
        assert "--task" in str(caught.value.hint)

    def test_a_task_can_be_named(self) -> None:
        labels = whole(2, 6, 3).float()
        assert detect(normal(6, 3), batch_of(labels), task="regression").task == "regression"
        with pytest.raises(UsageError, match="multilabel"):
            detect(normal(6, 3), batch_of(labels), task="multi-label")

    @pytest.mark.parametrize("task", TASKS)
    def test_a_named_task_that_does_not_fit(self, task: str) -> None:
        batch, outputs = batch_of(whole(5, 6, 2, 2, 2)), normal(6, 3, 7)

        def use() -> None:
            form = detect(outputs, batch, task=task)
            form.targets(batch)
            form.outputs(outputs, batch)

        with pytest.raises(InputError):
            use()

    @pytest.mark.parametrize(
        "raw, words", [((LOGITS,), "inputs alone"), ({"pixels": LOGITS}, "pixels")]
    )
    def test_no_labels(self, raw: Any, words: str) -> None:
        with pytest.raises(InputError, match="no labels") as caught:
            detect(LOGITS, as_batch(raw))
        assert words in str(caught.value.hint)

    def test_causal_models_shift_their_labels(self) -> None:
        """Labels that repeat the inputs: the output at t - 1 is what predicts them."""
        ids = whole(9, 4, 6)
        labels = ids.clone()
        labels[:, 4:] = -100
        batch = as_batch({"input_ids": ids, "labels": labels})
        form = detect(normal(4, 6, 9), batch)
        assert form.shifted
        targets = form.targets(batch)
        assert targets.values_R.tolist() == ids[:, 1:4].flatten().tolist()
        assert targets.sizes_N is not None
        assert targets.sizes_N.tolist() == [3] * 4
        logits = normal(4, 6, 9)
        right = logits[:, :3].log_softmax(-1).flatten(0, 1)
        torch.testing.assert_close(form.outputs(logits, batch), right)
        aligned = as_batch({"input_ids": ids, "labels": (ids + 1) % 9})
        assert not detect(logits, aligned).shifted


class TestDense:
    def test_ignored_pixels_are_no_rows(self) -> None:
        labels = whole(3, 2, 4, 4)
        labels[0, :2] = 255
        form = Form("segmentation", 3, ignore_index=255)
        batch, logits = batch_of(labels), normal(2, 3, 4, 4)
        targets = form.targets(batch)
        assert targets.sizes_N is not None
        assert targets.sizes_N.tolist() == [8, 16]
        kept = labels != 255
        assert targets.values_R.tolist() == labels[kept].tolist()
        right = logits.movedim(1, -1)[kept].log_softmax(1)
        torch.testing.assert_close(form.outputs(logits, batch), right)

    def test_smaller_maps_are_scaled_up(self) -> None:
        logits = normal(1, 3, 2, 2)
        large = torch.nn.functional.interpolate(logits, size=(6, 6), mode="bilinear")
        found = Form("segmentation", 3).outputs(logits, batch_of(whole(3, 1, 6, 6)))
        torch.testing.assert_close(found, large.movedim(1, -1).reshape(-1, 3).log_softmax(1))

    def test_a_void_label_is_named_in_the_hint(self) -> None:
        labels = whole(3, 2, 4, 4)
        labels[0, 0, 0] = 255
        with pytest.raises(InputError, match="labels run from 0 to 255") as caught:
            Form("segmentation", 3).targets(batch_of(labels))
        assert "--ignore-index" in str(caught.value.hint)

    def test_a_sample_without_any_row(self) -> None:
        labels = torch.full((2, 3, 3), -100)
        labels[1] = 1
        form = Form("segmentation", 3)
        targets = form.targets(batch_of(labels))
        assert targets.sizes_N is not None
        assert targets.sizes_N.tolist() == [0, 9]
        assert form.outputs(normal(2, 3, 3, 3), batch_of(labels)).shape == (9, 3)


class TestColumns:
    @pytest.mark.parametrize("labels", [[[0, 2]], [[0.5, 1.0]], [[-1, 1]]])
    def test_multilabel_labels_are_zero_or_one(self, labels: list[list[float]]) -> None:
        with pytest.raises(InputError, match="0 or 1"):
            Form("multilabel", 2).targets(batch_of(torch.tensor(labels)))

    @pytest.mark.parametrize("value", ["nan", "inf"])
    def test_labels_of_a_regression_are_finite(self, value: str) -> None:
        with pytest.raises(NotFiniteError, match="labels"):
            Form("regression", 1).targets(batch_of(torch.tensor([1.0, float(value)])))

    @pytest.mark.parametrize("task", ["multilabel", "regression"])
    def test_outputs_are_finite_and_of_the_labels_shape(self, task: str) -> None:
        form, labels = Form(task, 3), whole(2, 4, 3).float()
        broken = normal(4, 3)
        broken[2, 1] = float("nan")
        with pytest.raises(NotFiniteError):
            form.outputs(broken, batch_of(labels))
        with pytest.raises(InputError, match="shapes"):
            form.outputs(normal(4, 2), batch_of(labels))


def test_classes_stay_as_in_the_first_batch() -> None:
    with pytest.raises(InputError, match="4 classes here and 3"):
        Form("classification", 3).outputs(normal(6, 4), batch_of(whole(3, 6)))


@pytest.mark.parametrize(
    "task, outputs, labels",
    [
        ("classification", normal(6, 3), whole(3, 6)),
        ("multilabel", normal(6, 3), whole(2, 6, 3)),
        ("regression", normal(6, 3), normal(6, 3, seed=1)),
        ("tokens", normal(6, 4, 3), whole(3, 6, 4)),
    ],
)
def test_the_loss_is_torchs(task: str, outputs: torch.Tensor, labels: torch.Tensor) -> None:
    functional = torch.nn.functional
    form, batch = Form(task, 3), batch_of(labels)
    truth = form.targets(batch).values_R
    found = form.loss(form.outputs(outputs, batch), truth) / len(truth)
    wanted = {
        "classification": lambda: functional.cross_entropy(outputs, labels),
        "multilabel": lambda: functional.binary_cross_entropy_with_logits(outputs, labels.float()),
        "regression": lambda: functional.mse_loss(outputs, labels),
        "tokens": lambda: functional.cross_entropy(outputs.flatten(0, 1), labels.flatten()),
    }[task]()
    torch.testing.assert_close(found, wanted)
