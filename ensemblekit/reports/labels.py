"""Owns where names stand in a plot: beside their points, over nothing else that matters.

Input: names and points in the units of the drawing.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from ensemblekit.reports.axes import BOTTOM, LEFT, RIGHT, TOP, Point
from ensemblekit.reports.markup import Markup, tag

Box = tuple[float, float, float, float]  # left, top, right, bottom

_LETTER, _LINE = 8.2, 17.0  # in the largest font that the style sheet uses
_LONGEST = 28


@dataclass(frozen=True)
class Label:
    """A name that wants a place.

    Attributes:
        name: What to write.
        at: The point that it names.
        top: The upper end of the point's error bar.
        bottom: The lower end.
        class_: Of the text.
    """

    name: str
    at: Point
    top: float
    bottom: float
    class_: str = "label"


def place(labels: Sequence[Label], line: Sequence[Point]) -> list[Markup]:
    """The names, the first of them first; one that finds no free place is left out.

    Args:
        labels: The important ones first.
        line: A line through the plot, which no name shall cover.
    """
    taken = [box for label in labels for box in _own(label)] + _along(line)
    placed = []
    for label in labels:
        flat = " ".join(label.name.split())
        name = flat if len(flat) <= _LONGEST else f"{flat[: _LONGEST - 1]}…"
        for at, anchor in _places(label):
            box = _box(at, len(name), anchor)
            if _inside(box) and not any(_overlap(box, other) for other in taken):
                taken.append(box)
                x, y = at[0], at[1] + 5
                placed.append(tag("text", name, x=x, y=y, text_anchor=anchor, class_=label.class_))
                break
    return placed


def _places(label: Label) -> Iterable[tuple[Point, str]]:
    """Where a name may stand, the best place first: near the point, then beyond its error bar."""
    (x, y), anchors = label.at, ("start", "end")
    for right, anchor in zip((14, -14), anchors, strict=True):
        yield (x + right, y), anchor
    for down in (-17, 17):
        for right, anchor in zip((12, -12), anchors, strict=True):
            yield (x + right, y + down), anchor
    for beyond in (min(label.top, y - 8) - 11, max(label.bottom, y + 8) + 11):
        for right, anchor in ((0, "middle"), (8, "end"), (-8, "start")):
            yield (x + right, beyond), anchor


def _box(at: Point, letters: int, anchor: str) -> Box:
    width = letters * _LETTER
    left = at[0] - {"start": 0.0, "middle": width / 2, "end": width}[anchor]
    return left, at[1] - _LINE / 2, left + width, at[1] + _LINE / 2


def _own(label: Label) -> list[Box]:
    """The point and its error bar."""
    x, y = label.at
    return [(x - 8, y - 8, x + 8, y + 8), (x - 4, label.top, x + 4, label.bottom)]


def _along(line: Sequence[Point]) -> list[Box]:
    """A line as a row of small boxes."""
    boxes = []
    for (a, b), (c, d) in pairwise(line):
        for step in range(1, 20):
            x, y = a + (c - a) * step / 20, b + (d - b) * step / 20
            boxes.append((x - 4, y - 3, x + 4, y + 3))
    return boxes


def _inside(box: Box) -> bool:
    return box[0] >= LEFT and box[2] <= RIGHT + 12 and box[1] >= TOP - 10 and box[3] <= BOTTOM


def _overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
