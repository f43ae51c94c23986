"""Owns the plain mean: SWA (Izmailov 2018) over given snapshots, the uniform soup.

Input: snapshots; only their number matters.
"""

from typing import TYPE_CHECKING

from ensemblekit.candidates import Row, mean_row

if TYPE_CHECKING:
    from ensemblekit.snapshots import SnapshotSet


def uniform(snapshots: "SnapshotSet", *, objective: object = None) -> Row:
    """All snapshots with the same weight, (1, ..., 1) / K."""
    return mean_row(len(snapshots))
