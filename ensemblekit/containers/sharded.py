"""Owns folders whose tensors are spread over files by an index (Hugging Face's sharding).

Input: a folder. The index is JSON with `weight_map`: tensor name -> file name; the files are
plain files of the same folder and of any container that we know.
"""

import json
from pathlib import Path
from typing import Any

from ensemblekit import containers
from ensemblekit.containers import Tree
from ensemblekit.errors import DamagedError, listing
from ensemblekit.files import Source

INDEX_NAMES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_MAX_INDEX = 64 << 20
_HINT = "copy the folder again, or leave it out with --exclude"


def is_ours(folder: Path) -> bool:
    """Whether the folder has an index."""
    return _index_of(folder) is not None


def members(folder: Path) -> set[str]:
    """Names of the files that belong to the checkpoint."""
    index = _index_of(folder)
    return {index.name, *_weight_map(Source(index)).values()} if index else set()


def read_folder(folder: Path) -> Tree:
    """One tree out of all shards.

    Raises:
        DamagedError: The index is not an index, names files outside of its folder, or a tensor
            or a shard is missing.
    """
    index = _index_of(folder)
    assert index is not None, "called for folders of ours only"
    weight_map = _weight_map(Source(index))
    trees: dict[str, Tree] = {}
    for name in sorted(set(weight_map.values())):
        trees[name] = containers.read(Source(inside(folder, name, index)))
    root: dict[str, Any] = {}
    for key, name in weight_map.items():
        content = trees[name].root
        if not isinstance(content, dict) or key not in content:
            raise DamagedError(
                f"{folder / name}: tensor '{key}' is missing; {index.name} says that it is there",
                hint=_HINT,
            )
        root[key] = content[key]
    unlisted = [k for tree in trees.values() if isinstance(tree.root, dict) for k in tree.root]
    unlisted = [key for key in unlisted if key not in weight_map]
    if unlisted:
        raise DamagedError(
            f"{index}: does not list {listing(unlisted)}, which its shards hold", hint=_HINT
        )
    sources = tuple(source for tree in trees.values() for source in tree.sources)
    metadata = {k: v for tree in trees.values() for k, v in tree.metadata.items()}
    first = next(iter(trees.values()))
    return Tree(f"{first.container}-sharded", root, metadata, sources)


def _index_of(folder: Path) -> Path | None:
    return next((folder / name for name in INDEX_NAMES if (folder / name).is_file()), None)


def _weight_map(source: Source) -> dict[str, str]:
    if source.size > _MAX_INDEX:
        raise DamagedError(f"{source.path}: an index of {source.size} bytes", hint=_HINT)
    try:
        index = json.loads(source.read(0, source.size))
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"{source.path}: is not JSON ({error})", hint=_HINT) from error
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    sound = isinstance(weight_map, dict) and all(isinstance(v, str) for v in weight_map.values())
    if not sound or not weight_map:
        raise DamagedError(
            f"{source.path}: its 'weight_map' does not map tensor names to files", hint=_HINT
        )
    return dict(weight_map)


def inside(folder: Path, name: str, index: Path) -> Path:
    """The file of the folder that its index names.

    Raises:
        DamagedError: The name leads elsewhere or to nothing.
    """
    path = folder / name
    plain = name not in ("", ".", "..") and Path(name).name == name
    too_long = len(name.encode("utf-8", "surrogatepass")) > 255
    if not plain or too_long or "\\" in name or "\0" in name:
        raise DamagedError(
            f"{index}: names '{name}', which is not a plain file of its folder", hint=_HINT
        )
    if not path.exists():
        raise DamagedError(f"{index}: names '{name}', which is missing", hint=_HINT)
    if path.is_symlink() and path.resolve().parent != folder.resolve():
        raise DamagedError(
            f"{path}: is a link that leads out of its folder", hint="copy the file in its place"
        )
    return path
