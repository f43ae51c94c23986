"""Owns torch.distributed.checkpoint folders: `.metadata` says where each piece of each tensor lies.

Input: a folder with `.metadata` and `*.distcp` files. The metadata are a pickle, which
`dcp.load` would execute; here it goes through the inert machine. A piece is a torch file of its own,
at an offset within a `.distcp` file.
"""

from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from ensemblekit import containers
from ensemblekit.containers import Inert, Piece, TensorSpec, Tree, Unusable, pickle_vm
from ensemblekit.containers.pickle_globals import brief
from ensemblekit.containers.sharded import inside
from ensemblekit.errors import DamagedError, UnsupportedError
from ensemblekit.files import Source, Window

_MAX_METADATA = 256 << 20
_SMALL_VALUE = 1 << 20
_MAX_CELLS = 1 << 24
_HINT = "copy the folder again, or leave it out with --exclude"


def is_ours(folder: Path) -> bool:
    """Whether the folder has DCP's metadata."""
    return (folder / ".metadata").is_file()


def members(folder: Path) -> set[str]:
    """Names of the files that belong to the checkpoint."""
    return {path.name for path in folder.glob("*.distcp")} | {".metadata"}


def read_folder(folder: Path) -> Tree:
    """One tree out of all pieces, nested as the saved state was.

    Raises:
        DamagedError: Pieces are missing, overlap, or lie outside of their files or the folder.
        HostileError: A pickle in it calls into the interpreter or the operating system.
        UnsupportedError: Pieces are compressed or encrypted.
    """
    source = Source(folder / ".metadata")
    if source.size > _MAX_METADATA:
        raise _damaged(folder, f"its .metadata has {source.size} bytes")
    metadata, _ = pickle_vm.load_prefix(
        source.read(0, source.size), where=str(source.path), storage=pickle_vm.no_storage
    )
    fields = _fields(metadata)
    entries, paths = fields.get("state_dict_metadata"), fields.get("planner_data")
    if not isinstance(entries, dict) or not isinstance(fields.get("storage_data"), dict):
        raise _damaged(folder, "its .metadata is not DCP's")
    blobs = _Blobs(folder, fields["storage_data"])
    root: dict[str, Any] = {}
    for name, entry in entries.items():
        if not isinstance(name, str) or not isinstance(entry, Inert):
            raise _damaged(folder, "its .metadata is not DCP's")
        leaf = blobs.tensor(name, entry) if "chunks" in _fields(entry) else blobs.value(name)
        path = paths.get(name) if isinstance(paths, dict) else None
        _put(folder, root, path if isinstance(path, tuple) and path else (name,), leaf)
    return Tree("dcp", root, {}, (source, *blobs.files.values()))


class _Blobs:
    """The pieces, by the name of their tensor and the place of their first element."""

    def __init__(self, folder: Path, storage_data: dict[Any, Any]) -> None:
        self.folder = folder
        self.files: dict[str, Source] = {}
        self.infos: dict[tuple[str, tuple[int, ...]], Inert] = {}
        for index, info in storage_data.items():
            name, offset = (_fields(index).get(field) for field in ("fqn", "offset"))
            place = () if offset is None else _sizes(offset)
            if not isinstance(name, str) or place is None:
                raise _damaged(folder, f"its .metadata have an index {brief(name)} {brief(offset)}")
            self.infos[name, place] = info

    def value(self, name: str) -> Any:
        """A small value that is no tensor, such as the step; None for a large one."""
        info = self.infos.get((name, ()))
        length = _fields(info).get("length")
        if info is None or (type(length) is int and length >= _SMALL_VALUE):
            return None
        return containers.read(self.window(name, info)).root

    def tensor(self, name: str, entry: Inert) -> TensorSpec | Unusable:
        """The tensor, whole or joined from pieces."""
        fields = _fields(entry)
        shape = _sizes(fields.get("size"))
        chunks = fields.get("chunks")
        if shape is None or not isinstance(chunks, list):
            raise _damaged(self.folder, f"'{name}' has no size")
        pieces = []
        for chunk in chunks:
            offsets = _sizes(_fields(chunk).get("offsets"))
            sizes = _sizes(_fields(chunk).get("sizes"))
            if offsets is None or sizes is None or not len(offsets) == len(sizes) == len(shape):
                raise _damaged(self.folder, f"'{name}' has a piece without a place")
            spec = self.piece(name, offsets, sizes)
            if isinstance(spec, Unusable):
                return spec
            pieces.append(Piece(offsets, spec))
        return _joined(self.folder, name, shape, pieces)

    def piece(
        self, name: str, offsets: tuple[int, ...], sizes: tuple[int, ...]
    ) -> TensorSpec | Unusable:
        """One piece, as the torch file at its place describes it."""
        info = self.infos.get((name, offsets)) or self.infos.get((name, ()))
        if info is None:
            raise _damaged(self.folder, f"'{name}': the piece at {offsets} is nowhere")
        root = containers.read(self.window(name, info)).root
        if isinstance(root, dict) and len(root) == 1:  # safetensors pieces carry their name
            root = next(iter(root.values()))
        if isinstance(root, Unusable):
            return root
        if not isinstance(root, TensorSpec) or root.shape != sizes:
            raise _damaged(
                self.folder, f"'{name}': the piece at {offsets} is not what it should be"
            )
        return root

    def window(self, name: str, info: Inert) -> Window:
        """The bytes of a piece, as a file of their own."""
        fields = _fields(info)
        file, start, length = (fields.get(k) for k in ("relative_path", "offset", "length"))
        if fields.get("transform_descriptors"):
            raise UnsupportedError(
                f"{self.folder}: '{name}' is compressed or encrypted",
                hint="save it without transforms",
            )
        if not isinstance(file, str) or type(start) is not int or type(length) is not int:
            place = f"{brief(file)}, bytes {brief(start)}, {brief(length)}"
            raise _damaged(self.folder, f"'{name}' lies nowhere: {place}")
        if file not in self.files:
            self.files[file] = Source(inside(self.folder, file, self.folder / ".metadata"))
        return Window(self.files[file], start, length, name)


def _joined(
    folder: Path, name: str, shape: tuple[int, ...], pieces: list[Piece]
) -> TensorSpec | Unusable:
    """The whole out of pieces that cover it exactly."""
    if not pieces:
        raise _damaged(folder, f"'{name}' has no pieces")
    if len({piece.spec.dtype for piece in pieces}) > 1:
        raise _damaged(folder, f"'{name}' has pieces of several dtypes")
    if not _covers(shape, pieces):
        raise _damaged(folder, f"'{name}': its pieces do not cover its shape {shape} exactly")
    first = pieces[0].spec
    if len(pieces) == 1:
        return first
    return TensorSpec(first.dtype, shape, None, 0, first.extent, tuple(pieces))


def _covers(shape: tuple[int, ...], pieces: list[Piece]) -> bool:
    """Whether each element lies in one piece: the pieces' edges cut the shape into cells."""
    boxes = [
        [(o, o + n) for o, n in zip(piece.offsets, piece.spec.shape, strict=True)]
        for piece in pieces
        if piece.spec.size
    ]
    edges = [
        {0, size, *(edge for box in boxes for edge in box[axis])} for axis, size in enumerate(shape)
    ]
    if any(max(cuts) > size for cuts, size in zip(edges, shape, strict=True)):
        return False
    places = [{edge: i for i, edge in enumerate(sorted(cuts))} for cuts in edges]
    counts = [len(cuts) - 1 for cuts in edges]
    if prod(counts) > _MAX_CELLS:
        return False
    taken = np.zeros(counts, bool)
    for box in boxes:
        cells = tuple(slice(at[a], at[b]) for at, (a, b) in zip(places, box, strict=True))
        if taken[cells].any():
            return False
        taken[cells] = True
    return bool(taken.all())


def _put(folder: Path, root: dict[str, Any], path: tuple[Any, ...], leaf: Any) -> None:
    """Set the leaf at its place in the nested state that was saved."""
    if not all(isinstance(part, str | int) for part in path):
        raise _damaged(folder, f"it names a place {brief(path)}")
    *parts, last = map(str, path)
    place: Any = root
    for part in parts:
        place = place.setdefault(part, {})
        if not isinstance(place, dict):
            break
    if not isinstance(place, dict) or last in place:
        raise _damaged(folder, f"two entries have the place {brief(path)}")
    place[last] = leaf


def _fields(value: Any) -> dict[str, Any]:
    return value.attributes() if isinstance(value, Inert) else {}


def _sizes(value: Any) -> tuple[int, ...] | None:
    sound = isinstance(value, tuple) and all(type(n) is int and 0 <= n < 2**63 for n in value)
    return value if sound else None


def _damaged(folder: Path, what: str) -> DamagedError:
    return DamagedError(f"{folder}: damaged distributed checkpoint: {what}", hint=_HINT)
