"""Owns the proof that the module everything exported is compared with says what numpy says."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import nn

from ensemblekit.ensemble_module import EnsembleModule, Head, HeadModule, OneOutput
from ensemblekit.errors import UsageError

torch.set_num_threads(1)

Array = npt.NDArray[np.float64]


def members(count: int = 3) -> list[nn.Module]:
    torch.manual_seed(0)
    return [nn.Linear(5, 4).eval() for _ in range(count)]


def rows() -> torch.Tensor:
    return torch.randn(6, 5, generator=torch.Generator().manual_seed(1))


def softmax(values: Array, axis: int) -> Array:
    odds = np.exp(values - values.max(axis, keepdims=True))
    return np.asarray(odds / odds.sum(axis, keepdims=True))


def said(every: list[nn.Module], x: torch.Tensor) -> Array:
    with torch.no_grad():
        return np.stack([model(x).double().numpy() for model in every])


def numbers(module: nn.Module, *args: Any, **kwargs: Any) -> npt.NDArray[Any]:
    with torch.no_grad():
        return np.asarray(module(*args, **kwargs).numpy())


def test_the_mean_of_classes_is_that_of_probabilities() -> None:
    every = members()
    wanted = softmax(said(every, rows()), -1).mean(0)
    logits = numbers(EnsembleModule(every, Head("classification", "mean")), rows())
    np.testing.assert_allclose(logits, np.log(wanted), rtol=1e-5)
    head = Head("classification", "mean", {}, "probabilities")
    found = numbers(EnsembleModule(every, head), rows())
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
    np.testing.assert_allclose(found.sum(1), 1, rtol=1e-5)


def test_the_mean_of_labels_is_that_of_probabilities() -> None:
    every = members()
    wanted = (1 / (1 + np.exp(-said(every, rows())))).mean(0)
    head = Head("multilabel", "mean", {}, "probabilities")
    np.testing.assert_allclose(numbers(EnsembleModule(every, head), rows()), wanted, rtol=1e-5)
    logits = numbers(EnsembleModule(every, Head("multilabel", "mean")), rows())
    np.testing.assert_allclose(logits, np.log(wanted / (1 - wanted)), rtol=1e-4, atol=1e-5)


def test_the_mean_of_values_is_theirs() -> None:
    every = members()
    found = numbers(EnsembleModule(every, Head("regression", "mean")), rows())
    np.testing.assert_allclose(found, said(every, rows()).mean(0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "task, shape, axis", [("segmentation", (4, 5, 5), 1), ("tokens", (7, 4), -1)]
)
def test_classes_of_dense_tasks_lie_elsewhere(task: str, shape: tuple[int, ...], axis: int) -> None:
    outputs = torch.randn(3, 2, *shape, generator=torch.Generator().manual_seed(2))
    own_axis = axis if axis < 0 else axis + 1
    wanted = softmax(outputs.double().numpy(), own_axis).mean(0)
    head = Head(task, "mean", {}, "probabilities")
    assert head.class_axis == axis
    np.testing.assert_allclose(numbers(HeadModule(head), outputs), wanted, rtol=1e-5)
    logits = numbers(HeadModule(Head(task, "mean")), outputs)
    np.testing.assert_allclose(softmax(logits.astype(np.float64), axis), wanted, rtol=1e-5)


def test_weights_of_zero_do_not_count() -> None:
    every = members()
    head = Head("classification", "weighted", {"weights": [0.0, 0.25, 0.75]}, "probabilities")
    each = softmax(said(every, rows()), -1)
    np.testing.assert_allclose(
        numbers(EnsembleModule(every, head), rows()), 0.25 * each[1] + 0.75 * each[2], rtol=1e-5
    )


def test_certain_members_give_no_nan() -> None:
    """Probabilities that are zero in float32."""
    outputs = torch.tensor([[[200.0, -200, 0]], [[-200, 200, 0]]])
    found = numbers(HeadModule(Head("classification", "mean")), outputs)
    assert np.isfinite(found).all()
    np.testing.assert_allclose(found[0, :2], np.log(0.5), rtol=1e-6)


def test_a_single_member_is_itself() -> None:
    (one,) = members(1)
    head = Head("classification")
    assert head.plain
    assert np.array_equal(numbers(EnsembleModule([one], head), rows()), numbers(one, rows()))
    head = Head("classification", None, {}, "probabilities")
    assert not head.plain
    wanted = softmax(said([one], rows())[0], 1)
    np.testing.assert_allclose(numbers(EnsembleModule([one], head), rows()), wanted, rtol=1e-5)


def test_names_of_outputs() -> None:
    assert Head("classification").output_name == "logits"
    assert Head("tokens", "mean", {}, "probabilities").output_name == "probabilities"
    assert Head("regression", "mean").output_name == "output"


def test_probabilities_of_what_has_none_are_refused() -> None:
    with pytest.raises(UsageError, match="a regression has none"):
        Head("regression", "mean", {}, "probabilities")
    for combiner in ("vote", "stack-ridge"):
        with pytest.raises(UsageError, match=f"'{combiner}' gives scores"):
            Head("classification", combiner, {}, "probabilities")
    with pytest.raises(UsageError, match="--output-kind"):
        Head("classification", "mean", {}, "odds")


class Keyed(nn.Module):
    """Keywords in, a dict out."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 4)

    def forward(self, *, values: torch.Tensor, scale: torch.Tensor) -> dict[str, torch.Tensor]:
        out = self.linear(values) * scale
        return {"hidden": values, "logits": out, "other": -out}


def test_keywords_and_entries_of_a_dict() -> None:
    torch.manual_seed(0)
    one = Keyed().eval()
    x, scale = rows(), torch.tensor([2.0])
    given = {"values": x, "scale": scale}
    with torch.no_grad():
        wanted = (2 * one.linear(x)).numpy()
    head = Head("classification")
    assert np.array_equal(numbers(EnsembleModule([one], head), **given), wanted)
    other = EnsembleModule([one], head, logits="other")
    assert np.array_equal(numbers(other, **given), -wanted)
    ordered = OneOutput(one, names=("scale", "values"))
    assert np.array_equal(numbers(ordered, scale, x), wanted)
    ordered = OneOutput(one, logits="other", names=("values", "scale"))
    assert np.array_equal(numbers(ordered, x, scale), -wanted)


def test_members_of_a_tuple() -> None:
    class Pair(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return 2 * x, x

    assert np.array_equal(numbers(OneOutput(Pair()), rows()), 2 * rows().numpy())


def test_members_are_registered() -> None:
    module = EnsembleModule(members(2), Head("classification", "mean"))
    assert set(module.state_dict()) == {
        f"members.{k}.{name}" for k in range(2) for name in ("weight", "bias")
    }
