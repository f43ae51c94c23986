"""Owns the stopwatch: how long something takes, how sure that is, and fair turns among rivals.

Input: functions that do one run each. What they run, and on which device, is not known here; a
clock says when a run is over.

A run is timed from its call until its results are there. Rivals take turns, so that a machine that
slows down slows all of them. Each is warmed up until its median stands still, then all are run until
the medians are known to a relative standard error, or time is up.
"""

import math
import random
import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

Name = TypeVar("Name", bound=Hashable)
Run = Callable[[], Any]
Clock = Callable[[Run], float]
"""`clock(run)` makes one run and returns its milliseconds."""

_STILL = 0.05  # change of the median between two windows of the warm-up
_WINDOW = 3  # runs
_OUTLIER = 3.0  # interquartile ranges above the third quartile
_MANY_OUTLIERS = 0.02  # share that is worth a warning


@dataclass(frozen=True)
class Effort:
    """How long to measure.

    Attributes:
        seconds: For all rivals together, the warm-up left out.
        error: Relative standard error of the median that is enough.
        least: Runs of each at least.
        most: Runs of each at most.
        warm_up_s: For all rivals together, at most; each runs once in any case.
    """

    seconds: float = 3.0
    error: float = 0.005
    least: int = 10
    most: int = 10_000
    warm_up_s: float = 3.0


QUICK = Effort(seconds=0.3, error=0.02, least=3, most=100, warm_up_s=0.15)
"""For a cost column: tells twice as slow, not 2%."""


@dataclass(frozen=True)
class Latency:
    """Times of one rival.

    Attributes:
        batch_size: Samples in a run.
        warmup: Runs before.
        iterations: Timed runs.
        mean_ms: Their mean.
        p50_ms: Their median.
        p95_ms: Their 95th percentile.
        p99_ms: Their 99th percentile.
        error: Relative standard error of the median.
        outliers: Share of runs far above the others (3 interquartile ranges above the third quartile).
    """

    batch_size: int
    warmup: int
    iterations: int
    mean_ms: float
    p50_ms: float
    p95_ms: float
    p99_ms: float
    error: float
    outliers: float

    @property
    def throughput_per_s(self) -> float:
        """Samples a second at the median."""
        return self.batch_size / self.p50_ms * 1000

    @property
    def disturbed(self) -> bool:
        """Whether so many runs were far above the others that something else was running."""
        return self.iterations >= 20 and self.outliers > _MANY_OUTLIERS

    def to_json(self) -> dict[str, float | int]:
        """The contract's keys."""
        return {**vars(self), "throughput_per_s": self.throughput_per_s}


def measure(
    runs: Mapping[Name, Run],
    *,
    clock: Clock,
    batch_size: int,
    effort: Effort | None = None,
    between: Run | None = None,
) -> dict[Name, Latency]:
    """Time rivals in turns.

    Args:
        runs: One run of each.
        clock: Times one.
        batch_size: Samples in a run.
        effort: How long; `Effort()` when None.
        between: Called before each timed run, outside of the time: to clear caches.

    Returns:
        Latency of each.
    """
    effort = effort or Effort()
    before = dict.fromkeys(runs, 0)
    for name, run in runs.items():
        before[name] = _warm_up(run, clock, effort.warm_up_s / max(len(runs), 1))
    times: dict[Name, list[float]] = {name: [] for name in runs}
    names, order = list(runs), random.Random(0)  # noqa: S311  # no secret
    end, done, check = time.perf_counter() + effort.seconds, 0, effort.least
    while done < effort.most:
        for name in order.sample(names, len(names)):  # who follows whom changes from round to round
            if between is not None:
                between()
            times[name].append(clock(runs[name]))
        done += 1
        if done < effort.least:
            continue
        if time.perf_counter() > end:
            break
        if done >= check:  # sorting is work, too: not after each round
            check = math.ceil(done * 1.2)
            if all(median_error(np.array(own)) <= effort.error for own in times.values()):
                break
    return {
        name: summary(np.array(own), batch_size=batch_size, warmup=before[name])
        for name, own in times.items()
    }


def _warm_up(run: Run, clock: Clock, seconds: float) -> int:
    """Runs until two windows in a row have the same median; returns how many."""
    end = time.perf_counter() + seconds
    done, last = 0, math.inf
    while True:
        window = []
        for _ in range(_WINDOW):
            window.append(clock(run))
            done += 1
            if time.perf_counter() > end:
                return done
        median = float(np.median(window))
        if abs(median - last) <= _STILL * median:
            return done
        last = median


def median_error(times_ms: npt.NDArray[np.float64]) -> float:
    """Relative standard error of the median, from the order statistics around it.

    The number of times below the median is binomial (n, 1/2); the values one standard deviation,
    sqrt(n)/2, to either side of the middle bound the median's standard error without assuming a
    distribution. Infinite for fewer than 3 times.
    """
    n = len(times_ms)
    if n < 3:
        return math.inf
    ordered = np.sort(times_ms)
    reach = max(1.0, math.sqrt(n) / 2)
    low = max(0, math.floor((n - 1) / 2 - reach))
    high = min(n - 1, math.ceil((n - 1) / 2 + reach))
    return float((ordered[high] - ordered[low]) / 2 / np.median(ordered))


def summary(times_ms: npt.NDArray[np.float64], *, batch_size: int, warmup: int = 0) -> Latency:
    """The figures of some times."""
    p25, p50, p75, p95, p99 = (float(v) for v in np.percentile(times_ms, [25, 50, 75, 95, 99]))
    outliers = float((times_ms > p75 + _OUTLIER * (p75 - p25)).mean())
    return Latency(
        batch_size,
        warmup,
        len(times_ms),
        float(times_ms.mean()),
        p50,
        p95,
        p99,
        median_error(times_ms),
        outliers,
    )


def ratio(one: Latency, other: Latency) -> tuple[float, float]:
    """How many times longer `one` takes than `other`, and the standard error of that."""
    value = one.p50_ms / other.p50_ms
    return value, value * math.hypot(one.error, other.error)


def wall_clock(synchronize: Callable[[], None] | None = None) -> Clock:
    """A clock of the CPU; `synchronize` returns when all work that was started is done."""

    def clock(run: Run) -> float:
        if synchronize is not None:
            synchronize()
        start = time.perf_counter_ns()
        run()
        if synchronize is not None:
            synchronize()
        return (time.perf_counter_ns() - start) / 1e6

    return clock


def cuda_clock(device: Any) -> Clock:
    """A clock of a GPU's own events: without the time that Python takes to see the end."""
    import torch

    def clock(run: Run) -> float:
        start = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        torch.cuda.synchronize(device)
        stream = torch.cuda.current_stream(device)
        start.record(stream)
        run()
        end.record(stream)
        torch.cuda.synchronize(device)
        return float(start.elapsed_time(end))

    return clock
