"""Owns uncertainty: intervals and tests for what is measured on a finite data set.

Input: counts and sums over the items of the data set; nothing here knows models or predictions.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

# Resampled at a time. Together: 64 resamples of 65,536 items, 32 MiB.
_ITEMS = 1 << 16
_WEIGHTS = 1 << 22


@dataclass(frozen=True)
class Interval:
    """Where a value lies with the confidence that was asked for; both ends belong to it.

    Attributes:
        low: Lower end, nan if undefined.
        high: Upper end, nan if undefined.
    """

    low: float
    high: float


def wilson(successes: float, trials: float, *, level: float = 0.95) -> Interval:
    """Score interval for a proportion (Wilson 1927, JASA 22:209).

    The p with (s - n p)² <= z² n p (1 - p), for s successes in n trials.

    Args:
        successes: 0 to `trials`; need not be whole.
        trials: No trials give [0, 1].
        level: Confidence, two-sided, between 0 and 1.

    Returns:
        Within [0, 1]; has a width when all or none succeed.

    >>> interval = wilson(90, 100)
    >>> f"{interval.low:.3f} to {interval.high:.3f}"
    '0.826 to 0.945'
    """
    assert 0 <= successes <= trials
    z = _two_sided(level)
    return Interval(
        _wilson_low(successes, trials, z), 1 - _wilson_low(trials - successes, trials, z)
    )


def _wilson_low(successes: float, trials: float, z: float) -> float:
    """The smaller root; this form of it keeps its digits when it is near 0."""
    if successes == 0:
        return 0.0
    share = successes / trials
    root = math.sqrt(successes * (1 - share) + z * z / 4)
    return share * successes / (successes + z * z / 2 + z * root)


def tango(won: int, lost: int, total: int, *, level: float = 0.95) -> Interval:
    """Score interval for the difference of paired proportions (Tango 1998, Stat. Med. 17:891).

    Of n pairs, b are successes for the first only (won) and c for the second only (lost). The
    interval holds every difference d that the score test does not reject:

        |b - c - n d| <= z sqrt(n (2 q + d (1 - d)))

    where q is the likeliest P(lost) given d, the larger root of
    2n q² + ((2n - b + c) d - b - c) q - c d (1 - d) = 0.

    Unlike Wald's, it has a width when no pair is discordant, and it stays within [-1, 1].
    With few discordant pairs its ends differ: where about five are expected, a bound at 95% fails
    up to 6% of the time if it is the end away from 0, up to 9% if it is the end towards 0.

    Args:
        won: Pairs that only the first has right.
        lost: Pairs that only the second has right.
        total: All pairs; no pairs give [-1, 1].
        level: Confidence, two-sided, between 0 and 1. One end alone is a bound at
            (1 + level) / 2, so 0.9 gives bounds at 95%.

    Returns:
        Holds (won - lost) / total. The ends are right to 1e-10.

    >>> interval = tango(6, 16, 161)
    >>> f"{interval.low:.4f} to {interval.high:.4f}"
    '-0.1240 to -0.0054'
    """
    assert won >= 0
    assert lost >= 0
    assert won + lost <= total
    if total == 0:
        return Interval(-1.0, 1.0)
    z = _two_sided(level)
    return Interval(_tango_low(won, lost, total, z), -_tango_low(lost, won, total, z))


def _tango_low(won: int, lost: int, total: int, z: float) -> float:
    """The largest difference below the estimate that the score test rejects, by bisection."""
    low, high = -1.0, (won - lost) / total
    for _ in range(64):
        middle = (low + high) / 2
        excess = won - lost - total * middle
        if excess > z * math.sqrt(_tango_variance(won, lost, total, middle)):
            low = middle
        else:
            high = middle
    return low


def _tango_variance(won: int, lost: int, total: int, difference: float) -> float:
    """Variance of won - lost under the likeliest model with this difference."""
    d = difference
    if d < 0:
        # The mirror image: with d >= 0 neither `constant` nor what the root is of is negative.
        won, lost, d = lost, won, -d
    linear = (2 * total - won + lost) * d - won - lost
    constant = lost * d * (1 - d)
    root = math.sqrt(linear * linear + 8 * total * constant)
    # Two forms of one number; each subtracts what is nearly equal where the other does not.
    if linear > 0:
        q = 2 * constant / (linear + root)
    else:
        q = (root - linear) / (4 * total)
    return total * (2 * q + d * (1 - d))


def mcnemar(won: int, lost: int) -> float:
    """P-value of the exact McNemar test: two-sided, of won and lost being as likely.

    min(1, 2 P(X <= min(won, lost))) with X binomial over won + lost trials at 1/2
    (McNemar 1947, Psychometrika 12:153). 1 where no pair is discordant.

    Args:
        won: Pairs that only the first has right.
        lost: Pairs that only the second has right.

    >>> round(mcnemar(1, 5), 6)
    0.21875
    """
    from scipy.special import bdtr

    assert won >= 0
    assert lost >= 0
    return min(1.0, 2 * float(bdtr(min(won, lost), won + lost, 0.5)))


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """P-values adjusted for their number (Holm 1979, Scand. J. Statist. 6:65).

    Of m p-values in rising order, the j-th becomes max over i <= j of min(1, (m - i + 1) p_i).
    To reject where this is at most alpha makes any false rejection at most alpha probable,
    whatever the tests have in common.

    Args:
        p_values: 0 to 1; None for a test that was not made, which counts for nothing.

    Returns:
        In the order given, None where it was None.

    >>> holm([0.01, None, 0.25, 0.03])
    [0.03, None, 0.25, 0.06]
    """
    made = sorted((p, place) for place, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, (p, place) in enumerate(made):
        assert 0 <= p <= 1
        largest = max(largest, min(1.0, (len(made) - rank) * p))
        adjusted[place] = largest
    return adjusted


def bootstrap(
    sums_NQ: Floats,
    value: Callable[[Floats], Floats],
    *,
    seed: int,
    resamples: int = 2000,
    level: float = 0.95,
) -> Interval:
    """Percentile bootstrap over items (Efron 1979, Ann. Statist. 7:1).

    A resample draws N items with replacement. The statistic is a function of sums over items, so
    a resample is no more than how often each item was drawn, times the items.

    Args:
        sums_NQ: What each of N items adds to each of Q sums.
        value: Takes B rows of sums, (B, Q), and gives their B values.
        seed: The same seed gives the same interval.
        resamples: How many.
        level: Confidence, two-sided, between 0 and 1.

    Returns:
        Quantiles of the values that are finite; nan where none is. A single point where all
        resamples agree, which N = 1 always does: too few items show no uncertainty.

    >>> sums_NQ = np.array([[0.0], [1.0], [1.0], [1.0]])
    >>> bootstrap(sums_NQ, lambda sums_BQ: sums_BQ[:, 0] / 4, seed=0)
    Interval(low=0.25, high=1.0)
    """
    # Infinite items and empty denominators are the statistic's to have: they make it undefined.
    with np.errstate(all="ignore"):
        values_R = np.asarray(value(resample(sums_NQ, seed=seed, resamples=resamples)), np.float64)
    assert values_R.shape == (resamples,)
    return percentiles(values_R, level=level)


def percentiles(values_R: Floats, *, level: float = 0.95) -> Interval:
    """The middle `level` of the values that are finite; nan where none is."""
    assert 0 < level < 1
    finite = values_R[np.isfinite(values_R)]
    if not len(finite):
        return Interval(math.nan, math.nan)
    low, high = np.quantile(finite, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(low), float(high))


def resample(sums_NQ: Floats, *, seed: int, resamples: int = 2000) -> Floats:
    """Sums of each resample, (R, Q); what `bootstrap` takes its quantiles from.

    Long data sets are drawn in parts: first how many items fall into each part, then which. That
    is the same distribution, bounds the memory, and counts within the processor's cache.
    """
    generator = np.random.default_rng(seed)
    items = len(sums_NQ)
    assert items > 0
    starts = range(0, items, _ITEMS)
    sizes = np.array([min(_ITEMS, items - start) for start in starts])
    drawn_RP = generator.multinomial(items, sizes / items, size=resamples)
    totals_RQ = np.zeros((resamples, sums_NQ.shape[1]))
    for part, start in enumerate(starts):
        size = int(sizes[part])
        part_NQ = np.asarray(sums_NQ[start : start + size], np.float64)
        block = min(resamples, max(1, _WEIGHTS // size))
        weights_BN = np.empty((block, size))
        for first in range(0, resamples, block):
            counts = drawn_RP[first : first + block, part]
            for row, count in enumerate(counts):
                drawn = generator.integers(0, size, count)
                weights_BN[row] = np.bincount(drawn, minlength=size)
            totals_RQ[first : first + block] += weights_BN[: len(counts)] @ part_NQ
    return totals_RQ


def samples_needed(
    loss: float, variance: float, margin: float, *, level: float = 0.95
) -> int | None:
    """How many samples would settle whether a loss is within a margin.

    The smallest n whose one-sided bound lies on the side of the margin where the loss is:
    loss + z sqrt(v / n) <= margin for a loss within it, loss - z sqrt(v / n) > margin for one
    beyond. It takes the loss and the variance for the true ones, so a new sample of this size
    settles it about every second time.

    Args:
        loss: Mean difference by item.
        variance: Of that difference, by item.
        margin: The largest loss that is accepted.
        level: Confidence of the one-sided bound, at least 0.5.

    Returns:
        At least 1. None where no number settles it: the loss is the margin, or the variance is 0
        and so says nothing, or one is nan, or the number is beyond what a float holds.

    >>> samples_needed(0.001, 0.04, 0.005)
    6764
    """
    assert not variance < 0
    assert 0.5 <= level < 1
    if loss == margin or variance == 0:
        return None
    ratio = NormalDist().inv_cdf(level) * math.sqrt(variance) / abs(margin - loss)
    samples = ratio * ratio
    if not math.isfinite(samples):
        return None
    return max(1, math.ceil(samples)) if loss < margin else math.floor(samples) + 1


def _two_sided(level: float) -> float:
    """The z that a normal value exceeds in size with probability 1 - level."""
    assert 0 < level < 1
    return NormalDist().inv_cdf((1 + level) / 2)
