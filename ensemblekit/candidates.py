"""Owns candidates: what can be shipped, as numbers alone. A candidate is rows over snapshots.

Input: averaging rules and selections make rows; nothing here knows files or tensors.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from ensemblekit.errors import UsageError

BatchNorm = Literal["none", "averaged", "recomputed"]


@dataclass(frozen=True)
class Row:
    """Coefficients over snapshots and the one divisor that makes them sum to 1.

    Dividing the finished sum once, instead of each term, keeps the last bit right: about one
    element in a hundred would differ.

    Attributes:
        coefficients: One for each snapshot, in canonical order; negative ones extrapolate.
        divisor: Their sum.

    Raises:
        UsageError: No coefficients, a value that is not finite, or a sum that is not `divisor`.

    >>> Row((1.0, 1.0, 2.0), 4.0).weights
    (0.25, 0.25, 0.5)
    """

    coefficients: tuple[float, ...]
    divisor: float

    def __post_init__(self) -> None:
        numbers = (*self.coefficients, self.divisor)
        if not self.coefficients or not all(math.isfinite(c) for c in numbers):
            raise UsageError(f"coefficients must be finite numbers, found {self.coefficients}")
        size = sum(abs(c) for c in self.coefficients)
        if abs(self.divisor) <= 1e-12 * size or self.divisor == 0:
            raise UsageError(f"coefficients {self.coefficients} sum to zero: no average has them")
        if abs(math.fsum(self.coefficients) - self.divisor) > 1e-9 * size:
            raise UsageError(f"coefficients {self.coefficients} do not sum to {self.divisor}")

    @property
    def weights(self) -> tuple[float, ...]:
        """The coefficients divided, for people to read."""
        return tuple(c / self.divisor for c in self.coefficients)

    @property
    def only(self) -> int | None:
        """Index of the one snapshot that the row takes, None for a mixed row."""
        used = [k for k, c in enumerate(self.coefficients) if c != 0]
        return used[0] if len(used) == 1 else None

    @property
    def newest(self) -> int:
        """Index of the last snapshot that takes part."""
        return max(k for k, c in enumerate(self.coefficients) if c != 0)


def mean_row(count: int) -> Row:
    """The uniform row over `count` snapshots."""
    return Row((1.0,) * count, float(count))


def one_hot(index: int, count: int) -> Row:
    """The row that is snapshot `index` itself."""
    return Row(tuple(float(k == index) for k in range(count)), 1.0)


@dataclass(frozen=True)
class Member:
    """One model that can be run: a row, and where its BatchNorm statistics come from."""

    row: Row
    batch_norm: BatchNorm = "none"


@dataclass(frozen=True)
class Candidate:
    """Something that could be shipped: a matrix of rows, what its BatchNorm is, a combiner.

    Attributes:
        name: Unique among the candidates it is compared with.
        rows: M rows over the same K snapshots; one row is one model.
        batch_norm: For each row, where its running statistics come from.
        combiner: How M predictions become one; None for a single model.
        params: The combiner's fitted numbers.
        chosen_on: The split whose labels took part in making it, None where none did.
        seed: Of random rows.
    """

    name: str
    rows: tuple[Row, ...]
    batch_norm: tuple[BatchNorm, ...]
    combiner: str | None = None
    params: Mapping[str, Any] = field(default_factory=dict)
    chosen_on: str | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        counts = {len(row.coefficients) for row in self.rows}
        assert len(counts) == 1, "rows of one candidate are over the same snapshots"
        assert len(self.batch_norm) == len(self.rows)
        assert (self.combiner is None) == (len(self.rows) == 1)

    @property
    def members(self) -> tuple[Member, ...]:
        """The M models."""
        pairs = zip(self.rows, self.batch_norm, strict=True)
        return tuple(Member(row, batch_norm) for row, batch_norm in pairs)

    @property
    def kind(self) -> Literal["single", "averaged", "ensemble"]:
        """The word for it in reports."""
        if len(self.rows) > 1:
            return "ensemble"
        return "single" if self.rows[0].only is not None else "averaged"

    def to_json(self) -> dict[str, Any]:
        """Plain values; `from_json` gives an equal candidate back."""
        return {
            "name": self.name,
            "rows": [{"coefficients": r.coefficients, "divisor": r.divisor} for r in self.rows],
            "batch_norm": self.batch_norm,
            "combiner": self.combiner,
            "combiner_params": dict(self.params),
            "chosen_on": self.chosen_on,
            "seed": self.seed,
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Candidate":
        """The inverse of `to_json`.

        Raises:
            ValueError: It is not what `to_json` gave.
        """
        try:
            rows = tuple(Row(tuple(r["coefficients"]), r["divisor"]) for r in value["rows"])
            policies = tuple(value["batch_norm"])
            known = all(policy in get_args(BatchNorm) for policy in policies)
            name, combiner = value["name"], value["combiner"]
        except (KeyError, TypeError, OverflowError, UsageError) as error:
            raise ValueError(f"no candidate: {error}") from error
        one_length = len({len(row.coefficients) for row in rows}) == 1
        if not (known and one_length and len(policies) == len(rows)):
            raise ValueError("no candidate: rows and BatchNorm policies do not go together")
        if not isinstance(name, str) or not isinstance(combiner, str | None):
            raise ValueError("no candidate: a name or a combiner that is no text")
        if (combiner is None) != (len(rows) == 1):
            raise ValueError("no candidate: an ensemble needs a combiner, one model has none")
        return cls(
            name,
            rows,
            policies,
            combiner,
            value.get("combiner_params") or {},
            value.get("chosen_on"),
            value.get("seed"),
        )
