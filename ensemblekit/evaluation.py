"""Owns what is said about one candidate on one split: figures, intervals, its gain over another.

Input: scores of items from `scoring`.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ensemblekit import metrics, statistics
from ensemblekit.combiners import best_temperature
from ensemblekit.scoring import Scores

RESAMPLES = 2000
_MANY = 100  # items beyond which the bootstrap is left as it is
_Z_TWO_SIDED = 1.959963984540054  # of a 95% interval
_Z_ONE_SIDED = 1.6448536269514722  # of a 95% bound


@dataclass(frozen=True)
class Measure:
    """The figure that choices and gains go by.

    Attributes:
        name: A key of `metrics.FIGURES`.
    """

    name: str

    @property
    def figure(self) -> metrics.Figure:
        """Its formula."""
        return metrics.FIGURES[self.name]

    @property
    def sign(self) -> float:
        """1 where higher is better, else -1."""
        return 1.0 if self.figure.higher_is_better else -1.0

    def goodness(self, scores: Scores) -> float:
        """The figure, turned so that higher is better."""
        found = metrics.figure(self.name, scores)
        return -math.inf if found is None else self.sign * found


def figures(task: str, scores: Scores) -> dict[str, Any]:
    """All figures of a task; those that the candidate does not have are None."""
    found: dict[str, Any] = {name: metrics.figure(name, scores) for name in metrics.OF_TASK[task]}
    if found.get("top5", 0) is None:
        del found["top5"]
    if task == "classification":
        samples = len(scores["rows"])
        interval = statistics.wilson(float(scores["correct"].sum()), samples)
        found["accuracy_ci"] = [interval.low, interval.high]
        has = "confidence" in scores
        pair = (scores.get("confidence"), scores["correct"])
        found["ece"] = metrics.ece(*pair) if has else None  # type: ignore[arg-type]
        found["ece_adaptive"] = metrics.ece_adaptive(*pair) if has else None  # type: ignore[arg-type]
        for name, column in (
            ("disagreement", "disagreement"),
            ("mutual_information", "information"),
        ):
            if column in scores:
                found[name] = float(np.mean(scores[column], dtype=np.float64))
    return found


def with_auroc(found: dict[str, Any], task: str, scores: Scores, targets: npt.NDArray[Any]) -> None:
    """Add the AUROC where it is defined: two classes, or labels (the mean over labels)."""
    if "positive" not in scores:
        return
    if task == "classification":
        found["auroc"] = metrics.auroc(scores["positive"], targets)
        return
    each = [metrics.auroc(scores["positive"][:, c], targets[:, c]) for c in range(targets.shape[1])]
    known = [area for area in each if area is not None]
    found["auroc"] = sum(known) / len(known) if known else None


def calibrated_nll(
    log_probs_RC: torch.Tensor, targets: npt.NDArray[Any], *, seed: int
) -> tuple[float, float]:
    """NLL after temperature scaling by two-fold cross-validation (Ashukha 2020), and the mean T.

    The temperature of each half is fitted on the other.
    """
    truth = torch.from_numpy(targets).long()
    half = torch.from_numpy(np.random.default_rng(seed).permutation(len(truth)) % 2).bool()
    total, temperatures = 0.0, []
    for inside in (half, ~half):
        temperature = best_temperature(log_probs_RC[~inside], truth[~inside], "classification")
        logits = torch.nan_to_num(log_probs_RC[inside].double(), neginf=-1e4) / temperature
        total += float(torch.nn.functional.cross_entropy(logits, truth[inside], reduction="sum"))
        temperatures.append(temperature)
    return total / len(truth), sum(temperatures) / 2


def gains(
    measure: Measure, scores: Sequence[Scores], baseline: Scores, *, seed: int
) -> list[dict[str, Any] | None]:
    """What each candidate gains over the baseline on the same items, positive is better.

    Accuracy: Tango's interval and McNemar's exact p. Other figures: the percentile bootstrap over
    items, all candidates on the same resamples, and a p from its width. Holm's adjustment is over
    all candidates.
    """
    found: list[dict[str, Any] | None]
    if _counts(measure, baseline):
        found = [_paired_accuracy(one, baseline) for one in scores]
    else:
        found = _bootstrapped(measure, scores, baseline, seed=seed)
    tested = [
        None if gain is None or one is baseline else gain["p_value"]
        for gain, one in zip(found, scores, strict=True)
    ]
    adjusted = statistics.holm(tested)
    for gain, p in zip(found, adjusted, strict=True):
        if gain is not None:
            gain["p_adjusted"] = p
    return found


def _counts(measure: Measure, scores: Scores) -> bool:
    """Whether the figure is a share of items that are right or wrong."""
    if measure.name != "accuracy":
        return False
    return scores["correct"].dtype == np.bool_


def _paired_accuracy(scores: Scores, baseline: Scores) -> dict[str, Any]:
    won, lost, total = _discordant(scores, baseline)
    interval = statistics.tango(won, lost, total)
    return {
        "value": (won - lost) / total,
        "ci": [interval.low, interval.high],
        "p_value": statistics.mcnemar(won, lost),
    }


def _discordant(scores: Scores, other: Scores) -> tuple[int, int, int]:
    """Items that only the one, and only the other, has right, and all items."""
    mine, theirs = scores["correct"], other["correct"]
    return int((mine & ~theirs).sum()), int((theirs & ~mine).sum()), len(mine)


def _bootstrapped(
    measure: Measure, scores: Sequence[Scores], baseline: Scores, *, seed: int
) -> list[dict[str, Any] | None]:
    found: list[dict[str, Any] | None] = []
    for drawn in _resampled_gains(measure, scores, baseline, seed=seed):
        if drawn is None:
            found.append(None)
            continue
        value, values_B = drawn
        interval = _widened(statistics.percentiles(values_B), value, len(baseline["rows"]))
        if interval is None:
            found.append(None)
            continue
        error = (interval.high - interval.low) / (2 * _Z_TWO_SIDED)
        p_value = math.erfc(abs(value) / error / math.sqrt(2)) if error > 0 else 1.0
        found.append({"value": value, "ci": [interval.low, interval.high], "p_value": p_value})
    return found


def _widened(interval: statistics.Interval, value: float, items: int) -> statistics.Interval | None:
    """A bootstrap interval of few items is too narrow: by Student's t, and by the divisor N.

    None for fewer than two items, which tell nothing of their spread.
    """
    if items < 2 or not (math.isfinite(interval.low) and math.isfinite(interval.high)):
        return None
    if items >= _MANY:
        return interval
    from scipy.special import stdtrit

    factor = float(stdtrit(items - 1, 0.975)) / _Z_TWO_SIDED * math.sqrt(items / (items - 1))
    low, high = (value + factor * (end - value) for end in (interval.low, interval.high))
    return statistics.Interval(low, high)


def _resampled_gains(
    measure: Measure, scores: Sequence[Scores], other: Scores, *, seed: int
) -> list[tuple[float, metrics.Floats] | None]:
    """What each candidate gains over another, on the items and on resamples of them.

    All see the same resamples. None where the figure is not defined.
    """
    figure = measure.figure
    if not _has(figure, other):
        return [None for _ in scores]
    reference = figure.terms(other)
    sums = [figure.terms(one) if _has(figure, one) else None for one in scores]
    stacked = np.concatenate([reference, *(part for part in sums if part is not None)], axis=1)
    drawn_BQ = statistics.resample(stacked, seed=seed, resamples=RESAMPLES)
    both_BQ = np.concatenate([stacked.sum(axis=0)[None], drawn_BQ])  # the items themselves first
    width = place = reference.shape[1]
    found: list[tuple[float, metrics.Floats] | None] = []
    with np.errstate(all="ignore"):
        base_B = figure.value(both_BQ[:, :width])
        for part in sums:
            if part is None:
                found.append(None)
                continue
            values_B = measure.sign * (figure.value(both_BQ[:, place : place + width]) - base_B)
            place += width
            defined = np.isfinite(values_B[0]) and np.isfinite(values_B[1:]).any()
            found.append((float(values_B[0]), values_B[1:]) if defined else None)
    return found


def _has(figure: metrics.Figure, scores: Scores) -> bool:
    return all(column in scores for column in figure.needs)


@dataclass(frozen=True)
class Loss:
    """What a candidate loses against the best one, on choosing data.

    Attributes:
        value: In the unit of the measure, positive is worse.
        low: One-sided 95% bound from below.
        high: One-sided 95% bound from above.
        variance: Of the difference, by item.
    """

    value: float
    low: float
    high: float
    variance: float


def losses(
    measure: Measure, scores: Sequence[Scores], best: Scores, *, seed: int
) -> list[Loss | None]:
    """The loss of each candidate against the best."""
    if _counts(measure, best):
        return [_accuracy_loss(one, best) for one in scores]
    found: list[Loss | None] = []
    for drawn in _resampled_gains(measure, scores, best, seed=seed):
        if drawn is None:
            found.append(None)
            continue
        value, values_B = drawn
        interval = _widened(statistics.percentiles(-values_B, level=0.9), -value, len(best["rows"]))
        if interval is None:
            found.append(None)
            continue
        error = (interval.high - interval.low) / (2 * _Z_ONE_SIDED)
        found.append(Loss(-value, interval.low, interval.high, error**2 * len(best["rows"])))
    return found


def _accuracy_loss(scores: Scores, best: Scores) -> Loss:
    won, lost, total = _discordant(best, scores)
    interval = statistics.tango(won, lost, total, level=0.9)
    value = (won - lost) / total
    return Loss(value, interval.low, interval.high, (won + lost) / total - value**2)


def agreement(scores: Sequence[Mapping[str, npt.NDArray[Any]]]) -> list[list[float]] | None:
    """Share of items on which two candidates decide alike; None where nothing is decided."""
    if not scores or any("decided" not in one for one in scores):
        return None
    decided = np.stack([one["decided"] for one in scores])
    return [[float((a == b).mean()) for b in decided] for a in decided]
