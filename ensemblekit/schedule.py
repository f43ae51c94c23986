"""Owns what learning rates and steps tell about a series: members of a wrong phase of the training.

Input: snapshots in canonical order.
"""

from collections.abc import Sequence

from ensemblekit.errors import listing
from ensemblekit.snapshots import Snapshot, position

_JUMP = 3.0
_EARLY = 3.0


def at_high_rate(snapshots: Sequence[Snapshot]) -> list[Snapshot]:
    """Snapshots saved in the middle of a cycle, at the top of the learning rate.

    Fast Geometric Ensembling (Garipov 2018) ends its cycles at the lowest rate; folders of its
    scripts also hold the files of the half cycles. Such a file has a rate at least three times the
    one before it, and the rate comes down again, or ends there.
    """
    rates = [s.facts.lr for s in snapshots]
    if any(rate is None or rate <= 0 for rate in rates):
        return []
    known = [rate for rate in rates if rate is not None]
    return [
        snapshot
        for k, snapshot in enumerate(snapshots)
        if k > 0
        and known[k] >= _JUMP * known[k - 1]
        and (k == len(known) - 1 or min(known[k + 1 :]) * _JUMP <= known[k])
    ]


def high_rate_warning(snapshots: Sequence[Snapshot]) -> str | None:
    """What to say about them, None where there are none."""
    high = at_high_rate(snapshots)
    if not high:
        return None
    names = listing((s.name for s in high), limit=3)
    return (
        f"{len(high)} of {len(snapshots)} snapshots were saved at a high learning rate between ones "
        f"at a low rate ({names}): they are on their way, not at the end of a cycle; leave them out "
        "with --exclude"
    )


def early_span(snapshots: Sequence[Snapshot], ordered_by: str) -> str | None:
    """Advice when the series begins in the first third of the training, None when it does not.

    Numbers in names do not tell: they may count cycles, and not how far the training was.
    """
    if ordered_by == "number":
        return None
    places = [position(s, ordered_by) for s in snapshots]
    known = [place for place in places if place is not None]
    if len(known) < 3 or len(known) < len(places) or known[0] * _EARLY >= known[-1]:
        return None
    late = sum(place * 2 >= known[-1] for place in known)
    if not 2 <= late < len(known):
        return None
    return (
        f"the snapshots begin early ({ordered_by} {known[0]:g} of {known[-1]:g}); early ones are "
        f"seldom in the basin of the last: compare with --last {late}"
    )
