"""Scores of items: what a mix says about each, whatever way it is computed.

Figures against other libraries: reference/test_metrics_reference.py; segmentation: test_rivals.py.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import log_softmax

from ensemblekit import scoring
from ensemblekit.combiners import COMBINERS
from ensemblekit.errors import InputError, UsageError
from ensemblekit.evaluation import agreement
from ensemblekit.predictions import Predictions
from ensemblekit.scoring import Mix, combined_log_probs, score
from ensemblekit.tasks import Form

torch.set_num_threads(1)

Array = np.ndarray


def classes(count: int = 6, rows: int = 90, *, members: int = 3, seed: int = 0) -> Predictions:
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, count, rows)
    logits = rng.normal(size=(members, rows, count)) + np.eye(count)[truth]
    logs = log_softmax(logits, axis=2).astype(np.float32)
    return Predictions(Form("classification", count), tuple(logs), None, truth, None)


def labels(columns: int, rows: int = 40) -> Predictions:
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 2, (rows, columns)).astype(np.uint8)
    logits = rng.normal(size=(2, rows, columns)).astype(np.float32)
    return Predictions(Form("multilabel", columns), tuple(logits), None, truth, None)


def weighted(members: tuple[int, ...], *weights: float) -> Mix:
    return Mix(members, "weighted", {"weights": list(weights)})


def assert_same(one: scoring.Scores, other: scoring.Scores, *, but: tuple[str, ...] = ()) -> None:
    assert one.keys() - set(but) == other.keys() - set(but)
    for name in one.keys() - set(but):
        np.testing.assert_allclose(one[name], other[name], atol=1e-5, err_msg=name)


class TestWaysToOneAnswer:
    def test_pieces_of_work(self, monkeypatch: pytest.MonkeyPatch) -> None:
        mixes = [Mix((0,)), Mix((0, 1, 2), "mean"), Mix((0, 2), "vote"), weighted((1, 2), 0.3, 0.7)]
        whole = score(classes(), mixes)
        monkeypatch.setattr(scoring, "_BLOCK", 3 * 6 * 7)
        for one, other in zip(whole, score(classes(), mixes), strict=True):
            assert_same(one, other)

    def test_alone_or_among_others(self) -> None:
        mixes = [Mix((2,)), Mix((0, 1), "mean"), weighted((0, 1, 2), 0.5, 0.25, 0.25)]
        together = score(classes(), mixes)
        for mix, found in zip(mixes, together, strict=True):
            assert_same(found, score(classes(), [mix])[0])

    def test_a_mean_is_an_evenly_weighted_mean(self) -> None:
        mean, even = score(classes(), [Mix((0, 1), "mean"), weighted((0, 1), 0.5, 0.5)])
        assert_same(mean, even)

    @pytest.mark.parametrize("members", [(0, 1, 2), (2, 1, 0)])
    def test_weights_follow_their_members(self, members: tuple[int, ...]) -> None:
        weights = [0.2, 0.3, 0.5]
        mine = [weights[m] for m in members]
        found, wanted = score(classes(), [weighted(members, *mine), weighted((0, 1, 2), *weights)])
        assert_same(found, wanted)

    def test_a_weight_of_zero_leaves_a_member_out(self) -> None:
        """Down to a single member: such weights stand in files that people edit."""
        left = ("disagreement", "information")
        found, wanted = score(classes(), [weighted((0, 1, 2), 0.5, 0, 0.5), Mix((0, 2), "mean")])
        assert_same(found, wanted, but=left)
        found, wanted = score(classes(), [weighted((0, 1), 1.0, 0.0), Mix((0,))])
        assert_same(found, wanted, but=left)

    def test_a_member_that_takes_part_twice(self) -> None:
        left = ("disagreement", "information")
        found, wanted = score(classes(), [Mix((1, 1), "mean"), Mix((1,))])
        assert_same(found, wanted, but=left)
        found, wanted = score(
            classes(), [Mix((0, 0, 1, 1, 1, 1), "mean"), weighted((0, 1), 1 / 3, 2 / 3)]
        )
        assert_same(found, wanted, but=left)

    @pytest.mark.parametrize("name", ["mean-logits", "temperature", "vote"])
    def test_other_combiners_are_the_combiners_own(self, name: str) -> None:
        params = {"temperature": 1.3} if name == "temperature" else {}
        predictions, mix = classes(), Mix((0, 1, 2), name, params)
        (found,) = score(predictions, [mix])
        made = combined_log_probs(predictions, mix)
        np.testing.assert_array_equal(found["decided"], made.argmax(1))
        assert ("log_prob" in found) == COMBINERS[name].likelihood
        if COMBINERS[name].likelihood:
            rows = np.arange(90)
            np.testing.assert_allclose(found["log_prob"], made.numpy()[rows, predictions.targets])

    def test_half_precision_predictions(self) -> None:
        exact = classes()
        short = Predictions(
            exact.form,
            tuple(one.astype(np.float16) for one in exact.outputs),
            None,
            exact.targets,
            None,
        )
        mix = Mix((0, 1, 2), "mean")
        (one,), (other,) = score(exact, [mix]), score(short, [mix])
        np.testing.assert_allclose(one["log_prob"], other["log_prob"], atol=1e-2)


class TestUncertainty:
    def test_members_that_are_the_same_tell_nothing(self) -> None:
        one = classes(members=1)
        predictions = Predictions(one.form, one.outputs * 3, None, one.targets, None)
        (found,) = score(predictions, [Mix((0, 1, 2), "mean")])
        np.testing.assert_allclose(found["information"], 0, atol=1e-6)
        np.testing.assert_array_equal(found["disagreement"], 0)

    def test_information_is_never_negative(self) -> None:
        """However uneven the weights: each member's entropy counts as much as the member."""
        sure, unsure = np.log([0.98, 0.01, 0.01]), np.log([1 / 3] * 3)
        logs = np.stack([np.tile(sure, (5, 1)), np.tile(unsure, (5, 1))]).astype(np.float32)
        truth = np.zeros(5, np.int64)
        predictions = Predictions(Form("classification", 3), tuple(logs), None, truth, None)
        (found,) = score(predictions, [weighted((0, 1), 0.99, 0.01)])
        assert found["information"].min() >= -1e-6

    def test_one_member_has_none(self) -> None:
        (found,) = score(classes(), [Mix((0,))])
        assert not {"information", "disagreement"} & found.keys()


class TestAgreement:
    def test_of_classes(self) -> None:
        found = agreement(score(classes(), [Mix((m,)) for m in range(3)]))
        assert found is not None
        said = np.stack([one.argmax(axis=1) for one in classes().outputs])
        np.testing.assert_allclose(found, [[(a == b).mean() for b in said] for a in said])

    @pytest.mark.parametrize("columns", [1, 4, 60, 63, 64, 80])
    @pytest.mark.parametrize("changed", [0, -1])
    def test_of_labels(self, columns: int, changed: int) -> None:
        """Whichever of the labels differs, however many there are."""
        one = labels(columns)
        other = one.outputs[0].copy()
        other[:10, changed] *= -1
        predictions = Predictions(one.form, (one.outputs[0], other), None, one.targets, None)
        found = agreement(score(predictions, [Mix((0,)), Mix((1,))]))
        assert found == [[1.0, 0.75], [0.75, 1.0]]

    def test_values_are_not_decided(self) -> None:
        rng = np.random.default_rng(0)
        values = tuple(rng.normal(size=(2, 9, 1)).astype(np.float32))
        predictions = Predictions(
            Form("regression", 1), values, None, rng.normal(size=(9, 1)), None
        )
        assert agreement(score(predictions, [Mix((0,)), Mix((1,))])) is None


@pytest.mark.parametrize(
    "task, name", [("regression", "vote"), ("segmentation", "vote"), ("multilabel", "ridge")]
)
def test_a_combiner_of_another_task(task: str, name: str) -> None:
    predictions: Any = Predictions(Form(task, 3), (), None, np.zeros(0), None)
    with pytest.raises(InputError, match=f"'{name}' is not defined for {task}"):
        score(predictions, [Mix((0, 1), name)])


def test_a_combiner_that_does_not_exist() -> None:
    with pytest.raises(UsageError, match="median"):
        score(classes(), [Mix((0, 1), "median")])
