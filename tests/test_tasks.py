"""Tasks: which part of an output is the logits, and labels that fit them."""

from collections import OrderedDict, namedtuple
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from ensemblekit.errors import InputError, NotFiniteError
from ensemblekit.tasks import class_log_probs, logits_of

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
    """Outputs of no known kind."""

    logits: torch.Tensor


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
        (Plain(LOGITS), None, ("Plain",)),
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
