"""Rows and candidates: what they accept, what they say, and that they survive JSON."""

from __future__ import annotations

import json
import math

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
