"""Owns contents for the writers' tests: arrays of every element type, and a filler that has them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ensemblekit.dtypes import DTYPES
from ensemblekit.writers import Content
from ensemblekit.writers.saving import save

from ..helpers import Array

Sink = Callable[[str, int, Any], None]


def raw_bits(dtype: str, shape: tuple[int, ...], *, seed: int = 0) -> Array:
    """Any bits of a type; of booleans only the two that there are."""
    form = DTYPES[dtype].numpy
    count = int(np.prod(shape, dtype=int)) * form.itemsize
    top = 2 if dtype == "bool" else 256
    raw = np.random.default_rng(seed).integers(0, top, count).astype(np.uint8)
    return raw.view(form).reshape(shape)


def every_type() -> dict[tuple[str, str], Array]:
    """By (key, dtype): every type as a matrix, a scalar and an empty tensor."""
    found: dict[tuple[str, str], Array] = {}
    for seed, dtype in enumerate(DTYPES):
        for name, shape in (("matrix", (3, 5)), ("scalar", ()), ("empty", (2, 0, 3))):
            found[f"{dtype}.{name}", dtype] = raw_bits(dtype, shape, seed=seed)
    return found


class Arrays:
    """A filler of arrays, in pieces; notes what it was asked for."""

    def __init__(self, arrays: Mapping[str, Array]) -> None:
        self.arrays = arrays
        self.told: dict[str, Any] = {}
        self.asked: list[list[str] | None] = []
        self.finished = 0

    def fill(self, sink: Sink, keys: Collection[str] | None = None) -> None:
        self.asked.append(None if keys is None else list(keys))
        for key, array in self.arrays.items():
            if keys is not None and key not in keys:
                continue
            self.told[key] = int(array.size)
            data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
            for start in range(0, data.size, 1000):
                sink(key, start, data[start : start + 1000])

    def notes(self) -> dict[str, Any]:
        return dict(self.told)

    def resume(self, notes: dict[str, Any]) -> None:
        self.told |= dict(notes.items())

    def done(self) -> None:
        self.finished += 1


def write(path: Path, arrays: Mapping[tuple[str, str], Array], **more: Any) -> str:
    """A file with these tensors; its digest."""
    signature = {key: (array.shape, dtype) for (key, dtype), array in arrays.items()}
    filler = Arrays({key: array for (key, _), array in arrays.items()})
    content = Content(signature, **copy.deepcopy(more))
    return save(path, content, filler, lambda digest: {"sha256": digest}, inputs=[], force=False)
