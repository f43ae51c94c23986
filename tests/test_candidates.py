"""Rows and candidates: what they accept, what they say, and that they survive JSON."""

from __future__ import annotations

import copy
import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ensemblekit.candidates import Candidate, Row, mean_row, one_hot
from ensemblekit.errors import UsageError

MEAN = mean_row(4)


@pytest.mark.parametrize(
    "coefficients, divisor, weights, only, newest",
    [
        ((1.0, 1.0), 2.0, (0.5, 0.5), None, 1),
        ((1.0, 1.0, 2.0), 4.0, (0.25, 0.25, 0.5), None, 2),
        ((0.0, 3.0, 0.0), 3.0, (0.0, 1.0, 0.0), 1, 1),
        ((1.0, 2.0, 0.0), 3.0, (1 / 3, 2 / 3, 0.0), None, 1),
        ((2.0, -1.0), 1.0, (2.0, -1.0), None, 1),
        ((-1.0, -1.0), -2.0, (0.5, 0.5), None, 1),
        ((5.0,), 5.0, (1.0,), 0, 0),
    ],
)
def test_row(
    coefficients: tuple[float, ...],
    divisor: float,
    weights: tuple[float, ...],
    only: int | None,
    newest: int,
) -> None:
    row = Row(coefficients, divisor)
    assert (row.weights, row.only, row.newest) == (weights, only, newest)


@pytest.mark.parametrize(
    "coefficients, divisor, what",
    [
        ((), 1.0, "finite"),
        ((math.nan, 1.0), 1.0, "finite"),
        ((math.inf, 1.0), math.inf, "finite"),
        ((1.0, 1.0), math.nan, "finite"),
        ((1.0, -1.0), 0.0, "zero"),
        ((0.0, 0.0), 0.0, "zero"),
        ((1e20, 1.0, -1e20), 1.0, "zero"),
        ((1.0, 1.0), 3.0, "do not sum"),
    ],
)
def test_no_row(coefficients: tuple[float, ...], divisor: float, what: str) -> None:
    with pytest.raises(UsageError, match=what):
        Row(coefficients, divisor)


@given(st.integers(1, 200), st.data())
def test_named_rows(count: int, data: st.DataObject) -> None:
    index = data.draw(st.integers(0, count - 1))
    assert mean_row(count).divisor == count
    assert one_hot(index, count).only == index
    assert math.isclose(math.fsum(mean_row(count).weights), 1.0)


@pytest.mark.parametrize(
    "rows, combiner, kind",
    [
        ((one_hot(2, 4),), None, "single"),
        ((MEAN,), None, "averaged"),
        ((MEAN, one_hot(0, 4)), "mean", "ensemble"),
    ],
)
def test_candidate(rows: tuple[Row, ...], combiner: str | None, kind: str) -> None:
    candidate = Candidate("name", rows, ("none",) * len(rows), combiner)
    assert candidate.kind == kind
    assert Candidate.from_json(json.loads(json.dumps(candidate.to_json()))) == candidate


@pytest.mark.parametrize(
    "rows, statistics, combiner",
    [
        ((MEAN, mean_row(3)), ("none", "none"), "mean"),
        ((MEAN,), ("none", "none"), None),
        ((MEAN,), ("none",), "mean"),
        ((MEAN, MEAN), ("none", "none"), None),
    ],
)
def test_no_candidate(rows: tuple[Row, ...], statistics: tuple, combiner: str | None) -> None:  # type: ignore[type-arg]
    with pytest.raises(AssertionError):
        Candidate("name", rows, statistics, combiner)


ONE = Candidate("soup", (MEAN,), ("averaged",), None, {}, "val", 3)
TWO = Candidate("pair", (MEAN, one_hot(2, 4)), ("recomputed", "none"), "mean")
ABSENT = object()


def changed(candidate: Candidate, place: tuple[str | int, ...], value: Any) -> Any:
    """The candidate's JSON with something else in one place."""
    found: Any = json.loads(json.dumps(candidate.to_json()))
    at = found
    for step in place[:-1]:
        at = at[step]
    if value is ABSENT:
        del at[place[-1]]
    else:
        at[place[-1]] = copy.deepcopy(value)
    return found


DAMAGED: list[tuple[Candidate, tuple[str | int, ...], Any]] = [
    *((ONE, ("rows",), value) for value in (ABSENT, None, [], {}, "abc", 3, [3], ["ab"], [{}])),
    *((ONE, ("rows", 0, "coefficients"), value) for value in (ABSENT, None, [], "1111", 3)),
    *((ONE, ("rows", 0, "coefficients", 1), v) for v in (ABSENT, None, "1", math.nan, [], 2)),
    *((ONE, ("rows", 0, "divisor"), value) for value in (ABSENT, None, "4", 0, 5, math.inf)),
    *((ONE, ("batch_norm",), value) for value in (ABSENT, None, [], "averaged", 3, ["bogus"])),
    *((ONE, ("batch_norm", 0), value) for value in (ABSENT, None, "", 3, "Averaged")),
    *((ONE, ("combiner",), value) for value in ("mean", 3, [])),
    *((TWO, ("rows", 1, "coefficients"), value) for value in (ABSENT, [], [1.0], [1.0] * 5)),
    (TWO, ("rows", 1), ABSENT),
    (TWO, ("batch_norm", 1), ABSENT),
    (TWO, ("batch_norm",), ["averaged"] * 3),
    (TWO, ("combiner",), None),
    (ONE, ("name",), ABSENT),
    (ONE, ("combiner",), ABSENT),
    (ONE, ("batch_norm", 0), []),
    (ONE, ("batch_norm", 0), {}),
    (ONE, ("rows", 0, "coefficients", 0), 10**400),
    (ONE, ("rows", 0, "divisor"), 10**400),
]


@pytest.mark.parametrize(
    "candidate, place, value",
    DAMAGED,
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_json_that_is_no_candidate(
    candidate: Candidate, place: tuple[str | int, ...], value: Any
) -> None:
    with pytest.raises(ValueError, match="no candidate"):
        Candidate.from_json(changed(candidate, place, value))


@pytest.mark.parametrize("value", [None, 3, "text", [], [3], {}, True])
def test_values_that_are_no_candidate(value: Any) -> None:
    with pytest.raises(ValueError, match="no candidate"):
        Candidate.from_json(value)
