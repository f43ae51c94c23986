"""Owns the parts that plots are made of: scales, ticks, the frame, markers, lines.

Input: numbers in the unit that is shown. Positions are in the units of the drawing's viewBox; colours
are classes, so that the style sheet decides them for light and dark.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ensemblekit.reports.markup import Child, Markup, join, tag

WIDTH, HEIGHT = 560, 340
LEFT, RIGHT, TOP, BOTTOM = 68, 544, 34, 286

Point = tuple[float, float]


@dataclass(frozen=True)
class Scale:
    """A straight or logarithmic map of values to positions.

    >>> Scale(0, 10, start=100, stop=200)(5)
    150.0
    """

    low: float
    high: float
    start: float
    stop: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """The position of a value."""
        low, high = self._units(self.low), self._units(self.high)
        share = (self._units(value) - low) / (high - low)
        return round(self.start + share * (self.stop - self.start), 2)

    def _units(self, value: float) -> float:
        return math.log10(value) if self.log else value

    def ticks(self, count: int = 5) -> list[tuple[float, str]]:
        """Round values within the scale, and their texts; about `count`.

        >>> Scale(0, 1, start=0, stop=1).ticks(5)
        [(0.0, '0.0'), (0.2, '0.2'), (0.4, '0.4'), (0.6, '0.6'), (0.8, '0.8'), (1.0, '1.0')]
        """
        if self.log and self.high / self.low >= 4:
            powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            many = self.high / self.low > 1000
            values = [m * 10.0**p for p in powers for m in ((1,) if many else (1, 2, 5))]
            found = [v for v in values if self.low <= v <= self.high]
            return [(v, f"{v:g}") for v in found[:: 1 + len(found) // (2 * count)]]
        step = _round_step((self.high - self.low) / count)
        digits = max(0, -math.floor(math.log10(step) + 1e-9))
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        values = [round(k * step, digits + 1) for k in range(first, last + 1)]
        text = "{:,.0f}".format if digits == 0 else f"{{:.{digits}f}}".format
        return [(v, f"{v:.3g}" if digits > 4 else text(v)) for v in values]


def _round_step(rough: float) -> float:
    power = 10.0 ** math.floor(math.log10(rough))
    return next(m * power for m in (1.0, 2.0, 5.0, 10.0) if m * power >= rough * (1 - 1e-9))


def spanning(
    values: Iterable[float], start: float, stop: float, *, log: bool = False, pad: float = 0.06
) -> Scale:
    """A scale that holds all values, with some room at both ends."""
    found = list(values)
    low, high = min(found), max(found)
    if log:
        room = (high / low) ** pad if high > low else 1.5
        return Scale(low / room, high * room, start, stop, log=True)
    room = pad * (high - low) or abs(high) * 0.01 or 1.0
    return Scale(low - room, high + room, start, stop)


def across(values: Iterable[float], *, log: bool = False, pad: float = 0.06) -> Scale:
    """The scale of x."""
    return spanning(values, LEFT, RIGHT, log=log, pad=pad)


def upwards(values: Iterable[float], *, top: float = TOP, bottom: float = BOTTOM) -> Scale:
    """The scale of y."""
    return spanning(values, bottom, top)


def frame(x: Scale, y: Scale, x_label: str, y_label: str) -> Markup:
    """Grid lines with their numbers, and what the axes are."""
    return join(
        [*rules(y, y_label), *_columns(x), _text(RIGHT, HEIGHT - 8, x_label, "end", "axis")]
    )


def rules(y: Scale, label: str, count: int = 6) -> list[Markup]:
    """Horizontal grid lines with their numbers; the label stands above them."""
    lines = [
        tag("line", x1=LEFT, x2=RIGHT, y1=y(v), y2=y(v), class_="grid") for v, _ in y.ticks(count)
    ]
    numbers = [_text(LEFT - 8, y(v) + 5, shown, "end") for v, shown in y.ticks(count)]
    return [*lines, *numbers, _text(4, y.stop - 16, label, "start", "axis")]


def _columns(x: Scale) -> list[Markup]:
    base = tag("line", x1=LEFT, x2=RIGHT, y1=BOTTOM, y2=BOTTOM, class_="base")
    return [base, *(_text(x(v), BOTTOM + 22, shown, "middle") for v, shown in x.ticks(6))]


def _text(x: float, y: float, text: str, anchor: str, class_: str | None = None) -> Markup:
    return tag("text", text, x=x, y=y, text_anchor=anchor, class_=class_)


def drawing(
    title: str, description: str, *children: Child, width: float = WIDTH, height: float = HEIGHT
) -> Markup:
    """An SVG that scales with the page; the description is what someone who cannot see it hears."""
    about = tag("title", title), tag("desc", description)
    return tag("svg", *about, *children, viewBox=f"0 0 {width:g} {height:g}", role="img")


# of radius 1 around the origin
SHAPES = {
    "circle": "M-1 0a1 1 0 1 0 2 0a1 1 0 1 0-2 0z",
    "square": "M-.9-.9h1.8v1.8h-1.8z",
    "triangle": "M0-1.2l1.2 2.1h-2.4z",
    "diamond": "M0-1.3l1.3 1.3l-1.3 1.3l-1.3-1.3z",
}


def marker(shape: str, at: Point, class_: str, title: str | None = None, r: float = 4.5) -> Markup:
    """A point; the title is its tooltip."""
    note = None if title is None else tag("title", title)
    place = f"translate({at[0]:g} {at[1]:g}) scale({r:.3g})"
    return tag("path", note, d=SHAPES[shape], transform=place, class_=f"mark {class_}")


def line(points: Sequence[Point], class_: str) -> Markup:
    """A line through points."""
    places = " ".join(f"{x:g},{y:g}" for x, y in points)
    return tag("polyline", points=places, class_=f"line {class_}")


def key(entries: Iterable[tuple[str, str, str]]) -> Markup:
    """A legend: (shape, class, text) of each series; outside of the drawing, so that text wraps."""
    return tag(
        "ul",
        *(
            tag("li", tag("svg", marker(shape, (8, 8), css), viewBox="0 0 16 16"), text)
            for shape, css, text in entries
        ),
        class_="key",
    )
