"""`lawa`: the mean of the latest snapshots."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ensemblekit.averaging.lawa import last_row, lawa
from ensemblekit.candidates import Row
from ensemblekit.errors import UsageError

from .series import at_steps, mixed


@pytest.mark.parametrize("k", [1, 2, 7, 8, None])
def test_mean_of_the_last(tmp_path: Path, k: int | None) -> None:
    weights = list(np.random.default_rng(1).normal(size=(8, 30)))
    row = lawa(at_steps(tmp_path, range(8)), k=k)
    taken = 6 if k is None else k
    np.testing.assert_allclose(mixed(row, weights), np.mean(weights[-taken:], axis=0), atol=1e-15)
    assert row.divisor == taken, "divided once"


@pytest.mark.parametrize("count", [1, 2, 5])
def test_default_of_a_short_run_is_all_of_it(tmp_path: Path, count: int) -> None:
    assert lawa(at_steps(tmp_path, range(1, count + 1))) == Row((1.0,) * count, float(count))


@pytest.mark.parametrize("k", [0, -1, 4])
def test_as_many_as_there_are(tmp_path: Path, k: int) -> None:
    with pytest.raises(UsageError, match=f"--k {k}: there are 3 snapshots"):
        lawa(at_steps(tmp_path, range(3)), k=k)


def test_last_row() -> None:
    assert last_row(2, 4) == Row((0.0, 0.0, 1.0, 1.0), 2.0)
