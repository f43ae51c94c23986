"""Owns the page of `bench`: what is fastest, latency over batch size and members, every row.

Input: the object that `bench --json` prints. A row without a time did not run, and a row whose
outputs differ from the plain loop's is told, but never drawn as the fastest.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

from ensemblekit.reports.axes import (
    BOTTOM,
    LEFT,
    RIGHT,
    SHAPES,
    TOP,
    Scale,
    drawing,
    frame,
    key,
    line,
    marker,
    spanning,
)
from ensemblekit.reports.html import Section, document
from ensemblekit.reports.markup import Markup, join, tag
from ensemblekit.reports.tables import Column, bullets, pairs, scrolling
from ensemblekit.reports.view import Json, part, parts
from ensemblekit.reports.wording import MISSING, counted, nbytes, number, plain, texts, words

_COLOURS = ("s1", "s2", "s3", "s4")
# colour and shape change together first, so that neither alone tells the first lines apart
_STYLES = [(list(SHAPES)[(k + turn) % 4], _COLOURS[k]) for turn, k in product(range(4), range(4))]
_LETTER = 9.0  # of a number below an axis, in the units of the drawing
_AS_USUAL = (None, "loop", "graph")  # executions that go without saying

Series = dict[str, dict[int, Json]]


@dataclass(frozen=True)
class _Counts(Scale):
    """A scale of whole numbers: its ticks are those that were measured, as far as they fit."""

    counts: tuple[int, ...] = ()

    def ticks(self, count: int = 5) -> list[tuple[float, str]]:
        """The numbers and their texts."""
        found: list[tuple[float, str]] = []
        end = float("-inf")
        for value in self.counts:
            half = _LETTER * len(f"{value:,}") / 2
            if self(value) - half > end:
                found.append((float(value), f"{value:,}"))
                end = self(value) + half + _LETTER
        return found


def page(result: Mapping[str, Any]) -> str:
    """The page, as HTML that needs nothing else.

    Args:
        result: What `bench --json` prints; every part of it may be absent or None.
    """
    rows = parts(result.get("measurements"))
    return document(_headline(rows), _subject(rows), _summary(result), _sections(result, rows))


def _sections(result: Mapping[str, Any], rows: list[Json]) -> Iterable[Section]:
    over = _by_candidate(rows)
    title = "Latency over batch size"
    yield "batches", title, _plot(title, over, "batch size", _FASTEST, log=True)
    sizes, what = _by_members(rows)
    title = "Latency over members"
    note = f"{_FASTEST} Members run at every inference; an average is one."
    yield "members", title, _plot(title, sizes, "members", note, log=False) if what else None
    yield "measurements", "Measurements", _table(rows) if rows else None
    warnings = texts(result.get("warnings") or [])
    yield "warnings", "Warnings", bullets(warnings) if warnings else None
    facts = part(result, "environment").items()
    known = [(str(name), words(value)) for name, value in facts if value is not None]
    yield "environment", "Environment", pairs(known) if known else None


_FASTEST = "Each point is the fastest runtime whose outputs agree with the plain loop's."


# ----------------------------------------------------------------------------------- in words


def _headline(rows: list[Json]) -> str:
    good = [row for row in rows if _is_good(row)]
    if not good:
        timed = any(_p50_ms(row) is not None for row in rows)
        return "No outputs agree with the plain loop's" if timed else "Nothing could be measured"
    size = min(_count(row, "batch_size") or 0 for row in good)
    best = min((row for row in good if _count(row, "batch_size") == size), key=_time)
    shown = f"{_name(best)} on {_how(best)}, {_ms(_p50_ms(best))} ms"
    return f"Fastest at batch size {size:,}: {shown}"


def _subject(rows: list[Json]) -> str:
    def different(name: str) -> list[str]:
        return list(dict.fromkeys(str(row[name]) for row in rows if row.get(name) is not None))

    sizes = sorted({size for row in rows if (size := _count(row, "batch_size")) is not None})
    return ", ".join(
        [
            counted(len(different("candidate")), "candidate"),
            counted(len(different("runtime")), "runtime"),
            _sizes(sizes),
            *different("device"),
        ]
    )


def _sizes(sizes: list[int]) -> str:
    shown = ", ".join(f"{size:,}" for size in sizes)
    return f"batch size{'s' if len(sizes) > 1 else ''} {shown or MISSING}"


def _summary(result: Mapping[str, Any]) -> Markup:
    entries = [_entry(text) for text in texts(result.get("summary") or [])]
    within = [_within(target) for target in parts(result.get("within_latency"))]
    return tag(
        "section",
        tag("h2", "Summary"),
        tag("ul", *entries) if entries else None,
        bullets(within) if within else None,
        tag("p", "There are no two candidates to compare.") if not entries and not within else None,
        id="summary",
    )


def _entry(text: str) -> Markup:
    """A line, and what is indented below it as a list of its own."""
    first, *more = text.replace("+-", "±").splitlines() or [""]
    return tag("li", first, bullets(part.strip() for part in more) if more else None)


def _within(target: Json) -> str:
    found = number(target.get("throughput_per_s"))
    said = "no row keeps it"
    if found is not None:
        at = f"batch size {plain(target.get('batch_size'))} on {target.get('runtime') or MISSING}"
        said = f"{plain(found)} samples/s at {at}"
    name = target.get("candidate") or MISSING
    return f"{name} within {plain(target.get('max_latency_ms'))} ms: {said}"


# ----------------------------------------------------------------------------------- one row


def _name(row: Json) -> str:
    return str(row.get("candidate") or "unnamed")


def _how(row: Json) -> str:
    """Runtime, the way its members run where that says something, provider, precision."""
    found = [str(row.get("runtime") or MISSING)]
    execution, provider = row.get("execution"), row.get("provider")
    if execution not in _AS_USUAL and row.get("runtime") != f"torch-{execution}":
        found.append(str(execution))
    if provider and provider not in str(row.get("device")):
        found.append(str(provider))
    return ", ".join([*found, *texts(row.get("precision"))])


def _count(row: Json, name: str) -> int | None:
    found = number(row.get(name))
    return None if found is None or found < 1 else int(found)


def _p50_ms(row: Json) -> float | None:
    found = number(row.get("p50_ms"))
    return found if found is not None and found > 0 else None


def _time(row: Json) -> float:
    return _p50_ms(row) or float("inf")


def _is_good(row: Json) -> bool:
    """Whether it was timed, and says what the plain loop says."""
    timed = _p50_ms(row) is not None and _count(row, "batch_size") is not None
    return timed and row.get("agrees") is not False and row.get("error") is None


def _ms(value: object) -> str:
    """Three digits, whatever the magnitude: small networks take microseconds.

    >>> _ms(0.01234), _ms(12.345), _ms(1234.5)
    ('0.0123', '12.3', '1,234')
    """
    found = number(value)
    if found is None:
        return MISSING
    return f"{found:.3g}" if found < 100 else f"{found:,.0f}"


# ------------------------------------------------------------------------------------- plots


def _fastest(rows: Iterable[Json], series: Callable[[Json], str], place: str) -> Series:
    """Of each series and place on the axis, the fastest row that agrees."""
    found: Series = {}
    for row in rows:
        at = _count(row, place)
        if at is None or not _is_good(row):
            continue
        points = found.setdefault(series(row), {})
        if at not in points or _time(row) < _time(points[at]):
            points[at] = row
    return {name: dict(sorted(points.items())) for name, points in found.items()}


def _by_candidate(rows: list[Json]) -> Series:
    return _fastest(rows, _name, "batch_size")


def _by_members(rows: list[Json]) -> tuple[Series, bool]:
    """By batch size, of one batch size by runtime; whether there are sizes to compare."""
    good = [row for row in rows if _is_good(row)]
    sizes = sorted({size for row in good if (size := _count(row, "batch_size"))})
    members = {count for row in good if (count := _count(row, "members"))}
    if len(sizes) > 1:
        good.sort(key=lambda row: _count(row, "batch_size") or 0)
        series = _fastest(good, lambda row: f"batch size {_count(row, 'batch_size'):,}", "members")
    else:
        series = _fastest(good, _how, "members")
    return series, len(members) > 1


def _plot(title: str, series: Series, x_label: str, note: str, *, log: bool) -> Markup | None:
    counts = sorted({at for points in series.values() for at in points})
    if not counts:
        return None
    times = [_time(row) for points in series.values() for row in points.values()]
    span = spanning(counts, LEFT, RIGHT, log=log)
    x = _Counts(span.low, span.high, span.start, span.stop, span.log, tuple(counts))
    y = spanning(times, BOTTOM, TOP, log=True)
    styles = {name: _STYLES[k % len(_STYLES)] for k, name in enumerate(series)}
    body = [frame(x, y, x_label, "median latency, ms")]
    for name, points in series.items():
        shape, css = styles[name]
        body.append(line([(x(at), y(_time(row))) for at, row in points.items()], css))
        body += [
            marker(shape, (x(at), y(_time(row))), css, _told(row)) for at, row in points.items()
        ]
    entries = [(shape, css, name) for name, (shape, css) in styles.items()]
    description = f"{'; '.join(_ends(name, points) for name, points in series.items())}."
    return tag(
        "figure",
        drawing(title, description, *body),
        tag("figcaption", key(entries), tag("p", note)),
    )


def _told(row: Json) -> str:
    size = _count(row, "batch_size") or 0
    return f"{_name(row)}, batch size {size:,}: {_ms(_p50_ms(row))} ms ({_how(row)})"


def _ends(name: str, points: Mapping[int, Json]) -> str:
    first, last = next(iter(points)), list(points)[-1]
    start = f"{name}: {_ms(_time(points[first]))} ms at {first:,}"
    return start if first == last else f"{start}, {_ms(_time(points[last]))} ms at {last:,}"


# ------------------------------------------------------------------------------------- table


def _columns(rows: list[Json]) -> list[Column]:
    """The figures that any row has."""
    every = [
        Column("batch", lambda row: row.get("batch_size")),
        Column("members", lambda row: row.get("members")),
        Column("p50 ms", lambda row: row.get("p50_ms"), _ms, _error),
        Column("p95 ms", lambda row: row.get("p95_ms"), _ms),
        Column("p99 ms", lambda row: row.get("p99_ms"), _ms),
        Column("mean ms", lambda row: row.get("mean_ms"), _ms),
        Column("samples/s", lambda row: row.get("throughput_per_s"), descending=True),
        Column("peak memory", lambda row: row.get("peak_memory_bytes"), nbytes),
        Column("difference", lambda row: row.get("max_rel_diff"), _difference),
        Column("runs", lambda row: row.get("iterations")),
    ]
    return [c for c in every if any(number(c.value(row)) is not None for row in rows)]


def _error(row: Json) -> str:
    found = number(row.get("median_error"))
    return "" if found is None else f"± {found:.1%}"


def _difference(value: object) -> str:
    found = number(value)
    return MISSING if found is None else "0" if found == 0 else f"{found:.1e}"


def _table(rows: list[Json]) -> Markup:
    columns = _columns(rows)
    head = [tag("th", title, scope="col") for title in ("candidate", "runtime")]
    head += [column.head() for column in columns]
    note = (
        "p50, p95 and p99 are percentiles over the runs; below p50 stands the standard error of "
        "the median. The difference is the largest one from the plain loop in float32, over its "
        "largest output."
    )
    made = [_row(row, columns) for row in rows]
    return join([scrolling("Measurements", head, made, "measurements-table"), tag("p", note)])


def _row(row: Json, columns: list[Column]) -> Markup:
    mark, said = None, ""
    if row.get("error") is not None or _p50_ms(row) is None:
        mark, said = "failed", str(row.get("error") or "not measured")
    elif row.get("agrees") is False:
        difference = _difference(row.get("max_rel_diff"))
        mark = "other outputs"
        said = f"outputs differ from the plain loop's by {difference} of the largest"
        if difference == MISSING:
            said = "outputs differ from the plain loop's, or are no numbers"
    return tag(
        "tr",
        tag("th", _name(row), tag("span", mark, class_="badge") if mark else None, scope="row"),
        tag("td", _how(row), tag("small", said, class_="note") if mark else None),
        *(column.cell(row) for column in columns),
        class_=None if mark is None else mark.partition(" ")[0],
    )
