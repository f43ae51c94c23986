"""Owns the formulas of quality. A figure is a function of sums over data set items.

Input: what is known of each item (`Items`), made by `scoring`. Because a figure needs only sums, an
interval for it comes from resampled sums, whatever the figure is. Sums run in float64.

Legend of shapes: N items, Q sums, B resamples, C classes, labels or values.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

Floats = npt.NDArray[np.float64]
Items = Mapping[str, npt.NDArray[Any]]
"""Columns of N items: `rows` (targets in each), and sums over an item's rows, by name."""

BINS = 15


@dataclass(frozen=True)
class Figure:
    """A figure of quality.

    Attributes:
        needs: Columns that must be there.
        terms: The columns whose sums matter, (N, Q).
        value: From sums (B, Q) to figures (B,).
        higher_is_better: Direction.
        unit: `pp` for shares of 1, else nothing.
    """

    needs: tuple[str, ...]
    terms: Callable[[Items], Floats]
    value: Callable[[Floats], Floats]
    higher_is_better: bool
    unit: str = ""


def _ratio(column: str, *, higher: bool, unit: str = "", sign: float = 1.0) -> Figure:
    """The sum of a column over the number of rows."""

    def terms(items: Items) -> Floats:
        return np.stack([sign * items[column], items["rows"]], axis=1).astype(np.float64)

    return Figure((column,), terms, lambda s: s[:, 0] / s[:, 1], higher, unit)


def _root(sums_BQ: Floats) -> Floats:
    root_B: Floats = np.sqrt(sums_BQ[:, 0] / sums_BQ[:, 1])
    return root_B


def _perplexity(sums_BQ: Floats) -> Floats:
    with np.errstate(over="ignore"):
        found_B: Floats = np.exp(sums_BQ[:, 0] / sums_BQ[:, 1])
    return found_B


def _miou(sums_BQ: Floats) -> Floats:
    """Mean over classes that occur of intersection over union."""
    inter_BC, union_BC = np.split(sums_BQ, 2, axis=1)
    with np.errstate(invalid="ignore"):
        each_BC = np.where(union_BC > 0, inter_BC / union_BC, np.nan)
    found_B: Floats = np.nanmean(each_BC, axis=1)
    return found_B


def _r2(sums_BQ: Floats) -> Floats:
    """Mean over values of 1 - sum of squared errors / sum of squared deviations."""
    count_B1 = sums_BQ[:, -1:]
    error_BC, target_BC, square_BC = np.split(sums_BQ[:, :-1], 3, axis=1)
    spread_BC = square_BC - target_BC**2 / count_B1
    with np.errstate(divide="ignore", invalid="ignore"):
        found_B: Floats = (1.0 - error_BC / spread_BC).mean(axis=1)
    return found_B


def _r2_terms(items: Items) -> Floats:
    columns = [items["errors_C"], items["targets_C"], items["targets_C"] ** 2]
    return np.concatenate([*columns, items["rows"][:, None]], axis=1).astype(np.float64)


def _miou_terms(items: Items) -> Floats:
    return np.concatenate([items["inter_C"], items["union_C"]], axis=1).astype(np.float64)


FIGURES: dict[str, Figure] = {
    "accuracy": _ratio("correct", higher=True, unit="pp"),
    "miou": Figure(("inter_C", "union_C"), _miou_terms, _miou, True, "pp"),
    "exact_match": _ratio("exact", higher=True, unit="pp"),
    "top5": _ratio("top5", higher=True, unit="pp"),
    "nll": _ratio("log_prob", higher=False, sign=-1.0),
    "perplexity": Figure(
        ("log_prob",), _ratio("log_prob", higher=False, sign=-1.0).terms, _perplexity, False
    ),
    "brier": _ratio("brier", higher=False),
    "mse": _ratio("squared", higher=False),
    "rmse": Figure(("squared",), _ratio("squared", higher=False).terms, _root, False),
    "mae": _ratio("absolute", higher=False),
    "r2": Figure(("errors_C", "targets_C"), _r2_terms, _r2, True),
}

# What is reported of a task, the figure that choices go by first.
OF_TASK: dict[str, tuple[str, ...]] = {
    "classification": ("accuracy", "top5", "nll", "brier"),
    "segmentation": ("miou", "accuracy", "nll"),
    "tokens": ("nll", "perplexity", "accuracy"),
    "multilabel": ("accuracy", "exact_match", "nll", "brier"),
    "regression": ("mse", "rmse", "mae", "r2"),
}


def figure(name: str, items: Items) -> float | None:
    """One figure of all items; None where the items do not have what it needs, or it is not finite."""
    wanted = FIGURES[name]
    if any(column not in items for column in wanted.needs):
        return None
    with np.errstate(all="ignore"):
        found = float(wanted.value(wanted.terms(items).sum(axis=0)[None])[0])
    return found if math.isfinite(found) else None


def ece(confidence_N: Floats, correct_N: npt.NDArray[Any], *, bins: int = BINS) -> float:
    """Expected calibration error with bins of equal width, (a, b] (Guo 2017).

    sum over bins of n_b / N * |accuracy_b - confidence_b|
    """
    return _calibration_error(
        confidence_N, correct_N, _equal_width(np.asarray(confidence_N), bins), bins
    )


def ece_adaptive(confidence_N: Floats, correct_N: npt.NDArray[Any], *, bins: int = BINS) -> float:
    """Expected calibration error with bins of equal numbers of samples (Nguyen & O'Connor 2015)."""
    order = np.argsort(confidence_N, kind="stable")
    bin_N = np.empty(len(order), dtype=np.int64)
    bin_N[order] = np.arange(len(order)) * bins // max(len(order), 1)
    return _calibration_error(confidence_N, correct_N, bin_N, bins)


def reliability(
    confidence_N: Floats, correct_N: npt.NDArray[Any], *, bins: int = BINS
) -> list[dict[str, float | int | None]]:
    """What a reliability diagram shows: mean confidence and accuracy of each bin."""
    bin_N = _equal_width(np.asarray(confidence_N), bins)
    found: list[dict[str, float | int | None]] = []
    for b in range(bins):
        inside = bin_N == b
        count = int(inside.sum())
        found.append(
            {
                "low": b / bins,
                "high": (b + 1) / bins,
                "samples": count,
                "confidence": float(confidence_N[inside].mean()) if count else None,
                "accuracy": float(correct_N[inside].mean()) if count else None,
            }
        )
    return found


def _equal_width(confidence_N: Floats, bins: int) -> npt.NDArray[np.int64]:
    edges = np.linspace(0.0, 1.0, bins + 1)
    return np.clip(np.searchsorted(edges, confidence_N, side="left") - 1, 0, bins - 1)


def _calibration_error(
    confidence_N: Floats, correct_N: npt.NDArray[Any], bin_N: npt.NDArray[np.int64], bins: int
) -> float:
    confidence_B = np.bincount(bin_N, confidence_N, bins)
    correct_B = np.bincount(bin_N, correct_N, bins)
    return float(np.abs(confidence_B - correct_B).sum() / max(len(bin_N), 1))


def auroc(scores_N: npt.NDArray[Any], positive_N: npt.NDArray[Any]) -> float | None:
    """Area under the ROC curve, None where only one class occurs."""
    if len(np.unique(positive_N)) < 2:
        return None
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(positive_N, scores_N))


def correct(log_probs_NC: torch.Tensor, targets_N: torch.Tensor) -> int:
    """Samples whose most probable class is the label; ties go to the lower class."""
    return int((log_probs_NC.argmax(1) == targets_N.long()).sum())


def accuracy(log_probs_NC: torch.Tensor, targets_N: torch.Tensor) -> float:
    """Share of correct samples, 0 to 1."""
    return correct(log_probs_NC, targets_N) / len(targets_N)


def nll(log_probs_NC: torch.Tensor, targets_N: torch.Tensor) -> float:
    """Mean negative log-likelihood of the labels in nats: -1/N sum_n log p_n(y_n)."""
    chosen_N = log_probs_NC.gather(1, targets_N[:, None].long())
    return float(-chosen_N.to(torch.float64).mean())
