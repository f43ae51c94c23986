"""Owns candidates.csv: one row a candidate, every figure of every split, for a spreadsheet.

Input: the object that comparison.json holds. Values are raw: a share is 0 to 1.
"""

import csv
import io
from collections.abc import Mapping
from typing import Any

from ensemblekit.errors import printable
from ensemblekit.reports.view import Json, View, part, parts
from ensemblekit.reports.wording import interval, number

_FORMULA = tuple("=+-@\t\r\n\uff1d\uff0b\uff0d\uff20")  # the last four are full-width
_LATENCY = ("batch_size", "p50_ms", "p95_ms", "throughput_per_s")
_COST = ("parameters", "bytes", "flops")


def render(comparison: Mapping[str, Any]) -> str:
    """The table as CSV: comma, double quotes, a header, and line feeds at line ends."""
    view = View(comparison)
    figures = [_figures(candidate) for candidate in view.candidates]
    places = dict.fromkeys(place for row in figures for place in row)
    splits = list(dict.fromkeys(split for split, _ in places))
    ordered = sorted(places, key=lambda place: splits.index(place[0]))
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    names = ["_".join(place) for place in ordered]
    writer.writerow(map(_cell, [*_about(view, {}), *names, *_measured({})]))
    for candidate, row in zip(view.candidates, figures, strict=True):
        middle = [row.get(place) for place in ordered]
        cells = [*_about(view, candidate).values(), *middle, *_measured(candidate).values()]
        writer.writerow(map(_cell, cells))
    return out.getvalue()


def _about(view: View, candidate: Json) -> dict[str, Any]:
    plain = ("name", "kind", "members", "combiner", "chosen_on", "seed")
    return {
        **{key: candidate.get(key) for key in plain},
        "batch_norm": part(candidate, "batch_norm").get("policy"),
        "baseline": view.is_baseline(candidate),
        "shipped": view.is_shipped(candidate),
        "pareto": candidate.get("pareto"),
    }


def _figures(candidate: Json) -> dict[tuple[str, str], Any]:
    """By split and figure; `accuracy_ci` becomes `accuracy_low` and `accuracy_high`."""
    cells: dict[tuple[str, str], Any] = {}
    every = parts(candidate.get("evaluations")) or parts([candidate.get("evaluation")])
    for evaluation in every:
        split = str(evaluation.get("split") or "data")
        for name, value in evaluation.items():
            if name.endswith("_ci"):
                for column, end in _ends(name.removesuffix("_ci"), value).items():
                    cells.setdefault((split, column), end)
            elif name != "split" and not isinstance(value, list | tuple | Mapping):
                cells.setdefault((split, name), value)
    return cells


def _measured(candidate: Json) -> dict[str, Any]:
    gain = part(candidate, "gain")
    latency, cost = part(candidate, "latency"), part(candidate, "cost")
    return {
        "gain_metric": gain.get("metric"),
        "gain_vs": gain.get("vs"),
        "gain": gain.get("value"),
        **_ends("gain", gain.get("ci")),
        "p_value": gain.get("p_value"),
        "p_adjusted": gain.get("p_adjusted"),
        **{f"latency_{name}": latency.get(name) for name in _LATENCY},
        **{f"cost_{name}": cost.get(name) for name in _COST},
    }


def _ends(column: str, value: object) -> dict[str, float | None]:
    low, high = interval(value) or (None, None)
    return {f"{column}_low": low, f"{column}_high": high}


def _cell(value: Any) -> Any:
    """A number as it is; a text such that no spreadsheet takes it for a formula."""
    if isinstance(value, bool):
        return str(value).lower()
    if value is None or isinstance(value, int | float):
        return None if number(value) is None else value
    text = printable(str(value))
    return f"'{text}" if text.lstrip(" ").startswith(_FORMULA) else text
