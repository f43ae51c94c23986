"""Owns the reading of one tensor in all snapshots, block by block, with its checksums.

Input: tensor descriptions. A block is an array of K rows of bytes, one row a snapshot.
"""

from collections.abc import Collection, Iterator, Sequence

import numpy as np
import numpy.typing as npt

from ensemblekit.checksums import crc32
from ensemblekit.containers import Extent, TensorSpec, is_dense, read_array, storage_span
from ensemblekit.dtypes import DType
from ensemblekit.errors import DamagedError
from ensemblekit.files import blocks
from ensemblekit.mixing import Scratch
from ensemblekit.pieces import PiecesReader
from ensemblekit.snapshots import Snapshot
from ensemblekit.tables import TensorTable, one_form

BLOCK_VALUES = 1 << 19  # values of all snapshots together that are in hand at a time


class TensorBlocks:
    """Blocks of one tensor in every snapshot, in the order in which the storages hold them.

    Args:
        key: Of the tensor.
        snapshots: That hold it.
        scratch: Memory for the blocks.
        most: Values of all snapshots together in a block.
    """

    def __init__(
        self,
        key: str,
        snapshots: Sequence[Snapshot],
        scratch: Scratch | None = None,
        most: int | None = None,
    ) -> None:
        self.key = key
        self.most = most or BLOCK_VALUES
        self.scratch = scratch or Scratch()
        self.snapshots = snapshots
        self.specs = [snapshot.tensors[key] for snapshot in snapshots]
        first = self.specs[0]
        alike = all(s.stride == first.stride and (s.pieces or is_dense(s)) for s in self.specs)
        self.whole: list[npt.NDArray[np.uint8]] | None = None
        self.permutation: tuple[int, ...] | None = None
        if not alike:  # rare: gaps, or different memory formats; each is brought to C order
            self.whole = [read_array(s).reshape(-1).view(np.uint8) for s in self.specs]
        elif first.stride is not None:
            steps = first.stride
            self.permutation = tuple(
                sorted(range(len(steps)), key=lambda d: (-steps[d], -first.shape[d]))
            )

    def __iter__(self) -> Iterator[tuple[int, npt.NDArray[np.uint8]]]:
        """(byte offset, array of K rows of bytes); the array is reused."""
        spec = self.specs[0]
        itemsize = spec.type.itemsize
        count = max(256, self.most // len(self.specs)) & ~1  # `bfloat16` looks at pairs
        step = min(count * itemsize, spec.nbytes)
        buffer = self.scratch.array("block", (len(self.specs), step), np.uint8)
        sums = [0] * len(self.specs)
        checked = [
            self.whole is None and own.extent.crc32 is not None and _fills_storage(own)
            for own in self.specs
        ]
        joined = {k: PiecesReader(own) for k, own in enumerate(self.specs) if own.pieces}
        for offset in range(0, spec.nbytes, step):
            length = min(step, spec.nbytes - offset)
            if length < step:
                buffer = self.scratch.array("block", (len(self.specs), length), np.uint8)
            part = buffer
            for k, own in enumerate(self.specs):
                if self.whole is not None:
                    part[k] = self.whole[k][offset : offset + length]
                    continue
                if k in joined:
                    joined[k].read_into(memoryview(part[k]), offset)
                    continue
                own.extent.source.read_into(memoryview(part[k]), own.start + offset)
                if checked[k]:
                    sums[k] = crc32(part[k], sums[k])
            yield offset, part
        for k, own in enumerate(self.specs):
            if checked[k]:
                _check_crc(own.extent, sums[k], f"{self.snapshots[k].path}: '{self.key}'")

    def in_c_order(
        self, data: npt.NDArray[np.uint8], dtype: DType | None = None
    ) -> npt.NDArray[np.uint8]:
        """Bytes in storage order brought to C order; of another element type than the sources'."""
        assert self.permutation is not None
        spec = self.specs[0]
        stored = data.view((dtype or spec.type).numpy).reshape(
            [spec.shape[d] for d in self.permutation]
        )
        in_order = stored.transpose(np.argsort(self.permutation))
        return np.ascontiguousarray(in_order).reshape(-1).view(np.uint8)


def _fills_storage(spec: TensorSpec) -> bool:
    if spec.pieces:
        return False
    return spec.offset == 0 and storage_span(spec) * spec.type.itemsize == spec.extent.nbytes


def check_shared_storages(
    snapshots: Sequence[Snapshot], keys: Collection[str] | None = None
) -> None:
    """Checksums of storages of which no tensor is the whole are checked ahead."""
    uneven = _differently_strided(snapshots)
    for snapshot in snapshots:
        if isinstance(snapshot.tensors, TensorTable) and not snapshot.tensors.has_checksums:
            continue
        specs = snapshot.tensors.items()
        partial = {
            extent: key
            for key, spec in specs
            if (keys is None or key in keys)
            and (not (_fills_storage(spec) and is_dense(spec)) or key in uneven)
            for extent in spec.extents
        }
        for extent, key in partial.items():
            if extent.crc32 is None:
                continue
            total = 0
            for block in blocks(extent.source, extent.start, extent.nbytes):
                total = crc32(block, total)
            _check_crc(extent, total, f"{snapshot.path}: '{key}'")


def _differently_strided(snapshots: Sequence[Snapshot]) -> set[str]:
    """Keys whose elements do not lie in the same order in all snapshots."""
    first = snapshots[0].tensors
    if one_form(snapshot.tensors for snapshot in snapshots):
        return set()
    return {
        key
        for snapshot in snapshots[1:]
        for key, spec in snapshot.tensors.items()
        if spec.stride != first[key].stride
    }


def _check_crc(extent: Extent, found: int, where: str) -> None:
    if found != extent.crc32:
        raise DamagedError(
            f"{where}: wrong CRC-32: {found:08x}, the file says {extent.crc32:08x}",
            hint="its bytes were damaged; copy it again, or leave it out with --exclude",
        )
