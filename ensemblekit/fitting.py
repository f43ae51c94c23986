"""Owns what is fitted on predictions: members, weights and combiners, and their honest figures.

Input: what the K snapshots said on choosing data, in canonical order. A fit is a function from such
predictions to a candidate; `cross_fitted` scores each sample by a fit that did not see it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ensemblekit import choosing, families
from ensemblekit.candidates import Candidate
from ensemblekit.choosing import Losses, losses_of
from ensemblekit.combiners import COMBINERS
from ensemblekit.predictions import Predictions
from ensemblekit.scoring import Mix, Scores, score

FOLDS = 5


@dataclass(frozen=True)
class Fit:
    """Something that is fitted.

    Attributes:
        group: Of candidates, a key of `families.GROUPS`.
        name: Of the candidate.
        make: The candidate for given predictions; None where they are too few, or too wide.
    """

    group: str
    name: str
    make: Callable[[Predictions], Candidate | None]


def fits(task: str, count: int, on: str) -> list[Fit]:
    """Everything that is fitted for a task, for `count` snapshots and the choosing data's name."""
    by_weights: list[tuple[str, str, Callable[[Losses], Any]]] = [
        ("ensembles", "ensemble-greedy", choosing.greedy_ensemble),
        ("combiners", "ensemble-weighted", lambda losses: losses.best_weights()),
    ]
    if count <= choosing.MOST_EXHAUSTIVE:
        by_weights.insert(1, ("ensembles", "ensemble-best-subset", choosing.best_subset))
    found = [Fit(group, name, _of_weights(name, pick, on)) for group, name, pick in by_weights]
    for name, one in COMBINERS.items():
        if one.fitted and task in one.tasks:
            found.append(Fit("combiners", f"ensemble-{name}", _of_combiner(name, on)))
    return found


def _of_weights(
    name: str, pick: Callable[[Losses], Any], on: str
) -> Callable[[Predictions], Candidate | None]:
    def make(singles: Predictions) -> Candidate | None:
        count = singles.members
        weights_M = pick(losses_of(singles))
        taken = [int(m) for m in np.nonzero(weights_M)[0]]
        share = [float(weights_M[m]) for m in taken]
        even = max(share) - min(share) < 1e-12
        return families.ensemble(
            name,
            taken,
            count,
            combiner="mean" if even else "weighted",
            params={} if even else {"weights": share},
            chosen_on=on,
        )

    return make


def _of_combiner(name: str, on: str) -> Callable[[Predictions], Candidate | None]:
    def make(singles: Predictions) -> Candidate | None:
        fitted = COMBINERS[name].fit
        assert fitted is not None
        params = fitted(singles.outputs, singles.targets, singles.form.task)
        if params is None:
            return None
        count = singles.members
        whole = f"ensemble-{name}"
        return families.ensemble(
            whole, range(count), count, combiner=name, params=params, chosen_on=on
        )

    return make


def cross_fitted(wanted: Sequence[Fit], singles: Predictions, *, seed: int) -> dict[str, Scores]:
    """Scores of each item under fits to the other folds; without those that a fold is too small for."""
    samples = singles.samples
    fold_N = np.random.default_rng(seed).permutation(samples) % FOLDS
    found: dict[str, Scores] = {fit.name: {} for fit in wanted}
    for fold in range(FOLDS):
        inside = fold_N == fold
        if not inside.any() or inside.all():
            return {}
        rest, here = singles.part(~inside), singles.part(inside)
        made = {fit.name: fit.make(rest) for fit in wanted if fit.name in found}
        for name in [name for name, candidate in made.items() if candidate is None]:
            del found[name]
        mixes = {name: mix_of(c) for name, c in made.items() if c is not None}
        for name, scores in zip(mixes, score(here, list(mixes.values())), strict=True):
            _place(found[name], scores, inside, samples, first=fold == 0)
    return found


def _place(whole: Scores, scores: Scores, inside: Any, samples: int, *, first: bool) -> None:
    """Write the scores of a fold where its items stand; columns that not all folds have go."""
    for name, values in scores.items():
        if first:
            whole[name] = np.zeros((samples, *values.shape[1:]), values.dtype)
        if name in whole:
            whole[name][inside] = values
    for name in [name for name in whole if name not in scores]:
        del whole[name]


def mix_of(candidate: Candidate) -> Mix:
    """A prediction ensemble of snapshots as a mix of them."""
    members = [row.only for row in candidate.rows]
    assert None not in members
    return Mix(tuple(m for m in members if m is not None), candidate.combiner, candidate.params)
