"""Metrics against scikit-learn's."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, log_loss

from ensemblekit import metrics
from ensemblekit.predict import Predictions


def random(samples: int, classes: int, seed: int, scale: float = 2.0) -> Predictions:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(samples, classes, generator=generator) * scale
    targets = torch.randint(0, classes, (samples,), generator=generator)
    return Predictions(logits.log_softmax(1), targets)


@given(samples=st.integers(1, 200), classes=st.integers(2, 12), seed=st.integers(0, 2**16))
def test_equal_to_scikit_learn(samples: int, classes: int, seed: int) -> None:
    found = random(samples, classes, seed)
    probs = found.log_probs_NC.double().exp().numpy()
    probs /= probs.sum(1, keepdims=True)
    targets = found.targets_N.numpy()
    assert metrics.accuracy(found) == accuracy_score(targets, probs.argmax(1))
    wanted = log_loss(targets, probs, labels=np.arange(classes))
    assert metrics.nll(found) == pytest.approx(wanted, rel=1e-6, abs=1e-6)


def test_sums_run_in_float64() -> None:
    found = random(1, 3, 0)
    many = Predictions(found.log_probs_NC.expand(3_000_000, 3), found.targets_N.expand(3_000_000))
    assert metrics.nll(many) == pytest.approx(metrics.nll(found), rel=1e-12)


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
    found = Predictions(torch.tensor(rows).log(), torch.tensor(targets))
    assert metrics.correct(found) == correct
    assert metrics.accuracy(found) == correct / len(targets)


@pytest.mark.parametrize("kind", [torch.uint8, torch.int32, torch.int64], ids=str)
def test_labels_of_any_integer_type(kind: torch.dtype) -> None:
    found = Predictions(torch.tensor([[0.25, 0.75]]).log(), torch.tensor([1], dtype=kind))
    assert metrics.accuracy(found) == 1
    assert metrics.nll(found) == pytest.approx(-math.log(0.75))


def test_a_certain_mistake_costs_infinitely_much() -> None:
    found = Predictions(torch.tensor([[0.0, -math.inf]]), torch.tensor([1]))
    assert metrics.nll(found) == math.inf
