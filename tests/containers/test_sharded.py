"""Folders with an index: one tree out of all shards, and nothing outside of the folder."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from ensemblekit import containers
from ensemblekit.containers import sharded
from ensemblekit.errors import DamagedError, UnsupportedError

from ..checkpoints import assert_same_tensors, save, state

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def sharded_folder(folder: Path, **index: Any) -> Path:
    """A folder as `save_pretrained` leaves it; `index` replaces fields of the index."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = state()
    names = {key: FIRST if i % 2 else SECOND for i, key in enumerate(tensors)}
    for name in (FIRST, SECOND):
        part = {key: tensors[key] for key in tensors if names[key] == name}
        safetensors.torch.save_file(part, folder / name, metadata={"format": "pt"})
    content = {"metadata": {"total_size": 1}, "weight_map": names, **index}
    (folder / sharded.INDEX_NAMES[0]).write_text(json.dumps(content))
    return folder


def weight_map(folder: Path) -> dict[str, str]:
    found: dict[str, str] = json.loads((folder / sharded.INDEX_NAMES[0]).read_text())["weight_map"]
    return found


def test_one_tree_of_all_shards(tmp_path: Path) -> None:
    tree = containers.read_folder(sharded_folder(tmp_path))
    assert tree.container == "safetensors-sharded"
    assert_same_tensors(tree.root, state())
    assert sorted(source.path.name for source in tree.sources) == [FIRST, SECOND]
    assert tree.metadata == {"format": "pt"}


def test_shards_of_torch_save(tmp_path: Path) -> None:
    tensors = state()
    keys = list(tensors)
    save({key: tensors[key] for key in keys[:3]}, tmp_path / "a.bin")
    save({key: tensors[key] for key in keys[3:]}, tmp_path / "b.bin")
    names = {key: "a.bin" if key in keys[:3] else "b.bin" for key in keys}
    (tmp_path / sharded.INDEX_NAMES[1]).write_text(json.dumps({"weight_map": names}))
    tree = containers.read_folder(tmp_path)
    assert tree.container == "torch-zip-sharded"
    assert_same_tensors(tree.root, tensors)


def test_folder_and_its_members_are_known(tmp_path: Path) -> None:
    assert containers.folder_kind(tmp_path) is None
    assert containers.folder_members(tmp_path) == set()
    sharded_folder(tmp_path)
    assert containers.folder_kind(tmp_path) == "sharded"
    assert {FIRST, SECOND} <= containers.folder_members(tmp_path)


def test_plain_folder(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="no checkpoint of a known format"):
        containers.read_folder(tmp_path)


OUTSIDE = ["../x.safetensors", "/etc/passwd", "sub/x.safetensors", "..", ".", "", "a\\b", "a\0b"]


@pytest.mark.parametrize("name", OUTSIDE, ids=repr)
def test_names_that_leave_the_folder(name: str, tmp_path: Path) -> None:
    folder = sharded_folder(tmp_path / "in")
    sharded_folder(folder, weight_map={**weight_map(folder), "fc.bias": name})
    with pytest.raises(DamagedError, match="not a plain file of its folder"):
        containers.read_folder(folder)


def without_a_shard(folder: Path) -> None:
    (folder / SECOND).unlink()


def without_a_tensor(folder: Path) -> None:
    safetensors.torch.save_file({"other": torch.ones(1)}, folder / SECOND)


def with_an_unlisted_tensor(folder: Path) -> None:
    names = weight_map(folder)
    del names["fc.bias"]
    (folder / sharded.INDEX_NAMES[0]).write_text(json.dumps({"weight_map": names}))


def with_a_shard_elsewhere(folder: Path) -> None:
    (folder / SECOND).rename(folder.parent / "elsewhere.safetensors")
    (folder / SECOND).symlink_to(folder.parent / "elsewhere.safetensors")


def with_index(text: str) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        (folder / sharded.INDEX_NAMES[0]).write_text(text)

    return edit


@pytest.mark.parametrize(
    "edit, message",
    [
        (without_a_shard, "which is missing"),
        (without_a_tensor, "is missing; .* says that it is there"),
        (with_an_unlisted_tensor, "does not list fc.bias"),
        (with_a_shard_elsewhere, "a link that leads out of its folder"),
        (with_index("not json"), "is not JSON"),
        (with_index("[]"), "does not map tensor names"),
        (with_index('{"weight_map": {}}'), "does not map tensor names"),
        (with_index('{"weight_map": {"a": 1}}'), "does not map tensor names"),
        (with_index("[" * 100_000), "is not JSON"),
    ],
)
def test_damaged(edit: Callable[[Path], None], message: str, tmp_path: Path) -> None:
    folder = sharded_folder(tmp_path / "in")
    edit(folder)
    with pytest.raises(DamagedError, match=message):
        containers.read_folder(folder)


def test_links_inside_of_the_folder_are_fine(tmp_path: Path) -> None:
    """A download cache links names to hashes; hard links and links to siblings stay inside."""
    folder = sharded_folder(tmp_path)
    (folder / SECOND).rename(folder / "blob")
    (folder / SECOND).symlink_to("blob")
    (folder / FIRST).rename(folder / "blob2")
    os.link(folder / "blob2", folder / FIRST)
    assert_same_tensors(containers.read_folder(folder).root, state())
