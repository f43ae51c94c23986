"""Owns what outputs are: formats by ending, what goes into them, where the manifest stands.

Input: a signature and facts. A writer module of a file format offers `layout(content) -> Layout`;
a folder is several safetensors files (`writers.folder`).
"""

import contextlib
import hashlib
import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ensemblekit.errors import EnsembleKitError, UsageError
from ensemblekit.files import Source, sha256
from ensemblekit.snapshots import Signature

WRITERS: dict[str, str] = {
    ".safetensors": "ensemblekit.writers.safetensors",
    ".pt": "ensemblekit.writers.torch_zip",
    ".pth": "ensemblekit.writers.torch_zip",
    ".ckpt": "ensemblekit.writers.lightning",
}

_MARK = "ensemblekit"

Sink = Callable[[str, int, npt.NDArray[np.uint8]], None]


@dataclass(frozen=True)
class Content:
    """What an output holds.

    Attributes:
        signature: Shape and dtype by key.
        ties: Groups of keys that share one storage; in the network's order afterwards, so that
            the first of each is the one that the others are tied to.
        metadata: Texts that travel inside, where the format has room for them.
        document: Plain values beside the weights, of formats that are a tool's checkpoint.
        copies: Files that travel with a folder, and what of their JSON is changed.
    """

    signature: Signature
    ties: Sequence[Sequence[str]] = ()
    metadata: Mapping[str, str] = field(default_factory=dict)
    document: Mapping[str, Any] = field(default_factory=dict)
    copies: Mapping[Path, Mapping[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        place = {key: n for n, key in enumerate(self.signature)}
        ties = [
            sorted((k for k in group if k in place), key=place.__getitem__) for group in self.ties
        ]
        object.__setattr__(self, "ties", [group for group in ties if len(group) > 1])

    @property
    def followers(self) -> frozenset[str]:
        """Keys whose bytes are another key's, too."""
        return frozenset(key for group in self.ties for key in group[1:])


@dataclass(frozen=True)
class Layout:
    """Where everything goes in an output file.

    Attributes:
        places: (first byte, number of bytes) of each tensor; keys that share another's bytes are
            left out.
        frame: All bytes that are no tensor's, with their offsets, once the tensors' CRC-32 are known.
    """

    places: Mapping[str, tuple[int, int]]
    frame: Callable[[Mapping[str, int]], Sequence[tuple[int, bytes]]]


class Filler(Protocol):
    """What gives the values of tensors."""

    def fill(self, sink: Sink, keys: Collection[str] | None = None) -> None:
        """Give every tensor, or those of some keys, to `sink(key, offset, data)`."""

    def notes(self) -> dict[str, Any]:
        """What is known of the tensors that are filled and is needed in the end; plain values."""

    def resume(self, notes: dict[str, Any]) -> None:
        """Take up notes of tensors that an earlier run filled."""

    def done(self) -> None:
        """All tensors are filled: checks that need them all."""


def is_folder(path: Path) -> bool:
    """Whether an output of this name is a folder."""
    return path.suffix not in WRITERS and (path.suffix == "" or path.is_dir())


def check_format(path: Path) -> None:
    """Refuse an output whose ending is no format of ours.

    Raises:
        UsageError: Lists the endings that are.
    """
    if not path.name or path.name == ".." or path.name in WRITERS:
        raise UsageError("the output has no name", hint="-o averaged.safetensors")
    if path.suffix not in WRITERS and not is_folder(path):
        raise UsageError(
            f"output {path}: unknown ending '{path.suffix}'; valid: {', '.join(WRITERS)}, or none "
            "for a folder",
            hint=f"-o {path.with_suffix('.safetensors')}; for a folder of this name: mkdir {path}",
        )


def layout(path: Path, content: Content) -> Layout:
    """Where everything goes in a file; raises where the format cannot hold it.

    A folder's files are safetensors.
    """
    made: Layout = import_module(WRITERS.get(path.suffix, WRITERS[".safetensors"])).layout(content)
    return made


def manifest_path(path: Path) -> Path:
    """Where the manifest of an output stands."""
    return path.with_name(path.name + ".json")


def read_manifest(path: Path) -> dict[str, Any] | None:
    """The manifest of the output at `path`, None where there is none of ours."""
    try:
        with contextlib.closing(Source(manifest_path(path))) as source:
            value = json.loads(source.read(0, source.size))
    except (EnsembleKitError, ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) and _MARK in value else None


def digest(path: Path) -> str:
    """SHA-256 of an output as it is now."""
    if not path.is_dir():
        return sha256(Source(path))
    files = list(path.iterdir())
    if not all(file.is_file() for file in files):  # not ours any more
        return ""
    return folder_digest({file.name: sha256(Source(file)) for file in files})


def folder_digest(files: Mapping[str, str]) -> str:
    """SHA-256 over the names and digests of a folder's files, in the form of `sha256sum *`."""
    lines: Iterable[str] = (f"{files[name]}  {name}\n" for name in sorted(files))
    return hashlib.sha256("".join(lines).encode("utf-8", "surrogateescape")).hexdigest()
