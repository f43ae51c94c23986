"""Owns what `average` writes to: where, in which form, and what goes along with the weights.

Input: flags and snapshots.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ensemblekit import writers
from ensemblekit.atomic import check_output
from ensemblekit.candidates import Row
from ensemblekit.commands import provenance
from ensemblekit.dtypes import DTYPES
from ensemblekit.errors import UsageError, listing, one_of
from ensemblekit.files import Source, sha256
from ensemblekit.options import ModelOptions
from ensemblekit.snapshots import SnapshotSet
from ensemblekit.state import converted
from ensemblekit.writers import folder, lightning, saving

FLOATS = tuple(name for name, dtype in DTYPES.items() if dtype.kind == "float")


@dataclass(frozen=True)
class Output:
    """Where the average goes, and in which form.

    Attributes:
        path: A file (its ending chooses the format) or, without an ending, a folder; None keeps
            the average in memory.
        dtype: Element type of all floating-point tensors; their own when None.
        shard_bytes: Of one file of a folder at most.
        force: Replace what is there.
        dry_run: Write nothing.
    """

    path: Path | None
    dtype: str | None = None
    shard_bytes: int = folder.SHARD_BYTES
    force: bool = False
    dry_run: bool = False

    def __post_init__(self) -> None:
        if self.dtype is not None:
            one_of(self.dtype, FLOATS, what="--dtype")
        if self.shard_bytes < 1:
            raise UsageError(f"--max-shard-size {self.shard_bytes}: must be more than 0")
        if self.path is not None:
            writers.check_format(self.path)


def check(target: Output, snapshots: SnapshotSet) -> list[str]:
    """Refuse early what could not be written; what cannot go along is returned.

    Raises:
        UsageError: The output, or its manifest, would replace something that it must not.
        UnsupportedError: The format cannot hold the tensors.
    """
    path = target.path
    assert path is not None
    inputs = files(snapshots)
    if writers.is_folder(path):
        folder.check_replaceable(path, inputs=inputs, force=target.force)
        if all(s.format.endswith("/peft") for s in snapshots.snapshots):
            raise UsageError(
                f"output {path}: a folder of an adapter is more than we write",
                hint="-o adapter_model.safetensors, beside a copy of adapter_config.json",
            )
    else:
        check_output(path, inputs=inputs, force=target.force)
    saving.check_manifest(path, inputs=inputs, force=target.force)
    notes: list[str] = []
    writers.layout(path, content(target, snapshots, {}, notes))
    return notes


def terms(
    target: Output, snapshots: SnapshotSet, row: Row, method: str, bn: str, options: ModelOptions
) -> dict[str, Any]:
    """What determines the output, but for the inputs' digests."""
    found = provenance.terms(snapshots, row, method, bn, options, target.dtype)
    found["companions"] = companion_digests(target, snapshots)
    if target.path is not None and writers.is_folder(target.path):
        found["shard_bytes"] = target.shard_bytes
    return found


def content(
    target: Output, snapshots: SnapshotSet, metadata: Mapping[str, str], warnings: list[str]
) -> writers.Content:
    """What goes into the output; what cannot go along is said in `warnings`."""
    newest = snapshots.snapshots[-1]
    signature = converted(snapshots.first.signature, target.dtype)
    content = writers.Content(signature, snapshots.ties, metadata)
    path = target.path
    assert path is not None
    if path.suffix == ".ckpt":
        document, left = lightning.document(newest)
        if left:
            warnings.append(f"{path}: not carried along, because not plain values: {listing(left)}")
        return replace(content, document=document)
    return replace(content, copies=companions(target, snapshots))


def companions(target: Output, snapshots: SnapshotSet) -> dict[Path, dict[str, Any]]:
    """What a folder carries along from beside the newest snapshot."""
    if target.path is None or not writers.is_folder(target.path):
        return {}
    newest = snapshots.snapshots[-1].path
    source = newest if newest.is_dir() else newest.parent
    if not (source / "config.json").is_file():
        return {}
    return folder.companions(source, target.dtype)


def companion_digests(target: Output, snapshots: SnapshotSet) -> dict[str, str]:
    """SHA-256 of what a folder carries along, by name."""
    return {path.name: sha256(Source(path)) for path in companions(target, snapshots)}


def files(snapshots: SnapshotSet) -> list[Path]:
    """Every file that holds a snapshot."""
    return [source.path for s in snapshots.snapshots for source in s.sources]
