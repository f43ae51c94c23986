"""Owns the reading of any part of a tensor whose pieces are stored apart, in C order of the whole.

Input: tensor descriptions, and byte ranges of the whole. What lies in a range is one run in each
piece, since whole and pieces are in the same order: one read, spread out in memory where it has to.
"""

from bisect import bisect_left, bisect_right
from itertools import accumulate
from math import prod

import numpy as np
import numpy.typing as npt

from ensemblekit.containers import Piece, TensorSpec, read_array

Bytes = npt.NDArray[np.uint8]
# Bytes; a run up to this is copied as one item, ten times as fast where runs are tiny. numpy has no
# items of 2 GiB.
_SHORT = 4096


class PiecesReader:
    """Reads byte ranges of one tensor, and of each of its pieces no more than lies in the range.

    Beside the caller's buffer it takes less memory than the range has bytes. Strided pieces are the
    exception: each is read whole, and kept in C order until a range reaches its last byte or lies
    outside of it.

    Args:
        spec: The tensor. Its pieces cover it exactly; without pieces it is one itself.
    """

    def __init__(self, spec: TensorSpec) -> None:
        self.nbytes = spec.nbytes
        pieces = spec.pieces or (Piece((0,) * len(spec.shape), spec),)
        parts = [_Part(spec.shape, piece) for piece in pieces if piece.spec.size]
        self._parts = sorted(parts, key=lambda part: part.start)
        self._starts = [part.start for part in self._parts]
        self._ends = list(accumulate((part.end for part in self._parts), max))
        self._held: dict[_Part, Bytes] = {}

    def read_into(self, view: memoryview, offset: int) -> None:
        """Fill `view` with the bytes of the tensor in C order from byte `offset` on.

        Raises:
            DamagedError: A file ends before its piece does.
        """
        end = offset + len(view)
        assert 0 <= offset <= end <= self.nbytes
        for part in [part for part in self._held if part.start >= end or part.end <= offset]:
            del self._held[part]
        near = slice(bisect_right(self._ends, offset), bisect_left(self._starts, end))
        for part in self._parts[near]:
            first, last = part.before(offset), part.before(end)
            if first == last:
                continue
            spec, place = part.spec, part.place(first) - offset
            if not spec.in_one_run:
                if part not in self._held:
                    self._held[part] = read_array(spec).reshape(-1).view(np.uint8)
                part.spread(self._held[part][first:last], first, view, offset)
                if part.end <= end:
                    del self._held[part]
            elif part.place(last - 1) - offset - place == last - 1 - first:  # one run here, too
                spec.extent.source.read_into(view[place : place + last - first], spec.start + first)
            else:
                values = np.empty(last - first, np.uint8)
                spec.extent.source.read_into(values.data, spec.start + first)
                part.spread(values, first, view, offset)


class _Part:
    """A piece that is not empty, and the places of its bytes in the whole.

    Attributes:
        spec: The piece.
        start: Place of its first byte.
        end: Place behind its last byte.
        axes: Size, bytes of the piece and bytes of the whole in a step, outermost first. The last
            one counts bytes; axes that the piece fills are one with the axis before.
    """

    def __init__(self, shape: tuple[int, ...], piece: Piece) -> None:
        own = step = piece.spec.type.itemsize
        self.start = 0
        self.axes = [(own, 1, 1)]
        places = zip(piece.offsets, piece.spec.shape, shape, strict=True)
        for place, size, of in reversed(list(places)):
            self.start += place * step
            inner_size, inner_own, inner_step = self.axes[0]
            if step == inner_size * inner_step:
                self.axes[0] = (inner_size * size, inner_own, inner_step)
            else:
                self.axes.insert(0, (size, own, step))
            own, step = own * size, step * of
        self.spec = piece.spec
        self.end = self.place(own - 1) + 1

    def before(self, place: int) -> int:
        """How many bytes of the piece lie before a place in the whole."""
        count, rest = 0, max(0, place - self.start)
        for size, own, step in self.axes:
            index, rest = divmod(rest, step)
            count += min(index, size) * own
            if index >= size:
                break
        return count

    def place(self, number: int) -> int:
        """Where byte `number` of the piece lies in the whole."""
        place = self.start
        for size, own, step in self.axes:
            place += number // own % size * step
        return place

    def spread(self, run: Bytes, number: int, view: memoryview, offset: int) -> None:
        """Copy a run of the piece, from its byte `number` on, into bytes of the whole from `offset` on.

        The run is cut into boxes: as many steps of the outermost axis as there are, before and
        behind them steps of the next one, and so on.
        """
        sizes, owns, steps = zip(*self.axes, strict=True)
        while len(run):
            axis = next(a for a, own in enumerate(owns) if number % own == 0 and own <= len(run))
            count = min(len(run) // owns[axis], sizes[axis] - number // owns[axis] % sizes[axis])
            *outer, last = (count, *sizes[axis + 1 :])
            unit = last if last <= _SHORT else 1
            box, item = (*outer, last // unit), f"V{unit}"
            strides = (*steps[axis : axis + len(outer)], unit)
            target = np.ndarray(box, item, view, self.place(number) - offset, strides)
            taken = prod(box) * unit
            target[...] = run[:taken].view(item).reshape(box)
            run, number = run[taken:], number + taken
