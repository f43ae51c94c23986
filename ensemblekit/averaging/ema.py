"""Owns the exponential moving average over snapshots, each update weighted less as time goes by.

Input: snapshots; only their number and order matter.
"""

import math
from typing import TYPE_CHECKING, Annotated

from ensemblekit.candidates import Row
from ensemblekit.errors import UsageError

if TYPE_CHECKING:
    from ensemblekit.snapshots import SnapshotSet


def ema(
    snapshots: "SnapshotSet",
    *,
    decay: Annotated[float | None, "share of the old average that each snapshot keeps"] = None,
    half_life: Annotated[float | None, "snapshots until a weight has halved"] = None,
    objective: object = None,
) -> Row:
    """m_1 = w_1, m_k = decay * m_(k-1) + (1 - decay) * w_k: torch's `get_ema_avg_fn`, over snapshots.

    Args:
        snapshots: K snapshots, oldest first.
        decay: Between 0 and 1.
        half_life: The same as `decay = 2 ** (-1 / half_life)`; a fifth of the snapshots, at least
            one, when neither is given.
        objective: Not used.

    Raises:
        UsageError: Both of them, or one out of range.
    """
    if decay is not None and half_life is not None:
        raise UsageError("--decay and --half-life say the same thing: give one of them")
    if half_life is not None and not (half_life > 0 and math.isfinite(half_life)):
        raise UsageError(f"--half-life {half_life:g}: must be more than 0 snapshots")
    if decay is not None and not 0 <= decay < 1:
        raise UsageError(f"--decay {decay:g}: must be at least 0 and less than 1")
    if decay is None:
        decay = 2.0 ** (-1.0 / (half_life or max(len(snapshots) / 5, 1.0)))
    return ema_row(len(snapshots), decay)


def ema_row(count: int, decay: float) -> Row:
    """The row of a moving average that starts with the first snapshot.

    >>> ema_row(3, 0.5).coefficients
    (0.25, 0.25, 0.5)
    """
    oldest = decay ** (count - 1)
    rest = ((1 - decay) * decay ** (count - 1 - k) for k in range(1, count))
    coefficients = (oldest, *rest)
    return Row(coefficients, math.fsum(coefficients))
