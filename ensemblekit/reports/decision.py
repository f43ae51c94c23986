"""Owns the decision in words: what ships, its figures, and within which limits.

Input: a `View`.
"""

from collections.abc import Iterable

from ensemblekit.reports.view import Json, View, kind_of, members, name_of, p50_ms, part
from ensemblekit.reports.wording import (
    milliseconds,
    nbytes,
    number,
    plain,
    probability,
    texts,
    words,
)

_BUDGET = {
    "max_latency_ms": "at most {} ms at the 95th percentile",
    "latency_batch": "batch size {}",
    "max_members": "at most {} models",
    "max_bytes": "at most {}",
    "runtime": "{}",
    "device": "{}",
    "precision": "{}",
}


def headline(view: View) -> str:
    """The decision in one sentence."""
    return " ".join(texts(view.decision.get("headline"))) or "Comparison of snapshots"


def facts(view: View) -> Iterable[tuple[str, str]]:
    """What ships and what speaks for it, as names and values; a value may be empty."""
    decision, metric, shipped = view.decision, view.metric, view.shipped
    if shipped is None:
        named = "".join(texts(decision.get("ship")))
        yield "Ship", named or "nothing: no candidate fits the budget"
    else:
        count = members(shipped) or 1
        models = f", {plain(count)} models" if count > 1 else ""
        yield "Ship", f"{name_of(shipped)} ({kind_of(shipped)}{models})"
        span = metric.span(view.ends(shipped))
        shown = metric.show(view.value(shipped)) + (f" (95%: {span})" if span else "")
        yield f"{metric.name} on {view.split('reporting')}", shown
    yield "Gain over the best single", _gain(view)
    if shipped is not None:
        latency = p50_ms(shipped)
        batch = part(shipped, "latency").get("batch_size")
        at = f" at batch size {plain(batch)}" if number(batch) is not None else ""
        yield "Median latency", "" if latency is None else f"{milliseconds(latency)} ms{at}"
        size = part(shipped, "cost").get("bytes")
        yield "Size", "" if number(size) is None else nbytes(size)
    best = view.named(decision.get("best"))
    if best is not None and best is not shipped:
        yield "Best within the budget", f"{name_of(best)}, {metric.show(view.value(best))}"
    margin = number(decision.get("margin"))
    unit = " percentage points" if metric.percent else "% of the best figure"
    yield "Allowed loss", "" if margin is None else f"{margin:g}{unit}"
    yield "Budget", ", ".join(_limits(part(decision, "budget")))
    if decision.get("enough_data") is False:
        needed = number(decision.get("samples_needed"))
        more = "" if needed is None else f"; about {needed:,.0f} samples would do"
        yield "Data", f"too few to tell whether something cheaper would do{more}"


def _limits(budget: Json) -> Iterable[str]:
    for name, sentence in _BUDGET.items():
        if (value := budget.get(name)) is not None:
            yield sentence.format(nbytes(value) if name == "max_bytes" else words(value))


def _gain(view: View) -> str:
    gain = part(view.decision, "gain")
    if number(gain.get("value")) is None:
        return ""
    span = view.metric.span(gain.get("ci"))
    notes = [f"95%: {span}"] if span else []
    # one candidate, chosen on other data: nothing to adjust for
    if (p := number(part(view.decision, "gain").get("p_value"))) is not None:
        notes.append(f"p {probability(p)}")
    shown = view.metric.gain(gain["value"]) + (f" ({', '.join(notes)})" if notes else "")
    return shown + ("; not told apart from none" if view.decision.get("real") is False else "")
