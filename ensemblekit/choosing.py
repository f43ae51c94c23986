"""Owns choices among members: which, how often, with which weights. All from cached predictions.

Input: what the members said about the choosing data. The loss of a weighted mean of members needs
only their probabilities of the true classes (or, for values, a Gram matrix).

Legend of shapes: M members, R rows, S mixes of members.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ensemblekit.predictions import Predictions, true_outputs
from ensemblekit.rivals import all_subset_weights

Floats = npt.NDArray[np.float64]

MOST_EXHAUSTIVE = 12  # 4,095 subsets
_BLOCK = 1 << 22


class Losses(Protocol):
    """The mean loss of weighted means of the members."""

    @property
    def members(self) -> int:
        """M."""

    def of(self, weights_SM: Floats) -> Floats:
        """Mean loss of each of S mixes; each row of weights sums to 1."""

    def best_weights(self) -> Floats:
        """The weights on the simplex with the smallest loss."""


@dataclass(frozen=True)
class LogLoss:
    """NLL of weighted means of probabilities: -1/R sum_r log sum_m w_m p_m(y_r).

    Attributes:
        true_MR: Log-probabilities of the true classes.
    """

    true_MR: npt.NDArray[Any]

    @property
    def members(self) -> int:
        """M."""
        return len(self.true_MR)

    def of(self, weights_SM: Floats) -> Floats:
        """Mean NLL in nats of each mix."""
        probs_MR, shift = self._scaled()
        found = np.empty(len(weights_SM))
        step = max(1, _BLOCK // max(probs_MR.shape[1], 1))
        with np.errstate(divide="ignore"):
            for first in range(0, len(weights_SM), step):
                mixed_SR = weights_SM[first : first + step] @ probs_MR
                found[first : first + step] = -np.log(mixed_SR).mean(axis=1) - shift
            for s in np.nonzero(np.isposinf(found))[0]:  # probabilities too far apart for float64
                logs_M1 = np.log(weights_SM[s])[:, None]
                mixed_R = np.logaddexp.reduce(self.true_MR.astype(np.float64) + logs_M1, axis=0)
                found[s] = -mixed_R.mean()
        return found

    def best_weights(self) -> Floats:
        """Expectation-maximisation for mixture weights: the loss falls with every step."""
        probs_MR, _ = self._scaled()
        probs_MR = probs_MR[:, probs_MR.any(axis=0)]  # a row that all rule out tells nothing
        weights_M = np.full(self.members, 1.0 / self.members)
        if not probs_MR.size:
            return weights_M
        for _ in range(1000):
            new_M = weights_M * (probs_MR / (weights_M @ probs_MR)).mean(axis=1)
            if np.abs(new_M - weights_M).max() < 1e-7:
                break
            weights_M = new_M
        weights_M[weights_M < 1e-4] = 0.0  # a member that costs and adds nothing
        share_M: Floats = weights_M / weights_M.sum()
        return share_M

    def _scaled(self) -> tuple[Floats, float]:
        """Probabilities over the largest of each row, so that none is lost, and the mean shift."""
        true_MR = self.true_MR.astype(np.float64)
        top_R = np.maximum(true_MR.max(axis=0), -1e300)
        return np.exp(true_MR - top_R), float(top_R.mean())


@dataclass(frozen=True)
class BinaryLogLoss:
    """NLL of labels, each with two outcomes; the same form over rows x labels."""

    logits_MRC: npt.NDArray[Any]
    targets_RC: npt.NDArray[Any]

    def log_loss(self) -> LogLoss:
        """As probabilities of what is true."""
        signed = np.where(self.targets_RC.astype(bool), 1.0, -1.0) * self.logits_MRC
        return LogLoss(-np.logaddexp(0.0, -signed).reshape(len(self.logits_MRC), -1))


@dataclass(frozen=True)
class SquaredLoss:
    """Mean squared error of weighted means: w'Gw.

    Attributes:
        gram_MM: Mean products of members' errors: as weights sum to 1, errors mix as values do.
    """

    gram_MM: Floats

    @classmethod
    def from_values(
        cls, values_MRC: npt.NDArray[Any], targets_RC: npt.NDArray[Any]
    ) -> "SquaredLoss":
        """From what members predict."""
        errors = (values_MRC.astype(np.float64) - targets_RC).reshape(len(values_MRC), -1)
        return cls(errors @ errors.T / errors.shape[1])

    @property
    def members(self) -> int:
        """M."""
        return len(self.gram_MM)

    def of(self, weights_SM: Floats) -> Floats:
        """Mean squared error of each mix."""
        found: Floats = np.einsum("sm,mn,sn->s", weights_SM, self.gram_MM, weights_SM)
        return found

    def best_weights(self) -> Floats:
        """Exponentiated gradient on the simplex; the loss is convex."""
        weights_M = np.full(self.members, 1.0 / self.members)
        rate = 1.0 / max(float(np.abs(self.gram_MM).max()), 1e-300)
        for _ in range(5000):
            slope_M = self.gram_MM @ weights_M
            new_M = weights_M * np.exp(-rate * (slope_M - slope_M.min()))
            new_M /= new_M.sum()
            if np.abs(new_M - weights_M).max() < 1e-9:
                break
            weights_M = new_M
        weights_M[weights_M < 1e-4] = 0.0
        share_M: Floats = weights_M / weights_M.sum()
        return share_M


def greedy_ensemble(losses: Losses, *, rounds: int = 50) -> Floats:
    """Greedy ensemble selection with replacement (Caruana 2004).

    Starts empty; each round adds the member, perhaps again, that gives the smallest loss. The best
    of all rounds is returned.

    Returns:
        Weights (M,): how often each member was taken over how many were.
    """
    counts_M = np.zeros(losses.members)
    best, best_M = np.inf, counts_M
    for taken in range(1, rounds + 1):
        trials_MM = (counts_M + np.eye(losses.members)) / taken
        found_M = losses.of(trials_MM)
        chosen = int(np.argmin(found_M))
        counts_M = counts_M + np.eye(losses.members)[chosen]
        if taken == 1 or found_M[chosen] < best - 1e-12 * abs(best):
            best, best_M = float(found_M[chosen]), counts_M / taken
    return best_M


def best_subset(losses: Losses) -> Floats:
    """The subset, of any size, whose uniform mean has the smallest loss; all are tried."""
    weights_SM = all_subset_weights(losses.members)
    best: Floats = weights_SM[int(np.argmin(losses.of(weights_SM)))]
    return best


def losses_of(predictions: Predictions) -> Losses:
    """The losses of mixes of all members, on all rows of `predictions`."""
    task, targets = predictions.form.task, predictions.targets
    if task == "segmentation":
        assert predictions.rivals is not None
        return LogLoss(predictions.rivals.true_MR)
    if task == "tokens":
        return LogLoss(np.stack([one[:][:, 0] for one in predictions.outputs]))
    if task == "classification":
        return LogLoss(np.stack([true_outputs(one, targets) for one in predictions.outputs]))
    stacked = np.stack([one[:] for one in predictions.outputs])
    if task == "multilabel":
        return BinaryLogLoss(stacked, targets).log_loss()
    return SquaredLoss.from_values(stacked, targets)
