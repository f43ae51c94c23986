"""Owns the averaging rules: functions from snapshots to a row; the registry is all there is.

Input: a `SnapshotSet`. A rule is `rule(snapshots, *, objective=None, **options) -> Row`; its
keyword options become flags of the command line, with the help that stands in their annotation:
`decay: Annotated[float | None, "what it means"] = None`.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol, get_args

from ensemblekit.errors import UsageError, one_of

if TYPE_CHECKING:  # `average --help` reads the rules, and needs no numpy for that
    import numpy as np
    import numpy.typing as npt

    from ensemblekit.candidates import Row


class Objective(Protocol):
    """What a rule that looks at data asks of a row."""

    def value(self, row: "Row") -> float:
        """The figure of the average on choosing data, turned so that higher is better."""


class SmoothObjective(Objective, Protocol):
    """What a rule that follows a slope asks beside that."""

    def gradient(self, row: "Row") -> "tuple[float, npt.NDArray[np.float64]]":
        """The mean loss of the average there, and its derivative by each of K coefficients."""


RULES: dict[str, str] = {
    "uniform": "ensemblekit.averaging.uniform:uniform",
    "weighted": "ensemblekit.averaging.weighted:weighted",
    "ema": "ensemblekit.averaging.ema:ema",
    "lawa": "ensemblekit.averaging.lawa:lawa",
    "wsm-linear": "ensemblekit.averaging.wsm:wsm_linear",
    "wsm-1-sqrt": "ensemblekit.averaging.wsm:wsm_1_sqrt",
    "posthoc-ema": "ensemblekit.averaging.posthoc_ema:posthoc_ema",
    "greedy-soup": "ensemblekit.averaging.greedy_soup:greedy_soup",
}

ORDERLESS = ("uniform", "greedy-soup")  # which snapshot came first is nothing to them

CHOSEN_ON_DATA = ("greedy-soup",)  # labels took part in their rows


@dataclass(frozen=True)
class Option:
    """A keyword of rules, as a flag.

    Attributes:
        name: The keyword.
        kind: `int`, `float` or, for several numbers, `tuple`.
        help: What it means.
        rules: The rules that have it.
    """

    name: str
    kind: type
    help: str
    rules: tuple[str, ...]

    @property
    def flag(self) -> str:
        """As typed."""
        return "--" + self.name.replace("_", "-")


def rule(name: str) -> Callable:  # type: ignore[type-arg]  # options differ from rule to rule
    """The averaging rule of that name.

    Raises:
        UsageError: There is none.
    """
    module, _, attribute = RULES[one_of(name, RULES, what="method")].partition(":")
    found: Callable = getattr(import_module(module), attribute)  # type: ignore[type-arg]
    return found


def options() -> dict[str, Option]:
    """Every option of every rule, by keyword."""
    found: dict[str, Option] = {}
    for name in RULES:
        for keyword, parameter in inspect.signature(rule(name)).parameters.items():
            notes = getattr(parameter.annotation, "__metadata__", ())
            if not notes:  # the snapshots, the objective
                continue
            kinds = [k for k in get_args(parameter.annotation.__origin__) if k is not type(None)]
            kind = kinds[0] if kinds and kinds[0] in (int, float) else tuple
            rules = (*found[keyword].rules, name) if keyword in found else (name,)
            found[keyword] = Option(keyword, kind, notes[0], rules)
    return found


def method_for(method: str | None, given: dict[str, Any]) -> str:
    """The rule that was asked for: by name, or by an option that only it has.

    Raises:
        UsageError: An option that the rule does not have.
    """
    known = options()
    for keyword in given:
        option = known[keyword]
        if method is None:
            method = option.rules[0]
        if method not in option.rules:
            raise UsageError(
                f"{option.flag} is no option of method '{method}'",
                hint=f"it is for --method {' or '.join(option.rules)}",
            )
    return method or "uniform"
