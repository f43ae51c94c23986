"""Owns snapshots of a run for the rules: a few numbers each, at steps of one's choice."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ensemblekit.candidates import Row
from ensemblekit.discovery import discover
from ensemblekit.snapshots import SnapshotSet

from ..helpers import Array, write_safetensors


def at_steps(folder: Path, steps: Sequence[int], weights: Sequence[Array] = ()) -> SnapshotSet:
    """Snapshots at these steps, oldest first; without weights they hold anything.

    Of one snapshot alone no number is taken for its step.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for k, step in enumerate(steps):
        values = weights[k] if len(weights) else np.full(3, k, np.float32)
        write_safetensors(folder / f"step_{step:08}.safetensors", {"w": values})
    found = discover(folder)
    assert len(found) == 1 or [s.numbers[0] for s in found.snapshots] == list(steps)
    return found


def mixed(row: Row, weights: Sequence[Array]) -> Array:
    """The row over weights, in float64."""
    total = sum(
        c * np.asarray(w, np.float64) for c, w in zip(row.coefficients, weights, strict=True)
    )
    return np.asarray(total / row.divisor)
