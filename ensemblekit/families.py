"""Owns which candidates are compared without being asked: families of rows over K snapshots.

Input: how many snapshots there are, and what is known of BatchNorm. Candidates that are chosen on
data (soups, selected ensembles) are made elsewhere; here is what needs no data.
"""

import fnmatch
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ensemblekit.averaging.ema import ema_row
from ensemblekit.averaging.lawa import last_row
from ensemblekit.candidates import BatchNorm, Candidate, Row, mean_row, one_hot
from ensemblekit.errors import UsageError

GROUPS: dict[str, str] = {
    "singles": "every snapshot",
    "singles-bn": "every snapshot with recomputed BatchNorm statistics",
    "averages": "the mean of all, of the last k, an exponential moving average",
    "soups": "greedy soup, learned soup, ensembles of the means of parts of the run",
    "swag": "low-rank SWAG samples as an ensemble",
    "ensembles": "prediction ensembles of snapshots: all, first, last, best k, greedy, best subset",
    "combiners": "other ways to combine the ensemble of all",
}
RECOMPUTED = "+bn"  # what a name ends with when BatchNorm statistics were recomputed

_LADDER = (2, 3, 4, 5, 7, 10, 15, 20, 30, 50, 70, 100)
SWAG_SAMPLES = 5


@dataclass(frozen=True)
class Wanted:
    """What to compare: whole groups, and candidates by name.

    Attributes:
        groups: Keys of `GROUPS`.
        patterns: Globs of candidates' names.
    """

    groups: tuple[str, ...] = tuple(GROUPS)
    patterns: tuple[str, ...] = ()

    def keeps(self, group: str, name: str) -> bool:
        """Whether a candidate is compared."""
        named = any(matches(name, pattern) for pattern in self.patterns)
        return group in self.groups or named


def matches(name: str, pattern: str) -> bool:
    """Whether a glob means a candidate, with or without the mark of recomputed statistics."""
    plain = name.removesuffix(RECOMPUTED)
    return fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(plain, pattern)


def wanted(text: str | None) -> Wanted:
    """From a list such as `singles,ensembles` or `uniform*,last-3`.

    Raises:
        UsageError: It names nothing.

    >>> wanted("singles,last-*")
    Wanted(groups=('singles',), patterns=('last-*',))
    """
    if text is None or text.strip() == "all":
        return Wanted()
    words = [word.strip() for word in text.split(",") if word.strip()]
    if not words:
        raise UsageError("--candidates names nothing", hint=f"groups: {', '.join(GROUPS)}")
    groups = tuple(dict.fromkeys(word for word in words if word in GROUPS))
    patterns = tuple(dict.fromkeys(word for word in words if word not in GROUPS))
    return Wanted(groups, patterns)


def singles(names: Sequence[str], batch_norm: BatchNorm = "none") -> list[Candidate]:
    """Each snapshot by itself."""
    end = RECOMPUTED if batch_norm == "recomputed" else ""
    return [
        Candidate(name + end, (one_hot(k, len(names)),), (batch_norm,))
        for k, name in enumerate(names)
    ]


def averages(count: int, batch_norm: BatchNorm) -> list[Candidate]:
    """Means that need no data: all, the last k, an exponential moving average."""
    if count < 2:
        return []
    rows = {"uniform": mean_row(count)}
    rows |= {f"last-{k}": last_row(k, count) for k in _LADDER if k < count}
    if count > 2:
        rows["ema"] = ema_row(count, 2.0 ** (-1.0 / max(count / 5, 1.0)))
    return [mixed(name, row, batch_norm) for name, row in rows.items()]


def mixed(name: str, row: Row, batch_norm: BatchNorm, chosen_on: str | None = None) -> Candidate:
    """One averaged model; its name says where its statistics come from."""
    end = RECOMPUTED if batch_norm == "recomputed" else ""
    return Candidate(name + end, (row,), (batch_norm,), chosen_on=chosen_on)


def soup_ensembles(count: int, batch_norm: BatchNorm) -> list[Candidate]:
    """Ensembles of two and three means, each of one part of the run."""
    found = []
    for parts in (2, 3):
        if count < 2 * parts:
            continue
        edges = [round(count * p / parts) for p in range(parts + 1)]
        own: tuple[BatchNorm, ...] = (batch_norm,) * parts
        rows = tuple(
            Row(
                tuple(float(start <= k < stop) for k in range(count)),
                float(stop - start),
            )
            for start, stop in itertools.pairwise(edges)
        )
        end = RECOMPUTED if batch_norm == "recomputed" else ""
        name = f"ensemble-of-{parts}-soups{end}"
        found.append(Candidate(name, rows, own, "mean"))
    return found


def swag(count: int, batch_norm: BatchNorm, *, seed: int, samples: int = SWAG_SAMPLES) -> Candidate:
    """An ensemble of draws from the low-rank part of SWAG's Gaussian (Maddox 2019).

    The row of a draw is 1/K + (z - mean(z)) / sqrt(K - 1) with z standard normal: deviations of
    the snapshots from their mean, D z / sqrt(K - 1). SWAG gives half of the variance to a diagonal
    part; that part is left out here, so this one has all of it.
    """
    generator = np.random.default_rng(seed)
    rows = []
    for _ in range(samples):
        z_K = generator.standard_normal(count)
        weights_K = 1.0 / count + (z_K - z_K.mean()) / np.sqrt(count - 1)
        coefficients = tuple(float(c) for c in weights_K)
        rows.append(Row(coefficients, float(sum(coefficients))))
    end = RECOMPUTED if batch_norm == "recomputed" else ""
    own: tuple[BatchNorm, ...] = (batch_norm,) * samples
    return Candidate(f"swag-lowrank{end}", tuple(rows), own, "mean", seed=seed)


def ensemble(
    name: str,
    chosen: Sequence[int],
    count: int,
    *,
    combiner: str = "mean",
    params: Mapping[str, object] | None = None,
    chosen_on: str | None = None,
) -> Candidate:
    """A prediction ensemble of some of `count` snapshots."""
    rows = tuple(one_hot(k, count) for k in chosen)
    if len(rows) == 1:
        return Candidate(name, rows, ("none",), chosen_on=chosen_on)
    own: tuple[BatchNorm, ...] = tuple("none" for _ in rows)
    return Candidate(name, rows, own, combiner, params or {}, chosen_on=chosen_on)


def ensemble_names(count: int, combiners: Sequence[str]) -> list[str]:
    """Names that prediction ensembles of `count` snapshots may have."""
    if count < 2:
        return []
    ends = [f"{kind}-{k}" for k in ladder(count) for kind in ("first", "last", "best")]
    ends += ["greedy", "best-subset", *combiners]
    return ["ensemble", *(f"ensemble-{end}" for end in ends)]


def ladder(count: int) -> list[int]:
    """Sizes of partial ensembles: all up to 12 snapshots, then steps that grow."""
    return [k for k in range(2, count) if count <= 12 or k in _LADDER]
