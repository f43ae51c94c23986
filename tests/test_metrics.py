"""Figures of quality: formulas by hand, edge cases, and sums over items.

Against other libraries: reference/test_metrics_reference.py.
"""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, log_loss

from ensemblekit import metrics

Pair = tuple[torch.Tensor, torch.Tensor]


def random(samples: int, classes: int, seed: int, scale: float = 2.0) -> Pair:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(samples, classes, generator=generator) * scale
    targets = torch.randint(0, classes, (samples,), generator=generator)
    return logits.log_softmax(1), targets


@given(samples=st.integers(1, 200), classes=st.integers(2, 12), seed=st.integers(0, 2**16))
def test_equal_to_scikit_learn(samples: int, classes: int, seed: int) -> None:
    log_probs_NC, targets_N = random(samples, classes, seed)
    probs = log_probs_NC.double().exp().numpy()
    probs /= probs.sum(1, keepdims=True)
    targets = targets_N.numpy()
    assert metrics.accuracy(log_probs_NC, targets_N) == accuracy_score(targets, probs.argmax(1))
    wanted = log_loss(targets, probs, labels=np.arange(classes))
    assert metrics.nll(log_probs_NC, targets_N) == pytest.approx(wanted, rel=1e-6, abs=1e-6)


def test_sums_run_in_float64() -> None:
    one, target = random(1, 3, 0)
    many = metrics.nll(one.expand(3_000_000, 3), target.expand(3_000_000))
    assert many == pytest.approx(metrics.nll(one, target), rel=1e-12)


@pytest.mark.parametrize(
    "rows, targets, correct",
    [
        ([[0.5, 0.5]], [0], 1),  # a tie goes to the lower class
        ([[0.5, 0.5]], [1], 0),
        ([[0.9, 0.1], [0.2, 0.8]], [0, 0], 1),
        ([[1.0, 0.0]], [0], 1),
    ],
)
def test_correct(rows: list[list[float]], targets: list[int], correct: int) -> None:
    found = torch.tensor(rows).log(), torch.tensor(targets)
    assert metrics.correct(*found) == correct
    assert metrics.accuracy(*found) == correct / len(targets)


@pytest.mark.parametrize("kind", [torch.uint8, torch.int32, torch.int64], ids=str)
def test_labels_of_any_integer_type(kind: torch.dtype) -> None:
    found = torch.tensor([[0.25, 0.75]]).log(), torch.tensor([1], dtype=kind)
    assert metrics.accuracy(*found) == 1
    assert metrics.nll(*found) == pytest.approx(-math.log(0.75))


def test_a_certain_mistake_costs_infinitely_much() -> None:
    found = torch.tensor([[0.0, -math.inf]]), torch.tensor([1])
    assert metrics.nll(*found) == math.inf


class TestCalibration:
    def test_a_bin_holds_its_upper_edge(self) -> None:
        """(a, b], as in the paper: 1/15 is in the first bin, 1 in the last."""
        confidence = np.array([0.0, 1 / 15, 0.07, 1.0])
        found = metrics.reliability(confidence, np.array([True, False, True, True]))
        assert [b["samples"] for b in found] == [2, 1, *[0] * 11, 0, 1]
        assert found[0]["accuracy"] == 0.5
        assert found[2] == {
            "low": 2 / 15,
            "high": 3 / 15,
            "samples": 0,
            "confidence": None,
            "accuracy": None,
        }

    def test_ece_by_hand(self) -> None:
        confidence = np.array([0.95, 0.95, 0.55, 0.55])
        correct = np.array([True, False, True, True])
        assert metrics.ece(confidence, correct) == pytest.approx((0.45 + 0.45) / 2)

    def test_one_sample_a_bin_is_the_mean_error(self) -> None:
        rng = np.random.default_rng(0)
        confidence, correct = rng.uniform(size=15), rng.integers(0, 2, 15)
        found = metrics.ece_adaptive(confidence, correct)
        assert found == pytest.approx(np.abs(confidence - correct).mean())

    @pytest.mark.parametrize("samples", [1, 3, 14, 16])
    def test_few_samples(self, samples: int) -> None:
        confidence, correct = np.full(samples, 0.75), np.ones(samples, dtype=bool)
        assert metrics.ece(confidence, correct) == pytest.approx(0.25)
        assert metrics.ece_adaptive(confidence, correct) == pytest.approx(0.25)


class TestFigures:
    def test_a_figure_without_its_columns_is_none(self) -> None:
        items = {"rows": np.ones(3), "correct": np.array([True, False, True])}
        assert metrics.figure("accuracy", items) == pytest.approx(2 / 3)
        for name in ("nll", "top5", "brier", "miou", "r2", "rmse"):
            assert metrics.figure(name, items) is None

    def test_every_figure_of_a_task_exists(self) -> None:
        for names in metrics.OF_TASK.values():
            assert set(names) <= set(metrics.FIGURES)

    def test_classes_that_do_not_occur_leave_the_mean_alone(self) -> None:
        inter, union = np.array([[3, 0, 1]]), np.array([[4, 0, 4]])
        items = {"rows": np.array([8]), "inter_C": inter, "union_C": union}
        assert metrics.figure("miou", items) == pytest.approx((0.75 + 0.25) / 2)

    def test_a_figure_that_is_not_finite_is_none(self) -> None:
        items = {"rows": np.ones(1), "log_prob": np.array([-1000.0])}
        assert metrics.figure("perplexity", items) is None

    def test_rows_weigh_not_items(self) -> None:
        items = {"rows": np.array([1, 9]), "log_prob": np.array([-1.0, 0.0])}
        assert metrics.figure("nll", items) == pytest.approx(0.1)

    def test_one_class_has_no_auroc(self) -> None:
        assert metrics.auroc(np.array([0.1, 0.2]), np.array([1, 1])) is None
        assert metrics.auroc(np.array([0.1, 0.2, 0.2]), np.array([0, 0, 1])) == 0.75
