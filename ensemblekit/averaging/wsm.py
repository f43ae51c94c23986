"""Owns WSM, weights that stand for a learning-rate decay (arXiv 2507.17634, theorem 3.1).

Input: snapshots of a run at constant learning rate, and where in the run they stand.

With c_0 .. c_k on snapshots 0 .. k, the updates between snapshots i-1 and i count
w_i = c_i + ... + c_k times: as if their learning rate had been w_i times the constant one. So a
decay that is wanted gives c_0 = 1 - w_1, c_i = w_i - w_(i+1), c_k = w_k. Here w_i is the decay's mean
over the time between the two snapshots, so the newest one counts although the decay ends at 0, and
snapshots at uneven distances count for the time they stand for.
"""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import TYPE_CHECKING

from ensemblekit.candidates import Row

if TYPE_CHECKING:
    from ensemblekit.snapshots import SnapshotSet


def wsm_linear(snapshots: "SnapshotSet", *, objective: object = None) -> Row:
    """Stands for a linear decay, 1 - x: the plain mean with its two ends at half weight."""
    return _row(snapshots, lambda x: x - x**2 / 2)


def wsm_1_sqrt(snapshots: "SnapshotSet", *, objective: object = None) -> Row:
    """Stands for the decay 1 - sqrt(x) (Haegele 2024, arXiv 2405.18392)."""
    return _row(snapshots, lambda x: x - x**1.5 * 2 / 3)


def _row(snapshots: "SnapshotSet", integral: Callable[[float], float]) -> Row:
    if len(snapshots) == 1:
        return Row((1.0,), 1.0)
    times = _times(snapshots)
    shares = [(time - times[0]) / (times[-1] - times[0]) for time in times]
    decays = [1.0]
    decays += [(integral(b) - integral(a)) / (b - a) for a, b in pairwise(shares)]
    decays.append(0.0)
    coefficients = tuple(before - after for before, after in pairwise(decays))
    return Row(coefficients, math.fsum(coefficients))


def _times(snapshots: "SnapshotSet") -> list[float]:
    """Where the snapshots stand; evenly spaced where that is not known of all."""
    from ensemblekit.snapshots import position

    known = [position(s, snapshots.ordered_by) for s in snapshots.snapshots]
    times = [time for time in known if time is not None]
    grows = len(times) == len(known) and all(a < b for a, b in pairwise(times))
    return times if grows else [float(k) for k in range(len(known))]
