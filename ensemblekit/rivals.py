"""Owns the exact short form of class probabilities: the true class and those that can beat it.

Input: log-probabilities of M members. A class that beats the true one in no member beats it in no
weighted mean of them with non-negative weights. So for accuracy and NLL of every such mean the true
class and its rivals are enough: exact, and a small part of the whole.

Legend of shapes: M members, R rows (one target each), C classes, Q rivals of all rows, S mixes.
"""

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.floating[Any]]

_HEAD = struct.Struct("<QQQQ")  # members, rows, rivals, bytes of a log-probability
_BLOCK = 1 << 21  # elements of an intermediate array
_GROUP = 8  # probabilities that are multiplied before one logarithm is taken
_SAFE = -85.0  # the product of eight probabilities of e**-85 is still a normal float64


@dataclass(frozen=True)
class Rivals:
    """Log-probabilities of the true class, and of the classes that can win against it.

    Attributes:
        targets_R: The true classes.
        true_MR: Their log-probabilities.
        counts_R: Rivals of each row.
        classes_Q: Which classes they are, row after row.
        rivals_MQ: Their log-probabilities.
    """

    targets_R: npt.NDArray[np.int64]
    true_MR: Floats
    counts_R: npt.NDArray[np.int64]
    classes_Q: npt.NDArray[np.int64]
    rivals_MQ: Floats

    @property
    def rows_Q(self) -> npt.NDArray[np.int64]:
        """The row that each rival belongs to."""
        return np.repeat(np.arange(len(self.counts_R)), self.counts_R)

    def members(self, chosen: Sequence[int]) -> "Rivals":
        """The same rows seen by some of the members."""
        index = list(chosen)
        return Rivals(
            self.targets_R,
            self.true_MR[index],
            self.counts_R,
            self.classes_Q,
            self.rivals_MQ[index],
        )

    def rows(self, mask_R: npt.NDArray[np.bool_]) -> "Rivals":
        """Some of the rows."""
        mask_Q = np.repeat(mask_R, self.counts_R)
        return Rivals(
            self.targets_R[mask_R],
            self.true_MR[:, mask_R],
            self.counts_R[mask_R],
            self.classes_Q[mask_Q],
            self.rivals_MQ[:, mask_Q],
        )

    def to_bytes(self, dtype: str = "float32") -> bytes:
        """The short form as a record; classes as 32-bit integers, log-probabilities as `dtype`."""
        sizes = (len(self.true_MR), len(self.targets_R), len(self.classes_Q))
        head = _HEAD.pack(*sizes, np.dtype(dtype).itemsize)
        kept = [
            half(values) if dtype == "float16" else values.astype("<f4")
            for values in (self.true_MR, self.rivals_MQ)
        ]
        parts = (
            self.targets_R.astype("<i4"),
            kept[0],
            self.counts_R.astype("<i4"),
            self.classes_Q.astype("<i4"),
            kept[1],
        )
        return head + b"".join(part.tobytes() for part in parts)

    @classmethod
    def from_bytes(cls, record: bytes) -> "Rivals":
        """The inverse of `to_bytes`."""
        members, rows, count, itemsize = _HEAD.unpack_from(record)
        place = _HEAD.size
        found: list[Any] = []
        for dtype, shape in (
            ("<i4", (rows,)),
            (f"<f{itemsize}", (members, rows)),
            ("<i4", (rows,)),
            ("<i4", (count,)),
            (f"<f{itemsize}", (members, count)),
        ):
            size = int(np.prod(shape))
            part = np.frombuffer(record, dtype, size, place).reshape(shape)
            found.append(part.astype(np.int64) if dtype == "<i4" else part)
            place += part.nbytes
        return cls(*found)


def half(values: Floats) -> npt.NDArray[np.float16]:
    """As float16; what is too small stays the smallest number, so that no NLL becomes infinite."""
    return np.maximum(values, -65504.0).astype(np.float16)


def find_rivals(log_probs_MRC: Sequence[Any], targets_R: npt.NDArray[np.int64]) -> Rivals:
    """The short form of log-probabilities (R, C) of each of M members.

    A lower class than the true one wins when it is as probable, a higher one only when it is more
    so: ties go to the lower class, as in `argmax`.

    >>> found = find_rivals(np.log([[[0.5, 0.3, 0.2]], [[0.2, 0.3, 0.5]]]), np.array([1]))
    >>> found.classes_Q
    array([0, 2])
    """
    rows, classes = log_probs_MRC[0].shape
    step = max(1, _BLOCK // max(classes, 1))
    parts = [
        _find([one[first : first + step] for one in log_probs_MRC], targets_R[first : first + step])
        for first in range(0, max(rows, 1), step)
    ]
    return parts[0] if len(parts) == 1 else join(parts)


def _find(log_probs_MRC: Sequence[Floats], targets_R: npt.NDArray[np.int64]) -> Rivals:
    rows, classes = log_probs_MRC[0].shape
    every_R = np.arange(rows)
    true_MR = np.stack([one[every_R, targets_R] for one in log_probs_MRC])
    beats_RC = np.zeros((rows, classes), dtype=bool)
    for log_probs_RC, true_R in zip(log_probs_MRC, true_MR, strict=True):
        beats_RC |= log_probs_RC >= true_R[:, None]
    rows_Q, classes_Q = np.nonzero(beats_RC)
    rivals_MQ = np.stack([one[rows_Q, classes_Q] for one in log_probs_MRC])
    # as probable in some member and more so in none: a rival only when it is the lower class
    ahead_Q = (rivals_MQ > true_MR[:, rows_Q]).any(axis=0) | (classes_Q < targets_R[rows_Q])
    ahead_Q &= classes_Q != targets_R[rows_Q]
    rows_Q = rows_Q[ahead_Q]
    return Rivals(
        targets_R,
        true_MR,
        np.bincount(rows_Q, minlength=rows),
        classes_Q[ahead_Q],
        rivals_MQ[:, ahead_Q],
    )


def join(parts: Sequence[Rivals]) -> Rivals:
    """The rows of all parts, one after the other."""
    return Rivals(
        np.concatenate([part.targets_R for part in parts]),
        np.concatenate([part.true_MR for part in parts], axis=1),
        np.concatenate([part.counts_R for part in parts]),
        np.concatenate([part.classes_Q for part in parts]),
        np.concatenate([part.rivals_MQ for part in parts], axis=1),
    )


@dataclass(frozen=True)
class MixScores:
    """Accuracy and NLL of S weighted means of the members' probabilities.

    Attributes:
        correct_S: Rows whose most probable class is the true one.
        nll_S: Mean negative log-likelihood in nats.
    """

    correct_S: npt.NDArray[np.int64]
    nll_S: npt.NDArray[np.float64]


def score_mixes(rivals: Rivals, weights_SM: npt.NDArray[np.float64]) -> MixScores:
    """Accuracy and NLL of every row of `weights_SM`, exact up to float64 rounding.

    Args:
        rivals: R rows of M members.
        weights_SM: Non-negative, each row with the sum 1.
    """
    rows = len(rivals.targets_R)
    true_MR = np.exp(rivals.true_MR.astype(np.float64))
    rows_Q = rivals.rows_Q
    lead_QM = (np.exp(rivals.rivals_MQ.astype(np.float64)) - true_MR[:, rows_Q]).T.copy()
    # ahead means "> 0", for lower classes ">= 0", which is "> the largest negative number"
    limit_Q1 = np.where(rivals.classes_Q < rivals.targets_R[rows_Q], -5e-324, 0.0)[:, None]
    starts = (np.cumsum(rivals.counts_R) - rivals.counts_R)[rivals.counts_R > 0]
    # a member that gives a row next to nothing: such rows are summed as logarithms
    tiny_R = rivals.true_MR.min(axis=0) < _SAFE
    true_RM = np.ascontiguousarray(true_MR[:, ~tiny_R].T)
    rare_MR = rivals.true_MR[:, tiny_R].astype(np.float64)
    correct_S = np.full(len(weights_SM), rows, dtype=np.int64)
    nll_S = np.zeros(len(weights_SM))
    step = max(8, _BLOCK // max(rows, len(rows_Q), 1))
    for first in range(0, len(weights_SM), step):
        block = slice(first, first + step)
        weights_MS = np.ascontiguousarray(weights_SM[block].T)
        nll_S[block] = -(_sum_of_logs(true_RM @ weights_MS) + _rare(rare_MR, weights_MS)) / rows
        if len(starts):
            ahead_QS = lead_QM @ weights_MS > limit_Q1
            correct_S[block] -= np.logical_or.reduceat(ahead_QS, starts, axis=0).sum(axis=0)
    return MixScores(correct_S, nll_S)


def _sum_of_logs(probs_RS: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Sum over rows; one logarithm for eight of them, whose product stays a normal number."""
    whole = len(probs_RS) // _GROUP * _GROUP
    product = probs_RS[:whole].reshape(_GROUP, -1, probs_RS.shape[1])
    total = product[0].copy()
    for part in product[1:]:
        total *= part
    total_S: npt.NDArray[np.float64] = np.log(total).sum(axis=0)
    total_S += np.log(probs_RS[whole:]).sum(axis=0)
    return total_S


def _rare(
    true_MR: npt.NDArray[np.float64], weights_MS: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """The same sum, of logarithms all along."""
    total_S = np.zeros(weights_MS.shape[1])
    with np.errstate(divide="ignore"):
        logs_MS = np.log(weights_MS)
    for true_M in true_MR.T:
        total_S += np.logaddexp.reduce(logs_MS + true_M[:, None], axis=0)
    return total_S


def subsets(count: int) -> Iterator[tuple[int, ...]]:
    """All non-empty subsets of `count` members, as `all_subset_weights` orders them."""
    for bits in range(1, 1 << count):
        yield tuple(m for m in range(count) if bits >> m & 1)


def all_subset_weights(count: int) -> npt.NDArray[np.float64]:
    """The uniform weights of every non-empty subset of `count` members, (2**count - 1, count)."""
    bits_S = np.arange(1, 1 << count)
    taken_SM = (bits_S[:, None] >> np.arange(count)) & 1
    weights_SM: npt.NDArray[np.float64] = taken_SM / taken_SM.sum(axis=1, keepdims=True)
    return weights_SM
