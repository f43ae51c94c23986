"""Owns the weighted mean with coefficients that the user gives.

Input: snapshots and one coefficient for each, in canonical order.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

from ensemblekit.candidates import Row
from ensemblekit.errors import UsageError, listing

if TYPE_CHECKING:
    from ensemblekit.snapshots import SnapshotSet


def weighted(
    snapshots: "SnapshotSet",
    *,
    coefficients: Annotated[Sequence[float] | None, "one number a snapshot, oldest first"] = None,
    objective: object = None,
) -> Row:
    """The coefficients divided by their sum; negative ones extrapolate.

    Args:
        snapshots: K snapshots.
        coefficients: K numbers, oldest snapshot first; they need not sum to 1.
        objective: Not used.

    Raises:
        UsageError: Not one number for each snapshot, or a sum of zero.
    """
    names = listing((s.name for s in snapshots.snapshots), limit=12)
    if coefficients is None:
        raise UsageError(
            "method 'weighted' needs coefficients",
            hint=f"--coefficients with {len(snapshots)} numbers, for {names}",
        )
    if len(coefficients) != len(snapshots):
        raise UsageError(
            f"{len(coefficients)} coefficients for {len(snapshots)} snapshots",
            hint=f"in this order: {names}",
        )
    numbers = tuple(float(c) for c in coefficients)
    try:
        return Row(numbers, math.fsum(numbers))
    except (OverflowError, ValueError) as error:
        raise UsageError(
            f"coefficients must be finite and not too large, found {numbers}"
        ) from error
