"""Choices among members, beside brute force and scipy's optimiser."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from scipy.special import expit, log_softmax

from ensemblekit.choosing import (
    BinaryLogLoss,
    LogLoss,
    Losses,
    SquaredLoss,
    best_subset,
    greedy_ensemble,
    losses_of,
)
from ensemblekit.predictions import Predictions
from ensemblekit.rivals import all_subset_weights, find_rivals, subsets
from ensemblekit.tasks import Form

Array = np.ndarray


def classes(members: int, rows: int = 400, *, seed: int = 0) -> tuple[Array, Array]:
    """Log-probabilities of members of different quality, and the true classes."""
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, 5, rows)
    quality = rng.uniform(0.5, 3, members)[:, None, None]
    logits = rng.normal(size=(members, rows, 5)) * 1.5 + quality * np.eye(5)[truth]
    return log_softmax(logits, axis=2), truth


def log_loss(members: int, *, seed: int = 0) -> LogLoss:
    logs, truth = classes(members, seed=seed)
    return LogLoss(np.take_along_axis(logs, truth[None, :, None], axis=2)[..., 0])


def values(members: int, *, noise: float = 0.5, seed: int = 0) -> tuple[Array, Array]:
    """Members that share a part of their errors, and the truth, far from zero."""
    rng = np.random.default_rng(seed)
    truth = rng.normal(size=(300, 2)) + 7
    shared = rng.normal(size=truth.shape)
    own = rng.normal(size=(members, *truth.shape))
    spread = rng.uniform(0.5, 2, members)[:, None, None]
    return truth + noise * (spread * own + 0.5 * shared), truth


def squared_loss(members: int, *, seed: int = 0, noise: float = 0.5) -> SquaredLoss:
    return SquaredLoss.from_values(*values(members, noise=noise, seed=seed))


KINDS: dict[str, Callable[..., Losses]] = {"log": log_loss, "squared": squared_loss}


def optimum(direct: Callable[[Array], float], members: int) -> Array:
    """The best weights on the simplex, from several starts."""
    starts = [np.full(members, 1 / members), *(np.eye(members) * 0.9 + 0.1 / members)]
    scale = 1 / max(abs(direct(starts[0])), 1e-300)
    found = [
        minimize(
            lambda w: direct(w) * scale,
            start / start.sum(),
            method="SLSQP",
            bounds=[(0, 1)] * members,
            constraints={"type": "eq", "fun": lambda w: w.sum() - 1},
            options={"ftol": 1e-13, "maxiter": 500},
        )
        for start in starts
    ]
    best = min(found, key=lambda one: one.fun)
    weights: Array = np.maximum(best.x, 0) / np.maximum(best.x, 0).sum()
    return weights


class TestLosses:
    def test_log_loss_is_the_nll_of_the_mixed_probabilities(self) -> None:
        logs, truth = classes(4)
        weights = np.random.default_rng(0).dirichlet(np.ones(4), 9)
        mixed = np.tensordot(weights, np.exp(logs), axes=1)
        wanted = -np.log(mixed[:, np.arange(400), truth]).mean(axis=1)
        np.testing.assert_allclose(log_loss(4).of(weights), wanted, rtol=1e-12)

    def test_log_loss_of_tiny_probabilities(self) -> None:
        loss = LogLoss(np.array([[-2000.0, -1.0], [-2001.0, -3000.0]]))
        found = loss.of(np.array([[1.0, 0.0], [0.5, 0.5], [0.0, 1.0]]))
        shared = np.logaddexp(-2000, -2001) - np.log(2)
        np.testing.assert_allclose(found, [1000.5, -(shared - 1 - np.log(2)) / 2, 2500.5])

    def test_many_mixes_in_pieces(self, monkeypatch: pytest.MonkeyPatch) -> None:
        loss, weights = log_loss(5), all_subset_weights(5)
        whole = loss.of(weights)
        monkeypatch.setattr("ensemblekit.choosing._BLOCK", 1000)
        np.testing.assert_allclose(loss.of(weights), whole, rtol=1e-14)

    def test_labels(self) -> None:
        rng = np.random.default_rng(0)
        logits, truth = rng.normal(size=(3, 50, 4)) * 3, rng.integers(0, 2, (50, 4))
        weights = rng.dirichlet(np.ones(3), 5)
        probs = np.tensordot(weights, expit(logits), axes=1)
        wanted = -np.log(np.where(truth == 1, probs, 1 - probs)).mean(axis=(1, 2))
        found = BinaryLogLoss(logits, truth).log_loss().of(weights)
        np.testing.assert_allclose(found, wanted, rtol=1e-9)

    @pytest.mark.parametrize("noise", [1.0, 1e-2, 1e-5])
    def test_squared_loss_is_the_error_of_the_mixed_values(self, noise: float) -> None:
        made, truth = values(4, noise=noise)
        weights = np.random.default_rng(0).dirichlet(np.ones(4), 9)
        mixed = np.tensordot(weights, made, axes=1)
        wanted = ((mixed - truth) ** 2).mean(axis=(1, 2))
        found = SquaredLoss.from_values(made, truth).of(weights)
        np.testing.assert_allclose(found, wanted, rtol=1e-4)

    @pytest.mark.parametrize(
        "task", ["classification", "segmentation", "tokens", "multilabel", "regression"]
    )
    def test_of_predictions(self, task: str) -> None:
        """A loss of some members of a pool, in every form that predictions have."""
        weights = np.random.default_rng(0).dirichlet(np.ones(2), 5)
        form, taken = Form(task, 5), [2, 0]
        logs, truth = classes(3, 60)
        rivals, outputs = None, tuple(logs.astype(np.float32))
        wanted = -np.log(
            np.tensordot(weights, np.exp(logs[taken]), axes=1)[:, np.arange(60), truth]
        ).mean(axis=1)
        if task == "segmentation":
            rivals, outputs = find_rivals(logs, truth), ()
        elif task == "tokens":
            true = np.take_along_axis(logs, truth[None, :, None], axis=2)[..., 0]
            outputs = tuple(np.stack([one, one > -1], axis=1) for one in true)
        elif task == "multilabel":
            truth = np.random.default_rng(1).integers(0, 2, (60, 5))
            probs = np.tensordot(weights, expit(logs[taken]), axes=1)
            wanted = -np.log(np.where(truth == 1, probs, 1 - probs)).mean(axis=(1, 2))
        elif task == "regression":
            truth = np.random.default_rng(1).normal(size=(60, 5))
            mixed = np.tensordot(weights, logs[taken], axes=1)
            wanted = ((mixed - truth) ** 2).mean(axis=(1, 2))
        predictions = Predictions(form, outputs, rivals, truth, None)
        losses = losses_of(predictions.of(taken))
        assert losses.members == 2
        np.testing.assert_allclose(losses.of(weights), wanted, rtol=1e-5)


class TestBestWeights:
    @pytest.mark.parametrize("members", [1, 2, 3, 6])
    @pytest.mark.parametrize("seed", range(3))
    def test_log_loss(self, members: int, seed: int) -> None:
        losses = log_loss(members, seed=seed)
        found = losses.best_weights()
        probs = np.exp(losses.true_MR)
        wanted = optimum(lambda w: float(-np.log(w @ probs + 1e-300).mean()), members)
        self.good(losses, found, wanted)

    @pytest.mark.parametrize("members", [1, 2, 3, 6])
    @pytest.mark.parametrize("noise", [1.0, 0.1, 0.01])
    def test_squared_loss(self, members: int, noise: float) -> None:
        """Good members, too, whose errors are a small part of what they predict."""
        made, truth = values(members, noise=noise)
        errors = (made - truth).reshape(members, -1)
        gram = errors @ errors.T / errors.shape[1]
        losses = SquaredLoss.from_values(made, truth)
        wanted = optimum(lambda w: float(w @ gram @ w), members)
        found = losses.best_weights()
        assert found.sum() == pytest.approx(1)
        assert found.min() >= 0
        assert float(found @ gram @ found) <= float(wanted @ gram @ wanted) * (1 + 1e-3)

    def good(self, losses: Losses, found: Array, wanted: Array) -> None:
        assert found.shape == (losses.members,)
        assert found.sum() == pytest.approx(1)
        assert found.min() >= 0
        assert losses.of(found[None])[0] <= losses.of(wanted[None])[0] + 1e-4

    @pytest.mark.parametrize("kind", KINDS)
    def test_a_member_that_adds_nothing_is_left_out(self, kind: str) -> None:
        rng = np.random.default_rng(0)
        if kind == "log":
            good = -rng.uniform(0.1, 0.2, 100)
            losses: Losses = LogLoss(np.stack([good, good - 3]))
        else:
            truth = rng.normal(size=(100, 1))
            losses = SquaredLoss.from_values(np.stack([truth, truth + 2]), truth)
        np.testing.assert_allclose(losses.best_weights(), [1, 0], atol=1e-3)

    def test_equal_members(self) -> None:
        one = log_loss(1).true_MR
        losses = LogLoss(np.repeat(one, 3, axis=0))
        np.testing.assert_allclose(losses.best_weights(), [1 / 3] * 3)

    def test_a_row_that_no_member_can_explain(self) -> None:
        """Its loss is infinite whatever the weights: the others decide."""
        true = np.array([[-0.1, -np.inf, -0.2], [-3.0, -np.inf, -2.0]])
        found = LogLoss(true).best_weights()
        assert np.isfinite(found).all()
        assert found[0] > 0.9


class TestGreedy:
    def plain(self, losses: Losses, rounds: int) -> tuple[Array, float]:
        """The same by trying every member in every round."""
        taken: list[int] = []
        best: tuple[float, list[int]] = (np.inf, [])
        for _ in range(rounds):
            trials = []
            for m in range(losses.members):
                weights = np.bincount([*taken, m], minlength=losses.members) / (len(taken) + 1)
                trials.append(float(losses.of(weights[None])[0]))
            taken.append(int(np.argmin(trials)))
            if min(trials) < best[0] - 1e-12:
                best = (min(trials), list(taken))
        return np.bincount(best[1], minlength=losses.members) / len(best[1]), best[0]

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("seed", range(3))
    @pytest.mark.parametrize("rounds", [1, 2, 20])
    def test_as_tried_one_by_one(self, kind: str, seed: int, rounds: int) -> None:
        losses = KINDS[kind](5, seed=seed)
        wanted, loss = self.plain(losses, rounds)
        found = greedy_ensemble(losses, rounds=rounds)
        np.testing.assert_allclose(found, wanted)
        assert losses.of(found[None])[0] == pytest.approx(loss)

    def test_one_member(self) -> None:
        assert greedy_ensemble(log_loss(1)).tolist() == [1]

    @pytest.mark.parametrize("kind", KINDS)
    def test_no_worse_than_the_best_member_and_no_better_than_the_optimum(self, kind: str) -> None:
        losses = KINDS[kind](6)
        found = losses.of(greedy_ensemble(losses)[None])[0]
        assert found <= losses.of(np.eye(6)).min() + 1e-12
        assert found >= losses.of(losses.best_weights()[None])[0] - 1e-4

    def test_the_scale_of_values_does_not_matter(self) -> None:
        made, truth = values(4)
        wanted = greedy_ensemble(SquaredLoss.from_values(made, truth))
        assert (wanted > 0).sum() > 1
        small = SquaredLoss.from_values(made * 1e-7, truth * 1e-7)
        np.testing.assert_allclose(greedy_ensemble(small), wanted)

    def test_a_row_that_no_member_can_explain(self) -> None:
        """A loss that is infinite for all still gives a choice."""
        found = greedy_ensemble(LogLoss(np.array([[-0.1, -np.inf], [-3.0, -np.inf]])))
        assert found.sum() == pytest.approx(1)


class TestBestSubset:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("members", [1, 2, 5, 8])
    def test_all_are_tried(self, kind: str, members: int) -> None:
        losses = KINDS[kind](members)
        tried = {}
        for taken in subsets(members):
            weights = np.zeros(members)
            weights[list(taken)] = 1 / len(taken)
            tried[taken] = float(losses.of(weights[None])[0])
        best = min(tried, key=tried.__getitem__)
        found = best_subset(losses)
        assert tuple(np.nonzero(found)[0]) == best
        np.testing.assert_allclose(found[list(best)], 1 / len(best))


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**16), members=st.integers(1, 5), kind=st.sampled_from(sorted(KINDS)))
def test_the_order_of_losses(seed: int, members: int, kind: str) -> None:
    """Optimum, then subset or greedy, then the single best and the uniform mean."""
    losses = KINDS[kind](members, seed=seed)

    def loss(weights: Array) -> float:
        return float(losses.of(weights[None])[0])

    best = loss(losses.best_weights())
    assert best <= loss(best_subset(losses)) + 1e-4
    assert best <= loss(greedy_ensemble(losses)) + 1e-4
    assert loss(best_subset(losses)) <= losses.of(np.eye(members)).min() + 1e-12
    assert loss(best_subset(losses)) <= loss(np.full(members, 1 / members)) + 1e-12
