"""Owns how a comparison is read: every part of it may be absent or null.

Input: the object that comparison.json holds (docs/comparison.md).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ensemblekit.errors import printable
from ensemblekit.reports.wording import Metric, interval, number

Json = Mapping[str, Any]

KINDS = ("single", "averaged", "ensemble")
_SHARES = {"accuracy", "top5", "miou", "exact_match"}
_HIGHER = {*_SHARES, "auroc", "r2"}
_SECONDARY = (
    *("accuracy", "top5", "exact_match", "nll", "perplexity", "brier", "ece", "auroc"),
    *("mse", "rmse", "mae", "r2"),
)


def part(value: object, *keys: str) -> Json:
    """The object at the end of `keys`, empty where the way there is missing."""
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value if isinstance(value, Mapping) else {}


def parts(value: object) -> list[Json]:
    """The objects in a list, none where there is no list."""
    return [v for v in value if isinstance(v, Mapping)] if isinstance(value, list | tuple) else []


@dataclass(frozen=True)
class View:
    """A comparison, with a default for everything that may be missing."""

    raw: Json

    @cached_property
    def metric(self) -> Metric:
        """What choices and gains go by."""
        found = part(self.raw, "metric")
        name = printable(str(found.get("name") or "metric"))
        return Metric(name, found.get("unit") == "pp", found.get("higher_is_better") is not False)

    @cached_property
    def candidates(self) -> list[Json]:
        """All candidates, best first on the choosing data."""
        return parts(self.raw.get("candidates"))

    @cached_property
    def snapshots(self) -> list[Json]:
        """All snapshots in canonical order."""
        return parts(self.raw.get("snapshots"))

    @cached_property
    def decision(self) -> Json:
        """What ships and why; empty where nothing was decided."""
        return part(self.raw, "decision")

    @cached_property
    def shipped(self) -> Json | None:
        """The candidate that ships."""
        return self.named(self.decision.get("ship"))

    @cached_property
    def baseline(self) -> Json | None:
        """The candidate that gains are measured against."""
        return self.named(self.raw.get("baseline"))

    def named(self, name: object) -> Json | None:
        """The candidate of that name."""
        return next((c for c in self.candidates if name and c.get("name") == name), None)

    def split(self, role: str) -> str:
        """The name of the split that is `choosing` or `reporting`."""
        return printable(str(part(self.raw, "data", role).get("split") or role))

    @cached_property
    def secondary(self) -> list[Metric]:
        """Other figures that any candidate has, worth a column."""
        every = [self.figures(candidate) for candidate in self.candidates]
        present = {name for found in every for name in found if number(found[name]) is not None}
        known = (name for name in _SECONDARY if name in present and name != self.metric.name)
        return [Metric(name, name in _SHARES, name in _HIGHER) for name in known]

    def figures(self, candidate: Json, role: str = "reporting") -> Json:
        """A candidate's figures on the split that is `choosing` or `reporting`."""
        if role == "reporting" and (found := part(candidate, "evaluation")):
            return found
        split = part(self.raw, "data", role).get("split")
        found_here = [e for e in parts(candidate.get("evaluations")) if e.get("split") == split]
        return found_here[0] if found_here else {}

    def value(self, candidate: Json, role: str = "reporting") -> float | None:
        """A candidate's value of the metric."""
        return number(self.figures(candidate, role).get(self.metric.name))

    def ends(self, candidate: Json) -> tuple[float, float] | None:
        """The confidence interval of that value on the reporting split."""
        return interval(self.figures(candidate).get(f"{self.metric.name}_ci"))

    def is_shipped(self, candidate: Json) -> bool:
        """Whether it is what ships."""
        return candidate is self.shipped

    def is_baseline(self, candidate: Json) -> bool:
        """Whether gains are measured against it."""
        return candidate is self.baseline


def name_of(thing: Json) -> str:
    """The name of a candidate or of a snapshot."""
    return printable(str(thing.get("name") or thing.get("path") or "unnamed"))


def kind_of(candidate: Json) -> str:
    """Its kind; what is none of ours counts as single."""
    kind = candidate.get("kind")
    return kind if kind in KINDS else KINDS[0]


def p50_ms(candidate: Json) -> float | None:
    """Its median latency."""
    return number(part(candidate, "latency").get("p50_ms"))


def members(candidate: Json) -> float | None:
    """Models that run at inference."""
    return number(candidate.get("members") or part(candidate, "cost").get("members"))


def p_value(candidate: Json) -> float | None:
    """That of its gain, adjusted for the number of candidates where that is known."""
    gain = part(candidate, "gain")
    adjusted = number(gain.get("p_adjusted"))
    return number(gain.get("p_value")) if adjusted is None else adjusted
