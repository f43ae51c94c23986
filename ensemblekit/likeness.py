"""Owns how alike the outputs of two runs are: differences, decisions, the figure of each.

Input: outputs of torch and of another runtime for the same samples, batch by batch. A difference
counts against the size of its own sample's outputs, so that one large number somewhere hides
nothing; what a softmax makes nothing of (100 below the largest) counts as nothing.

Legend of shapes: N samples, C classes, labels or values; `...` are positions of dense tasks.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ensemblekit.errors import NotFiniteError

_NOTHING = 100.0  # below the largest logit: a probability of 1e-43
_MOST = 0.9  # of the samples: a few large outputs set no scale for the others
_NEARLY_NOTHING = 50.0  # what the other side may make of it
Precision = str
"""`fp32`, `fp16`, `bf16`, `int8-dynamic` or `int8-static`: what the file computes in."""


@dataclass(frozen=True)
class Tolerance:
    """What a precision may change.

    Attributes:
        ratio: Largest difference over the largest output of a sample, or of nine in ten samples,
            whichever is larger; None: any.
        flips: Share of decisions that may change, ties left out.
        tie: Two choices are equal when they differ by less than this times the larger one (or 1).
        rms: Of a regression without `ratio`: root mean square of the differences over the spread of the outputs.
    """

    ratio: float | None
    flips: float
    tie: float
    rms: float = 0.0


TOLERANCES: Mapping[Precision, Tolerance] = {
    "fp32": Tolerance(1e-4, 0.0, 1e-5),
    "fp16": Tolerance(2e-2, 0.01, 1e-3),
    "bf16": Tolerance(1e-1, 0.03, 5e-3),
    "int8-dynamic": Tolerance(None, 0.05, 0.0, 0.15),
    "int8-static": Tolerance(None, 0.05, 0.0, 0.15),
}


class Unlike(Exception):
    """A check said no: which, and why."""

    def __init__(self, check: str, reason: str) -> None:
        super().__init__(reason)
        self.check = check
        self.reason = reason


class Likeness:
    """What the two sides said so far, as sums.

    Args:
        task: What the outputs mean.
        rule: What may differ.
        class_axis: Where an output has its classes.
        threshold: Of a label.
        ignored: Label of positions that do not count.
        shifted: The label of a position is what the output before it predicts.
    """

    def __init__(
        self,
        task: str,
        rule: Tolerance,
        *,
        class_axis: int,
        threshold: float,
        ignored: int,
        shifted: bool,
    ) -> None:
        self.task = task
        self.rule = rule
        self.class_axis = class_axis
        self.threshold = threshold
        self.ignored = ignored
        self.shifted = shifted
        self.compared = False
        self.samples = 0
        self.difference = 0.0
        self.apart: list[npt.NDArray[np.float64]] = []  # of each sample: largest difference
        self.scales: list[npt.NDArray[np.float64]] = []  # and largest output
        self.flips = self.ties = self.decisions = 0
        self.seen: set[int] = set()
        self.scored = 0
        self.right = np.zeros(2)
        self.moments = np.zeros(4)  # of a regression: count, sum, squares, squared differences

    def compare(
        self,
        wanted: npt.NDArray[Any],
        got: npt.NDArray[Any],
        target: torch.Tensor | None,
        *,
        counted: bool = True,
    ) -> None:
        """Add one batch; `counted`: its decisions, too.

        Raises:
            NotFiniteError: Torch's output contains NaN.
            Unlike: NaN or Inf on one side only.
        """
        wanted, got = wanted.astype(np.float64), got.astype(np.float64)
        if np.isnan(wanted).any():
            raise NotFiniteError(
                "the model's output contains NaN: nothing can be compared with it",
                hint="check the checkpoints and the data in torch first",
            )
        finite = np.isfinite(wanted)
        if (np.isfinite(got) != finite).any() or (got[~finite] != wanted[~finite]).any():
            raise Unlike("numbers", "NaN or Inf in ONNX Runtime's output and not in torch's")
        self.compared = True
        self._differences(wanted, got, finite)
        if not counted:
            return
        self.samples += len(wanted)
        if self.task == "regression":
            apart = (wanted - got)[finite]
            values = wanted[finite]
            self.moments += (values.size, values.sum(), (values**2).sum(), (apart**2).sum())
            self._score(wanted, got, target)
            return
        ours, theirs, margin, top = self._decisions(wanted, got)
        self.decisions += ours.size
        self.seen.update(np.unique(ours).tolist())
        other = ours != theirs
        tied = margin[other] <= self.rule.tie * np.maximum(np.abs(top[other]), 1.0)
        self.flips += int((~tied).sum())
        self.ties += int(tied.sum())
        self._score(ours, theirs, target)

    def _differences(
        self, wanted: npt.NDArray[Any], got: npt.NDArray[Any], finite: npt.NDArray[np.bool_]
    ) -> None:
        matters = finite
        if self.task not in ("multilabel", "regression"):
            axis = self.class_axis
            highest = np.where(finite, wanted, -np.inf).max(axis, keepdims=True)
            theirs = np.where(finite, got, -np.inf).max(axis, keepdims=True)
            with np.errstate(invalid="ignore"):
                matters = finite & (wanted >= highest - _NOTHING)
                risen = finite & ~matters & (got > theirs - _NEARLY_NOTHING)
            if risen.any():
                raise Unlike(
                    "numbers", "a class that is next to impossible in torch is likely in the file"
                )
        size = len(wanted)
        with np.errstate(invalid="ignore"):  # infinities on both sides
            apart = np.abs(wanted - got)
        apart_N = np.where(matters, apart, 0.0).reshape(size, -1).max(1, initial=0.0)
        scale_N = np.where(matters, np.abs(wanted), 0.0).reshape(size, -1).max(1, initial=0.0)
        self.difference = max(self.difference, float(apart_N.max(initial=0.0)))
        self.apart.append(apart_N)
        self.scales.append(scale_N)

    @property
    def ratio(self) -> float:
        """Largest difference over its sample's largest output, or that of nine in ten samples."""
        if not self.scales:
            return 0.0
        scale_N = np.concatenate(self.scales)
        scale_N = np.maximum(scale_N, np.quantile(scale_N, _MOST))
        return float((np.concatenate(self.apart) / np.maximum(scale_N, 1e-30)).max(initial=0.0))

    def _decisions(
        self, wanted: npt.NDArray[Any], got: npt.NDArray[Any]
    ) -> tuple[Any, Any, Any, Any]:
        """Both sides' decisions, how much torch prefers its own, and the value of that."""
        if self.task == "multilabel":
            margin = np.abs(wanted - self.threshold)
            return wanted > self.threshold, got > self.threshold, margin, wanted
        axis = self.class_axis
        ours, theirs = wanted.argmax(axis), got.argmax(axis)
        own, other = (
            np.squeeze(np.take_along_axis(wanted, np.expand_dims(one, axis), axis), axis)
            for one in (ours, theirs)
        )
        return ours, theirs, own - other, own

    def _score(
        self, ours: npt.NDArray[Any], theirs: npt.NDArray[Any], target: torch.Tensor | None
    ) -> None:
        if target is None:
            return
        true = target.detach().cpu().numpy()
        if self.shifted:
            ours, theirs, true = ours[:, :-1], theirs[:, :-1], true[:, 1:]
        if true.shape != ours.shape:
            true = true.reshape(ours.shape) if true.size == ours.size else true
        if true.shape != ours.shape:
            return  # labels that the model shifts or scales: no figure of ours
        values = self.task == "regression"
        kept = np.ones(true.shape, bool) if values else true != self.ignored
        self.scored += int(kept.sum())
        for side, said in enumerate((ours, theirs)):
            right = (said - true) ** 2 if values else said == true
            self.right[side] += float(right[kept].sum())

    def figures(self) -> dict[str, Any]:
        """What was found so far, by the names of a verification."""
        found: dict[str, Any] = {"samples": self.samples}
        if not self.compared:
            return found
        found |= {"max_abs_diff": self.difference, "max_rel_diff": self.ratio}
        if self.task != "regression":
            found |= {"decision_flips": self.flips, "ties": self.ties}
            found["classes_seen"] = len(self.seen)
        if self.scored:
            found["metric"] = "mse" if self.task == "regression" else "accuracy"
            ours, theirs = (float(v) for v in self.right / self.scored)
            found |= {"metric_torch": ours, "metric_onnx": theirs}
        return found

    def conclude(self) -> None:
        """The checks of numbers and decisions.

        Raises:
            Unlike: One says no.
        """
        limit = self.rule.ratio
        if limit is not None and self.ratio > limit:
            raise Unlike(
                "numbers",
                f"outputs differ by up to {self.difference:.3g}, {self.ratio:.1e} of the largest of "
                f"a sample; allowed: {limit:g}",
            )
        if limit is None and self.task == "regression" and self.moments[0] > 1:
            count, total, squares, apart = self.moments
            spread = max(squares / count - (total / count) ** 2, 0.0) ** 0.5
            error = (apart / count) ** 0.5
            if error > self.rule.rms * max(spread, 1e-30):
                raise Unlike(
                    "numbers",
                    f"outputs differ by {error:.3g} in the root mean square, and spread by "
                    f"{spread:.3g}; allowed: {self.rule.rms:.2%} of that",
                )
        if self.flips > self.rule.flips * self.decisions:
            raise Unlike(
                "decisions",
                f"{self.flips} of {self.decisions:,} decisions differ from torch's; allowed: "
                f"{self.rule.flips:.1%}",
            )
