"""Owns post-hoc EMA: a moving average of any width out of stored ones (Karras 2024, section 3).

Input: snapshots that are power-function moving averages themselves, of widths that are stated.

A power-function average of exponent g at time t weighs the weights of time s by
p(s) = (g + 1) s^g / t^(g + 1); its width is its standard deviation over t. The row is the combination
of the stored averages' p that is nearest to the wanted p in the least-squares sense.
"""

import math
import re
from typing import TYPE_CHECKING, Annotated

from ensemblekit.candidates import Row
from ensemblekit.errors import IncompatibleError, UsageError, listing

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from ensemblekit.snapshots import Snapshot, SnapshotSet

_FACTS = ("sigma_rel", "ema_std", "std")
_IN_NAMES = re.compile(r"(?<![\d.])(0\.\d+)(?![\d.]*\d)")
_WIDEST = 1 / math.sqrt(12)  # of a flat average, exponent 0


def posthoc_ema(
    snapshots: "SnapshotSet",
    *,
    width: Annotated[float | None, "relative width of the wanted average, such as 0.1"] = None,
    stored_widths: Annotated[
        tuple[float, ...] | None,
        "widths of the given averages, one for all or one each, oldest first [default: what the "
        "files or their names say]",
    ] = None,
    objective: object = None,
) -> Row:
    """Coefficients over stored averages for an average of another width at the newest time.

    Args:
        snapshots: K moving averages with steps (or epochs) and widths.
        width: Standard deviation over the training time, more than 0 and at most 0.288.
        stored_widths: Widths of the snapshots.
        objective: Not used.

    Raises:
        UsageError: No width, or one out of range; no time or no width is known of a snapshot.
        IncompatibleError: Snapshots that are raw weights.
    """
    import numpy as np

    from ensemblekit.snapshots import position

    stated = stored_widths is not None  # of a plain file only its owner knows what it holds
    raw = [
        s.name
        for s in snapshots.snapshots
        if s.role != "ema" and not (stated and len(s.available) == 1)
    ]
    if raw:
        raise IncompatibleError(
            f"{listing(raw)}: raw weights, and a post-hoc EMA is made of moving averages",
            hint="--weights ema where the files hold one; for raw snapshots --method ema",
        )
    if width is None:
        raise UsageError("method 'posthoc-ema' needs a width", hint="--width 0.1")
    widths = [width, *_stored(snapshots, stored_widths)]
    exponents = np.array([exponent(w) for w in widths])
    known = [position(s, snapshots.ordered_by) for s in snapshots.snapshots]
    times = [time for time in known if time is not None and time > 0]
    if len(times) < len(known):
        raise UsageError(
            "a post-hoc EMA needs the step of every snapshot, and more than 0",
            hint="number the files by step, such as ema-0.050-0001000.pt",
        )
    times_ = np.array([max(times), *times]) / max(times)
    if stored_widths is not None and len({*stored_widths}) > 1 and len({*times}) < len(times):
        raise UsageError(
            "--stored-widths: several averages were stored at one time, so there is no order to name "
            "their widths in",
            hint="put the widths into the names, such as ema-0.050-0001000.pt",
        )
    products = _products(exponents, times_)
    row_K = np.linalg.lstsq(products[1:, 1:], products[1:, 0], rcond=None)[0]
    # Karras leaves the sum as it comes, 0.98 to 1.001 in practice; a mean of weights has sum 1
    coefficients = tuple(float(c) for c in row_K)
    return Row(coefficients, math.fsum(coefficients))


def exponent(width: float) -> float:
    """The exponent g of a power-function average: width^2 = (g + 1) / ((g + 2)^2 (g + 3)).

    Raises:
        UsageError: No average has this width.

    >>> round(exponent(0.1), 3)
    6.937
    """
    import numpy as np

    if not 0 < width <= _WIDEST:
        raise UsageError(
            f"width {width:g}: a moving average is more than 0 and at most {_WIDEST:.4f} wide, "
            "as a share of the training time"
        )
    square = width**-2
    roots = np.roots([1, 7, 16 - square, 12 - square])
    return float(roots.real.max())


def _products(
    exponents: "npt.NDArray[np.float64]", times: "npt.NDArray[np.float64]"
) -> "npt.NDArray[np.float64]":
    """Integrals of p_i p_j over time, each p scaled to the length of its own time.

    With r = min(t) / max(t) and g of the later one:
    (g_i + 1)(g_j + 1) / (g_i + g_j + 1) * r^g / max(t).
    """
    import numpy as np

    one, other = exponents[:, None], exponents[None, :]
    early, late = np.minimum.outer(times, times), np.maximum.outer(times, times)
    of_late = np.where(times[:, None] >= times[None, :], one, other)
    return (one + 1) * (other + 1) / (one + other + 1) * (early / late) ** of_late / late


def _stored(snapshots: "SnapshotSet", given: tuple[float, ...] | None) -> list[float]:
    if given is not None and len(given) == 1:
        return [given[0]] * len(snapshots)
    if given is not None and len(given) != len(snapshots):
        raise UsageError(f"--stored-widths: {len(given)} widths for {len(snapshots)} snapshots")
    if given is not None:
        return list(given)
    found = {s.name: _width_of(s) for s in snapshots.snapshots}
    silent = [name for name, value in found.items() if value is None]
    if silent:
        raise UsageError(
            f"no width is known of {listing(silent)}",
            hint="--stored-widths W, or W1,W2,... with one for each, oldest first",
        )
    return [value for value in found.values() if value is not None]


def _width_of(snapshot: "Snapshot") -> float | None:
    for fact in _FACTS:
        if fact in snapshot.facts.metrics:
            return snapshot.facts.metrics[fact]
    named = _IN_NAMES.findall(snapshot.path.name)
    return float(named[0]) if len(named) == 1 else None
