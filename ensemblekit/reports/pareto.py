"""Owns the plot of quality over cost: every candidate, and the few that deserve a name.

Input: a `View`. Cost is the median latency; where no candidate has one, the number of models.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from ensemblekit.reports.axes import Scale, across, drawing, frame, key, line, marker, upwards
from ensemblekit.reports.labels import Label, place
from ensemblekit.reports.markup import Markup, join, tag
from ensemblekit.reports.view import KINDS, Json, View, kind_of, members, name_of, p50_ms
from ensemblekit.reports.wording import milliseconds

SHAPE_OF = dict(zip(KINDS, ("circle", "square", "triangle"), strict=True))

_CROWD = 24  # with more candidates, only those with a name keep their error bar


@dataclass(frozen=True)
class Spot:
    """A candidate in the plot.

    Attributes:
        candidate: From the comparison.
        cost: Its latency, or its number of models.
        value: Its metric, as shown.
        ends: The interval of that, as shown.
        labelled: Whether it is the baseline, what ships, or on the Pareto line.
    """

    candidate: Json
    cost: float
    value: float
    ends: tuple[float, float] | None
    labelled: bool


def plot(view: View) -> Markup | None:
    """The figure, None where nothing can be drawn."""
    timed = any(p50_ms(candidate) is not None for candidate in view.candidates)
    spots = _spots(view, timed=timed)
    if not spots:
        return None
    costs = [spot.cost for spot in spots]
    barred = [s for s in spots if s.ends and (s.labelled or len(spots) <= _CROWD)]
    x = across(costs, log=timed and min(costs) > 0 and max(costs) > 8 * min(costs))
    y = upwards([s.value for s in spots] + [end for s in barred for end in s.ends or ()])
    front = sorted((x(s.cost), y(s.value)) for s in spots if s.candidate.get("pareto") is True)
    x_label = "median latency, ms" if timed else "models that run at inference"
    return tag(
        "figure",
        drawing(
            f"{view.metric.name} over {'latency' if timed else 'number of models'}",
            _description(view, spots, x_label),
            frame(x, y, x_label, f"{view.metric.label} ({view.split('reporting')})"),
            line(front, "pareto"),
            *(_bar(spot, x, y) for spot in barred),
            *(_point(view, spot, x, y) for spot in sorted(spots, key=lambda s: s.labelled)),
            *place(_labels(view, [s for s in spots if s.labelled], x, y), front),
        ),
        _caption(view, spots, timed=timed),
        class_="wide",
    )


def _spots(view: View, *, timed: bool) -> list[Spot]:
    spots = []
    for candidate in view.candidates:
        cost = p50_ms(candidate) if timed else members(candidate)
        value = view.metric.scaled(view.value(candidate))
        if cost is None or value is None:
            continue
        factor = 100 if view.metric.percent else 1
        ends = view.ends(candidate)
        shown = None if ends is None else (factor * ends[0], factor * ends[1])
        special = view.is_shipped(candidate) or view.is_baseline(candidate)
        labelled = special or candidate.get("pareto") is True
        spots.append(Spot(candidate, cost, value, shown, labelled))
    return spots


def _point(view: View, spot: Spot, x: Scale, y: Scale) -> Markup:
    candidate, at = spot.candidate, (x(spot.cost), y(spot.value))
    span = view.metric.span(view.ends(candidate))
    title = f"{name_of(candidate)}: {view.metric.show(view.value(candidate))}" + (
        f" ({span})" if span else ""
    )
    if (latency := p50_ms(candidate)) is not None:
        title += f", {milliseconds(latency)} ms"
    kind = kind_of(candidate)
    faint = "" if spot.labelled else " faint"
    ring = None
    if view.is_shipped(candidate) or view.is_baseline(candidate):
        ring = marker("circle", at, "ring" if view.is_shipped(candidate) else "ring dashed", r=10)
    return join([ring, marker(SHAPE_OF[kind], at, f"{kind}{faint}", title, r=5)])


def _bar(spot: Spot, x: Scale, y: Scale) -> Markup:
    low, high = spot.ends or (spot.value, spot.value)
    at, bottom, top = x(spot.cost), y(low), y(high)
    path = f"M{at:g} {bottom:g}V{top:g}M{at - 4:g} {bottom:g}h8M{at - 4:g} {top:g}h8"
    return tag("path", d=path, class_="bar" if spot.labelled else "bar faint")


def _labels(view: View, spots: Sequence[Spot], x: Scale, y: Scale) -> list[Label]:
    """What ships, the baseline, then the others from the best down."""
    sign = -1 if view.metric.higher_is_better else 1

    def rank(spot: Spot) -> tuple[bool, bool, float]:
        candidate = spot.candidate
        return not view.is_shipped(candidate), not view.is_baseline(candidate), sign * spot.value

    labels = []
    for spot in sorted(spots, key=rank):
        low, high = spot.ends or (spot.value, spot.value)
        at, css = (x(spot.cost), y(spot.value)), "label"
        if view.is_shipped(spot.candidate):
            css = "label strong"
        labels.append(Label(name_of(spot.candidate), at, y(high), y(low), css))
    return labels


def _caption(view: View, spots: Sequence[Spot], *, timed: bool) -> Markup:
    kinds = [kind for kind in KINDS if any(kind_of(c) == kind for c in view.candidates)]
    entries = [(SHAPE_OF[kind], kind, kind) for kind in kinds]
    if view.shipped is not None:
        entries.append(("circle", "ring", "ships"))
    if view.baseline is not None:
        entries.append(("circle", "ring dashed", "baseline"))
    notes = []
    if any(spot.ends for spot in spots):
        notes.append("Bars are 95% intervals.")
    if any(spot.candidate.get("pareto") is True for spot in spots):
        notes.append("The line joins candidates that nothing cheaper beat on the choosing data.")
    if not timed:
        notes.append("Latency was not measured: the number of models stands for the cost.")
    if left_out := len(view.candidates) - len(spots):
        notes.append(f"{left_out} without figures or latency are not shown.")
    return tag("figcaption", key(entries), tag("p", " ".join(notes)))


def _description(view: View, spots: Sequence[Spot], x_label: str) -> str:
    better = max if view.metric.higher_is_better else min
    best = better(spots, key=lambda s: s.value)
    text = f"{len(spots)} candidates by {x_label}. "
    text += f"Best here: {name_of(best.candidate)}, {view.metric.show(view.value(best.candidate))}."
    if view.shipped is not None:
        text += f" Ships: {name_of(view.shipped)}, {view.metric.show(view.value(view.shipped))}."
    return text
