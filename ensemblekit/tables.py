"""Owns the tensors of a snapshot in little memory: one form for a run, five integers a tensor.

Input: tensor descriptions. A thousand snapshots of five hundred tensors are half a million
descriptions; as objects they take hundreds of megabytes.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from weakref import WeakValueDictionary

import numpy as np
import numpy.typing as npt

from ensemblekit.containers import Extent, TensorSpec
from ensemblekit.files import Readable


@dataclass(frozen=True)
class Form:
    """What the snapshots of one run share.

    Attributes:
        keys: Of the tensors.
        dtypes: Torch's names of the element types.
        shapes: Sizes.
        strides: Steps in elements, None for C order.
    """

    keys: tuple[str, ...]
    dtypes: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    strides: tuple[tuple[int, ...] | None, ...]

    @cached_property
    def places(self) -> dict[str, int]:
        """Where each key stands."""
        return {key: place for place, key in enumerate(self.keys)}

    @cached_property
    def signature(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Shape and dtype by key."""
        pairs = zip(self.shapes, self.dtypes, strict=True)
        return dict(zip(self.keys, pairs, strict=True))


_FORMS: "WeakValueDictionary[Form, Form]" = WeakValueDictionary()


def one_form(tables: Iterable[Mapping[str, TensorSpec]]) -> bool:
    """Whether all are known to have the same keys, types, shapes and memory formats."""
    forms = {id(table.form) if isinstance(table, TensorTable) else None for table in tables}
    return len(forms) == 1 and None not in forms


class TensorTable(Mapping[str, TensorSpec]):
    """Tensor descriptions by key, made when they are asked for.

    Args:
        tensors: The descriptions.
    """

    def __init__(self, tensors: Mapping[str, TensorSpec]) -> None:
        specs = tensors.values()
        form = Form(
            tuple(tensors),
            tuple(s.dtype for s in specs),
            tuple(s.shape for s in specs),
            tuple(s.stride for s in specs),
        )
        self.form = _FORMS.setdefault(form, form)
        sources = dict.fromkeys(s.extent.source for s in specs)
        places = {source: place for place, source in enumerate(sources)}
        self._sources: tuple[Readable, ...] = tuple(sources)
        rows = [
            (
                places[s.extent.source],
                s.extent.start,
                s.extent.nbytes,
                -1 if s.extent.crc32 is None else s.extent.crc32,
                s.offset,
            )
            for s in specs
        ]
        self._rows: npt.NDArray[np.int64] = np.array(rows, np.int64).reshape(-1, 5)
        self._in_pieces = {key: spec for key, spec in tensors.items() if spec.pieces}

    def __getitem__(self, key: str) -> TensorSpec:
        if key in self._in_pieces:
            return self._in_pieces[key]
        place = self.form.places[key]
        source, start, nbytes, crc32, offset = self._rows[place].tolist()
        extent = Extent(self._sources[source], start, nbytes, None if crc32 < 0 else crc32)
        form = self.form
        return TensorSpec(
            form.dtypes[place], form.shapes[place], form.strides[place], offset, extent
        )

    def __iter__(self) -> Iterator[str]:
        return iter(self.form.keys)

    def __len__(self) -> int:
        return len(self.form.keys)

    def __contains__(self, key: object) -> bool:
        return key in self.form.places

    @property
    def has_checksums(self) -> bool:
        """Whether the file states the CRC-32 of any storage."""
        pieces = (p.spec for spec in self._in_pieces.values() for p in spec.pieces)
        return bool((self._rows[:, 3] >= 0).any()) or any(
            s.extent.crc32 is not None for s in pieces
        )
