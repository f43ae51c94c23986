"""Owns the question why averaging failed, and what to do about it.

Input: a contest whose plain average is worse than its members. The path from one snapshot over the
mean to another tells most of it: with statistics that were interpolated, and with recomputed ones.
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ensemblekit import build, evaluation, metrics
from ensemblekit.candidates import BatchNorm, Member, Row, mean_row
from ensemblekit.contest import Contest
from ensemblekit.scoring import Mix, Scores, score
from ensemblekit.snapshots import SnapshotSet
from ensemblekit.state import materialize

POSITIONS = (0.0, 0.25, 0.5, 0.75, 1.0)
_SAME = 0.9  # cosine of channels that are the same but for their order
_OTHER = 0.6
_LAYERS, _WIDEST = 20, 2048  # layers that are looked at, and channels of one


@dataclass(frozen=True)
class Diagnosis:
    """Why averaging failed.

    Attributes:
        verdict: mismatched model, stale BatchNorm, maximum-LR member, permuted, different basins
            or weak members.
        because: A sentence.
        next: What to do: flags to add to the same command, or words.
        path: Points of the path through the mean.
    """

    verdict: str
    because: str
    next: str
    path: tuple[dict[str, Any], ...] = ()


def diagnose(
    contest: Contest, chosen: Mapping[str, Scores], cosines: Sequence[float]
) -> Diagnosis | None:
    """Look at an average that is worse than its members; None where nothing is wrong.

    Args:
        contest: With its predictions.
        chosen: Scores on choosing data.
        cosines: Of each snapshot to the mean of the others.
    """
    names, measure = contest.names, contest.measure
    if (found := _mismatched(contest, chosen)) is not None:
        return found
    averages = [c for c in ("uniform", "uniform+bn") if c in chosen]
    if not averages or len(names) < 2:
        return None
    alone = [measure.goodness(chosen[name]) for name in names]
    middle = names[int(np.argsort(alone)[len(alone) // 2])]
    best = max(averages, key=lambda name: measure.goodness(chosen[name]))
    (lost,) = evaluation.losses(measure, [chosen[best]], chosen[middle], seed=contest.seed)
    if lost is None or lost.low <= 0 or measure.goodness(chosen[best]) >= np.mean(alone):
        return None
    return _Examination(contest, alone, cosines, float(np.median(alone))).verdict()


def _mismatched(contest: Contest, chosen: Mapping[str, Scores]) -> Diagnosis | None:
    """Snapshots that know nothing: the model or the data are not those of the training."""
    predictions = contest.predictions(contest.choosing)
    if predictions.form.task != "classification":
        return None
    classes, samples = predictions.form.classes, predictions.samples
    true_C = np.bincount(predictions.targets, minlength=classes) / samples
    if (true_C > 0).sum() < 2:
        return None
    excess = []
    for name in contest.names:
        said_C = np.bincount(chosen[name]["decided"], minlength=classes) / samples
        chance = float(true_C @ said_C)  # what the same answers would have on shuffled labels
        noise = 3 * np.sqrt(max(chance * (1 - chance), 1e-12) / samples)
        excess.append((metrics.figure("accuracy", chosen[name]) or 0.0) - chance - noise)
    if max(excess) > 0:
        return None
    return Diagnosis(
        "mismatched model",
        "no snapshot is better than the same answers given at random: the model, its arguments, the "
        "preprocessing or the labels are not those of the training",
        "check --model, --model-arg and the data target against the training script",
    )


def _less(usual: float) -> float:
    """What is still as good: a hundredth less."""
    return usual - 0.01 * abs(usual)


class _Examination:
    """One failed average, looked at from all sides."""

    def __init__(
        self, contest: Contest, alone: Sequence[float], cosines: Sequence[float], usual: float
    ) -> None:
        self.contest = contest
        self.alone = alone
        self.cosines = cosines
        self.usual = usual  # what a member usually has; an average should
        self.count = len(alone)
        self.first = int(np.argmax(alone))
        others = [k for k in range(self.count) if k != self.first]
        self.second = min(others, key=lambda k: cosines[k])
        self.has_bn = contest.mixed_bn != "none"

    def verdict(self) -> Diagnosis:
        """The first explanation that the figures bear out."""
        path = self._path()
        middle = path[len(path) // 2]
        names = self.contest.names
        shown = (names[self.first], names[self.second])
        recomputed = middle["metric_recomputed_bn"]
        sign = self.contest.measure.sign
        if recomputed is not None and sign * recomputed >= _less(self.usual):
            return Diagnosis(
                "stale BatchNorm",
                f"with averaged BatchNorm statistics the mean has {self._told(middle)}, with "
                f"recomputed ones {recomputed:.4f}: the weights are good, the statistics do not fit",
                "give training data: --train-data FILE.py:NAME (or --bn recompute)",
                tuple(path),
            )
        for verdict, left, what in (
            ("maximum-LR member", self._fast(), "saved at a high learning rate"),
            ("weak members", self._weak(), "far worse than the others"),
        ):
            if left and self._good_without(left):
                return Diagnosis(
                    verdict,
                    f"{', '.join(names[k] for k in left)}: {what}; the mean without is as good as "
                    "its members",
                    " ".join(f"--exclude '{names[k]}'" for k in left),
                    tuple(path),
                )
        if self._permuted():
            return Diagnosis(
                "permuted",
                f"{shown[0]} and {shown[1]} have the same channels in another order: their mean "
                "mixes channels that do not belong together",
                "ensemble their predictions instead: --candidates singles,ensembles",
                tuple(path),
            )
        figure = recomputed if recomputed is not None else middle["metric_averaged_bn"]
        return Diagnosis(
            "different basins",
            f"between {shown[0]} and {shown[1]} (cosine to the others "
            f"{self.cosines[self.second]:.2f}) there is a barrier: the mean has "
            f"{figure:.4f} where the snapshots have {path[0]['metric_averaged_bn']:.4f} and "
            f"{path[-1]['metric_averaged_bn']:.4f}",
            "ensemble their predictions (--candidates singles,ensembles), or average snapshots of "
            "one run, from its last part (--last N)",
            tuple(path),
        )

    def _told(self, point: Mapping[str, Any]) -> str:
        return f"{point['metric_averaged_bn']:.4f}"

    def _path(self) -> list[dict[str, Any]]:
        rows = [self._row(position) for position in POSITIONS]
        plain = self._figures(rows, "averaged" if self.has_bn else "none")
        fresh = self._figures(rows, "recomputed") if self.has_bn else [None] * len(rows)
        return [
            {
                "row": list(row.weights),
                "position": position,
                "metric_averaged_bn": before,
                "metric_recomputed_bn": after,
            }
            for row, position, before, after in zip(rows, POSITIONS, plain, fresh, strict=True)
        ]

    def _row(self, position: float) -> Row:
        """From the first snapshot (0) over the mean (0.5) to the second (1)."""
        end = self.first if position <= 0.5 else self.second
        share = abs(position - 0.5) * 2
        weights = [(1 - share) / self.count + share * (k == end) for k in range(self.count)]
        return Row(tuple(weights), sum(weights))

    def _figures(self, rows: Sequence[Row], policy: BatchNorm) -> list[float | None]:
        """The figure of each row on choosing data.

        Where there are no training data the statistics are recomputed on the inputs of the
        choosing data: good enough to tell why, not to ship.
        """
        bench, view = self.contest.bench, self.contest.choosing
        found = []
        with ExitStack() as stack:
            if policy == "recomputed" and bench.options.train_data is None:
                data = bench.splits[view.split].data
                stack.enter_context(bench.builder.recomputing_on(data))
            for member in (Member(row, policy) for row in rows):
                bench.predict([member], [view.split])
                whole = bench.predictions([member], view.split)
                part = whole.part(view.mask(whole.samples))
                (scores,) = score(part, [Mix((0,))])
                found.append(metrics.figure(self.contest.measure.name, scores))
        return found

    def _good_without(self, left_out: Sequence[int]) -> bool:
        """Whether the mean of the others is as good as its members usually are."""
        kept = [k for k in range(self.count) if k not in left_out]
        if not kept:
            return False
        if len(kept) == 1:
            return True
        row = Row(tuple(float(k in kept) for k in range(self.count)), float(len(kept)))
        policy: BatchNorm = "recomputed" if self.has_bn else "none"
        (found,) = self._figures([row], policy)
        usual = float(np.median([self.alone[k] for k in kept]))
        return found is not None and self.contest.measure.sign * found >= _less(usual)

    def _fast(self) -> list[int]:
        """Snapshots whose learning rate is far above the lowest one."""
        rates = [s.facts.lr for s in self.contest.bench.snapshots.snapshots]
        known = [rate for rate in rates if rate is not None]
        if len(known) < self.count or min(known) <= 0:
            return []
        found = [k for k, rate in enumerate(rates) if rate is not None and rate > 3 * min(known)]
        return found if len(found) < self.count else []

    def _weak(self) -> list[int]:
        """Snapshots far below the others: by six times the usual distance from the median."""
        middle = float(np.median(self.alone))
        spread = float(np.median(np.abs(np.array(self.alone) - middle)))
        limit = middle - max(6 * spread, 0.05 * abs(middle))
        return [k for k, value in enumerate(self.alone) if value < limit]

    def _permuted(self) -> bool:
        """Whether a layer of the one is that of the other in another order."""
        snapshots = self.contest.bench.snapshots
        pair = [snapshots.snapshots[k] for k in (self.first, self.second)]
        keys = [
            key
            for key, spec in pair[0].tensors.items()
            if len(spec.shape) >= 2 and min(spec.shape[:2]) > 3 and max(spec.shape[:2]) <= _WIDEST
        ]
        states = [materialize(SnapshotSet((s,)), [mean_row(1)])[0][0] for s in pair]
        for key in keys[:_LAYERS]:
            one, other = (build.to_torch(state[key]).double() for state in states)
            if _in_another_order(one.flatten(1), other.flatten(1)):
                return True
            if _in_another_order(one.transpose(0, 1).flatten(1), other.transpose(0, 1).flatten(1)):
                return True
        return False


def _in_another_order(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether the rows of the one are those of the other, but not at the same places."""
    from scipy.optimize import linear_sum_assignment

    rows = [m / m.norm(dim=1, keepdim=True).clamp(min=1e-300) for m in (one, other)]
    cosine = (rows[0] @ rows[1].T).numpy()
    ours, theirs = linear_sum_assignment(-cosine)
    matched = float(np.median(cosine[ours, theirs]))
    return matched > _SAME and float(np.median(np.diag(cosine))) < _OTHER
