"""Owns the averaging rules: functions from snapshots to a row; the registry is all there is.

Input: a `SnapshotSet`. A rule is `rule(snapshots, *, objective=None, **options) -> Row`; its
keyword options become flags of the command line.
"""

from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING, Protocol

from ensemblekit.errors import one_of

if TYPE_CHECKING:  # `average --help` reads the registry, and needs no numpy for that
    import numpy as np
    import numpy.typing as npt

    from ensemblekit.candidates import Row


class Objective(Protocol):
    """What a rule that looks at data asks of a row."""

    def value(self, row: "Row") -> float:
        """The figure of the average on choosing data, turned so that higher is better."""

    def gradient(self, row: "Row") -> "tuple[float, npt.NDArray[np.float64]]":
        """The mean loss of the average there, and its derivative by each of K coefficients."""


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
