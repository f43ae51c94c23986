"""The short form of class probabilities: as good as all of them."""

import numpy as np
import pytest

from ensemblekit.predictions import Predictions
from ensemblekit.rivals import (
    Rivals,
    all_subset_weights,
    find_rivals,
    half,
    join,
    score_mixes,
    subsets,
)
from ensemblekit.scoring import Mix, score
from ensemblekit.tasks import Form

Array = np.ndarray


def log_probs(members: int, rows: int, classes: int, *, seed: int = 0, scale: float = 2) -> Array:
    """Float64 log-probabilities (M, R, C)."""
    logits = np.random.default_rng(seed).normal(size=(members, rows, classes)) * scale
    return logits - np.logaddexp.reduce(logits, axis=2, keepdims=True)


def targets(rows: int, classes: int, *, seed: int = 0) -> Array:
    return np.random.default_rng(seed + 1).integers(0, classes, rows)


def simplex(mixes: int, members: int, *, seed: int = 0) -> Array:
    """Random weights, some of them zero, and all one-hot ones."""
    rng = np.random.default_rng(seed + 2)
    weights = rng.dirichlet(np.ones(members), mixes) * (rng.uniform(size=(mixes, members)) > 0.3)
    weights[weights.sum(axis=1) == 0] = 1
    return np.concatenate([weights / weights.sum(axis=1, keepdims=True), np.eye(members)])


def full(log_probs_MRC: Array, targets_R: Array, weights_SM: Array) -> tuple[Array, Array]:
    """Right rows and mean NLL of each mix, from all classes."""
    mixed_SRC = np.tensordot(weights_SM, np.exp(log_probs_MRC), axes=1)
    correct_S = (mixed_SRC.argmax(axis=2) == targets_R).sum(axis=1)
    true_MR = np.take_along_axis(log_probs_MRC, targets_R[None, :, None], axis=2)[..., 0]
    with np.errstate(divide="ignore"):
        logs_SM = np.log(weights_SM)
    mixed_SR = np.logaddexp.reduce(logs_SM[:, :, None] + true_MR[None], axis=1)
    return correct_S, -mixed_SR.mean(axis=1)


def assert_equal_to_full(log_probs_MRC: Array, targets_R: Array, weights_SM: Array) -> None:
    found = score_mixes(find_rivals(log_probs_MRC, targets_R), weights_SM)
    correct_S, nll_S = full(log_probs_MRC, targets_R, weights_SM)
    np.testing.assert_array_equal(found.correct_S, correct_S)
    np.testing.assert_allclose(found.nll_S, nll_S, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("scale", [0.01, 1, 8, 60])
@pytest.mark.parametrize("shape", [(1, 1, 2), (1, 40, 5), (3, 7, 2), (4, 203, 10), (7, 64, 30)])
def test_all_mixes_as_from_all_classes(shape: tuple[int, int, int], scale: float) -> None:
    members, rows, classes = shape
    assert_equal_to_full(
        log_probs(*shape, scale=scale), targets(rows, classes), simplex(20, members)
    )


@pytest.mark.parametrize("rows", [1, 7, 8, 9, 16, 65])
def test_any_number_of_rows(rows: int) -> None:
    assert_equal_to_full(log_probs(2, rows, 3), targets(rows, 3), simplex(5, 2))


def test_ties_go_to_the_lower_class() -> None:
    """Every pattern of two equal classes, in one member and over two."""
    probs = np.array(
        [
            [[0.5, 0.5, 0.0], [0.0, 0.5, 0.5], [0.25, 0.5, 0.25], [0.5, 0.25, 0.25]],
            [[0.5, 0.5, 0.0], [0.0, 0.5, 0.5], [0.5, 0.25, 0.25], [0.25, 0.25, 0.5]],
        ]
    )
    with np.errstate(divide="ignore"):
        logs = np.log(probs)
    weights = np.array([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5]])
    for wanted in np.ndindex(3, 3, 3, 3):
        truth = np.array(wanted)
        found = score_mixes(find_rivals(logs, truth), weights)
        mixed = np.tensordot(weights, np.exp(logs), axes=1)
        np.testing.assert_array_equal(found.correct_S, (mixed.argmax(axis=2) == truth).sum(axis=1))


def test_members_that_agree_to_the_last_bit() -> None:
    """Two classes with the same log-probabilities in every member tie in every mix."""
    logs = log_probs(5, 300, 6)
    logs[:, :, 4] = logs[:, :, 1]
    for truth in (1, 4):
        rivals = find_rivals(logs, np.full(300, truth))
        found = score_mixes(rivals, simplex(30, 5))
        without = np.delete(logs, 4, axis=2)
        correct, _ = full(without, np.full(300, 1), simplex(30, 5))
        np.testing.assert_array_equal(found.correct_S, correct if truth == 1 else 0)


@pytest.mark.parametrize("low", [-80.0, -200.0, -700.0, -1e4])
def test_members_that_are_sure_and_wrong(low: float) -> None:
    """Probabilities near the end of float64 and beyond it cost what they should."""
    rng = np.random.default_rng(0)
    logs = log_probs(3, 50, 4)
    truth = targets(50, 4)
    for r in rng.choice(50, 25, replace=False):
        logs[rng.integers(3), r, truth[r]] = low
    for r in rng.choice(50, 5, replace=False):
        logs[:, r, truth[r]] = low - rng.uniform(0, 3, 3)
    assert_equal_to_full(logs, truth, simplex(20, 3))


def test_a_class_that_is_ruled_out() -> None:
    logs = log_probs(2, 4, 3)
    logs[0, 1, 2] = -np.inf
    truth = np.array([0, 2, 1, 2])
    with np.errstate(divide="ignore"):
        found = score_mixes(find_rivals(logs, truth), np.array([[1.0, 0.0], [0.5, 0.5]]))
    assert found.nll_S[0] == np.inf
    assert np.isfinite(found.nll_S[1])


def test_without_rivals() -> None:
    logs = np.log(np.array([[[0.9, 0.1], [0.2, 0.8]]]))
    rivals = find_rivals(logs, np.array([0, 1]))
    assert len(rivals.classes_Q) == 0
    found = score_mixes(rivals, np.array([[1.0]]))
    assert found.correct_S.tolist() == [2]
    assert found.nll_S[0] == pytest.approx(-(np.log(0.9) + np.log(0.8)) / 2)
    assert len(Rivals.from_bytes(rivals.to_bytes()).classes_Q) == 0


def test_many_mixes_in_pieces() -> None:
    assert_equal_to_full(
        log_probs(10, 3000, 4, scale=1), targets(3000, 4), all_subset_weights(10)[::7]
    )


def test_only_classes_that_can_win_are_kept() -> None:
    logs = log_probs(3, 100, 8)
    truth = targets(100, 8)
    found = find_rivals(logs, truth)
    for r in range(100):
        kept = set(found.classes_Q[found.rows_Q == r])
        wanted = {
            c
            for c in range(8)
            for m in range(3)
            if logs[m, r, c] > logs[m, r, truth[r]]
            or (logs[m, r, c] == logs[m, r, truth[r]] and c < truth[r])
        }
        assert kept == wanted
    np.testing.assert_array_equal(found.counts_R, np.bincount(found.rows_Q, minlength=100))


def short(*, seed: int = 0) -> Rivals:
    """As it is kept: float16."""
    found = find_rivals(log_probs(3, 40, 6, seed=seed), targets(40, 6, seed=seed))
    return Rivals.from_bytes(found.to_bytes())


def assert_same(one: Rivals, other: Rivals) -> None:
    for name in ("targets_R", "true_MR", "counts_R", "classes_Q", "rivals_MQ"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))


class TestRecords:
    def test_round_trip(self) -> None:
        exact = find_rivals(log_probs(3, 40, 6), targets(40, 6))
        found = Rivals.from_bytes(exact.to_bytes())
        for name in ("targets_R", "counts_R", "classes_Q"):
            np.testing.assert_array_equal(getattr(found, name), getattr(exact, name))
        np.testing.assert_allclose(found.true_MR, exact.true_MR, rtol=1e-3, atol=1e-3)
        np.testing.assert_allclose(found.rivals_MQ, exact.rivals_MQ, rtol=1e-3, atol=1e-3)
        assert_same(Rivals.from_bytes(found.to_bytes()), found)

    def test_no_rows(self) -> None:
        empty = find_rivals(np.zeros((3, 0, 4)), np.zeros(0, np.int64))
        assert_same(Rivals.from_bytes(empty.to_bytes()), empty)

    def test_what_is_too_small_stays_a_number(self) -> None:
        assert half(np.array([-1e9, -np.inf, -0.1])).tolist() == [-65504, -65504, np.float16(-0.1)]

    def test_join_is_the_inverse_of_cutting(self) -> None:
        whole = short()
        first = np.arange(40) < 13
        assert_same(join([whole.rows(first), whole.rows(~first)]), whole)
        assert_same(whole.rows(np.ones(40, dtype=bool)), whole)

    def test_some_members_are_scored_as_with_zero_weights(self) -> None:
        whole = short()
        some = score_mixes(whole.members([2, 0]), np.array([[0.25, 0.75]]))
        same = score_mixes(whole, np.array([[0.75, 0.0, 0.25]]))
        np.testing.assert_array_equal(some.correct_S, same.correct_S)
        np.testing.assert_allclose(some.nll_S, same.nll_S)


class TestSubsets:
    @pytest.mark.parametrize("count", [1, 2, 3, 5, 8])
    def test_weights_and_members_tell_the_same(self, count: int) -> None:
        found = list(subsets(count))
        weights = all_subset_weights(count)
        assert len(found) == len(weights) == 2**count - 1
        assert len(set(found)) == len(found)
        for taken, row in zip(found, weights, strict=True):
            assert taken == tuple(np.nonzero(row)[0])
            np.testing.assert_allclose(row[list(taken)], 1 / len(taken))


class TestDecisions:
    """What `scoring` makes of rivals, beside the full mean over classes."""

    def predictions(self, logs: Array, truth: Array, sizes: Array) -> Predictions:
        form = Form("segmentation", logs.shape[2])
        return Predictions(form, (), find_rivals(logs, truth), truth, sizes)

    @pytest.mark.parametrize("seed", range(5))
    @pytest.mark.parametrize("ties", [False, True])
    def test_items(self, seed: int, ties: bool) -> None:
        rng = np.random.default_rng(seed)
        sizes = rng.integers(0, 9, 12)
        rows = int(sizes.sum())
        logs, truth = log_probs(3, rows, 5, seed=seed), targets(rows, 5, seed=seed)
        if ties:  # dyadic probabilities: sums are exact, so ties are ties
            counts = rng.multinomial(8, np.full(5, 0.2), size=(3, rows))
            with np.errstate(divide="ignore"):
                logs = np.log(counts / 8)
            logs = np.where(np.isfinite(logs), logs, -60000.0)
        weights = [(0.25, 0.25, 0.5), (0.5, 0.0, 0.5), (1.0, 0.0, 0.0)]
        mixes = [Mix((0, 1, 2), "weighted", {"weights": list(w)}) for w in weights]
        mixes += [Mix((1,)), Mix((0, 2), "mean")]
        weights += [(0.0, 1.0, 0.0), (0.5, 0.0, 0.5)]
        item = np.repeat(np.arange(12), sizes)
        for weight, found in zip(
            weights, score(self.predictions(logs, truth, sizes), mixes), strict=True
        ):
            probs = np.round(np.exp(logs) * 8) / 8 if ties else np.exp(logs)
            said = np.tensordot(np.array(weight), probs, axes=1).argmax(axis=1)
            for n in range(12):
                here = item == n
                assert found["rows"][n] == here.sum()
                assert found["correct"][n] == (said[here] == truth[here]).sum()
                for c in range(5):
                    inter = ((said == c) & (truth == c) & here).sum()
                    union = (((said == c) | (truth == c)) & here).sum()
                    assert found["inter_C"][n, c] == inter
                    assert found["union_C"][n, c] == union
            _, nll = full(logs, truth, np.array([weight]))
            assert -found["log_prob"].sum() / rows == pytest.approx(nll[0])

    def test_equal_classes_tie_whatever_the_weights(self) -> None:
        """The same numbers at other places of an array: still the lower class."""
        logs = log_probs(5, 400, 6, seed=3)
        logs[:, :, 4] = logs[:, :, 1]
        sizes = np.full(20, 20)
        weights = simplex(10, 5)[:10]
        mixes = [
            Mix(tuple(np.nonzero(w)[0]), "weighted", {"weights": w[w > 0].tolist()})
            for w in weights
        ]
        for truth in (1, 4, 0):
            labels = np.full(400, truth)
            for w, found in zip(
                weights, score(self.predictions(logs, labels, sizes), mixes), strict=True
            ):
                said = np.tensordot(w, np.exp(np.delete(logs, 4, axis=2)), axes=1).argmax(axis=1)
                said[said == 4] = 5
                right = (said == truth).sum() if truth != 4 else 0
                assert found["correct"].sum() == right
                assert found["union_C"][:, 4].sum() == (400 if truth == 4 else 0)
