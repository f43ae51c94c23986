"""Owns the way from CHECKPOINTS arguments to places that may hold one snapshot each.

Input: files, folders and globs as typed. Folders are searched downwards; what is plainly no
checkpoint is noted as such, never dropped without a word.
"""

import contextlib
import glob
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from ensemblekit import containers
from ensemblekit.errors import EnsembleKitError, UsageError, listing
from ensemblekit.files import Source

# By these endings a file claims to be a checkpoint: if it cannot be read, that is an error.
_CLAIMS = {".pt", ".pth", ".ckpt", ".safetensors", ".bin", ".tar", ".pyth", ".th", ".pt2", ".nemo"}
# These claim to be pickles, of whatever.
PICKLES = {".pkl", ".pickle"}
# Files that training tools put beside the weights.
_SIDE_FILES = (
    *("optimizer*", "scheduler*", "scaler*", "random_states*", "rng_state*", "training_args.bin"),
    *(
        "criterion*",
        "*_optim_states.pt",
        "*.tmp",
        "*.part",
        "*.lock",
        "tokenizer.model",
        "custom_checkpoint_*",
    ),
    *("*.json", "*.txt", "*.md", "*.csv", "*.yaml", "*.yml", "*.toml", "*.log", "*.py", "*.npz"),
    *("*.npy", "*.png", "*.jpg", "*.svg", "*.html", "*.onnx", "events.out.*", ".*"),
)
_MAX_DEPTH = 6


@dataclass(frozen=True)
class Place:
    """Something that may hold a snapshot.

    Attributes:
        path: A file, or a folder with a sharded checkpoint.
        name: The path as shown, relative to where the search began.
        found_in: The folder argument under which it was found, None when it was named itself.
        claims: It was named or ends like a checkpoint: not being one is an error.
    """

    path: Path
    name: str
    found_in: Path | None
    claims: bool


@dataclass(frozen=True)
class Passed:
    """A file that was not looked into, and why."""

    path: Path
    name: str
    reason: str


def places(
    arguments: Sequence[str | os.PathLike[str]], *, exclude: Iterable[str] = ()
) -> tuple[list[Place], list[Passed]]:
    """Every place that the arguments name, and what was passed over.

    Args:
        arguments: Files, folders and globs (`**` goes down folders).
        exclude: Globs matched with the path as shown and with the file's name.

    Raises:
        UsageError: An argument names nothing.
    """
    found: dict[str, Place] = {}
    passed: list[Passed] = []
    for argument in arguments:
        for path in _expand(os.fspath(argument)):
            if path.is_dir() and containers.folder_kind(path) is None:
                items = _search(path, path, 0, passed)
            elif path.suffix == ".json" and _is_manifest(path):  # as `ckpts/*` of a shell gives it
                passed.append(Passed(path, str(path), "what we noted of an output"))
                continue
            else:
                items = [Place(path, str(path), None, claims=True)]
            for item in items:
                found.setdefault(str(item.path.absolute()), item)
    kept = []
    for item in found.values():
        pattern = next((p for p in exclude if _matches(item, p)), None)
        if pattern is None:
            kept.append(item)
        else:
            passed.append(Passed(item.path, item.name, f"excluded by '{pattern}'"))
    return kept, passed


def unmatched(patterns: Iterable[str], items: Sequence[Place | Passed]) -> list[str]:
    """Patterns that match nothing that was found: perhaps misspelt."""
    return [p for p in patterns if not any(_matches(item, p) for item in items)]


def _expand(argument: str) -> list[Path]:
    path = Path(argument)
    if os.path.lexists(path):
        return [path]
    if glob.has_magic(argument):
        matches = [Path(m) for m in glob.glob(argument, recursive=True)]  # noqa: PTH207  # absolute ones too
        kept = sorted(m for m in matches if m.is_dir() or not _is_side_file(m.name))
        if kept:
            return kept
        raise UsageError(f"no file matches '{argument}'")
    near = listing(sorted(p.name for p in path.parent.glob("*"))) if path.parent.is_dir() else ""
    raise UsageError(
        f"{argument}: no such file or folder",
        hint=f"{path.parent} holds {near}" if near else None,
    )


def _search(folder: Path, top: Path, depth: int, passed: list[Passed]) -> list[Place]:
    """Places below `folder`, sharded checkpoints as one."""
    found: list[Place] = []
    consumed: set[str] = set()
    if containers.folder_kind(folder) is not None:
        found.append(Place(folder, _shown(folder, top), top, claims=True))
        consumed = containers.folder_members(folder)
    for entry in sorted(os.scandir(folder), key=lambda e: e.name):
        path = Path(entry.path)
        if _is_folder(entry):
            if reason := _why_not_enter(entry, depth):
                passed.append(Passed(path, _shown(path, top), reason))
                continue
            below = _search(path, top, depth + 1, passed)
            if not below and path.suffix in _CLAIMS:
                below = [Place(path, _shown(path, top), top, claims=True)]
            found.extend(below)
        elif entry.name in consumed:
            continue
        elif _is_side_file(entry.name):
            passed.append(Passed(path, _shown(path, top), "not a checkpoint"))
        else:
            found.append(
                Place(path, _shown(path, top), top, claims=path.suffix in _CLAIMS | PICKLES)
            )
    return found


def _why_not_enter(entry: os.DirEntry[str], depth: int) -> str | None:
    if entry.name.startswith("."):
        return "hidden folder"
    if entry.is_symlink():
        return "link to a folder"
    return f"more than {_MAX_DEPTH} folders deep" if depth >= _MAX_DEPTH else None


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads in circles: reading it as a file will say so
        return False


def _is_manifest(path: Path) -> bool:
    """Whether a file stands beside an output of ours and says what that was made of."""
    try:
        with contextlib.closing(Source(path)) as source:
            head = source.read(0, min(source.size, 64))
    except EnsembleKitError:
        return False
    return head.split()[:2] == [b"{", b'"ensemblekit":']


def _is_side_file(name: str) -> bool:
    return any(fnmatch(name, pattern) for pattern in _SIDE_FILES)


def _matches(item: Place | Passed, pattern: str) -> bool:
    return fnmatch(item.name, pattern) or fnmatch(item.path.name, pattern)


def _shown(path: Path, top: Path) -> str:
    return str(path.relative_to(top)) if path != top else path.name
