"""Owns plain means of bfloat16 values in float32, where they are what float64 gives.

Input: blocks from `blocks`. With float64 most of the time goes into widening.

Legend of shapes: K snapshots, N values, H pairs of values, B bytes.
"""

from math import ceil, log2
from typing import Any

import numpy as np
import numpy.typing as npt

from ensemblekit.dtypes import DTYPES, to_bfloat16
from ensemblekit.mixing import SMALL, Bytes, Moments, NotRegular, Scratch

KIND = DTYPES["bfloat16"].numpy
BLOCK_VALUES = 1 << 20  # of all snapshots: fewer steps are worth more than caches
_MOST_SNAPSHOTS = 64
_HUGE = 0x7180  # bits of 2^100: the sum of such values could leave float32
_LARGE = 0x5000  # bits of 2^33: sums of squares stay far below what float32 can hold
_MOST_DOUBTS = 32  # when one element in so many is summed twice, float64 alone is quicker


def mean(block_KB: Bytes, scratch: Scratch, moments: Moments | None = None) -> Bytes:
    """The mean of K snapshots, to the bit the one that `mixing` makes in float64.

    A bfloat16 has 8 digits. K of them whose exponents differ by g at most have a sum of less than
    8 + g + log2(K) digits; up to 23, float32 holds it exactly, with one digit to spare: so the
    quotient lies on the same side of every tie between two bfloat16 as the true mean does, and is a
    tie only where that is one. Elements with farther exponents are summed again in float64.

    Args:
        block_KB: K rows of bytes.
        scratch: Holds the result until the next call.
        moments: Added to, in float32; None where other blocks of the tensor tell enough.

    Raises:
        NotRegular: Nothing was done: NaN, Inf, very large values, too many doubts or snapshots, an
            odd number of values, or moments of so few that they are worth float64.
    """
    count = len(block_KB)
    small = moments is not None and block_KB.size <= SMALL * KIND.itemsize
    if small or block_KB.shape[1] % 4 or count > _MOST_SNAPSHOTS:
        raise NotRegular
    pairs_KH = block_KB.view(np.uint32)  # of two values each; the first one is the lower half
    largest = _HUGE if moments is None else _LARGE
    doubtful = _doubtful(pairs_KH, 15 - ceil(log2(count)), largest, scratch)
    wide_KH = scratch.array("wide", pairs_KH.shape, np.uint32)
    lower_H = scratch.array("lower", pairs_KH.shape[1:], np.uint32)
    upper_H = scratch.array("upper", pairs_KH.shape[1:], np.uint32)
    _rounded_mean(np.left_shift(pairs_KH, 16, out=wide_KH), lower_H, scratch, moments)
    _rounded_mean(np.bitwise_and(pairs_KH, 0xFFFF0000, out=wide_KH), upper_H, scratch, moments)
    lower_H >>= 16
    upper_H &= 0xFFFF0000
    upper_H |= lower_H
    result_N = upper_H.view(np.uint16)
    if doubtful.size:
        result_N[doubtful] = _in_float64(block_KB.view(np.uint16)[:, doubtful])
    return result_N.view(np.uint8)


def _in_float64(bits_KN: npt.NDArray[np.uint16]) -> npt.NDArray[np.uint16]:
    """Bits of the means, summed from the first snapshot to the last."""
    values_KN = (bits_KN.astype(np.uint32) << 16).view(np.float32)
    mean_N = np.zeros(bits_KN.shape[1])  # which is not -0: no doubt is about zeros alone
    for values_N in values_KN:
        mean_N += values_N
    mean_N /= len(bits_KN)
    return to_bfloat16(mean_N, mean_N.astype(np.float32), np.empty(mean_N.shape, np.uint16))


def _doubtful(
    pairs_KH: npt.NDArray[np.uint32], widest: int, limit: int, scratch: Scratch
) -> npt.NDArray[np.intp]:
    """Elements whose exponents differ by more than `widest`; none may have a size from `limit` on."""
    sizes_KH = scratch.array("wide", pairs_KH.shape, np.uint32)
    np.bitwise_and(pairs_KH, 0x7FFF7FFF, out=sizes_KH)
    sizes_KN = sizes_KH.view(np.uint16)  # in the order of the values' sizes
    size = sizes_KN.shape[1:]
    largest_N = np.maximum.reduce(sizes_KN, axis=0, out=scratch.array("largest", size, np.uint16))
    if largest_N.max() >= limit:
        raise NotRegular
    least_N = np.minimum.reduce(sizes_KN, axis=0, out=scratch.array("least", size, np.uint16))
    largest_N -= least_N  # 128 a step of the exponent
    found = np.flatnonzero(largest_N > 128 * widest)
    if found.size * _MOST_DOUBTS > largest_N.size:
        raise NotRegular
    return found


def _rounded_mean(
    wide_KH: npt.NDArray[np.uint32],
    result_H: npt.NDArray[np.uint32],
    scratch: Scratch,
    moments: Moments | None,
) -> None:
    """Bits of the mean; the upper half is what bfloat16 keeps after rounding to nearest, even."""
    mean_H: npt.NDArray[Any] = result_H.view(np.float32)
    values_KH = wide_KH.view(np.float32)
    np.add.reduce(values_KH, axis=0, out=mean_H, initial=-0.0)  # leaves -0.0 as is
    mean_H /= np.float32(len(wide_KH))
    if moments is not None:
        moments.add(values_KH, mean_H)
    odd_H = scratch.array("odd", result_H.shape, np.uint32)
    np.right_shift(result_H, 16, out=odd_H)
    odd_H &= 1
    odd_H += 0x7FFF
    result_H += odd_H
