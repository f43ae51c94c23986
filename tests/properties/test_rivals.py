"""What holds for any log-probabilities: true class and rivals say as much as all classes."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from ensemblekit.rivals import Rivals, find_rivals, join, score_mixes

quick = settings(max_examples=150, deadline=None)


@st.composite
def cases(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Eighths, so that sums are exact and ties are ties; and weights of halves and quarters."""
    members, rows, classes = (draw(st.integers(1, n)) for n in (4, 12, 5))
    classes = max(classes, 2)
    rng = np.random.default_rng(draw(st.integers(0, 2**20)))
    counts = rng.multinomial(8, rng.dirichlet(np.ones(classes)), size=(members, rows))
    targets = rng.integers(0, classes, rows)
    choices = [[4, 0, 0, 0], [2, 2, 0, 0], [1, 1, 2, 0], [1, 1, 1, 1], [0, 3, 1, 0]]
    weights = np.array([rng.permutation(choice)[:members] for choice in choices] * 3)
    weights = weights[weights.sum(axis=1) == 4] / 4
    return counts / 8, targets, np.concatenate([weights, np.eye(members)])


def logs(probs: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore"):
        return np.log(probs)


@quick
@given(cases())
def test_accuracy_and_nll_are_those_of_all_classes(
    case: tuple[np.ndarray, np.ndarray, np.ndarray],
) -> None:
    probs_MRC, targets_R, weights_SM = case
    found = score_mixes(find_rivals(logs(np.maximum(probs_MRC, 1e-30)), targets_R), weights_SM)
    mixed_SRC = np.tensordot(weights_SM, probs_MRC, axes=1)
    right_SR = mixed_SRC.argmax(axis=2) == targets_R
    # exp(log(p)) is p up to the last bit, so classes within it of the best may win
    true_SR = np.take_along_axis(mixed_SRC, targets_R[None, :, None], axis=2)[..., 0]
    others = mixed_SRC.copy()
    np.put_along_axis(others, np.broadcast_to(targets_R[None, :, None], (*true_SR.shape, 1)), -1, 2)
    close_SR = np.abs(others.max(axis=2) - true_SR) < 1e-12
    assert (np.abs(found.correct_S - right_SR.sum(axis=1)) <= close_SR.sum(axis=1)).all()
    certain = ~close_SR.any(axis=1)
    np.testing.assert_array_equal(found.correct_S[certain], right_SR.sum(axis=1)[certain])
    wanted_S = -np.log(np.maximum(true_SR, 1e-30)).mean(axis=1)
    np.testing.assert_allclose(found.nll_S, wanted_S, rtol=1e-9, atol=1e-12)


@quick
@given(cases(), st.integers(0, 12))
def test_records_can_be_cut_and_joined(
    case: tuple[np.ndarray, np.ndarray, np.ndarray], place: int
) -> None:
    probs_MRC, targets_R, weights_SM = case
    whole = find_rivals(logs(np.maximum(probs_MRC, 1e-4)), targets_R)
    kept = Rivals.from_bytes(whole.to_bytes())
    first = np.arange(len(targets_R)) < place
    parts = [Rivals.from_bytes(kept.rows(mask).to_bytes()) for mask in (first, ~first)]
    one, other = score_mixes(kept, weights_SM), score_mixes(join(parts), weights_SM)
    np.testing.assert_array_equal(one.correct_S, other.correct_S)
    np.testing.assert_allclose(one.nll_S, other.nll_S, rtol=1e-12)


@quick
@given(cases())
def test_members_in_another_order(case: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    probs_MRC, targets_R, weights_SM = case
    whole = find_rivals(logs(np.maximum(probs_MRC, 1e-30)), targets_R)
    turned = np.arange(len(probs_MRC))[::-1]
    one = score_mixes(whole, weights_SM)
    other = score_mixes(whole.members(list(turned)), weights_SM[:, turned])
    np.testing.assert_allclose(one.nll_S, other.nll_S, rtol=1e-12)
