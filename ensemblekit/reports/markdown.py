"""Owns report.md: the decision and the essential columns, for a pull request or a ticket.

Input: the object that comparison.json holds.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ensemblekit.errors import printable
from ensemblekit.reports.decision import facts, headline
from ensemblekit.reports.view import (
    Json,
    View,
    kind_of,
    members,
    name_of,
    p50_ms,
    p_value,
    part,
    parts,
)
from ensemblekit.reports.wording import (
    MISSING,
    command,
    counted,
    milliseconds,
    nbytes,
    plain,
    probability,
    texts,
    words,
)

# a colon would make a link of an address
_SPECIAL = re.compile(r"([\\`*_{}\[\]<>#|~!&$]|:(?=//))")
_STARTS_LIST = re.compile(r"^(\d{0,9})(?=[-+=]|[.)]\s)")


def render(comparison: Mapping[str, Any]) -> str:
    """The report as GitHub's Markdown."""
    view = View(comparison)
    sections = (_decision, _candidates, _diagnosis, _warnings, _notes)
    blocks = [block for section in sections for block in section(view)]
    return "\n\n".join(blocks) + "\n"


def _decision(view: View) -> Iterable[str]:
    yield f"# {escaped(headline(view))}"
    yield "\n".join(
        f"- **{escaped(name)}**: {escaped(value)}" for name, value in facts(view) if value
    )
    yield from _reasons(view.decision)


def _diagnosis(view: View) -> Iterable[str]:
    if found := part(view.raw, "diagnosis"):
        yield "## Why averaging failed"
        yield from map(_line, texts(found.get("verdict")))
        yield from _reasons(found)


def _reasons(found: Json) -> Iterable[str]:
    if because := texts(found.get("because")):
        yield _bullets(because)
    if following := command(found.get("next")):
        yield _fenced(following)


def _candidates(view: View) -> Iterable[str]:
    if not view.candidates:
        return
    metric, split = view.metric, view.split("reporting")
    yield "## Candidates"
    numbers = [escaped(f"{metric.name} ({split})"), "gain", "p50 ms", "models", "p (Holm)"]
    numbers += [other.name for other in view.secondary[:2]] + ["size"]
    rule = ["---", "---", *("--:" for _ in numbers), "---"]
    rows = [_cells(view, candidate) for candidate in view.candidates]
    yield "\n".join(_row(row) for row in [["candidate", "kind", *numbers, ""], rule, *rows])


def _cells(view: View, candidate: Json) -> list[str]:
    gain, figures = part(candidate, "gain"), view.figures(candidate)
    span = view.metric.span(gain.get("ci"))
    marks = {
        "**ships**": view.is_shipped(candidate),
        "baseline": view.is_baseline(candidate),
        "pareto": candidate.get("pareto"),
        "over budget": candidate.get("within_budget") is False,
    }
    return [
        escaped(name_of(candidate)),
        kind_of(candidate),
        view.metric.show(view.value(candidate)),
        view.metric.gain(gain.get("value")) + (f" ({span})" if span else ""),
        milliseconds(p50_ms(candidate)),
        plain(members(candidate)),
        probability(p_value(candidate)).replace("<", "&lt;"),
        *(metric.show(figures.get(metric.name)) for metric in view.secondary[:2]),
        nbytes(part(candidate, "cost").get("bytes")),
        ", ".join(word for word, applies in marks.items() if applies),
    ]


def _warnings(view: View) -> Iterable[str]:
    if found := texts(view.raw.get("warnings") or []):
        yield "## Warnings"
        yield _bullets(found)


def _notes(view: View) -> Iterable[str]:
    yield "## Data and environment"
    data = part(view.raw, "data")
    lines = []
    for role in ("choosing", "reporting", "train"):
        about = part(data, role)
        if about:
            split = texts(about.get("split"))
            lines.append(f"{role}: {' '.join([*split, plain(about.get('samples'))])} samples")
    lines += texts([data.get("note")])
    lines.append(counted(len(view.snapshots), "snapshot"))
    if skipped := parts(view.raw.get("skipped")):
        lines.append(f"left out: {counted(len(skipped), 'file')}")
    lines += [f"{key}: {words(value)}" for key, value in part(view.raw, "environment").items()]
    yield _bullets(lines)
    if following := command(view.raw.get("command")):
        yield _fenced(following)


def escaped(text: object) -> str:
    r"""A text that Markdown shows as it is, on one line and in one cell of a table.

    >>> escaped("a|b `c`\nd")
    'a\\|b \\`c\\` d'
    """
    flat = " ".join(printable(str(text)).split())
    return _SPECIAL.sub(r"\\\1", flat) or MISSING


def _bullets(lines: Sequence[str]) -> str:
    return "\n".join(f"- {_line(line)}" for line in lines)


def _line(text: str) -> str:
    """A text at the start of a line, where a number or a dash would make it a list."""
    return _STARTS_LIST.sub(r"\1\\", escaped(text))


def _fenced(text: str) -> str:
    """A block of code, in a fence longer than any that it contains."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}sh\n{text}\n{fence}"


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"
