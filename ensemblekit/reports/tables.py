"""Owns the tables of report.html: candidates, snapshots, and pairs of a name and a value.

Input: a `View`. Cells carry their raw number for sorting.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from ensemblekit.reports.markup import Child, Markup, tag
from ensemblekit.reports.view import Json, View, kind_of, members, name_of, p50_ms, p_value, part
from ensemblekit.reports.wording import MISSING, milliseconds, nbytes, number, plain, probability


@dataclass(frozen=True)
class Column:
    """A column of numbers.

    Attributes:
        title: Of the column.
        value: A candidate's number, or what is no number where it has none.
        show: That number as a text.
        small: An interval below it.
        descending: Whether larger is better, so that sorting starts there.
    """

    title: str
    value: Callable[[Json], object]
    show: Callable[[object], str] = plain
    small: Callable[[Json], str] = lambda _: ""
    descending: bool = False

    def head(self) -> Markup:
        """The header cell."""
        first = "descending" if self.descending else None
        return tag("th", self.title, scope="col", class_="n", data_first=first)

    def cell(self, candidate: Json) -> Markup:
        """A candidate's cell, with the raw number for sorting."""
        found, below = number(self.value(candidate)), self.small(candidate)
        return tag(
            "td",
            self.show(found),
            tag("small", below) if below else None,
            class_="n",
            data_value=None if found is None else repr(found),
        )


def scrolling(label: str, head: Iterable[Markup], rows: Iterable[Markup], id_: str) -> Markup:
    """A table in a box of its own that scrolls, also by keyboard, when the screen is narrow."""
    made = tag("table", tag("thead", tag("tr", *head)), tag("tbody", *rows), id=id_)
    return tag("div", made, class_="scroll", role="region", aria_label=label, tabindex="0")


def candidates(view: View) -> Markup:
    """All candidates, one a row; the script makes the headers sort."""
    columns = [
        column
        for column in _columns(view)
        if any(number(column.value(candidate)) is not None for candidate in view.candidates)
    ]
    head = [
        *(tag("th", t, scope="col") for t in ("candidate", "kind")),
        *(c.head() for c in columns),
    ]
    rows = []
    for candidate in view.candidates:
        marks = {
            "ships": view.is_shipped(candidate),
            "baseline": view.is_baseline(candidate),
            "over budget": candidate.get("within_budget") is False,
        }
        applying = {name: name.replace(" ", "-") for name, applies in marks.items() if applies}
        badges = [tag("span", name, class_=f"badge {style}") for name, style in applying.items()]
        cells = [
            tag("th", name_of(candidate), *badges, scope="row"),
            tag("td", kind_of(candidate)),
            *(column.cell(candidate) for column in columns),
        ]
        kind, class_ = kind_of(candidate), " ".join(applying.values()) or None
        rows.append(tag("tr", *cells, class_=class_, data_kind=kind))
    return scrolling("Candidates", head, rows, "candidates-table")


def _columns(view: View) -> Iterable[Column]:
    metric = view.metric
    up = metric.higher_is_better
    title = f"{metric.name} ({view.split('reporting')})"
    yield Column(title, view.value, metric.show, lambda c: metric.span(view.ends(c)), up)
    ends = _at("gain", "ci")
    yield Column("gain", _at("gain", "value"), metric.gain, lambda c: metric.span(ends(c)), True)
    yield Column("p50 ms", p50_ms, milliseconds)
    yield Column("models", members)
    yield Column("p (Holm)", p_value, probability)
    if view.split("choosing") != view.split("reporting"):
        title = f"{metric.name} ({view.split('choosing')})"
        yield Column(title, lambda c: view.value(c, "choosing"), metric.show, descending=up)
    for other in view.secondary:
        figure = _figure(view, other.name)
        yield Column(other.name, figure, other.show, descending=other.higher_is_better)
    yield Column("samples/s", _at("latency", "throughput_per_s"), descending=True)
    yield Column("parameters", _at("cost", "parameters"))
    yield Column("size", _at("cost", "bytes"), nbytes)


def _at(key: str, name: str) -> Callable[[Json], object]:
    return lambda candidate: part(candidate, key).get(name)


def _figure(view: View, name: str) -> Callable[[Json], object]:
    return lambda candidate: view.figures(candidate).get(name)


def snapshots(view: View) -> Markup:
    """Where the snapshots come from."""
    titles = ("#", "snapshot", "step", "epoch", "lr", "cosine", "path", "sha256")
    rows = [
        tag(
            "tr",
            tag("td", str(index), class_="n"),
            tag("th", name_of(snapshot), scope="row"),
            *(tag("td", plain(snapshot.get(k)), class_="n") for k in ("step", "epoch", "lr")),
            tag("td", plain(snapshot.get("cosine"), 6), class_="n"),
            *(tag("td", tag("code", str(snapshot.get(k) or MISSING))) for k in ("path", "sha256")),
        )
        for index, snapshot in enumerate(view.snapshots, start=1)
    ]
    numbers = {"#", "step", "epoch", "lr", "cosine"}
    head = [tag("th", t, scope="col", class_="n" if t in numbers else None) for t in titles]
    return scrolling("Snapshots", head, rows, "snapshots-table")


def pairs(entries: Iterable[tuple[str, Child]]) -> Markup:
    """Names and values; entries without a value are left out."""
    kept = [(name, value) for name, value in entries if value]
    return tag("dl", *(tag("div", tag("dt", name), tag("dd", value)) for name, value in kept))


def bullets(lines: Iterable[str]) -> Markup:
    """A list of texts."""
    return tag("ul", *(tag("li", line) for line in lines))
