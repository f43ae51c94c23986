"""Intervals and tests: particular values, and what must hold for any input."""

from __future__ import annotations

import math
import subprocess
import sys
import tracemalloc
from statistics import NormalDist
from typing import Any
from unittest import mock

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from ensemblekit import statistics
from ensemblekit.statistics import (
    Interval,
    bootstrap,
    holm,
    mcnemar,
    samples_needed,
    tango,
    wilson,
)

Array = np.ndarray[Any, np.dtype[np.float64]]

levels = st.floats(0.5, 0.999)
p_values = st.lists(st.none() | st.floats(0, 1), max_size=12)


@st.composite
def pairs(draw: st.DrawFn) -> tuple[int, int, int]:
    """Won, lost, total."""
    total = draw(st.integers(1, 10**6) | st.integers(1, 30))
    won = draw(st.integers(0, total) | st.integers(0, min(total, 5)))
    lost = draw(st.integers(0, total - won) | st.integers(0, min(total - won, 5)))
    return won, lost, total


@st.composite
def proportions(draw: st.DrawFn) -> tuple[float, float]:
    """Successes, trials."""
    trials = draw(st.integers(1, 10**6) | st.floats(0.5, 1e6))
    return trials * draw(st.sampled_from([0.0, 1.0]) | st.floats(0, 1)), trials


def first(sums_BQ: Array) -> Array:
    return sums_BQ[:, 0]


def ratio(sums_BQ: Array) -> Array:
    return np.asarray(sums_BQ[:, 0] / sums_BQ[:, 1])


# wilson


@given(proportions(), levels)
def test_wilson_is_a_proportion_and_holds_the_estimate(
    case: tuple[float, float], level: float
) -> None:
    found = wilson(*case, level=level)
    assert 0 <= found.low < found.high <= 1
    assert found.low - 1e-12 <= case[0] / case[1] <= found.high + 1e-12


@given(proportions(), levels)
def test_wilson_of_failures_is_the_mirror_image(case: tuple[float, float], level: float) -> None:
    found, failures = (
        wilson(*case, level=level),
        wilson(case[1] - case[0], case[1], level=level),
    )
    assert failures.low == pytest.approx(1 - found.high, abs=1e-9)
    assert failures.high == pytest.approx(1 - found.low, abs=1e-9)


@given(proportions(), levels, levels)
def test_wilson_nests(case: tuple[float, float], one: float, other: float) -> None:
    inner, outer = (wilson(*case, level=level) for level in sorted((one, other)))
    assert outer.low <= inner.low + 1e-12
    assert inner.high <= outer.high + 1e-12


def test_wilson_at_the_borders() -> None:
    assert wilson(0, 0) == Interval(0, 1)
    assert wilson(0, 50).low == 0
    assert wilson(50, 50).high == 1


# tango


@given(pairs(), levels)
def test_tango_holds_the_estimate(case: tuple[int, int, int], level: float) -> None:
    won, lost, total = case
    found = tango(*case, level=level)
    assert -1 <= found.low <= (won - lost) / total <= found.high <= 1
    assert found.low < found.high


@given(pairs(), levels)
def test_tango_of_the_swapped_is_the_negative(case: tuple[int, int, int], level: float) -> None:
    won, lost, total = case
    found = tango(won, lost, total, level=level)
    assert tango(lost, won, total, level=level) == Interval(-found.high, -found.low)


@given(pairs(), levels, levels)
def test_tango_nests(case: tuple[int, int, int], one: float, other: float) -> None:
    inner, outer = (tango(*case, level=level) for level in sorted((one, other)))
    assert outer.low <= inner.low + 1e-12
    assert inner.high <= outer.high + 1e-12


@given(pairs(), st.integers(2, 50), levels)
def test_tango_shrinks(case: tuple[int, int, int], times: int, level: float) -> None:
    won, lost, total = case
    few = tango(won, lost, total, level=level)
    many = tango(won * times, lost * times, total * times, level=level)
    assert many.high - many.low < few.high - few.low


@given(pairs(), levels)
def test_tango_rejects_no_difference_when_the_score_does(
    case: tuple[int, int, int], level: float
) -> None:
    """At a difference of 0 the score is McNemar's asymptotic one."""
    won, lost, _ = case
    z = statistics._two_sided(level)
    score = abs(won - lost) / math.sqrt(max(1, won + lost))
    found = tango(*case, level=level)
    assume(abs(score - z) > 1e-9)
    assert (found.low <= 0 <= found.high) == (score <= z)


@pytest.mark.parametrize("total", [1, 2, 10, 10_000, 10**6, 10**9])
def test_tango_without_discordance(total: int) -> None:
    """The score equation is n d = z²(1 - d) then."""
    z = 1.959963984540054
    found = tango(0, 0, total)
    assert found.high == pytest.approx(z * z / (total + z * z), abs=1e-10)
    assert found.low == -found.high


@pytest.mark.parametrize("total", [1, 2, 10, 10_000, 10**6, 10**9])
def test_tango_of_all_discordant_on_one_side(total: int) -> None:
    """P(won) is the one number left: Wilson's interval, on the scale of -1 to 1."""
    found = tango(total, 0, total)
    assert found.high == 1
    assert found.low == pytest.approx(2 * wilson(total, total).low - 1, abs=1e-10)


def test_tango_of_no_pairs() -> None:
    assert tango(0, 0, 0) == Interval(-1, 1)


def test_tango_of_many_pairs_is_wald() -> None:
    """At a million pairs the score hardly differs from the normal interval."""
    won, lost, total = 31_000, 30_000, 10**6
    half = 1.959963984540054 * math.sqrt((won + lost) / total - 0.001**2) / 1000
    found = tango(won, lost, total)
    assert found.low == pytest.approx(0.001 - half, rel=1e-3)
    assert found.high == pytest.approx(0.001 + half, rel=1e-3)


@pytest.mark.parametrize("wrong", [(-1, 0, 5), (0, -1, 5), (3, 3, 5)])
def test_impossible_counts(wrong: tuple[int, int, int]) -> None:
    with pytest.raises(AssertionError):
        tango(*wrong)


@pytest.mark.parametrize("level", [0.0, 1.0, 95.0])
def test_impossible_level(level: float) -> None:
    for function in (
        lambda: wilson(1, 2, level=level),
        lambda: tango(1, 0, 2, level=level),
        lambda: bootstrap(np.ones((2, 1)), first, seed=0, level=level),
    ):
        with pytest.raises(AssertionError):
            function()


# mcnemar


def test_mcnemar_without_discordance() -> None:
    assert mcnemar(0, 0) == 1


@given(st.integers(0, 10**6), st.integers(0, 10**6))
@settings(deadline=None)  # the first call imports scipy
def test_mcnemar_has_no_direction(won: int, lost: int) -> None:
    assert 0 <= mcnemar(won, lost) == mcnemar(lost, won) <= 1


# holm


@given(p_values)
def test_holm_keeps_the_order_and_only_raises(given_p: list[float | None]) -> None:
    adjusted = holm(given_p)
    assert [p is None for p in given_p] == [p is None for p in adjusted]
    made = sorted((p, a) for p, a in zip(given_p, adjusted, strict=True) if p is not None)
    assert all(a is not None and p <= a <= 1 for p, a in made)
    raised = [a for _, a in made if a is not None]
    assert raised == sorted(raised)


@given(p_values, st.randoms(use_true_random=False))
def test_holm_of_another_order(given_p: list[float | None], random: Any) -> None:
    places = list(range(len(given_p)))
    random.shuffle(places)
    adjusted = holm(given_p)
    assert holm([given_p[place] for place in places]) == [adjusted[place] for place in places]


def test_holm_does_not_count_what_was_not_tested() -> None:
    assert holm([]) == []
    assert holm([None, None]) == [None, None]
    assert holm([None, 0.04, None]) == [None, 0.04, None]
    assert holm([0.04, 0.04, 0.7]) == pytest.approx([0.12, 0.12, 0.7])


# bootstrap


def test_bootstrap_by_seed() -> None:
    sums_NQ = np.random.default_rng(0).random((500, 2))
    one, same, other = (bootstrap(sums_NQ, ratio, seed=seed) for seed in (1, 1, 2))
    assert one == same
    assert one != other


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=20, deadline=None)
def test_bootstrap_of_another_order_of_items(seed: int) -> None:
    generator = np.random.default_rng(seed)
    sums_NQ = generator.random((300, 1)) / 300
    error = sums_NQ.std() * math.sqrt(300)
    one = bootstrap(sums_NQ, first, seed=0)
    other = bootstrap(generator.permutation(sums_NQ), first, seed=0)
    # The standard error of such a quantile is 0.06 of the statistic's.
    assert one.low == pytest.approx(other.low, abs=0.45 * error)
    assert one.high == pytest.approx(other.high, abs=0.45 * error)


@given(st.integers(0, 2**32 - 1), levels, levels)
@settings(max_examples=20, deadline=None)
def test_bootstrap_nests(seed: int, one: float, other: float) -> None:
    sums_NQ = np.random.default_rng(seed).random((40, 1))
    narrow, wide = sorted((one, other))
    inner = bootstrap(sums_NQ, first, seed=seed, resamples=200, level=narrow)
    outer = bootstrap(sums_NQ, first, seed=seed, resamples=200, level=wide)
    assert outer.low <= inner.low <= inner.high <= outer.high


@pytest.mark.parametrize("part", [1, 3, 7, 1 << 16])
def test_each_item_is_drawn_as_often_as_in_a_multinomial(part: int) -> None:
    """Of items that are unit vectors the sums are the counts."""
    items, resamples = 12, 20_000
    seen: list[Array] = []

    def value(sums_BQ: Array) -> Array:
        seen.append(sums_BQ)
        return first(sums_BQ)

    # Blocks of 100 resamples and of 1,200, neither a divisor of what is asked for.
    with mock.patch.multiple(statistics, _ITEMS=part, _WEIGHTS=1200):
        bootstrap(np.eye(items), value, seed=5, resamples=resamples)
    counts = np.concatenate(seen)
    assert counts.shape == (resamples, items)
    assert (counts.sum(1) == items).all()
    assert (counts == counts.round()).all()
    wanted = np.eye(items) - 1 / items
    np.testing.assert_allclose(counts.mean(0), 1, atol=5 / math.sqrt(resamples))
    np.testing.assert_allclose(np.cov(counts.T), wanted, atol=10 / math.sqrt(resamples))
    never = (counts == 0).mean()
    assert never == pytest.approx((1 - 1 / items) ** items, abs=0.005)


def test_bootstrap_leaves_undefined_values_out() -> None:
    """A ratio over the items of a rare class: some resamples have none of them."""
    sums_NQ = np.zeros((30, 2))
    sums_NQ[:2] = [[1, 1], [0, 1]]
    found = bootstrap(sums_NQ, ratio, seed=0)
    assert found == Interval(0, 1)


@pytest.mark.parametrize("item", [math.nan, math.inf, 0.0])
def test_bootstrap_of_what_is_never_defined(item: float) -> None:
    found = bootstrap(np.full((10, 2), item), ratio, seed=0, resamples=50)
    assert math.isnan(found.low)
    assert math.isnan(found.high)


def test_bootstrap_of_one_item() -> None:
    assert bootstrap(np.array([[3.0]]), first, seed=0) == Interval(3, 3)


def test_bootstrap_of_whole_numbers() -> None:
    kinds: list[Any] = [np.bool_, np.uint8, np.int64, np.float32, np.float64]
    items = np.arange(20).reshape(10, 2) % 2
    found = {kind: bootstrap(items.astype(kind), first, seed=0) for kind in kinds}
    assert len(set(found.values())) == 1


def test_memory_of_bootstrap() -> None:
    """64 MB at most beside its input, for data sets of any length."""
    sums_NQ = np.ones((1 << 20, 2))
    tracemalloc.start()
    try:
        bootstrap(sums_NQ, ratio, seed=0, resamples=40)
        long = tracemalloc.get_traced_memory()[1]
        tracemalloc.reset_peak()
        bootstrap(sums_NQ[:10], ratio, seed=0, resamples=20_000)
        short = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert max(long, short) < 64e6


# samples_needed


@given(
    st.floats(-0.1, 0.1),
    st.floats(1e-6, 1),
    st.floats(-0.1, 0.1),
    levels,
)
def test_samples_needed_is_the_smallest(
    loss: float, variance: float, margin: float, level: float
) -> None:
    assume(abs(loss - margin) > 1e-6)
    found = samples_needed(loss, variance, margin, level=level)
    assert found is not None
    z = NormalDist().inv_cdf(level)

    def settled(samples: float) -> bool:
        half = z * math.sqrt(variance / samples)
        return loss + half <= margin if loss < margin else loss - half > margin

    # Rounding moves a number of samples by far less than one in a billion.
    assert settled(found * (1 + 1e-9))
    fewer = (found - 1) * (1 - 1e-9)
    assert fewer == 0 or not settled(fewer)


def test_samples_needed_in_round_numbers() -> None:
    level = 0.9772498680518208  # z = 2
    assert samples_needed(0.0, 1.0, 0.1, level=level + 1e-9) == 401
    assert samples_needed(0.0, 1.0, 0.1, level=level - 1e-9) == 400
    assert samples_needed(0.3, 1.0, 0.1, level=level - 1e-9) == 100
    assert samples_needed(-5.0, 1.0, 5.0) == 1
    assert samples_needed(5.0, 1.0, -5.0) == 1


@pytest.mark.parametrize(
    "loss, variance, margin",
    [
        (0.1, 1.0, 0.1),
        (0.1, 0.0, 0.2),
        (0.0, 1.0, 1e-300),
        (math.nan, 1.0, 0.1),
        (0.0, math.inf, 0.1),
        (math.inf, math.nan, 0.1),
    ],
)
def test_no_number_of_samples_settles_it(loss: float, variance: float, margin: float) -> None:
    assert samples_needed(loss, variance, margin) is None


# the module


def test_import_is_light() -> None:
    """scipy is loaded by the one test that needs it."""
    program = (
        "import sys, ensemblekit.statistics\n"
        "print([name for name in ('torch', 'scipy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
