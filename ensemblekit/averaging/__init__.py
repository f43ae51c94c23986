"""Owns the averaging rules: functions from snapshots to a row; the registry is all there is.

Input: a `SnapshotSet`. A rule is `rule(snapshots, *, objective=None, **options) -> Row`; its
keyword options become flags of the command line.
"""

from collections.abc import Callable
from importlib import import_module

from ensemblekit.errors import one_of

RULES: dict[str, str] = {
    "uniform": "ensemblekit.averaging.uniform:uniform",
    "weighted": "ensemblekit.averaging.weighted:weighted",
}


def rule(name: str) -> Callable:  # type: ignore[type-arg]  # options differ from rule to rule
    """The averaging rule of that name.

    Raises:
        UsageError: There is none.
    """
    module, _, attribute = RULES[one_of(name, RULES, what="method")].partition(":")
    found: Callable = getattr(import_module(module), attribute)  # type: ignore[type-arg]
    return found
