"""Owns outputs: a file in the format of its ending, complete or absent, with a manifest beside it.

Input: a signature, and a function that fills the tensors in. A writer module offers
`layout(signature, metadata) -> Layout`.
"""

import json
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from hashlib import sha256
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ensemblekit.errors import MachineError, UsageError
from ensemblekit.files import AtomicFile, Source, check_output, locked_folder
from ensemblekit.snapshots import Signature

WRITERS: dict[str, str] = {".safetensors": "ensemblekit.writers.safetensors"}

_BLOCK = 1 << 20
_MARK = "ensemblekit"


@dataclass(frozen=True)
class Layout:
    """Where everything goes in an output file.

    Attributes:
        head: Bytes at the start.
        places: (first byte, number of bytes) of each tensor, without gaps behind the head.
    """

    head: bytes
    places: Mapping[str, tuple[int, int]]


Fill = Callable[[Callable[[str, int, npt.NDArray[np.uint8]], None]], object]


def check_format(path: Path) -> None:
    """Refuse an output whose ending is no format of ours.

    Raises:
        UsageError: Lists the endings that are.
    """
    if not path.name:
        raise UsageError("the output has no name", hint="-o averaged.safetensors")
    if path.suffix not in WRITERS:
        raise UsageError(
            f"output {path}: unknown ending '{path.suffix}'; valid: {', '.join(WRITERS)}",
            hint=f"-o {path.with_suffix('.safetensors')}",
        )


def plan(path: Path, signature: Signature, metadata: Mapping[str, str]) -> Layout:
    """Where everything would go in the output; raises where the format cannot hold it."""
    made: Layout = import_module(WRITERS[path.suffix]).layout(signature, metadata)
    return made


def manifest_path(path: Path) -> Path:
    """Where the manifest of an output stands."""
    return path.with_name(path.name + ".json")


def read_manifest(path: Path) -> dict[str, Any] | None:
    """The manifest of the output at `path`, None where there is none of ours."""
    try:
        value = json.loads(manifest_path(path).read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) and _MARK in value else None


def save(
    path: Path,
    signature: Signature,
    metadata: Mapping[str, str],
    fill: Fill,
    manifest: Callable[[str], Mapping[str, Any]],
    *,
    inputs: list[Path],
    force: bool,
) -> str:
    """Write an output and its manifest, read back and verified, and return its SHA-256.

    Args:
        path: The output; its ending chooses the format.
        signature: Shape and dtype by key.
        metadata: Texts that travel inside the file.
        fill: Called with `sink(key, offset, data)`; must fill every tensor.
        manifest: Makes the manifest from the SHA-256 of the output.
        inputs: Files that must not be overwritten.
        force: Replace an existing output.

    Raises:
        UsageError: The output exists and `force` is not given, or is an input.
        MachineError: The disk is full, or gave back other bytes than were written.
    """
    check_format(path)
    note_path = manifest_path(path)
    layout: Layout = import_module(WRITERS[path.suffix]).layout(signature, metadata)
    with AtomicFile(path) as file, AtomicFile(note_path) as note:
        checksums = dict.fromkeys(signature, 0)

        def sink(key: str, offset: int, data: npt.NDArray[np.uint8]) -> None:
            start, nbytes = layout.places[key]
            assert offset + data.size <= nbytes
            view = memoryview(np.ascontiguousarray(data).data)
            file.write_at(view, start + offset)
            checksums[key] = zlib.crc32(view, checksums[key])

        file.write_at(layout.head, 0)
        fill(sink)
        digest = _read_back(file.seal(), layout, checksums)
        text = json.dumps({_MARK: True, **manifest(digest)}, indent=2, sort_keys=False)
        note.write_at(text.encode() + b"\n", 0)
        note.seal().close()
        with locked_folder(path.parent):
            check_output(path, inputs=inputs, force=force)
            check_output(note_path, inputs=inputs, force=True)
            if note_path.exists() and read_manifest(path) is None and not force:
                raise UsageError(
                    f"{note_path} exists and is no manifest of ours", hint="use --force"
                )
            # the manifest first: if we are stopped in between, the old output is still there
            earlier = note_path.read_bytes() if note_path.exists() else None
            try:
                note.rename()
                file.rename()
            except BaseException:
                if not file.temporary.exists():  # both are in place
                    raise
                _put_back(note_path, earlier)
                raise
    return digest


def _put_back(path: Path, earlier: bytes | None) -> None:
    if earlier is None:
        path.unlink(missing_ok=True)
        return
    with AtomicFile(path) as file:
        file.write_at(earlier, 0)
        file.rename()


def _read_back(source: Source, layout: Layout, checksums: Mapping[str, int]) -> str:
    digest = sha256()
    head = source.read(0, len(layout.head))
    digest.update(head)
    sound = head == layout.head
    for key, (start, nbytes) in sorted(layout.places.items(), key=lambda item: item[1]):
        total = 0
        for place in range(start, start + nbytes, _BLOCK):
            data = source.read(place, min(_BLOCK, start + nbytes - place))
            digest.update(data)
            total = zlib.crc32(data, total)
        sound = sound and total == checksums[key]
    source.close()
    if not sound:
        raise MachineError(f"{source.path}: the disk gave back other bytes than were written")
    return digest.hexdigest()
