"""Owns the line plots: growth, calibration, the run over time, the path between two snapshots.

Input: a `View`. Each function returns a figure, or None where its data are missing.
"""

from collections.abc import Iterable, Sequence
from itertools import cycle

from ensemblekit.reports.axes import (
    BOTTOM,
    Point,
    Scale,
    across,
    drawing,
    frame,
    key,
    line,
    marker,
    rules,
    upwards,
)
from ensemblekit.reports.markup import Markup, tag
from ensemblekit.reports.view import Json, View, name_of, part, parts
from ensemblekit.reports.wording import number, plain

STYLES = (("circle", "s1"), ("square", "s2"), ("triangle", "s3"), ("diamond", "s4"))


def growth(view: View) -> Markup | None:
    """The metric of ensembles of k members, taken in three orders."""
    orders = {"best": "best first", "first": "from the first", "last": "from the last"}
    found = part(view.raw, "growth")
    for role in ("reporting", "choosing"):
        series = {
            label: [
                (float(members), value)
                for entry in parts(found.get(order))
                if (members := number(entry.get("members"))) is not None
                and (value := view.metric.scaled(part(entry, role).get("metric"))) is not None
            ]
            for order, label in orders.items()
        }
        if any(series.values()):
            return _lines(
                f"{view.metric.name} as the ensemble grows",
                {label: points for label, points in series.items() if points},
                "members",
                f"{view.metric.label} ({view.split(role)})",
            )
    return None


def reliability(view: View) -> Markup | None:
    """Accuracy over confidence; the size of a point is the share of the samples."""
    series, sizes = {}, {}
    for name, bins in part(view.raw, "reliability").items():
        full = [
            (100 * confidence, 100 * accuracy, samples)
            for entry in parts(bins)
            if (samples := number(entry.get("samples")))
            and (confidence := number(entry.get("confidence"))) is not None
            and (accuracy := number(entry.get("accuracy"))) is not None
        ]
        if full:
            label = name_of({"name": name})
            total = sum(samples for _, _, samples in full)
            series[label] = [(confidence, accuracy) for confidence, accuracy, _ in full]
            sizes[label] = [2 + 6 * (samples / total) ** 0.5 for _, _, samples in full]
    if not series:
        return None
    x, y = across((0.0, 100.0), pad=0.02), upwards((0.0, 100.0))
    ideal = line([(x(0), y(0)), (x(100), y(100))], "ideal")
    return _figure(
        "Accuracy over confidence",
        _ends_in_words(series, "accuracy at the highest confidence"),
        [frame(x, y, "confidence, %", "accuracy, %"), ideal, *_series(series, x, y, sizes)],
        series,
        "On the dotted line, confidence is right. Larger points stand for more samples.",
    )


def timeline(view: View) -> Markup | None:
    """The metric of each single snapshot along the run, with the learning rate below it."""
    unit, places = _places(view.snapshots)
    singles = _singles(view)
    points = [
        (place, value, name_of(snapshot))
        for place, snapshot in zip(places, view.snapshots, strict=True)
        if (single := singles.get(str(snapshot.get("path")))) is not None
        and (value := view.metric.scaled(view.value(single))) is not None
    ]
    rates = [
        (place, rate, name_of(snapshot))
        for place, snapshot in zip(places, view.snapshots, strict=True)
        if (rate := number(snapshot.get("lr"))) is not None
    ]
    if len(points) < 2:
        return None
    x = across(places)
    y = upwards([value for _, value, _ in points], bottom=190 if rates else BOTTOM)
    label = f"{view.metric.label} ({view.split('reporting')})"
    body = [frame(x, y, unit, label), *_traced(points, x, y, STYLES[0], view.metric.label)]
    if rates:
        low = upwards([0.0, *(rate for _, rate, _ in rates)], top=240)
        body += [*rules(low, "learning rate", 2), *_traced(rates, x, low, STYLES[2], "lr")]
    best = (max if view.metric.higher_is_better else min)(points, key=lambda p: p[1])
    description = f"{len(points)} snapshots by {unit}; best: {best[2]} at {plain(best[1])}."
    return _figure("Single snapshots along the run", description, body, {}, None)


def path(view: View) -> Markup | None:
    """The metric between two snapshots through their mean, with both kinds of statistics."""
    found = parts(part(view.raw, "diagnosis").get("path"))
    names = {
        "recomputed statistics": "metric_recomputed_bn",
        "averaged statistics": "metric_averaged_bn",
    }
    series = {
        label: sorted(
            (place, value)
            for entry in found
            if (place := number(entry.get("position"))) is not None
            and (value := view.metric.scaled(entry.get(key_))) is not None
        )
        for label, key_ in names.items()
    }
    series = {label: points for label, points in series.items() if points}
    if not series:
        return None
    title = f"{view.metric.name} from one snapshot over the mean to another"
    x_label = "0: a snapshot, 0.5: the mean, 1: another"
    return _lines(title, series, x_label, view.metric.label)


def _places(snapshots: Sequence[Json]) -> tuple[str, list[float]]:
    """Where each snapshot stands: by step, else by epoch, else by its number in the order."""
    for unit in ("step", "epoch"):
        found = [number(snapshot.get(unit)) for snapshot in snapshots]
        places = [place for place in found if place is not None]
        if len(places) == len(found) and len(set(places)) == len(places):
            return unit, places
    return "snapshot", [float(index + 1) for index in range(len(snapshots))]


def _singles(view: View) -> dict[str, Json]:
    """The candidate that is one snapshot alone, by the snapshot's path: as it was trained."""
    found: dict[str, Json] = {}
    for recomputed in (False, True):
        for candidate in view.candidates:
            paths = candidate.get("snapshots") or []
            policy = part(candidate, "batch_norm").get("policy")
            alone = candidate.get("kind") == "single" and len(paths) == 1
            if alone and (policy == "recomputed") == recomputed:
                found.setdefault(str(paths[0]), candidate)
    return found


def _lines(title: str, series: dict[str, list[Point]], x_label: str, y_label: str) -> Markup:
    every = [point for points in series.values() for point in points]
    x, y = across([p[0] for p in every]), upwards([p[1] for p in every])
    body = [frame(x, y, x_label, y_label), *_series(series, x, y, {})]
    return _figure(title, _ends_in_words(series, "last value"), body, series, None)


def _series(
    series: dict[str, list[Point]], x: Scale, y: Scale, sizes: dict[str, list[float]]
) -> Iterable[Markup]:
    for (label, points), (shape, css) in zip(series.items(), cycle(STYLES)):
        yield line([(x(a), y(b)) for a, b in points], css)
        for (a, b), r in zip(points, sizes.get(label, [4.5] * len(points)), strict=True):
            yield marker(shape, (x(a), y(b)), css, f"{label}, {plain(a)}: {plain(b)}", r)


def _traced(
    points: Sequence[tuple[float, float, str]],
    x: Scale,
    y: Scale,
    style: tuple[str, str],
    what: str,
) -> Iterable[Markup]:
    shape, css = style
    yield line([(x(a), y(b)) for a, b, _ in points], css)
    for a, b, name in points:
        yield marker(shape, (x(a), y(b)), css, f"{name}: {what} {plain(b)}")


def _figure(
    title: str, description: str, body: Iterable[Markup], series: Iterable[str], note: str | None
) -> Markup:
    entries = [(*style, label) for label, style in zip(series, cycle(STYLES))]
    caption = [key(entries) if entries else None, tag("p", note) if note else None]
    return tag(
        "figure",
        drawing(title, description, *body),
        tag("figcaption", *caption) if any(caption) else None,
    )


def _ends_in_words(series: dict[str, list[Point]], what: str) -> str:
    ends = [f"{label}: {what} {plain(points[-1][1])}" for label, points in series.items()]
    return f"{'; '.join(ends)}."
