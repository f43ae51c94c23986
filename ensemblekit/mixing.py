"""Owns the arithmetic of averaging: a block of K snapshots' bytes becomes M rows' bytes.

Input: blocks from `blocks`, rows. Sums run in float64 in canonical order (float64 sources:
compensated), are divided once and rounded once.

Legend of shapes: K snapshots, N values, B bytes.
"""

import base64
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from ensemblekit.candidates import Row
from ensemblekit.dtypes import DType, narrow, to_bfloat16

Bytes = npt.NDArray[np.uint8]

_SHRINK = 2.0**-100
SMALL = 1 << 16  # values whose moments are summed in float64; float32's are good to 1e-5
_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
_HALF = np.dtype(np.float16)
_SINGLE = np.dtype(np.float32)


@dataclass
class Moments:
    """Of one tensor: squared norms of the snapshots, their products with the first row's mean.

    Attributes:
        squares_K: Of each snapshot, the sum of squares.
        products_K: Of each snapshot, the sum of products with the mean.
        square: The sum of squares of the mean.
        values: How many values these are sums over.
    """

    squares_K: npt.NDArray[np.float64]
    products_K: npt.NDArray[np.float64]
    square: float = 0.0
    values: int = 0

    def scaled(self, values: int) -> "Moments":
        """As if all `values` of the tensor had been seen, and not only some blocks of it."""
        more = values / self.values if self.values else 1.0
        return Moments(self.squares_K * more, self.products_K * more, self.square * more, values)

    def add(
        self,
        values_KN: npt.NDArray[Any],
        mean_N: npt.NDArray[Any],
        squares_K: npt.NDArray[Any] | None = None,
    ) -> None:
        """Take in a block, and the first row's mean of it; its squares when they are known."""
        if squares_K is None:
            squares_K = np.einsum("kn,kn->k", values_KN, values_KN)
        self.values += mean_N.size
        self.squares_K += squares_K
        self.products_K += np.einsum("kn,n->k", values_KN, mean_N)
        self.square += float(np.einsum("n,n->", mean_N, mean_N))

    @classmethod
    def none(cls, count: int) -> "Moments":
        """Before the first block."""
        return cls(np.zeros(count), np.zeros(count))

    def to_json(self) -> list[Any]:
        """Plain values; digits of a thousand snapshots would take ten times the room."""
        coded = (base64.b64encode(a.tobytes()).decode() for a in (self.squares_K, self.products_K))
        return [*coded, self.square]

    @classmethod
    def from_json(cls, value: Sequence[Any]) -> "Moments":
        """The inverse of `to_json`."""
        squares_K, products_K = (np.frombuffer(base64.b64decode(v)) for v in value[:2])
        return cls(squares_K, products_K, float(value[2]))


class NotRegular(Exception):  # no error: the values want a closer look
    """A block that holds NaN or Inf, or values whose squares are too large for float32."""


class Scratch(threading.local):
    """Memory of one thread that is used again from block to block: fresh pages cost more than sums."""

    def __init__(self) -> None:
        self._held: dict[str, npt.NDArray[np.uint8]] = {}

    def array(self, name: str, shape: tuple[int, ...], dtype: Any) -> npt.NDArray[Any]:
        """An array with any values, good until the next one of that name."""
        nbytes = prod(shape) * np.dtype(dtype).itemsize
        held = self._held.get(name)
        if held is None or held.size < nbytes:
            held = self._held[name] = np.empty(nbytes, np.uint8)
        found: npt.NDArray[Any] = held[:nbytes].view(dtype).reshape(shape)
        return found


def is_quick(real: np.dtype[Any], rows: Sequence[Row], target: DType | None = None) -> bool:
    """Whether `quick` may be used: what is equal in all snapshots then comes out as it went in.

    A mean with positive coefficients of equal values is off by a few units in float64's last place,
    and rounds back to its own type; to another one only a plain mean does, which is exact. Negative
    coefficients cancel, and nothing is left to round float64 to.
    """
    numbers = [c for row in rows for c in row.coefficients]
    sound = min(numbers) >= 0 and (target is None or {*numbers} <= {0.0, 1.0})
    return sound and real in (_SINGLE, _HALF, _BFLOAT16)


def quick(
    block_KB: Bytes,
    real: np.dtype[Any],
    rows: Sequence[Row],
    moments: Moments | None,
    scratch: Scratch,
    target: DType | None,
) -> list[Bytes]:
    """Rows' bytes of a block of float32, float16 or bfloat16 values that are all finite.

    Args:
        block_KB: K rows of bytes.
        real: Type of the values.
        rows: M rows.
        moments: Added to; None where other blocks of the tensor tell enough.
        scratch: Holds the results until the next call.
        target: Type of the results when it is another.

    Raises:
        NotRegular: Nothing was done; `careful` tells what is wrong, if anything is.
    """
    wide_KN = _single(block_KB, real, scratch)
    if moments is None and not all(all(row.coefficients) for row in rows):
        moments = Moments.none(len(wide_KN))  # a sum does not see what it leaves out
    seen_KN: npt.NDArray[Any] = wide_KN
    if moments is not None:
        if wide_KN.size <= SMALL:
            seen_KN = wide_KN.astype(np.float64)
        with np.errstate(over="ignore", invalid="ignore"):
            squares_K = np.einsum("kn,kn->k", seen_KN, seen_KN)
        if not np.isfinite(squares_K).all():
            raise NotRegular
    results = []
    for m, row in enumerate(rows):
        only = row.only
        if only is not None:
            mean_N: npt.NDArray[Any] = wide_KN[only]
            result = block_KB[only] if target is None else _narrowed(mean_N, target.real)
        else:
            with np.errstate(over="ignore", invalid="ignore"):
                mean_N = _mean(wide_KN, row, scratch)
            if not np.isfinite(mean_N).all():
                raise NotRegular
            kind = real if target is None else target.real
            result = _rounded(mean_N, kind, scratch, f"result {m}")
        results.append(result)
        if m == 0 and moments is not None:
            if mean_N.dtype != seen_KN.dtype:
                mean_N = _cast(mean_N, seen_KN.dtype, scratch)
            moments.add(seen_KN, mean_N, squares_K)
    return results


def _single(block_KB: Bytes, real: np.dtype[Any], scratch: Scratch) -> npt.NDArray[np.float32]:
    """The values as float32, which holds all of them exactly."""
    if real == _SINGLE:
        return block_KB.view(np.float32)
    halves_KN = block_KB.view(np.uint16)
    if real == _HALF:
        wide_KN = scratch.array("wide", halves_KN.shape, np.float32)
        np.copyto(wide_KN, block_KB.view(np.float16))
        return wide_KN
    bits_KN = scratch.array("wide", halves_KN.shape, np.uint32)
    np.left_shift(halves_KN, 16, out=bits_KN, dtype=np.uint32, casting="unsafe")
    return bits_KN.view(np.float32)


def _mean(wide_KN: npt.NDArray[np.float32], row: Row, scratch: Scratch) -> npt.NDArray[np.float64]:
    size = (wide_KN.shape[1],)
    total_N = scratch.array("total", size, np.float64)
    term_N = scratch.array("term", size, np.float64)
    used = [k for k, coefficient in enumerate(row.coefficients) if coefficient != 0]
    for place, k in enumerate(used):
        into_N = term_N if place else total_N
        if row.coefficients[k] == 1:
            np.copyto(into_N, wide_KN[k])
        else:
            np.multiply(wide_KN[k], row.coefficients[k], out=into_N, dtype=np.float64)
        if place:
            total_N += term_N
    if row.divisor != 1:
        total_N /= row.divisor
    return total_N


def _cast(values_N: npt.NDArray[Any], dtype: Any, scratch: Scratch) -> npt.NDArray[Any]:
    cast_N = scratch.array("cast", values_N.shape, dtype)
    np.copyto(cast_N, values_N, casting="same_kind")
    return cast_N


def _rounded(
    mean_N: npt.NDArray[np.float64], kind: np.dtype[Any], scratch: Scratch, name: str
) -> Bytes:
    if kind == _BFLOAT16:
        near_N = _cast(mean_N, np.float32, scratch)
        result_N = scratch.array(name, mean_N.shape, np.uint16)
        return to_bfloat16(mean_N, near_N, result_N).view(np.uint8)
    if kind.isbuiltin != 1:
        return _narrowed(mean_N, kind)
    result_N = scratch.array(name, mean_N.shape, kind)
    with np.errstate(over="ignore"):
        np.copyto(result_N, mean_N, casting="same_kind")
    return result_N.view(np.uint8)


def _narrowed(values_N: npt.NDArray[Any], kind: np.dtype[Any]) -> Bytes:
    with np.errstate(over="ignore", invalid="ignore"):
        return narrow(values_N.astype(np.float64, copy=False), kind).view(np.uint8)


def careful(
    block_KB: Bytes,
    values_KN: npt.NDArray[np.float64],
    real: np.dtype[Any],
    rows: Sequence[Row],
    moments: Moments,
    target: DType | None,
) -> list[Bytes]:
    """Rows' bytes of a block of any values; what is bitwise equal in all snapshots is copied.

    Args:
        block_KB: K rows of bytes.
        values_KN: The same as float64.
        real: Type of the values.
        rows: M rows.
        moments: Added to.
        target: Type of the results when it is another.
    """
    bits_KN = block_KB.view(f"u{real.itemsize}")
    same_N = (bits_KN == bits_KN[0]).all(axis=0)
    equal = bool(same_N.all())
    results = []
    for m, row in enumerate(rows):
        only = 0 if equal else row.only
        if only is not None:
            mixed_N, result = values_KN[only], block_KB[only]
        else:
            mixed_N = _mix_within_range(values_KN, row, compensated=real == np.float64)
            np.copyto(mixed_N, values_KN[0], where=same_N)
            result = _narrowed(mixed_N, real)
            if target is None:  # NaN has many bit patterns
                np.copyto(result.view(bits_KN.dtype), bits_KN[0], where=same_N)
        if target is not None:
            result = _narrowed(mixed_N, target.real)
        if m == 0:
            with np.errstate(invalid="ignore", over="ignore"):
                moments.add(values_KN, mixed_N)
        results.append(result)
    return results


def _mix_within_range(
    values_KN: npt.NDArray[np.float64], row: Row, *, compensated: bool
) -> npt.NDArray[np.float64]:
    """The sum of large float64 values can overflow where their mean does not."""
    with np.errstate(over="ignore", invalid="ignore"):
        mixed_N = _mix(values_KN, row, compensated=compensated)
        far_N = ~np.isfinite(mixed_N)
        if far_N.any():
            near = _mix(values_KN[:, far_N] * _SHRINK, row, compensated=compensated)
            mixed_N[far_N] = near / _SHRINK
    return mixed_N


def _mix(
    values_KN: npt.NDArray[np.float64], row: Row, *, compensated: bool
) -> npt.NDArray[np.float64]:
    total_N = np.full(values_KN.shape[1], -0.0)  # which, unlike 0.0, leaves a -0.0 what it is
    lost_N = np.zeros_like(total_N)
    for values_N, coefficient in zip(values_KN, row.coefficients, strict=True):
        if coefficient == 0:
            continue
        term_N = values_N if coefficient == 1 else values_N * coefficient
        if not compensated:
            total_N += term_N
            continue
        if coefficient != 1:
            lost_N += _product_error(values_N, coefficient, term_N)
        new_N = total_N + term_N  # Knuth's two-sum: what the addition lost, exactly
        part_N = new_N - total_N
        lost_N += (total_N - (new_N - part_N)) + (term_N - part_N)
        total_N = new_N
    if not compensated:
        total_N /= row.divisor
        return total_N
    mean_N = (total_N + lost_N) / row.divisor
    back_N = mean_N * row.divisor  # one step of long division: what the quotient left over
    left_N = (total_N - back_N) - _product_error(mean_N, row.divisor, back_N) + lost_N
    mean_N += left_N / row.divisor
    return mean_N


def _product_error(
    values_N: npt.NDArray[np.float64], factor: float, product_N: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """What rounding took from `values * factor`, exactly (Dekker 1971); 0 near overflow."""
    with np.errstate(over="ignore", invalid="ignore"):
        high_N = values_N * 134217729.0
        high_N -= high_N - values_N
        low_N = values_N - high_N
        high = factor * 134217729.0
        high -= high - factor
        low = factor - high
        error_N = ((high_N * high - product_N) + high_N * low + low_N * high) + low_N * low
        return np.where(np.isfinite(error_N), error_N, 0.0)
