"""Owns the greedy soup (Wortsman 2022, recipe 1): snapshots join the mean while it gets no worse.

Input: snapshots and an objective on choosing data.
"""

from typing import TYPE_CHECKING

from ensemblekit.candidates import Row, one_hot
from ensemblekit.errors import UsageError

if TYPE_CHECKING:
    from ensemblekit.averaging import Objective
    from ensemblekit.snapshots import SnapshotSet


def greedy_soup(snapshots: "SnapshotSet", *, objective: "Objective | None" = None) -> Row:
    """Snapshots from the best to the worst; each joins if the mean with it is at least as good.

    Raises:
        UsageError: Without an objective.
    """
    if objective is None:
        raise UsageError("a greedy soup is chosen on data", hint="--model TARGET --val-data TARGET")
    count = len(snapshots)
    alone = [objective.value(one_hot(k, count)) for k in range(count)]
    order = sorted(range(count), key=lambda k: (-alone[k], -k))
    taken, best = {order[0]}, alone[order[0]]
    for k in order[1:]:
        trial = taken | {k}
        row = Row(tuple(float(i in trial) for i in range(count)), float(len(trial)))
        value = objective.value(row)
        if value >= best:
            taken, best = trial, value
    return Row(tuple(float(i in taken) for i in range(count)), float(len(taken)))
