"""Owns how values become words: numbers, sizes, probabilities, intervals, command lines.

Input: values as JSON holds them; what is missing or is no number shows as a dash.
"""

import json
import math
import shlex
from collections.abc import Mapping
from dataclasses import dataclass

from ensemblekit.errors import printable

MISSING = "-"


def number(value: object) -> float | None:
    """A finite number, or None for everything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def interval(value: object) -> tuple[float, float] | None:
    """The two ends of an interval, or None."""
    if not isinstance(value, list | tuple) or len(value) != 2:
        return None
    low, high = number(value[0]), number(value[1])
    return None if low is None or high is None else (low, high)


def texts(value: object) -> list[str]:
    """The texts in a list; a lone text counts as a list of one."""
    values = value if isinstance(value, list | tuple) else [value]
    return [printable(str(v)) for v in values if v is not None]


def command(value: object) -> str | None:
    """A command line, from one or from its words."""
    if isinstance(value, list | tuple):
        return printable(shlex.join(str(word) for word in value)) if value else None
    return printable(str(value)) if value else None


def plain(value: object, digits: int = 4) -> str:
    """A number with so many significant digits.

    >>> plain(0.123456), plain(1234567), plain(None)
    ('0.1235', '1,234,567', '-')
    """
    found = number(value)
    if found is None:
        return MISSING
    if found == round(found) and abs(found) < 1e12:
        return f"{found:,.0f}"
    return f"{found:,.0f}" if 1e4 <= abs(found) < 1e9 else f"{found:.{digits}g}"


def nbytes(value: object) -> str:
    """A size in decimal units.

    >>> nbytes(44_700_000)
    '44.7 MB'
    """
    found = number(value)
    if found is None:
        return MISSING
    for unit in ("B", "kB", "MB", "GB"):
        if abs(found) < 1000:
            return f"{found:.3g} {unit}"
        found /= 1000
    return f"{found:,.4g} TB"


def milliseconds(value: object) -> str:
    """A latency, without its unit.

    >>> milliseconds(1.4), milliseconds(1234.5)
    ('1.40', '1,234')
    """
    found = number(value)
    if found is None:
        return MISSING
    return f"{found:.2f}" if found < 100 else f"{found:,.0f}"


def probability(value: object) -> str:
    """A p-value.

    >>> probability(0.00004), probability(0.0312)
    ('< 0.001', '0.031')
    """
    found = number(value)
    if found is None:
        return MISSING
    return "< 0.001" if found < 0.001 else f"{found:.3f}"


def counted(count: int, noun: str) -> str:
    """A number of things.

    >>> counted(1, "snapshot"), counted(1000, "sample")
    ('1 snapshot', '1,000 samples')
    """
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def words(value: object) -> str:
    """A value of any shape, on one line."""
    if isinstance(value, Mapping | list | tuple):
        return json.dumps(value, ensure_ascii=False, default=str)
    return plain(value) if number(value) is not None else str(value)


@dataclass(frozen=True)
class Metric:
    """A metric, and how its values are written.

    >>> accuracy = Metric("accuracy", percent=True)
    >>> accuracy.show(0.9731), accuracy.gain(0.012), accuracy.span((0.96, 0.98))
    ('97.31%', '+1.20 pp', '96.00 to 98.00')
    """

    name: str
    percent: bool = False
    higher_is_better: bool = True

    def scaled(self, value: object) -> float | None:
        """The number that is shown: a hundred times the share, for percentages."""
        found = number(value)
        return found if found is None or not self.percent else 100 * found

    def show(self, value: object) -> str:
        """A value of the metric."""
        found = self.scaled(value)
        if self.percent and found is not None:
            return f"{found:.2f}%"
        aligned = found is not None and 0.01 <= abs(found) < 10
        return f"{found:.4f}" if aligned else plain(found)

    def gain(self, value: object) -> str:
        """A difference of two values; its sign says whether it is better."""
        found = self.scaled(value)
        if found is None:
            return MISSING
        return f"{found:+.2f} pp" if self.percent else f"{found:+.4g}"

    def span(self, value: object) -> str:
        """An interval of values or of differences, without a unit; empty where there is none."""
        ends = interval(value)
        if ends is None:
            return ""
        shown = [100 * end if self.percent else end for end in ends]
        return " to ".join(f"{end:.2f}" if self.percent else f"{end:.4g}" for end in shown)

    @property
    def label(self) -> str:
        """The name, with the unit of `scaled`, for an axis."""
        return f"{self.name}, %" if self.percent else self.name
