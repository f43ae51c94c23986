"""The rule of the decision: the cheapest that is surely good enough, and words that are true."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ensemblekit import evaluation
from ensemblekit.decision import (
    Budget,
    Decision,
    Option,
    affordable,
    best_of,
    budget_json,
    decide,
    headline,
    pareto,
    points,
)
from ensemblekit.evaluation import Loss, Measure
from ensemblekit.scoring import Scores
from ensemblekit.statistics import samples_needed


def option(
    name: str,
    members: int = 1,
    goodness: float = 0.9,
    *,
    p95_ms: float | None = 1.0,
    tie_break: float = 0.0,
    complexity: int = 0,
) -> Option:
    kind = "ensemble" if members > 1 else "single"
    time = None if p95_ms is None else p95_ms * members
    return Option(
        name, kind, members, 100 * members, time, time, goodness, tie_break, complexity
    )  # fmt: skip


def lost(value: float, spread: float = 0.0, variance: float = 0.0) -> Loss:
    return Loss(value, value - spread, value + spread, variance)


def choose(
    options: list[Option], losses: dict[str, Loss | None], margin: float = 0.002
) -> Decision:
    best = best_of(options)
    return decide(
        options, {best.name: lost(0.0), **losses}, margin=margin, samples=1000, best=best
    )  # fmt: skip


# ------------------------------------------------------------------------------ the rule


def test_the_cheapest_that_is_surely_within_the_margin_ships() -> None:
    options = [option("five", 5, 0.95), option("two", 2, 0.949), option("one", 1, 0.93)]
    made = choose(options, {"two": lost(0.001, 0.0005), "one": lost(0.02, 0.005)})
    assert (made.ship, made.best, made.enough_data) == ("two", "five", True)
    assert made.samples_needed is None
    assert made.reasons == ()


def test_the_bound_counts_not_the_estimate() -> None:
    options = [option("five", 5, 0.95), option("one", 1, 0.949)]
    assert choose(options, {"one": lost(0.001, 0.0010001)}).ship == "five"
    assert choose(options, {"one": lost(0.001, 0.0009999)}).ship == "one"


def test_a_bound_on_the_margin_is_within_it() -> None:
    options = [option("five", 5, 0.95), option("one", 1, 0.948)]
    made = choose(options, {"one": Loss(0.001, 0.0, 0.002, 1.0)})
    assert (made.ship, made.enough_data) == ("one", True)


def test_no_margin_asks_for_the_best() -> None:
    options = [option("five", 5, 0.95), option("one", 1, 0.9)]
    made = choose(options, {"one": lost(0.05, 0.01)}, margin=0.0)
    assert (made.ship, made.enough_data) == ("five", True)


def test_among_equally_cheap_ones_the_best_on_choosing_data() -> None:
    options = [option("four", 4, 0.95), option("a", 1, 0.947), option("b", 1, 0.949)]
    made = choose(options, {"a": lost(0.003, 0.0001), "b": lost(0.001, 0.0001)}, margin=0.01)
    assert made.ship == "b"


def test_a_cheaper_option_that_may_or_may_not_do() -> None:
    options = [option("five", 5, 0.95), option("one", 1, 0.949)]
    loss = lost(0.001, 0.004, variance=0.04)
    made = choose(options, {"one": loss})
    assert (made.ship, made.enough_data) == ("five", False)
    assert made.samples_needed == samples_needed(0.001, 0.04, 0.002)
    assert made.samples_needed is not None
    assert made.samples_needed > 1000
    (text,) = made.reasons
    assert "not enough data" in text
    assert "one" in text
    assert f"{made.samples_needed:,}" in text
    assert "1,000 samples" in text


def test_the_number_of_samples_is_more_than_there_are() -> None:
    options = [option("five", 5, 0.95), option("one", 1, 0.949)]
    made = choose(options, {"one": lost(0.001, 0.004, variance=1e-9)})
    assert (made.enough_data, made.samples_needed) == (False, 1001)


def test_nobody_knows_how_many_samples_would_do() -> None:
    """The estimate is the margin itself: no number settles it."""
    options = [option("five", 5, 0.95), option("one", 1, 0.948)]
    made = choose(options, {"one": lost(0.002, 0.001, variance=0.04)})
    assert (made.enough_data, made.samples_needed) == (False, None)
    assert "not enough data" in made.reasons[0]
    assert "None" not in made.reasons[0]


def test_what_is_surely_worse_leaves_no_question() -> None:
    options = [option("five", 5, 0.95), option("one", 1, 0.9)]
    made = choose(options, {"one": lost(0.05, 0.01, variance=0.1)})
    assert (made.ship, made.enough_data, made.reasons) == ("five", True, ())


def test_a_dearer_option_is_no_question() -> None:
    """Whether something that costs more would do as well does not matter."""
    options = [option("one", 1, 0.95), option("five", 5, 0.949)]
    made = choose(options, {"five": lost(0.001, 0.004, variance=0.04)})
    assert (made.ship, made.enough_data) == ("one", True)


def test_the_likeliest_question_is_told() -> None:
    options = [option("five", 5, 0.95), option("a", 1, 0.94), option("b", 1, 0.949)]
    made = choose(
        options, {"a": lost(0.01, 0.02, variance=1e-6), "b": lost(0.001, 0.02, variance=0.04)}
    )
    assert "b costs less" in made.reasons[0]
    assert made.samples_needed == samples_needed(0.001, 0.04, 0.002)


def test_an_option_without_the_figure_never_ships() -> None:
    options = [option("five", 5, 0.95), option("one", 1, -math.inf)]
    made = choose(options, {"one": None})
    assert (made.ship, made.enough_data) == ("five", True)


def test_a_loss_that_is_not_a_number_never_ships() -> None:
    options = [option("five", 5, 0.95), option("one", 1, 0.94)]
    made = choose(options, {"one": Loss(math.nan, math.nan, math.nan, math.nan)})
    assert made.ship == "five"


GOODNESS = st.integers(0, 40).map(lambda n: n / 40)


@given(
    rows=st.lists(st.tuples(st.integers(1, 6), GOODNESS), min_size=1, max_size=12),
    margin=st.integers(0, 20).map(lambda n: n / 40 + 1e-9),
)
def test_with_certain_losses_the_cheapest_within_the_margin_ships(
    rows: list[tuple[int, float]], margin: float
) -> None:
    options = [option(f"c{i}", m, g) for i, (m, g) in enumerate(rows)]
    best = best_of(options)
    losses: dict[str, Loss | None] = {o.name: lost(best.goodness - o.goodness) for o in options}
    made = decide(options, losses, margin=margin, samples=10, best=best)
    good = [o for o in options if best.goodness - o.goodness <= margin]
    cheapest = min(o.members for o in good)
    shipped = next(o for o in options if o.name == made.ship)
    assert shipped.members == cheapest
    assert shipped.goodness == max(o.goodness for o in good if o.members == cheapest)
    assert made.enough_data
    assert made.best == best.name
    assert best.goodness == max(o.goodness for o in options)


@given(
    rows=st.lists(st.tuples(st.integers(1, 6), GOODNESS), min_size=1, max_size=8),
    spread=st.floats(0, 1),
)
def test_uncertainty_never_ships_what_may_be_too_bad(
    rows: list[tuple[int, float]], spread: float
) -> None:
    options = [option(f"c{i}", m, g) for i, (m, g) in enumerate(rows)]
    best = best_of(options)
    losses: dict[str, Loss | None] = {
        o.name: lost(best.goodness - o.goodness, spread, 0.1) for o in options
    }
    made = decide(options, losses, margin=0.1, samples=10, best=best)
    shipped = next(o for o in options if o.name == made.ship)
    loss = losses[shipped.name]
    assert loss is not None
    assert shipped is best or loss.high <= 0.1
    assert shipped.members <= best.members


# --------------------------------------------------------------------------------- ties


def test_equals_are_told_apart_by_cost_then_plainness_then_loss() -> None:
    dear, cheap = option("dear", 3), option("cheap", 1)
    assert best_of([dear, cheap]) is best_of([cheap, dear]) is cheap
    plain, fitted = option("plain", complexity=0, tie_break=0.5), option("fitted", complexity=1)
    assert best_of([fitted, plain]) is best_of([plain, fitted]) is plain
    low, high = option("low", tie_break=0.3), option("high", tie_break=0.4)
    assert best_of([high, low]) is best_of([low, high]) is low


def test_goodness_comes_before_everything() -> None:
    best = option("best", 9, 0.91, tie_break=9, complexity=1)
    assert best_of([option("cheap", 1, 0.90), best]) is best


# ------------------------------------------------------------------------------- budgets

SET = [option("one", 1), option("three", 3), option("unknown", 2, p95_ms=None)]


@pytest.mark.parametrize(
    "budget, names",
    [
        (Budget(), ["one", "three", "unknown"]),
        (Budget(max_members=2), ["one", "unknown"]),
        (Budget(max_members=3), ["one", "three", "unknown"]),
        (Budget(max_bytes=299), ["one", "unknown"]),
        (Budget(max_bytes=300), ["one", "three", "unknown"]),
        (Budget(max_latency_ms=3.0), ["one", "three"]),
        (Budget(max_latency_ms=2.9), ["one"]),
        (Budget(max_latency_ms=0.5), []),
        (Budget(max_latency_ms=5.0, max_members=1), ["one"]),
        (Budget(max_bytes=1), []),
    ],
)
def test_budgets(budget: Budget, names: list[str]) -> None:
    assert [o.name for o in affordable(SET, budget)] == names


def test_the_budget_as_json() -> None:
    shown = budget_json(Budget(max_members=2))
    assert shown == {
        "max_latency_ms": None,
        "latency_batch": 1,
        "max_members": 2,
        "max_bytes": None,
        "runtime": "torch",
        "device": "cpu",
        "precision": "fp32",
    }


# -------------------------------------------------------------------------------- pareto


def test_pareto() -> None:
    options = [
        option("one", 1, 0.90),
        option("worse", 1, 0.80),
        option("two", 2, 0.95),
        option("dear", 4, 0.95),
        option("best", 5, 0.96),
        option("unknown", 1, -math.inf),
    ]
    assert pareto(options) == {"one", "two", "best"}


@given(st.lists(st.tuples(st.integers(1, 5), GOODNESS), min_size=1, max_size=10))
def test_nothing_on_the_front_is_beaten(rows: list[tuple[int, float]]) -> None:
    options = [option(f"c{i}", m, g) for i, (m, g) in enumerate(rows)]
    front = pareto(options)
    assert best_of(options).name in front
    for o in options:
        beaten = any(
            (p.members <= o.members and p.goodness > o.goodness)
            or (p.members < o.members and p.goodness >= o.goodness)
            for p in options
        )
        assert (o.name in front) == (not beaten)


# --------------------------------------------------------------------------------- words


def shown(name: str, members: int, gain: tuple[float, float, float] | None) -> dict[str, Any]:
    told = None if gain is None else {"value": gain[0], "ci": list(gain[1:])}
    latency = {"p50_ms": 2.0 * members}
    return {"name": name, "members": members, "gain": told, "latency": latency}


def test_the_headline_of_the_baseline_itself() -> None:
    one = shown("snap", 1, None)
    text = headline(one, one, None, metric="accuracy", unit="pp")
    assert text.startswith("Ship snap, the best single snapshot")


def test_the_headline_of_a_part_of_the_gain() -> None:
    shipped, all_of = (
        shown("uniform", 1, (0.012, 0.004, 0.02)),
        shown("ensemble", 4, (0.016, 0.01, 0.02)),
    )
    text = headline(shipped, shown("snap", 1, None), all_of, metric="accuracy", unit="pp")
    assert "75% of the gain of ensemble" in text
    assert "1/4 of its latency" in text
    assert "+1.20 pp accuracy (95% interval +0.40 pp to +2.00 pp)" in text
    assert "not sure" not in text


def test_the_headline_admits_that_a_gain_is_not_sure() -> None:
    shipped = shown("uniform", 1, (0.001, -0.004, 0.006))
    text = headline(shipped, shown("snap", 1, None), None, metric="accuracy", unit="pp")
    assert "not sure to be a gain" in text


def test_points() -> None:
    assert points(0.0123, "pp") == "+1.23 pp"
    assert points(-0.0123, "pp") == "-1.23 pp"
    assert "pp" not in points(0.0123, "")


# ------------------------------------------------------------------- no optimism is reported


def columns(right_N: np.ndarray[Any, Any]) -> Scores:
    return {"rows": np.ones(len(right_N)), "correct": right_N}


def drawn(rng: np.random.Generator, items: int, candidates: int) -> list[Scores]:
    """Candidates that are right on 80% of items each, and mostly on the same ones."""
    shared_N = rng.random(items) < 0.8
    found = []
    for _ in range(candidates):
        own_N = rng.random(items) < 0.05
        found.append(columns(np.where(own_N, rng.random(items) < 0.8, shared_N)))
    return found


def test_choosing_among_many_equals_reports_no_gain() -> None:
    """20 candidates, all as good: what is chosen on one set gains nothing on the other."""
    rng = np.random.default_rng(0)
    measure, size, count = Measure("accuracy"), 2000, 20
    members = [1] * 10 + [2, 2, 3, 3, 4, 4, 5, 5, 6, 6]
    shipped, best, seen = [], [], []
    for _ in range(200):
        val, test = drawn(rng, size, count), drawn(rng, size, count)
        options = [
            option(str(i), m, measure.goodness(s))
            for i, (m, s) in enumerate(zip(members, val, strict=True))
        ]
        top = best_of(options)
        losses = dict(
            zip(
                (o.name for o in options),
                evaluation.losses(measure, val, val[int(top.name)], seed=0),
                strict=True,
            )
        )
        made = decide(options, losses, margin=0.002, samples=size, best=top)
        baseline = int(best_of(options[:10]).name)
        assert made.ship is not None
        for name, gains in ((made.ship, shipped), (top.name, best)):
            (gain,) = evaluation.gains(measure, [test[int(name)]], test[baseline], seed=0)
            assert gain is not None
            gains.append(100 * gain["value"])
        (naive,) = evaluation.gains(measure, [val[int(top.name)]], val[0], seed=0)
        assert naive is not None
        seen.append(100 * naive["value"])
    assert np.mean(seen) > 0.3, "on the data of the choice there would be a gain"
    for gains in (shipped, best):
        error = np.std(gains) / math.sqrt(len(gains))
        assert error < 0.03
        assert abs(np.mean(gains)) < 0.1


def test_intervals_of_equals_hold_zero() -> None:
    """95% of them; the bootstrap's, of the log-likelihood, as well as Tango's."""
    rng = np.random.default_rng(1)
    for name, column in (("accuracy", "correct"), ("nll", "log_prob")):
        held = 0
        for seed in range(100):
            if name == "accuracy":
                pair = drawn(rng, 500, 2)
            else:
                pair = [{"rows": np.ones(500), column: rng.normal(-1, 1, 500)} for _ in range(2)]
            (gain,) = evaluation.gains(Measure(name), [pair[0]], pair[1], seed=seed)
            assert gain is not None
            held += gain["ci"][0] <= 0 <= gain["ci"][1]
        assert held / 100 > 0.88


@pytest.mark.parametrize("name, column, sign", [("nll", "log_prob", 1), ("mse", "squared", -1)])
def test_gains_and_losses_of_figures_where_less_is_better(
    name: str, column: str, sign: int
) -> None:
    rng = np.random.default_rng(0)
    base = rng.normal(0, 0.1, 400) + (-1.0 if sign > 0 else 1.0)
    good: Scores = {"rows": np.ones(400), column: base + sign * 0.2}
    poor: Scores = {"rows": np.ones(400), column: base}
    measure = Measure(name)
    assert measure.goodness(good) > measure.goodness(poor)
    (gain,) = evaluation.gains(measure, [good], poor, seed=0)
    assert gain is not None
    assert gain["value"] == pytest.approx(0.2)
    assert gain["ci"][0] > 0
    assert gain["p_value"] < 0.001
    (loss,) = evaluation.losses(measure, [poor], good, seed=0)
    assert loss is not None
    assert loss.value == pytest.approx(0.2)
    assert loss.low <= loss.value <= loss.high
