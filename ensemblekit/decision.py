"""Owns the decision: which candidate to ship, made on choosing data, and the words for it.

Input: candidates with their losses against the best, their costs and their gains.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ensemblekit.errors import UsageError
from ensemblekit.evaluation import Loss
from ensemblekit.statistics import samples_needed

_Z_ONE_SIDED = 1.6448536269514722  # of a 95% bound


@dataclass(frozen=True)
class Budget:
    """What may be spent at inference; None where there is no limit.

    Attributes:
        max_latency_ms: At the 95th percentile, for a batch of `latency_batch` samples.
        latency_batch: Samples in that batch.
        max_members: Models that run.
        max_bytes: Of weights.
        margin: Percentage points (for figures that are no shares: per cent of the best figure)
            that a cheaper candidate may lose against the best.
        runtime: Where latency was measured.
        device: Likewise.
        precision: Likewise.
    """

    max_latency_ms: float | None = None
    latency_batch: int = 1
    max_members: int | None = None
    max_bytes: int | None = None
    margin: float = 0.2
    runtime: str = "torch"
    device: str = "cpu"
    precision: str = "fp32"

    def __post_init__(self) -> None:
        least = {"max_latency_ms": 0, "latency_batch": 1, "max_members": 1, "max_bytes": 1}
        for name, bound in {**least, "margin": 0}.items():
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value >= bound):
                raise UsageError(f"--{name.replace('_', '-')} {value}: must be at least {bound}")


@dataclass(frozen=True)
class Option:
    """A candidate as the decision sees it.

    Attributes:
        name: Of the candidate.
        kind: single, averaged or ensemble.
        members: Models that run.
        nbytes: Of their weights.
        p95_ms: Measured for the budget's batch, None where not measured.
        p50_ms: Likewise.
        goodness: The figure on choosing data, turned so that higher is better.
        tie_break: Smaller is better among equals: the loss that the figure does not see.
        complexity: How much of it was chosen on the data; the plainer one wins among equals.
    """

    name: str
    kind: str
    members: int
    nbytes: int
    p95_ms: float | None
    p50_ms: float | None
    goodness: float
    tie_break: float = 0.0
    complexity: int = 0

    @property
    def cost(self) -> int:
        """What cheapest means: models that run; candidates of as many run equally fast."""
        return self.members


@dataclass(frozen=True)
class Decision:
    """Which candidate to ship; see docs/comparison.md for the keys."""

    ship: str | None
    best: str | None
    enough_data: bool
    samples_needed: int | None
    reasons: tuple[str, ...]


def affordable(options: Sequence[Option], budget: Budget) -> list[Option]:
    """The options within the budget; one whose latency is not known is not within a limit of it."""
    found = []
    for option in options:
        fits = budget.max_members is None or option.members <= budget.max_members
        fits = fits and (budget.max_bytes is None or option.nbytes <= budget.max_bytes)
        if budget.max_latency_ms is not None:
            fits = fits and option.p95_ms is not None and option.p95_ms <= budget.max_latency_ms
        if fits:
            found.append(option)
    return found


def best_of(options: Sequence[Option]) -> Option:
    """The best on choosing data; among equals the cheaper, then the plainer."""
    return max(options, key=lambda o: (o.goodness, -o.cost, -o.complexity, -o.tie_break))


def decide(
    options: Sequence[Option],
    losses: dict[str, Loss | None],
    *,
    margin: float,
    samples: int,
    best: Option,
    unit: str = "pp",
) -> Decision:
    """Ship the cheapest option whose loss against the best is surely within the margin.

    Args:
        options: Within the budget.
        losses: Of each against `best`.
        margin: In the unit of the figure.
        samples: Items of the choosing data.
        best: `best_of(options)`.
        unit: Of the figure, for the words.
    """
    within = [o for o in options if _surely_within(losses[o.name], margin) or o is best]
    least = min(o.cost for o in within)
    chosen = best_of([o for o in within if o.cost == least])
    open_questions = [
        (o, loss)
        for o in options
        if o.cost < chosen.cost
        and (loss := losses[o.name]) is not None
        and loss.low <= margin < loss.high
    ]
    if not open_questions:
        return Decision(chosen.name, best.name, True, None, ())
    # the likeliest to be good enough, not the one that is settled soonest
    promising, loss = min(open_questions, key=lambda pair: pair[1].value)
    number = _needed(loss, margin, unit)
    text = (
        f"not enough data: {promising.name} costs less, and its loss against {best.name} lies "
        f"between {points(loss.low, unit)} and {points(loss.high, unit)} on {samples:,} samples "
        f"(allowed: {points(margin, unit).lstrip('+')})"
    )
    if number is not None:
        text += f"; about {max(number, samples + 1):,} samples would tell"
        number = max(number, samples + 1)
    return Decision(chosen.name, best.name, False, number, (text,))


def _needed(loss: Loss, margin: float, unit: str) -> int | None:
    """Samples that would settle a question."""
    if loss.variance > 0:
        return samples_needed(loss.value, loss.variance, margin)
    if unit != "pp" or not 0 < margin < 1:
        return None
    # no sample tells the two apart: the score bound of no difference is z^2 / (n + z^2)
    return math.ceil(_Z_ONE_SIDED**2 * (1 - margin) / margin)


def _surely_within(loss: Loss | None, margin: float) -> bool:
    return loss is not None and loss.high <= margin


def pareto(options: Sequence[Option]) -> set[str]:
    """Names of options that no other one beats in cost without being worse."""
    front = set()
    for option in options:
        beaten = any(
            other.cost <= option.cost
            and other.goodness >= option.goodness
            and (other.cost < option.cost or other.goodness > option.goodness)
            for other in options
        )
        if not beaten and math.isfinite(option.goodness):
            front.add(option.name)
    return front


def headline(
    shipped: dict[str, Any],
    baseline: dict[str, Any],
    ensemble: dict[str, Any] | None,
    *,
    metric: str,
    unit: str,
    settled: bool = True,
) -> str:
    """One sentence for a manager: what the shipped candidate gains, and at what cost."""
    gain, name = shipped["gain"], shipped["name"]
    start = f"Ship {name}" if settled else f"Not enough data to settle it; until then ship {name}"
    if gain is None:
        return f"{start}, the best single snapshot: nothing that was compared is worth more."
    low, high = gain["ci"]
    parts = []
    real = ensemble is not None and ensemble["gain"] is not None and ensemble["gain"]["ci"][0] > 0
    if ensemble is not None and real and shipped["members"] < ensemble["members"]:
        most, cost = ensemble["gain"]["value"], _share_of_cost(shipped, ensemble)
        if 0 < gain["value"] < most:
            share = gain["value"] / most
            parts.append(f"it gives {share:.0%} of the gain of {ensemble['name']} at {cost}")
        elif gain["value"] >= most:
            parts.append(f"it gains no less than {ensemble['name']} at {cost}")
    sentence = (
        f"its gain over {baseline['name']} (the best single snapshot) is "
        f"{points(gain['value'], unit)} {metric} (95% interval {points(low, unit)} to "
        f"{points(high, unit)})"
    )
    if high < 0:
        sentence += ": on this data it is a loss"
    elif low <= 0:
        sentence += ", so it is not sure to be a gain"
    return f"{start}: {'; '.join([*parts, sentence])}."


def _share_of_cost(shipped: dict[str, Any], ensemble: dict[str, Any]) -> str:
    times = [c["latency"]["p50_ms"] if c["latency"] else None for c in (shipped, ensemble)]
    if times[0] and times[1]:
        return _part(times[0] / times[1]) + " of its latency"
    return _part(shipped["members"] / ensemble["members"]) + " of its models"


def _part(share: float) -> str:
    return f"1/{1 / share:.0f}" if share < 0.4 else f"{share:.0%}"


def points(value: float, unit: str) -> str:
    """A difference as people write it: percentage points of shares, else the number."""
    return f"{value * 100:+.2f} pp" if unit == "pp" else f"{value:+.4g}"


def budget_json(budget: Budget) -> dict[str, Any]:
    """The budget without the margin."""
    shown = asdict(budget)
    shown.pop("margin")
    return shown
