"""Owns the learned soup (Wortsman 2022, appendix I): coefficients by gradient on choosing data.

Input: snapshots and an objective that can be differentiated through the mixed weights.
"""

import numpy as np

from ensemblekit.averaging import SmoothObjective
from ensemblekit.candidates import Row
from ensemblekit.errors import UsageError
from ensemblekit.snapshots import SnapshotSet


def learned_soup(
    snapshots: SnapshotSet, *, objective: SmoothObjective | None = None, steps: int = 6
) -> Row:
    """Exponentiated gradient over the simplex from the uniform mean; the best step is returned.

    Args:
        snapshots: K snapshots.
        objective: Its `gradient` gives the loss and its K derivatives.
        steps: Gradients that are computed; each is a pass forwards and backwards over the data.

    Raises:
        UsageError: Without an objective.
    """
    if objective is None:
        raise UsageError(
            "a learned soup is fitted to data", hint="--model TARGET --val-data TARGET"
        )
    weights_K = np.full(len(snapshots), 1.0 / len(snapshots))
    best, best_K, slope_K = np.inf, weights_K, np.zeros_like(weights_K)
    reach = 1.0  # the largest change of a logarithm of a weight in one step
    for _ in range(steps):
        loss, found_K = objective.gradient(_row(weights_K))
        if loss < best:
            best, best_K, slope_K = loss, weights_K, found_K
        else:
            reach /= 4  # too far: a shorter step from the best place
        lean_K = slope_K - slope_K @ best_K
        size = np.abs(lean_K).max()
        if size < 1e-12:
            break
        weights_K = best_K * np.exp(-reach * lean_K / size)
        weights_K = weights_K / weights_K.sum()
    return _row(best_K)


def _row(weights_K: np.ndarray[tuple[int, ...], np.dtype[np.float64]]) -> Row:
    # six digits: more would be noise of the order of summation, and make another candidate of it
    coefficients = tuple(round(float(w), 6) for w in weights_K)
    return Row(coefficients, float(sum(coefficients)))
