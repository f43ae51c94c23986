"""WSM rules against gradient descent: the same gradients with the learning rate that they stand for."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from ensemblekit.averaging.wsm import wsm_1_sqrt, wsm_linear
from ensemblekit.candidates import Row
from ensemblekit.snapshots import SnapshotSet

from ..helpers import Array, write_safetensors
from .series import at_steps, mixed

Rule = Callable[[SnapshotSet], Row]
RULES: dict[str, tuple[Rule, Callable[[Array], Array]]] = {
    "linear": (wsm_linear, lambda x: 1 - x),
    "1-sqrt": (wsm_1_sqrt, lambda x: 1 - np.sqrt(x)),
}
STEPS = {
    "even": [1000, 2000, 3000, 4000, 5000],
    "uneven": [100, 150, 700, 720, 2000, 2001],
    "two": [40, 50],
}
FINE = 20_000  # points of the decay's mean over an interval


def simulated(steps: list[int], decay: Callable[[Array], Array]) -> tuple[list[Array], Array]:
    """Snapshots of SGD at constant rate, and where the decayed rate leads with the same gradients.

    Within an interval the rate is the decay's mean there, by the midpoint rule.
    """
    rng = np.random.default_rng(len(steps))
    rate, weights = 0.05, rng.normal(size=25)
    snapshots, decayed = [weights], weights.copy()
    span = steps[-1] - steps[0]
    for begin, end in pairwise(steps):
        places = begin + (np.arange(FINE) + 0.5) * (end - begin) / FINE
        factor = float(decay((places - steps[0]) / span).mean())
        for _ in range(end - begin):
            gradient = np.tanh(weights) + rng.normal(size=25)
            weights = weights - rate * gradient
            decayed = decayed - rate * factor * gradient
        snapshots.append(weights)
    return snapshots, decayed


@pytest.mark.parametrize("steps", sorted(STEPS))
@pytest.mark.parametrize("name", sorted(RULES))
def test_stands_for_the_decay(tmp_path: Path, name: str, steps: str) -> None:
    rule, decay = RULES[name]
    snapshots, expected = simulated(STEPS[steps], decay)
    row = rule(at_steps(tmp_path, STEPS[steps]))
    np.testing.assert_allclose(mixed(row, snapshots), expected, rtol=1e-6, atol=1e-6)
    moved = np.abs(snapshots[-1] - expected).max()
    assert moved > 0.01, "the decay makes a difference here"


def test_linear_over_even_steps_is_the_mean_with_half_ends(tmp_path: Path) -> None:
    weights = wsm_linear(at_steps(tmp_path, STEPS["even"])).weights
    assert weights == pytest.approx([1 / 8, 1 / 4, 1 / 4, 1 / 4, 1 / 8])


@pytest.mark.parametrize("name", sorted(RULES))
@pytest.mark.parametrize("steps", sorted(STEPS))
def test_positive_and_one_together(tmp_path: Path, name: str, steps: str) -> None:
    """Of a decay that only falls no snapshot counts negatively."""
    weights = RULES[name][0](at_steps(tmp_path, STEPS[steps])).weights
    assert min(weights) > 0
    assert sum(weights) == pytest.approx(1)


@pytest.mark.parametrize("name", sorted(RULES))
def test_one_snapshot(tmp_path: Path, name: str) -> None:
    assert RULES[name][0](at_steps(tmp_path, [500])) == Row((1.0,), 1.0)


@pytest.mark.parametrize("name", sorted(RULES))
def test_only_distances_count(tmp_path: Path, name: str) -> None:
    """Where the first snapshot stands, and the unit of time, do not matter."""
    rule = RULES[name][0]
    one = rule(at_steps(tmp_path / "a", [0, 10, 40]))
    other = rule(at_steps(tmp_path / "b", [700, 900, 1500]))
    assert one.weights == pytest.approx(other.weights)


@pytest.mark.parametrize("name", sorted(RULES))
def test_without_numbers_they_stand_evenly(tmp_path: Path, name: str) -> None:
    for k, letter in enumerate("pqr"):
        write_safetensors(tmp_path / f"{letter}.safetensors", {"w": np.full(3, k, np.float32)})
    from ensemblekit.discovery import discover

    rule = RULES[name][0]
    assert rule(discover(tmp_path)) == rule(at_steps(tmp_path / "even", [1, 2, 3]))
