"""The averaging rules: which row each makes, and the registry that knows them."""

from __future__ import annotations

from pathlib import Path

import pytest

from ensemblekit import averaging
from ensemblekit.averaging.uniform import uniform
from ensemblekit.averaging.weighted import weighted
from ensemblekit.candidates import Row
from ensemblekit.errors import UsageError
from ensemblekit.snapshots import SnapshotSet

from ..helpers import read_set, write_series


@pytest.fixture
def three(tmp_path: Path) -> SnapshotSet:
    return read_set(*sorted(write_series(tmp_path).iterdir()))


def test_registry() -> None:
    assert averaging.rule("uniform") is uniform
    assert averaging.rule("weighted") is weighted
    with pytest.raises(UsageError, match="weighted") as raised:
        averaging.rule("wieghted")
    assert raised.value.hint == "did you mean 'weighted'?"


def test_uniform(three: SnapshotSet) -> None:
    assert uniform(three) == Row((1.0, 1.0, 1.0), 3.0)


@pytest.mark.parametrize(
    "coefficients, divisor",
    [((1, 2, 1), 4.0), ((0, 0, 5), 5.0), ((-1, 1, 1), 1.0), ((0.1, 0.2, 0.7), 1.0)],
)
def test_weighted(three: SnapshotSet, coefficients: tuple[float, ...], divisor: float) -> None:
    assert weighted(three, coefficients=coefficients) == Row(coefficients, divisor)


@pytest.mark.parametrize(
    "coefficients, words",
    [
        (None, "needs coefficients"),
        ((), "0 coefficients for 3"),
        ((1, 2), "2 coefficients for 3"),
        ((1, 2, 3, 4), "4 coefficients for 3"),
        ((1, -1, 0), "zero"),
        ((1, float("nan"), 1), "finite"),
        ((float("inf"), float("-inf"), 1), "finite"),
        ((1e308, 1e308, 1e308), "finite|large"),
    ],
)
def test_not_weighted(
    three: SnapshotSet, coefficients: tuple[float, ...] | None, words: str
) -> None:
    with pytest.raises(UsageError, match=words):
        weighted(three, coefficients=coefficients)


def test_hint_names_the_snapshots_in_order(three: SnapshotSet) -> None:
    with pytest.raises(UsageError) as raised:
        weighted(three)
    hint = raised.value.hint or ""
    assert "3 numbers" in hint
    assert hint.index("snap_1") < hint.index("snap_2") < hint.index("snap_3")
