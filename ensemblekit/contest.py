"""Owns who takes part in a comparison: candidates, the models behind them, what they said.

Input: a workbench. The first half runs models, on every process; the second half only reads what
was predicted. Choices look at choosing data alone.

Legend of shapes: N items, M members.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from ensemblekit import families, fitting
from ensemblekit.averaging.greedy_soup import greedy_soup
from ensemblekit.averaging.learned_soup import learned_soup
from ensemblekit.candidates import BatchNorm, Candidate, Member, Row, mean_row
from ensemblekit.combiners import COMBINERS
from ensemblekit.errors import InputError, UsageError, one_of
from ensemblekit.evaluation import Measure
from ensemblekit.families import Wanted
from ensemblekit.predictions import Predictions
from ensemblekit.scoring import Mix, Scores, score
from ensemblekit.workbench import Workbench

LEARNED_STEPS = 6

Taken = Callable[[int], npt.NDArray[np.bool_]]


@dataclass(frozen=True)
class View:
    """The samples of a split that one purpose looks at.

    Attributes:
        name: In reports.
        split: `val` or `test`.
        half: None for all samples, else 0 or 1: a seeded half of them.
        seed: Of the halves.
    """

    name: str
    split: str
    half: int | None = None
    seed: int = 0

    def mask(self, samples: int) -> npt.NDArray[np.bool_]:
        """Which of the samples it looks at."""
        if self.half is None:
            return np.ones(samples, dtype=bool)
        order = np.random.default_rng(self.seed).permutation(samples)
        mask_N: npt.NDArray[np.bool_] = np.isin(np.arange(samples), order[self.half :: 2])
        return mask_N


FEWEST = 10  # items of a labelled set that can be halved


def views(splits: Sequence[str], seed: int) -> tuple[View, View]:
    """What choices look at and what is reported; one labelled split is cut in two halves."""
    if "val" in splits and "test" in splits:
        return View("val", "val"), View("test", "test")
    (split,) = splits
    return (
        View(f"{split}-choosing", split, 0, seed),
        View(f"{split}-reporting", split, 1, seed),
    )


@dataclass
class Contest:
    """Candidates and the predictions behind them.

    Attributes:
        bench: Runs the models.
        wanted: What to compare.
        measure: What choices go by.
        choosing: The samples of every choice.
        reporting: The samples of the final figures.
        mixed_bn: BatchNorm policy of mixed rows.
        candidates: In the order they were made; filled by the methods.
    """

    bench: Workbench
    wanted: Wanted
    measure: Measure
    choosing: View
    reporting: View
    mixed_bn: BatchNorm
    seed: int = 0
    candidates: list[Candidate] = field(default_factory=list)
    _pools: list[tuple[Member, ...]] = field(default_factory=list)
    _read: dict[tuple[int, str], Predictions] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """Of the snapshots."""
        return [snapshot.name for snapshot in self.bench.snapshots.snapshots]

    # ---------------------------------------------------------- with models, on all processes

    def fixed(self, added: Sequence[tuple[str, Row]]) -> list[Candidate]:
        """Candidates that need no data to be made; singles always take part."""
        count, names = len(self.names), self.names
        keeps = self.wanted.keeps
        found = families.singles(names)
        if self.mixed_bn == "recomputed":
            again = families.singles(names, "recomputed")
            found += [c for c in again if keeps("singles-bn", c.name)]
        if count > 1:
            made = families.averages(count, self.mixed_bn)
            if self.mixed_bn == "recomputed":
                made.insert(1, families.mixed("uniform", mean_row(count), "averaged"))
            found += [c for c in made if keeps("averages", c.name)]
            parts = families.soup_ensembles(count, self.mixed_bn)
            found += [c for c in parts if keeps("soups", c.name)]
        if count > 2:
            drawn = families.swag(count, self.mixed_bn, seed=self.seed)
            found += [drawn] if keeps("swag", drawn.name) else []
        return [*found, *(Candidate(name, (row,), (self.mixed_bn,)) for name, row in added)]

    def check_names(self, fixed: Sequence[Candidate], added: Sequence[tuple[str, Row]]) -> None:
        """Refuse names that are taken, and patterns that no candidate has.

        Raises:
            UsageError: Names the nearest.
        """
        count = len(self.names)
        end = families.RECOMPUTED if self.mixed_bn == "recomputed" else ""
        rest = [f"{soup}-soup{end}" for soup in ("greedy", "learned")] if count > 1 else []
        rest += families.ensemble_names(count, tuple(COMBINERS))
        own = [name for name, _ in added]
        taken = [c.name for c in fixed if c.name not in own] + rest
        for name in own:
            if name in taken or own.count(name) > 1:
                raise UsageError(f"--add {name}: there is a candidate of this name already")
        for pattern in self.wanted.patterns:
            if not any(families.matches(name, pattern) for name in (*taken, *own)):
                one_of(pattern, [*families.GROUPS, *taken, *own], what="candidate")

    def steps(self) -> tuple[bool, bool]:
        """Whether a greedy and a learned soup are to be made."""
        several = len(self.names) > 1
        end = families.RECOMPUTED if self.mixed_bn == "recomputed" else ""
        return (
            several and self.wanted.keeps("soups", "greedy-soup" + end),
            several
            and self.wanted.keeps("soups", "learned-soup" + end)
            and self.bench.form is not None,
        )

    def predict(self, fixed: Sequence[Candidate]) -> None:
        """Run every model that is needed, soups last: they go by what the others said."""
        self.candidates = list(fixed)
        pool = tuple(dict.fromkeys(m for c in fixed for m in c.members))
        self.bench.predict(pool)
        seen = self.bench.splits[self.choosing.split].seen
        if self.choosing.half is not None and seen is not None and seen.samples < FEWEST:
            raise InputError(
                f"the {self.choosing.split} data have {seen.samples} items: too few to choose on one "
                "half and report on the other",
                hint=f"give --val-data and --test-data, or at least {FEWEST} items",
            )
        self._pools = [pool]
        greedy, learned = self.steps()
        objective = _Objective(self)
        if greedy:
            row = greedy_soup(self.bench.snapshots, objective=objective)
            self._join("greedy-soup", row)
        if learned:
            row = learned_soup(self.bench.snapshots, objective=objective, steps=LEARNED_STEPS)
            self._join("learned-soup", row)

    def _join(self, name: str, row: Row) -> None:
        """A row that was chosen on data becomes a candidate."""
        policy = self.mixed_bn if row.only is None else "none"  # one snapshot: as it was trained
        made = families.mixed(name, row, policy, self.choosing.name)
        self.bench.predict(made.members)
        self.candidates.append(made)
        self._add(made.members)

    def _add(self, members: tuple[Member, ...]) -> None:
        form = self.bench.form
        if form is not None and form.task == "segmentation":
            self._pools.append(members)  # rivals are found for a pool as a whole
        else:
            self._pools[0] = tuple(dict.fromkeys((*self._pools[0], *members)))
            self._read.clear()

    def holds(self, member: Member) -> bool:
        """Whether the member's predictions are among those of the fixed candidates."""
        return member in self._pools[0]

    # ----------------------------------------------------------- from predictions, process 0

    def predictions(self, view: View, pool: int = 0) -> Predictions:
        """What the members of a pool said on the samples of a view."""
        if (pool, view.name) not in self._read:
            whole = self.bench.predictions(self._pools[pool], view.split)
            mask_N = view.mask(whole.samples)
            self._read[pool, view.name] = whole if mask_N.all() else whole.part(mask_N)
        return self._read[pool, view.name]

    def mix(self, candidate: Candidate) -> tuple[int, Mix]:
        """The pool of a candidate, and what it does with the pool's members."""
        for index, pool in enumerate(self._pools):
            place = {member: at for at, member in enumerate(pool)}
            if all(member in place for member in candidate.members):
                at = tuple(place[member] for member in candidate.members)
                return index, Mix(at, candidate.combiner, candidate.params)
        raise AssertionError(f"{candidate.name}: no pool holds its members")

    def scores(self, candidates: Sequence[Candidate], view: View) -> dict[str, Scores]:
        """What is known of each item, by candidate."""
        by_pool: dict[int, dict[str, Mix]] = {}
        for candidate in candidates:
            pool, mix = self.mix(candidate)
            by_pool.setdefault(pool, {})[candidate.name] = mix
        found: dict[str, Scores] = {}
        for pool, mixes in by_pool.items():
            made = score(self.predictions(view, pool), list(mixes.values()))
            found |= dict(zip(mixes, made, strict=True))
        return {candidate.name: found[candidate.name] for candidate in candidates}

    def ensembles(self, ranking: Sequence[int]) -> tuple[list[Candidate], dict[str, Scores]]:
        """Prediction ensembles of snapshots, those that are chosen or fitted among them.

        Args:
            ranking: Snapshots from the best to the worst on choosing data.

        Returns:
            The candidates, and of the fitted ones the cross-fitted scores on choosing data: what
            each sample gets from a fit that did not see it.
        """
        count = len(ranking)
        keeps, on = self.wanted.keeps, self.choosing.name
        if count < 2:
            return [], {}
        made = [families.ensemble("ensemble", range(count), count)]
        for k in families.ladder(count):
            made.append(families.ensemble(f"ensemble-first-{k}", range(k), count))
            made.append(families.ensemble(f"ensemble-last-{k}", range(count - k, count), count))
            best = sorted(ranking[:k])
            made.append(families.ensemble(f"ensemble-best-{k}", best, count, chosen_on=on))
        made = [c for c in made if keeps("ensembles", c.name)]
        task = self.predictions(self.choosing).form.task
        for name, one in COMBINERS.items():
            if name in ("mean", "weighted") or task not in one.tasks or one.fitted:
                continue
            other = families.ensemble(f"ensemble-{name}", range(count), count, combiner=name)
            made += [other] if keeps("combiners", other.name) else []
        singles = self.singles(self.choosing)
        fits = [f for f in fitting.fits(task, count, on) if keeps(f.group, f.name)]
        fitted = {fit.name: fit.make(singles) for fit in fits}
        made += [candidate for candidate in fitted.values() if candidate is not None]
        fits = [fit for fit in fits if fitted[fit.name] is not None]
        folded = fitting.cross_fitted(fits, singles, seed=self.seed)
        # without honest figures on choosing data a fit has no place in a contest
        unfolded = {fit.name for fit in fits} - set(folded)
        return [candidate for candidate in made if candidate.name not in unfolded], folded

    def singles(self, view: View) -> Predictions:
        """What the snapshots as they are said, in canonical order."""
        count = len(self.names)
        pool, mix = self.mix(families.ensemble("all", range(count), count))
        return self.predictions(view, pool).of(mix.members)


class _Objective:
    """The objective of averaging rules: goodness and loss of a mixed row on choosing data."""

    def __init__(self, contest: Contest) -> None:
        self.contest = contest

    def value(self, row: Row) -> float:
        contest = self.contest
        bench, view = contest.bench, contest.choosing
        member = Member(row, "none" if row.only is not None else contest.mixed_bn)
        found = None
        if not contest.holds(member):
            bench.predict([member], [view.split])
        if bench.world.rank == 0:
            if contest.holds(member):
                candidate = Candidate("trial", (row,), (member.batch_norm,))
                scores = contest.scores([candidate], view)["trial"]
            else:
                whole = bench.predictions([member], view.split)
                part = whole.part(view.mask(whole.samples))
                (scores,) = score(part, [Mix((0,))])
            found = contest.measure.goodness(scores)
        value = bench.world.from_first(found)
        assert value is not None
        return value

    def gradient(self, row: Row) -> tuple[float, npt.NDArray[np.float64]]:
        contest = self.contest
        bench, view = contest.bench, contest.choosing
        samples = None
        if bench.world.rank == 0:
            seen = bench.splits[view.split].seen
            assert seen is not None
            samples = seen.samples
        samples = bench.world.from_first(samples)
        assert samples is not None
        like = None
        if contest.mixed_bn == "recomputed":
            like = Member(mean_row(len(contest.names)), "recomputed")
            if bench.builder.statistics(like) is None:
                bench.builder.models([like])
        return bench.gradient(Member(row, contest.mixed_bn), view.split, view.mask(samples), like)


def weights_json(candidate: Candidate) -> list[Any]:
    """Coefficients of the snapshots that take part; one list a member for an ensemble."""
    used = used_snapshots(candidate)
    rows = [[row.weights[k] for k in used] for row in candidate.rows]
    return rows if len(rows) > 1 else rows[0]


def used_snapshots(candidate: Candidate) -> list[int]:
    """Indices of the snapshots that take part."""
    count = len(candidate.rows[0].coefficients)
    return [k for k in range(count) if any(row.coefficients[k] != 0 for row in candidate.rows)]
