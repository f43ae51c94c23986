"""Owns the step from bytes to tensor descriptions; nothing here reads a tensor's values.

Input: an open file. A container module offers `sniff(source) -> bool` and
`read(source) -> Tree`; the registry below is tried in order.
"""

from dataclasses import dataclass, field
from importlib import import_module
from math import prod
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ensemblekit.dtypes import DTYPES, DType
from ensemblekit.errors import DamagedError, UnsupportedError
from ensemblekit.files import Readable, Source

CONTAINERS: dict[str, str] = {
    "torch-zip": "ensemblekit.containers.torch_zip",
    "tar": "ensemblekit.containers.tar",
    "torch-legacy": "ensemblekit.containers.torch_legacy",
    "pickle": "ensemblekit.containers.raw_pickle",
    "safetensors": "ensemblekit.containers.safetensors",
}

# A folder that is one checkpoint: `is_ours(folder)`, `members(folder)`, `read_folder(folder)`.
FOLDERS: dict[str, str] = {
    "sharded": "ensemblekit.containers.sharded",
    "dcp": "ensemblekit.containers.dcp",
}


class Extent(NamedTuple):
    """The bytes of one storage: where they lie, and their CRC-32 where the file states one."""

    source: Readable
    start: int
    nbytes: int
    crc32: int | None


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor as the file describes it; its values are read on demand.

    Attributes:
        dtype: Torch's name of the element type.
        shape: Sizes.
        stride: Steps in elements, None when the elements lie in C order without gaps.
        offset: Elements from the extent's start to the first element.
        extent: The storage that holds it (the first one, if it comes in pieces).
        pieces: Parts that are stored apart; empty for a tensor that is stored as a whole.
    """

    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...] | None
    offset: int
    extent: Extent
    pieces: "tuple[Piece, ...]" = ()

    @property
    def type(self) -> DType:
        """The element type."""
        return DTYPES[self.dtype]

    @property
    def size(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the elements, laid out without gaps."""
        return self.size * self.type.itemsize

    @property
    def in_one_run(self) -> bool:
        """Whether the elements lie in C order without gaps, from `start` on."""
        return self.stride is None and not self.pieces

    @property
    def extents(self) -> tuple[Extent, ...]:
        """All storages that hold it."""
        return tuple(p.spec.extent for p in self.pieces) or (self.extent,)

    @property
    def start(self) -> int:
        """Byte in the file at which the first element lies."""
        return self.extent.start + self.offset * self.type.itemsize


class Piece(NamedTuple):
    """A part of a tensor: the place of its first element in the whole, and the part itself."""

    offsets: tuple[int, ...]
    spec: TensorSpec


@dataclass(frozen=True, slots=True)
class Unusable:
    """A leaf that stands for a tensor without usable values.

    It is an error only if the tensor is wanted, and then one that can name the key.

    Attributes:
        reason: Predicate that completes "'key' ...", such as "is quantised".
        hint: What to do about it.
        damaged: The file is at fault, not the kind of tensor.
    """

    reason: str
    hint: str | None = None
    damaged: bool = False


@dataclass(eq=False, slots=True)
class Inert:
    """What an object of an unknown class left in a pickle: its parts, and no behaviour.

    Attributes:
        cls: `module.name` of the class or function that would have made it.
        args: What it would have been called with.
        state: What its `__setstate__` or `__dict__` would have received.
        items: What would have been appended to it.
        mapping: Pairs that would have been set on it.
    """

    cls: str
    args: tuple[Any, ...] = ()
    state: Any = None
    items: list[Any] = field(default_factory=list)
    mapping: list[tuple[Any, Any]] = field(default_factory=list)

    def attributes(self) -> dict[str, Any]:
        """The attributes that the state would have given the object."""
        parts = self.state if isinstance(self.state, tuple) else (self.state,)
        found: dict[str, Any] = {}
        for part in parts:
            if isinstance(part, dict):
                found.update({k: v for k, v in part.items() if isinstance(k, str)})
        return found


@dataclass(frozen=True)
class Tree:
    """What a container holds: plain values, `TensorSpec`, `Unusable` and `Inert` leaves.

    Attributes:
        container: Name in the registry.
        root: The outermost object.
        metadata: Text that the format keeps beside the tensors.
        sources: Every file that the leaves point into.
    """

    container: str
    root: Any
    metadata: dict[str, str]
    sources: tuple[Source, ...]


def sniff(source: Readable) -> str | None:
    """Name of the container that the bytes announce, None when it is none of ours."""
    return next((name for name in CONTAINERS if _module(name).sniff(source)), None)


def folder_kind(folder: Path) -> str | None:
    """Name of the container that the folder is, None for a plain folder."""
    return next((n for n in FOLDERS if import_module(FOLDERS[n]).is_ours(folder)), None)


def folder_members(folder: Path) -> set[str]:
    """Names of the files that make the folder a container."""
    kind = folder_kind(folder)
    found: set[str] = import_module(FOLDERS[kind]).members(folder) if kind else set()
    return found


def read_folder(folder: Path) -> Tree:
    """Describe everything in a folder that is one checkpoint.

    Raises:
        UnsupportedError: It is not one.
        DamagedError, HostileError: See the container modules.
    """
    kind = folder_kind(folder)
    if kind is None:
        raise UnsupportedError(f"{folder}: is a folder, but no checkpoint of a known format")
    tree: Tree = import_module(FOLDERS[kind]).read_folder(folder)
    return tree


def read(source: Readable) -> Tree:
    """Describe everything in the file.

    Raises:
        UnsupportedError: Not a container that we know.
        DamagedError, HostileError: See the container modules.
    """
    if source.size == 0:
        raise DamagedError(
            f"{source.path}: is empty (0 bytes)",
            hint="the writer was interrupted; leave it out with --exclude",
        )
    name = sniff(source)
    if name is None:
        head = source.read(0, min(8, source.size))
        if head.startswith(b"\x1f\x8b"):
            raise UnsupportedError(
                f"{source.path}: is compressed with gzip",
                hint="unpack it and name the checkpoint in it: gunzip, or tar -xzf for a .nemo",
            )
        raise UnsupportedError(
            f"{source.path}: is not a checkpoint of a known format (begins with {head!r})",
            hint=f"known: {', '.join(CONTAINERS)}; leave it out with --exclude, or save it again "
            "with torch.save or safetensors",
        )
    tree: Tree = _module(name).read(source)
    return tree


def checked_spec(
    *,
    dtype: str,
    shape: tuple[int, ...],
    stride: tuple[int, ...],
    offset: int,
    extent: Extent,
) -> TensorSpec | Unusable:
    """A `TensorSpec` whose every element lies inside its storage and whose size is honest.

    Returns `Unusable` for negative sizes, elements outside of the storage, or more bytes than
    the file has (a stride of 0 can make a giant out of one number).
    """
    itemsize = DTYPES[dtype].itemsize

    def unusable(what: str) -> Unusable:
        geometry = f"(shape {shape}, stride {stride}, offset {offset})"
        return Unusable(what.format(geometry), damaged=True)

    if min((offset, *shape, *stride)) < 0:
        return unusable("has negative geometry {}")
    if len(shape) != len(stride):
        return unusable("has not one stride for each dimension {}")
    size, last, contiguous = 1, offset, True
    for n, step in zip(reversed(shape), reversed(stride), strict=True):
        contiguous = contiguous and (n == 1 or step == size)  # a single row has any stride
        last += (n - 1) * step
        size *= n
    if size == 0:
        return TensorSpec(dtype, shape, None, 0, extent)
    held = extent.nbytes // itemsize
    if last >= held:
        return unusable(f"needs {last + 1} elements {{}}, its storage holds {held}")
    if size * itemsize > extent.source.size:
        return unusable(
            f"would take {size * itemsize} bytes {{}} out of a file of {extent.source.size}"
        )
    return TensorSpec(dtype, shape, None if contiguous else stride, offset, extent)


def read_array(spec: TensorSpec) -> npt.NDArray[Any]:
    """The whole tensor in C order; for tensors that are known to be small or wanted whole."""
    if spec.pieces:
        whole = np.empty(spec.shape, spec.type.numpy)
        for piece in spec.pieces:
            ends = zip(piece.offsets, piece.spec.shape, strict=True)
            whole[tuple(slice(o, o + n) for o, n in ends)] = read_array(piece.spec)
        return whole
    raw = bytearray(storage_span(spec) * spec.type.itemsize)
    spec.extent.source.read_into(memoryview(raw), spec.start)
    flat = np.frombuffer(raw, dtype=spec.type.numpy)
    if spec.stride is None:
        return flat.reshape(spec.shape)
    steps = tuple(s * spec.type.itemsize for s in spec.stride)
    plain = flat.view(f"V{spec.type.itemsize}")  # numpy's striding does not know float8
    view = np.lib.stride_tricks.as_strided(plain, spec.shape, steps, writeable=False)
    return np.ascontiguousarray(view).view(spec.type.numpy)


def storage_span(spec: TensorSpec) -> int:
    """Elements from the first to the last element of the tensor in its storage."""
    if spec.size == 0:
        return 0
    if spec.stride is None:
        return spec.size
    return 1 + sum((n - 1) * s for n, s in zip(spec.shape, spec.stride, strict=True))


def is_dense(spec: TensorSpec) -> bool:
    """Whether the elements fill their span exactly once, in whatever order (channels_last does)."""
    if spec.stride is None or spec.pieces:
        return not spec.pieces
    steps = sorted((s, n) for n, s in zip(spec.shape, spec.stride, strict=True) if n > 1)
    expected = [1, *(s * n for s, n in steps)]
    return all(s == e for (s, _), e in zip(steps, expected, strict=False))


def _module(name: str) -> ModuleType:
    return import_module(CONTAINERS[name])
