"""Owns the reports for people: functions from a comparison to a text; the registry is all there is.

Input: the object that comparison.json holds (docs/comparison.md). A report is
`render(comparison) -> str`; the names in the registry are those of the files.
"""

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

from ensemblekit.errors import one_of

REPORTS: dict[str, str] = {
    "report.html": "ensemblekit.reports.html:render",
    "report.md": "ensemblekit.reports.markdown:render",
    "candidates.csv": "ensemblekit.reports.csv:render",
}


def render(name: str, comparison: Mapping[str, Any]) -> str:
    """The text of the report that goes into a file of that name, to be written as UTF-8.

    Raises:
        UsageError: There is no such report.
    """
    module, _, attribute = REPORTS[one_of(name, REPORTS, what="report")].partition(":")
    function: Callable[[Mapping[str, Any]], str] = getattr(import_module(module), attribute)
    return function(comparison)
