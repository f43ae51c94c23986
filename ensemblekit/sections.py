"""Owns what a comparison shows beside its candidates: growth, subsets, agreement, reliability.

Input: a contest whose predictions are there.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ensemblekit import evaluation, families, metrics
from ensemblekit.candidates import mean_row
from ensemblekit.choosing import MOST_EXHAUSTIVE
from ensemblekit.contest import Contest
from ensemblekit.rivals import all_subset_weights, find_rivals, score_mixes
from ensemblekit.scoring import Scores
from ensemblekit.snapshots import SnapshotSet, position
from ensemblekit.state import weighted_sums


def cosines(snapshots: SnapshotSet) -> tuple[float, ...]:
    """Of each snapshot to the mean of the others."""
    count = len(snapshots)
    if count < 2:
        return (1.0,)
    every = frozenset(snapshots.first.tensors)
    row = mean_row(count)
    return weighted_sums(snapshots, [row], [lambda *_: None], replaced=every).cosines


def snapshots_json(
    snapshots: SnapshotSet, digests: Sequence[str], cosines: Sequence[float]
) -> list[dict[str, Any]]:
    """What took part, in canonical order."""
    return [
        {
            "name": s.name,
            "path": str(s.path),
            "position": position(s, snapshots.ordered_by),
            "step": s.facts.step,
            "epoch": s.facts.epoch,
            "lr": s.facts.lr,
            "weights": s.variant,
            "sha256": digest,
            "cosine": cosine,
        }
        for s, digest, cosine in zip(snapshots.snapshots, digests, cosines, strict=True)
    ]


def growth(
    contest: Contest, ranking: Sequence[int], known: Mapping[str, Mapping[str, Scores]]
) -> dict[str, list[dict[str, Any]]]:
    """Ensembles of 1, 2, ... snapshots, from the front, from the back, and best first.

    Args:
        contest: With its predictions.
        ranking: Snapshots from the best to the worst.
        known: Scores of candidates by side (`choosing`, `reporting`) and name.
    """
    count, name = len(ranking), contest.measure.name
    orders = {"first": list(range(count)), "last": list(range(count))[::-1], "best": [*ranking]}
    sizes = [1, *families.ladder(count), count] if count > 1 else [1]
    labels = {
        (kind, size): _label(contest.names, kind, order[:size], count)
        for kind, order in orders.items()
        for size in sizes
    }
    missing = {
        labels[kind, size]: families.ensemble(
            labels[kind, size], sorted(orders[kind][:size]), count
        )
        for kind, size in labels
        if labels[kind, size] not in known["choosing"]
    }
    views = {"choosing": contest.choosing, "reporting": contest.reporting}
    scores = {
        side: {**known[side], **contest.scores(list(missing.values()), view)}
        for side, view in views.items()
    }

    def figures(one: Scores) -> dict[str, float | None]:
        return {"metric": metrics.figure(name, one), "nll": metrics.figure("nll", one)}

    return {
        kind: [
            {
                "members": size,
                **{side: figures(scores[side][labels[kind, size]]) for side in views},
            }
            for size in sizes
        ]
        for kind in orders
    }


def _label(names: Sequence[str], kind: str, taken: Sequence[int], count: int) -> str:
    """The candidate that is this ensemble."""
    if len(taken) == 1:
        return names[taken[0]]
    return "ensemble" if len(taken) == count else f"ensemble-{kind}-{len(taken)}"


def subsets(contest: Contest) -> list[dict[str, Any]] | None:
    """The best uniform ensembles of each size on choosing data, of all there are."""
    count = len(contest.names)
    predictions = contest.singles(contest.choosing)
    if predictions.form.task != "classification" or not 2 <= count <= MOST_EXHAUSTIVE:
        return None
    weights_SM = all_subset_weights(count)
    scores = score_mixes(find_rivals(predictions.outputs, predictions.targets), weights_SM)
    sizes_S, names = (weights_SM > 0).sum(axis=1), np.array(contest.names)
    found = []
    for size in range(1, count + 1):
        inside = np.nonzero(sizes_S == size)[0]
        best = {
            "best_nll": inside[np.argmin(scores.nll_S[inside])],
            "best_accuracy": inside[np.argmax(scores.correct_S[inside])],
        }
        entry: dict[str, Any] = {"members": size, "subsets": len(inside)}
        for key, at in best.items():
            entry[key] = {
                "snapshots": names[weights_SM[at] > 0].tolist(),
                "accuracy": float(scores.correct_S[at] / predictions.samples),
                "nll": float(scores.nll_S[at]),
            }
        found.append(entry)
    return found


def agreement(names: Sequence[str], scores: Mapping[str, Scores]) -> dict[str, Any] | None:
    """Share of items on which two snapshots decide alike; None where nothing is decided."""
    matrix = evaluation.agreement([scores[name] for name in names])
    return None if matrix is None else {"names": list(names), "matrix": matrix}


def reliability(names: Sequence[str], scores: Mapping[str, Scores]) -> dict[str, Any]:
    """What a reliability diagram shows, for those of the candidates that have confidences."""
    return {
        name: metrics.reliability(scores[name]["confidence"], scores[name]["correct"])
        for name in dict.fromkeys(names)
        if name in scores and "confidence" in scores[name]
    }
