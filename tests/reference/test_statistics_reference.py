"""Intervals and tests against scipy, published values, definitions, and simulated truth."""

from __future__ import annotations

import math
from collections.abc import Sequence
from decimal import Decimal, localcontext
from functools import cache
from itertools import combinations
from typing import Any

import numpy as np
import pytest
from scipy import optimize, special, stats

from ensemblekit.statistics import Interval, bootstrap, holm, mcnemar, tango, wilson

Array = np.ndarray[Any, np.dtype[np.float64]]

# Won, lost, total.
CASES = [
    (0, 0, 1),
    (0, 0, 30),
    (1, 0, 1),
    (0, 1, 2),
    (1, 1, 2),
    (3, 0, 10),
    (0, 10, 10),
    (7, 3, 10),
    (1, 7, 21),
    (6, 16, 161),
    (1, 0, 1000),
    (12, 30, 1000),
    (300, 500, 1000),
    (0, 40, 10_000),
    (310, 250, 10_000),
    (31_000, 30_000, 1_000_000),
    (0, 1, 1_000_000),
    (500_000, 500_000, 1_000_000),
]


@pytest.mark.parametrize("level", [0.5, 0.9, 0.95, 0.999])
@pytest.mark.parametrize(
    "successes, trials", [(0, 1), (1, 1), (0, 40), (3, 7), (40, 40), (499, 1000), (3, 10**6)]
)
def test_wilson_against_scipy(successes: int, trials: int, level: float) -> None:
    wanted = stats.binomtest(successes, trials).proportion_ci(level, method="wilson")
    found = wilson(successes, trials, level=level)
    assert found.low == pytest.approx(wanted.low, rel=1e-9, abs=1e-14)
    assert found.high == pytest.approx(wanted.high, rel=1e-12)


@pytest.mark.parametrize(
    "won, lost",
    [(0, 1), (1, 0), (5, 5), (5, 6), (1, 7), (16, 6), (0, 60), (480, 520), (30_000, 31_000)],
)
def test_mcnemar_against_scipy(won: int, lost: int) -> None:
    wanted = stats.binomtest(won, won + lost).pvalue
    assert mcnemar(won, lost) == pytest.approx(wanted, rel=1e-8)


def test_mcnemar_as_published() -> None:
    """Complete response before and after therapy (Cavo 2012), in Fagerland 2017, chapter 8."""
    assert mcnemar(6, 16) == pytest.approx(0.052479, abs=5e-7)


def by_closed_testing(p_values: Sequence[float]) -> list[float]:
    """Holm's procedure is the closure of Bonferroni's test.

    A hypothesis is rejected when every set of hypotheses that it belongs to is, each by its
    smallest p-value times its size.
    """
    places = range(len(p_values))
    sets = [s for size in places for s in combinations(places, size + 1)]
    worst = [min(1.0, len(s) * min(p_values[place] for place in s)) for s in sets]
    return [max(w for s, w in zip(sets, worst, strict=True) if place in s) for place in places]


def by_rejecting(p_values: Sequence[float], alpha: float) -> list[bool]:
    """Step down, as Holm 1979 states it: smallest first, until one is not small enough."""
    order = sorted(range(len(p_values)), key=lambda place: p_values[place])
    rejected = [False] * len(p_values)
    for step, place in enumerate(order):
        if p_values[place] > alpha / (len(p_values) - step):
            break
        rejected[place] = True
    return rejected


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8])
def test_holm_against_its_definitions(count: int) -> None:
    generator = np.random.default_rng(count)
    for _ in range(40):
        p_values = [float(p) for p in generator.choice(generator.random(count) ** 3, count)]
        found = holm(p_values)
        assert found == pytest.approx(by_closed_testing(p_values))
        for alpha in (0.01, 0.05, 0.2):
            small = [p is not None and p <= alpha for p in found]
            assert small == by_rejecting(p_values, alpha)


# Tango


@pytest.mark.parametrize(
    "won, lost, total, level, low, high, digits",
    [
        # Airway hyper-responsiveness (Bentur 2009), in Fagerland 2014, Stat. Med. 33:2850.
        (1, 7, 21, 0.95, -0.517, -0.026, 3),
        # Complete response (Cavo 2012), in Fagerland 2017, chapter 8, and its R package.
        (6, 16, 161, 0.95, -0.1240, -0.0054, 4),
        # scoreci.mp(25, 28, 618, 0.9) of the R package PropCIs, whose sign is the other.
        (28, 25, 618, 0.9, -0.0148, 0.0247, 4),
    ],
)
def test_tango_as_published(
    won: int, lost: int, total: int, level: float, low: float, high: float, digits: int
) -> None:
    found = tango(won, lost, total, level=level)
    assert round(found.low, digits) == low
    assert round(found.high, digits) == high


def score_by_likelihood(won: int, lost: int, total: int, d: float) -> float:
    """Tango's statistic, its nuisance parameter from the trinomial likelihood itself."""

    def unlikely(p_lost: float) -> float:
        rest = max(0.0, 1 - 2 * p_lost - d)
        logs = (
            special.xlogy(won, p_lost + d)
            + special.xlogy(lost, p_lost)
            + special.xlogy(total - won - lost, rest)
        )
        return float(-logs / total)

    bounds = (max(0.0, -d), (1 - d) / 2)
    best = optimize.minimize_scalar(
        unlikely, bounds=bounds, method="bounded", options={"xatol": 1e-13}
    )
    variance = total * (2 * best.x + d - d * d)
    return float((won - lost - total * d) / math.sqrt(variance))


def tango_by_likelihood(won: int, lost: int, total: int, level: float) -> Interval:
    z = float(stats.norm.ppf((1 + level) / 2))
    estimate = (won - lost) / total
    tiny = 1e-9

    def end(side: int) -> float:
        border = side * (1 - tiny)
        if side * (border - estimate) <= tiny:
            return float(side)
        near = estimate + side * tiny
        return float(
            optimize.brentq(
                lambda d: score_by_likelihood(won, lost, total, d) + side * z,
                near,
                border,
                xtol=1e-12,
            )
        )

    return Interval(end(-1), end(1))


@pytest.mark.parametrize("level", [0.9, 0.99])
@pytest.mark.parametrize("won, lost, total", CASES)
def test_tango_against_numeric_likelihood(won: int, lost: int, total: int, level: float) -> None:
    wanted = tango_by_likelihood(won, lost, total, level)
    found = tango(won, lost, total, level=level)
    width = found.high - found.low
    assert found.low == pytest.approx(wanted.low, abs=1e-5 * width)
    assert found.high == pytest.approx(wanted.high, abs=1e-5 * width)


def accepted(won: int, lost: int, total: int, d: Decimal, z: Decimal) -> bool:
    """The score test in 60 digits, straight from the paper's formulas."""
    with localcontext(prec=60):
        a = Decimal(2 * total)
        b = -won - lost + (2 * total - won + lost) * d
        c = -lost * d * (1 - d)
        q = ((b * b - 4 * a * c).sqrt() - b) / (2 * a)
        excess = won - lost - total * d
        return excess * excess <= z * z * total * (2 * q + d * (1 - d))


@pytest.mark.parametrize("level", [0.9, 0.95])
@pytest.mark.parametrize("won, lost, total", CASES)
def test_ends_of_tango_in_high_precision(won: int, lost: int, total: int, level: float) -> None:
    z = Decimal(float(stats.norm.ppf((1 + level) / 2)))
    found = tango(won, lost, total, level=level)
    step = Decimal("1e-10")
    for end, outwards in ((Decimal(found.low), -step), (Decimal(found.high), step)):
        assert accepted(won, lost, total, end - outwards, z)
        if abs(end) < 1:
            assert not accepted(won, lost, total, end + outwards, z)


@pytest.mark.parametrize("won, lost, total", CASES)
def test_what_tango_accepts_is_one_interval(won: int, lost: int, total: int) -> None:
    z = Decimal(float(stats.norm.ppf(0.975)))
    found = tango(won, lost, total)
    width = found.high - found.low
    everywhere = np.linspace(-1, 1, 202)[1:-1]
    nearby = np.linspace(found.low - width, found.high + width, 201)
    for d in (float(x) for x in (*everywhere, *nearby) if -1 < x < 1):
        if min(abs(d - found.low), abs(d - found.high)) > 1e-9:
            inside = found.low < d < found.high
            assert accepted(won, lost, total, Decimal(d), z) == inside, d


@cache
def remembered(won: int, lost: int, total: int, level: float) -> Interval:
    return tango(won, lost, total, level=level)


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 0.75, 1.0])
@pytest.mark.parametrize("discordance", [0.01, 0.05, 0.2])
@pytest.mark.parametrize("total", [200, 1000, 4000])
def test_coverage_of_tango(total: int, discordance: float, share: float) -> None:
    """At least 93 of 100 intervals at 95% hold the truth; `share` is what is won of it."""
    p_won, p_lost = discordance * share, discordance * (1 - share)
    generator = np.random.default_rng([total, round(1000 * discordance), round(100 * share)])
    drawn = generator.multinomial(total, [p_won, p_lost, 1 - p_won - p_lost], size=1000)
    found = [remembered(int(won), int(lost), total, 0.95) for won, lost, _ in drawn]
    covered = sum(i.low <= p_won - p_lost <= i.high for i in found)
    assert covered >= 930


@pytest.mark.parametrize("share", [0.0, 0.05, 0.2, 0.5])
@pytest.mark.parametrize("expected", [5, 20])
def test_error_of_one_end_of_tango(expected: int, share: float) -> None:
    """Exact probabilities that a bound at 95% is wrong, with few discordant pairs of 1000.

    The truth is 0 or below, so the low end is the one away from 0.
    """
    total, level = 1000, 0.9
    truth = expected / total * (2 * share - 1)
    above = below = 0.0
    for discordant in range(4 * expected + 1):
        probabilities = stats.binom.pmf(discordant, total, expected / total) * stats.binom.pmf(
            np.arange(discordant + 1), discordant, share
        )
        for won, probability in enumerate(probabilities):
            if probability > 1e-7:
                found = remembered(won, discordant - won, total, level)
                above += probability * (found.low > truth + 1e-12)
                below += probability * (found.high < truth - 1e-12)
    assert above <= 0.06
    assert below <= 0.09


# bootstrap


def mean(sums_BQ: Array) -> Array:
    return np.asarray(sums_BQ[:, 0] / sums_BQ[:, 1])


def close(found: Interval, low: float, high: float) -> None:
    """Both are drawn; with 10,000 resamples an end's standard error is 0.7% of the width."""
    width = high - low
    assert found.low == pytest.approx(low, abs=0.05 * width)
    assert found.high == pytest.approx(high, abs=0.05 * width)


@pytest.mark.parametrize("level", [0.9, 0.95])
@pytest.mark.parametrize("items", [20, 400])
def test_bootstrap_of_a_mean_against_scipy(items: int, level: float) -> None:
    x = np.random.default_rng(items).exponential(size=items)
    wanted = stats.bootstrap(
        (x,), np.mean, n_resamples=10_000, confidence_level=level, method="percentile", rng=1
    ).confidence_interval
    sums_NQ = np.stack([x, np.ones(items)], 1)
    found = bootstrap(sums_NQ, mean, seed=2, resamples=10_000, level=level)
    close(found, wanted.low, wanted.high)


def test_bootstrap_of_a_correlation_against_scipy() -> None:
    generator = np.random.default_rng(0)
    x = generator.normal(size=300)
    y = x + generator.normal(size=300)
    wanted = stats.bootstrap(
        (x, y),
        lambda a, b: stats.pearsonr(a, b).statistic,
        n_resamples=2000,
        paired=True,
        vectorized=False,
        method="percentile",
        rng=1,
    ).confidence_interval

    def correlation(sums_BQ: Array) -> Array:
        x_B, y_B, xx_B, yy_B, xy_B = sums_BQ.T / 300
        return np.asarray((xy_B - x_B * y_B) / np.sqrt((xx_B - x_B**2) * (yy_B - y_B**2)))

    sums_NQ = np.stack([x, y, x * x, y * y, x * y], 1)
    close(bootstrap(sums_NQ, correlation, seed=2, resamples=10_000), wanted.low, wanted.high)


def test_bootstrap_of_a_share_against_the_binomial() -> None:
    """A resampled share is binomial, also where the items are drawn in several parts."""
    items, ones = 200_000, 60_000
    sums_NQ = (np.arange(items) < ones).astype(float)[:, None]
    found = bootstrap(sums_NQ, lambda sums_BQ: sums_BQ[:, 0], seed=0, resamples=1000)
    low, high = stats.binom.ppf([0.025, 0.975], items, ones / items)
    assert found.low == pytest.approx(low, abs=0.1 * (high - low))
    assert found.high == pytest.approx(high, abs=0.1 * (high - low))


@pytest.mark.parametrize("items", [50, 500])
def test_coverage_of_the_bootstrap(items: int) -> None:
    """Too narrow for few items, as is known of it; near the level for many."""
    generator = np.random.default_rng(items)
    covered = 0
    for seed in range(400):
        sums_NQ = np.stack([generator.normal(size=items), np.ones(items)], 1)
        found = bootstrap(sums_NQ, mean, seed=seed, resamples=400)
        covered += found.low <= 0 <= found.high
    assert 0.90 <= covered / 400 <= 0.985
