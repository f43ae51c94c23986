"""Owns the writing of an output: filled, read back, renamed, with its manifest beside it.

Input: a content, and a filler that gives the tensors' values.
"""

import json
from collections.abc import Callable, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ensemblekit import writers
from ensemblekit.atomic import AtomicFile, check_output, locked_folder
from ensemblekit.checksums import crc32
from ensemblekit.errors import MachineError, UsageError
from ensemblekit.files import blocks
from ensemblekit.writers import Content, Filler, Layout, manifest_path, read_manifest

Manifest = Callable[[str], Mapping[str, Any]]
"""Makes the manifest from the SHA-256 of the output."""


def save(
    path: Path,
    content: Content,
    filler: Filler,
    manifest: Manifest,
    *,
    inputs: list[Path],
    force: bool,
) -> str:
    """Write a file and its manifest, read back and verified, and return its SHA-256.

    Args:
        path: The output; its ending chooses the format.
        content: What it holds.
        filler: Gives every tensor's values.
        manifest: Makes the manifest.
        inputs: Files that must not be overwritten.
        force: Replace an existing output.

    Raises:
        UsageError: The output exists and `force` is not given, or is an input.
        MachineError: The disk is full, or gave back other bytes than were written.
    """
    writers.check_format(path)
    with AtomicFile(path) as file:
        filling = Filling(file, writers.layout(path, content))
        filler.fill(filling.sink)
        filler.done()
        digest = filling.seal()
        publish(
            path,
            file.temporary,
            manifest(digest),
            file.rename,
            lambda: check_output(path, inputs=inputs, force=force),
            inputs=inputs,
            force=force,
        )
    return digest


class Filling:
    """A file on its way: takes tensors in pieces, then adds the frame and reads all of it back.

    Args:
        file: Opened.
        layout: Where everything goes.
    """

    def __init__(self, file: AtomicFile, layout: Layout) -> None:
        self.file = file
        self.layout = layout
        self._checksums = dict.fromkeys(layout.places, 0)

    def sink(self, key: str, offset: int, data: npt.NDArray[np.uint8]) -> None:
        """Bytes of a tensor, in order within each key."""
        if key not in self.layout.places:  # shares another's
            return
        start, nbytes = self.layout.places[key]
        assert offset + data.size <= nbytes
        view = memoryview(np.ascontiguousarray(data).data)
        self.file.write_at(view, start + offset)
        self._checksums[key] = crc32(view, self._checksums[key])

    def seal(self) -> str:
        """Complete and durable; the SHA-256 of what the disk gives back.

        Raises:
            MachineError: It gives back other bytes than were written.
        """
        frame = self.layout.frame(self._checksums)
        for offset, data in frame:
            self.file.write_at(data, offset)
        source, digest, sound, end = self.file.seal(), sha256(), True, 0
        parts: list[tuple[int, int, int]] = [(o, len(d), crc32(d)) for o, d in frame]
        parts += [(*self.layout.places[key], crc) for key, crc in self._checksums.items()]
        for start, nbytes, expected in sorted(parts):
            assert start == end, "frame and tensors fill the file without gaps"
            total, end = 0, start + nbytes
            for block in blocks(source, start, nbytes):
                digest.update(block)
                total = crc32(block, total)
            sound = sound and total == expected
        source.close()
        if not sound:
            raise MachineError(f"{source.path}: the disk gave back other bytes than were written")
        return digest.hexdigest()


def publish(
    path: Path,
    ready: Path,
    manifest: Mapping[str, Any],
    show: Callable[[], None],
    check: Callable[[], None],
    *,
    inputs: list[Path],
    force: bool,
) -> None:
    """Show an output that is ready under its name, with its manifest.

    Args:
        path: The name.
        ready: The output under its temporary name.
        manifest: What to write beside it.
        show: Renames the output.
        check: Refuses a name that must not be replaced; called when nobody else can write there.
        inputs: Files that must not be overwritten.
        force: Replace a file that stands in the manifest's place.

    Raises:
        UsageError: As `check`.
    """
    note_path = manifest_path(path)
    own = ready.stat().st_ino
    with AtomicFile(note_path) as note:
        note.write_at(json.dumps({"ensemblekit": True, **manifest}, indent=2).encode() + b"\n", 0)
        note.seal().close()
        with locked_folder(path.parent):
            check()
            check_manifest(path, inputs=inputs, force=force)
            # the manifest first: if we are stopped in between, the old output is still there
            earlier = note_path.read_bytes() if note_path.exists() else None
            try:
                note.rename()
                show()
            except BaseException:
                if not path.exists() or path.stat().st_ino != own:  # else both are in place
                    _put_back(note_path, earlier)
                raise


def check_manifest(path: Path, *, inputs: list[Path], force: bool) -> None:
    """Refuse an output whose manifest would replace something else.

    Raises:
        UsageError: An input, a folder, or without `force` a file that is no manifest of ours.
    """
    note_path = manifest_path(path)
    check_output(note_path, inputs=inputs, force=True)
    if note_path.exists() and read_manifest(path) is None and not force:
        raise UsageError(f"{note_path} exists and is no manifest of ours", hint="use --force")


def _put_back(path: Path, earlier: bytes | None) -> None:
    if earlier is None:
        path.unlink(missing_ok=True)
        return
    with AtomicFile(path) as file:
        file.write_at(earlier, 0)
        file.rename()
