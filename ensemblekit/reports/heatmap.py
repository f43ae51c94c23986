"""Owns the plot of agreement: how often two snapshots decide alike, as a matrix.

Input: a `View`. Shades are classes `h0` to `h7`, and `h8` for the diagonal, which says nothing.
"""

from collections.abc import Iterable, Sequence

from ensemblekit.reports.axes import drawing
from ensemblekit.reports.markup import Markup, tag
from ensemblekit.reports.view import View, name_of, part
from ensemblekit.reports.wording import number

_EDGE, _TOP, _SIDE = 40, 8, 512  # room for the numbers of the snapshots, and the matrix itself
_NUMBERS_FIT = 12
_TICKS = 20


def plot(view: View) -> Markup | None:
    """The figure, None where there is nothing to compare."""
    found = part(view.raw, "agreement")
    names = [name_of({"name": name}) for name in found.get("names") or []]
    shares = _shares(found.get("matrix"), len(names))
    apart = [share for i, j, share in shares if i != j]
    if not apart:
        return None
    low, high = min(apart), max(apart)
    cell = _SIDE / len(names)
    body: list[Markup] = []
    for i, j, share in shares:
        level = 8 if i == j else round(7 * (share - low) / (high - low or 1))
        title = f"{names[i]} and {names[j]}: {100 * share:.2f}%"
        body.append(_cell(_EDGE + j * cell, _TOP + i * cell, cell, level, title))
        if len(names) <= _NUMBERS_FIT and i != j:
            x, y = _EDGE + (j + 0.5) * cell, _TOP + (i + 0.5) * cell + 5
            body.append(tag("text", f"{100 * share:.1f}", x=x, y=y, text_anchor="middle"))
    note = (
        "Percent of samples on which two snapshots decide alike: "
        f"{100 * low:.1f} to {100 * high:.1f}. Rows and columns are in the order of the run."
    )
    size = {"width": _EDGE + _SIDE + 8, "height": _TOP + _SIDE + 30}
    image = drawing("Agreement of snapshots", note, *body, *_ticks(len(names), cell), **size)
    return tag("figure", image, tag("figcaption", tag("p", note)))


def _shares(matrix: object, count: int) -> list[tuple[int, int, float]]:
    rows: Sequence[object] = matrix if isinstance(matrix, list | tuple) else []
    return [
        (i, j, share)
        for i, row in enumerate(rows[:count])
        if isinstance(row, list | tuple)
        for j, value in enumerate(row[:count])
        if (share := number(value)) is not None
    ]


def _cell(x: float, y: float, cell: float, level: int, title: str) -> Markup:
    side = max(cell - 1, 0.5)
    note = tag("title", title)
    return tag("rect", note, x=x, y=y, width=side, height=side, class_=f"h{level}")


def _ticks(count: int, cell: float) -> Iterable[Markup]:
    """Numbers of the snapshots along two sides, as many as fit."""
    for index in range(0, count, 1 + (count - 1) // _TICKS):
        middle, shown = (index + 0.5) * cell, str(index + 1)
        yield tag("text", shown, x=_EDGE - 8, y=_TOP + middle + 5, text_anchor="end")
        yield tag("text", shown, x=_EDGE + middle, y=_TOP + _SIDE + 20, text_anchor="middle")
