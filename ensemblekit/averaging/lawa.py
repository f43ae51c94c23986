"""Owns LAWA, the mean of the latest snapshots (Kaddour 2022, arXiv 2209.14981).

Input: snapshots; only their number and order matter.
"""

from typing import TYPE_CHECKING, Annotated

from ensemblekit.candidates import Row
from ensemblekit.errors import UsageError

if TYPE_CHECKING:
    from ensemblekit.snapshots import SnapshotSet

_LATEST = 6  # the paper's choice


def lawa(
    snapshots: "SnapshotSet",
    *,
    k: Annotated[int | None, "how many of the newest snapshots [default: 6, or all]"] = None,
    objective: object = None,
) -> Row:
    """The newest `k` with the same weight, the others with none.

    Raises:
        UsageError: There are not as many.
    """
    count = len(snapshots)
    if k is not None and not 1 <= k <= count:
        raise UsageError(f"--k {k}: there are {count} snapshots, so 1 to {count} can be taken")
    return last_row(k or min(_LATEST, count), count)


def last_row(taken: int, count: int) -> Row:
    """The mean of the last `taken` of `count` snapshots."""
    return Row(tuple(float(k >= count - taken) for k in range(count)), float(taken))
