"""Owns report.html: one page that needs nothing else, with the decision on top; and its frame.

Input: the object that comparison.json holds. Style and script stand beside this file and are put
into the page; the page's policy lets nothing else load or run.
"""

import base64
import hashlib
from collections.abc import Iterable, Mapping
from importlib.resources import files
from typing import Any

from ensemblekit.reports import heatmap, pareto, plots
from ensemblekit.reports.decision import facts, headline
from ensemblekit.reports.markup import Markup, join, tag
from ensemblekit.reports.tables import bullets, candidates, pairs, snapshots
from ensemblekit.reports.view import View, part, parts
from ensemblekit.reports.wording import command, counted, number, plain, texts, words

Section = tuple[str, str, Markup | None]

# two in a row where there is room
_HALVES = {"growth", "reliability", "agreement", "timeline", "batches", "members"}


def render(comparison: Mapping[str, Any]) -> str:
    """The page."""
    view = View(comparison)
    return document(headline(view), _subject(view), _decision(view), _sections(view))


def document(title: str, subject: str, lead: Markup, sections: Iterable[Section]) -> str:
    """A page of ours.

    Args:
        title: Its headline.
        subject: A line above it: what the page is about.
        lead: The section that everyone reads.
        sections: (id, title, body) of the others; those without a body are left out.
    """
    style, script = _asset("report.css"), _asset("report.js")
    found = [(id_, name, body) for id_, name, body in sections if body]
    page = tag(
        "html",
        tag(
            "head",
            tag("meta", charset="utf-8"),
            tag("meta", http_equiv="Content-Security-Policy", content=_policy(style, script)),
            tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
            tag("meta", name="color-scheme", content="light dark"),
            tag("title", f"{title} (ensemblekit)"),
            tag("style", style),
        ),
        tag(
            "body",
            tag("a", "Skip to the content", href="#main", class_="skip"),
            tag("header", tag("p", subject), tag("h1", title)),
            tag(
                "main",
                lead,
                _contents(found),
                *(_section(*entry) for entry in found),
                id="main",
                tabindex="-1",
            ),
            tag("script", script),
        ),
        lang="en",
    )
    return f"<!doctype html>\n{page}\n"


def _sections(view: View) -> Iterable[Section]:
    yield "pareto", "Quality and cost", pareto.plot(view)
    yield "candidates", "Candidates", candidates(view) if view.candidates else None
    yield "growth", "As the ensemble grows", plots.growth(view)
    yield "reliability", "Reliability", plots.reliability(view)
    yield "agreement", "Agreement of members", heatmap.plot(view)
    yield "timeline", "Along the run", plots.timeline(view)
    yield "diagnosis", "Why averaging failed", _diagnosis(view)
    warnings = texts(view.raw.get("warnings") or [])
    yield "warnings", "Warnings", bullets(warnings) if warnings else None
    yield "provenance", "Provenance", _provenance(view)


def _section(id_: str, title: str, body: Markup) -> Markup:
    return tag("section", tag("h2", title), body, id=id_, class_="half" if id_ in _HALVES else None)


def _contents(found: Iterable[tuple[str, str, Markup]]) -> Markup:
    links = [tag("a", title, href=f"#{id_}") for id_, title, _ in found]
    return tag("nav", *links, aria_label="Sections")


def _subject(view: View) -> str:
    samples = number(part(view.raw, "data", "reporting").get("samples"))
    on = f"{view.metric.name} on {view.split('reporting')}"
    return ", ".join(
        [
            counted(len(view.snapshots), "snapshot"),
            counted(len(view.candidates), "candidate"),
            on + (f" ({samples:,.0f} samples)" if samples is not None else ""),
        ]
    )


def _decision(view: View) -> Markup:
    decision = view.decision
    because = texts(decision.get("because") or [])
    return tag(
        "section",
        tag("h2", "Decision"),
        pairs(facts(view)),
        bullets(because) if because else None,
        _next(decision.get("next")),
        id="decision",
    )


def _next(value: object) -> Markup | None:
    text = command(value)
    if text is None:
        return None
    shown = tag("pre", tag("code", text), tabindex="0", role="region", aria_label="Command")
    return tag("div", shown, class_="copy")


def _diagnosis(view: View) -> Markup | None:
    found = part(view.raw, "diagnosis")
    if not found:
        return None
    verdict, reasons = texts(found.get("verdict")), texts(found.get("because"))
    return join(
        [
            tag("p", tag("strong", *verdict)) if verdict else None,
            bullets(reasons) if reasons else None,
            plots.path(view),
            _next(found.get("next")),
        ]
    )


def _provenance(view: View) -> Markup:
    data, entries = part(view.raw, "data"), []
    for role in ("choosing", "reporting", "train"):
        about = part(data, role)
        samples = [f"{plain(about['samples'])} samples"] if "samples" in about else []
        title = f"Data for {'training' if role == 'train' else role}"
        entries.append((title, ", ".join(texts(about.get("split")) + samples)))
    entries.append(("Note on data", "".join(texts(data.get("note")))))
    for title, key in (("Passes", "passes"), ("Environment", "environment")):
        found = part(view.raw, key).items()
        entries.append((title, "; ".join(f"{k} {words(v)}" for k, v in found if v is not None)))
    skipped = [f"{s.get('path')}: {s.get('reason')}" for s in parts(view.raw.get("skipped"))]
    left_out = tag("summary", f"Left out: {counted(len(skipped), 'file')}")
    return join(
        [
            pairs(entries),
            snapshots(view) if view.snapshots else None,
            tag("details", left_out, bullets(skipped)) if skipped else None,
            _next(view.raw.get("command")),
        ]
    )


def _policy(style: str, script: str) -> str:
    return (
        f"default-src 'none'; style-src {_hashed(style)}; script-src {_hashed(script)}; "
        "base-uri 'none'; form-action 'none'"
    )


def _hashed(text: str) -> str:
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest())
    return f"'sha256-{digest.decode()}'"


def _asset(name: str) -> Markup:
    """A file of ours, as it is; neither may hold the end of its own element."""
    text = (files("ensemblekit.reports") / name).read_text(encoding="utf-8")
    assert "</" not in text
    return Markup(text)
