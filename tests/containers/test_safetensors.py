"""Files by the reference library are read as it reads them, and ours by it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ensemblekit.atomic import AtomicFile
from ensemblekit.dtypes import DTYPES
from ensemblekit.errors import DamagedError, UnsupportedError
from ensemblekit.files import Source
from ensemblekit.snapshots import Signature
from ensemblekit.writers import WRITERS, Content
from ensemblekit.writers import safetensors as writer

from ..checkpoints import any_tensor, assert_same_tensors, state, tree_of

STORABLE = [d.name for d in DTYPES.values() if d.safetensors]
SHAPES: list[tuple[int, ...]] = [(), (1,), (0,), (3, 0, 2), (5,), (2, 3, 4)]


def all_shapes(name: str) -> dict[str, torch.Tensor]:
    tensors = {str(shape): any_tensor(getattr(torch, name), *shape) for shape in SHAPES}
    return {**tensors, "odd": any_tensor(torch.uint8, 3)}


@pytest.mark.parametrize("name", STORABLE)
def test_dtype(name: str, tmp_path: Path) -> None:
    tensors = all_shapes(name)
    safetensors.torch.save_file(tensors, tmp_path / "file.safetensors")
    root = tree_of(tmp_path / "file.safetensors").root
    assert_same_tensors({key: root[key] for key in tensors}, tensors)


@pytest.mark.parametrize("dtype", safetensors.torch._TYPES.values(), ids=str)
def test_every_dtype_that_the_library_writes(dtype: torch.dtype, tmp_path: Path) -> None:
    """Since 0.6 the format has F8_E4M3FNUZ and F8_E5M2FNUZ."""
    tensors = {"w": any_tensor(dtype, 5)}
    safetensors.torch.save_file(tensors, tmp_path / "file.safetensors")
    assert_same_tensors(tree_of(tmp_path / "file.safetensors").root, tensors)


def test_state_dict_and_metadata(tmp_path: Path) -> None:
    path = tmp_path / "file.safetensors"
    safetensors.torch.save_file(state(), path, metadata={"format": "pt", "note": "ünï"})
    tree = tree_of(path)
    assert tree.container == "safetensors"
    assert tree.metadata == {"format": "pt", "note": "ünï"}
    loaded = safetensors.torch.load_file(path)
    assert_same_tensors(tree.root, {key: loaded[key] for key in tree.root})
    assert set(tree.root) == set(loaded)


def test_no_tensors_at_all(tmp_path: Path) -> None:
    path = tmp_path / "file.safetensors"
    safetensors.torch.save_file({}, path, metadata={"format": "pt"})
    assert tree_of(path).root == {}


def test_known_by_content(tmp_path: Path) -> None:
    safetensors.torch.save_file(state(), tmp_path / "file.bin")
    assert tree_of(tmp_path / "file.bin").container == "safetensors"


def write(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """Through our writer's layout, values put where it says."""
    names = {key: str(t.dtype).removeprefix("torch.") for key, t in tensors.items()}
    signature: Signature = {key: (tuple(t.shape), names[key]) for key, t in tensors.items()}
    plan = writer.layout(Content(signature, metadata=metadata))
    with AtomicFile(path) as file:
        for start, data in plan.frame({}):
            file.write_at(data, start)
        for key, (start, length) in plan.places.items():
            raw = bytes(tensors[key].contiguous().clone().untyped_storage())
            assert len(raw) == length
            file.write_at(raw, start)
        file.seal().close()
        file.rename()


@pytest.mark.parametrize("name", STORABLE)
def test_library_reads_what_we_lay_out(name: str, tmp_path: Path) -> None:
    value = all_shapes(name)
    path = tmp_path / "file.safetensors"
    write(path, value, {"note": "x"})
    loaded = safetensors.torch.load_file(path)
    assert set(loaded) == set(value)
    for key, tensor in value.items():
        assert loaded[key].dtype == tensor.dtype
        assert loaded[key].shape == tensor.shape
        assert bytes(loaded[key].clone().untyped_storage()) == bytes(tensor.untyped_storage())
    with safetensors.safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt", "note": "x"}


NAMES = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12).filter(
    lambda name: name != "__metadata__"
)


@settings(max_examples=40, deadline=None)
@given(
    tensors=st.dictionaries(
        NAMES,
        st.tuples(
            st.sampled_from(STORABLE), st.lists(st.integers(0, 3), max_size=3), st.integers(0, 9)
        ),
        min_size=1,  # safetensors 0.8 writes no JSON for neither tensors nor metadata
        max_size=6,
    ),
    metadata=st.dictionaries(NAMES, st.text(st.characters(exclude_categories=["Cs"])), max_size=3),
)
def test_any_file_goes_both_ways(
    tmp_path_factory: pytest.TempPathFactory,
    tensors: dict[str, tuple[str, list[int], int]],
    metadata: dict[str, str],
) -> None:
    folder = tmp_path_factory.mktemp("both")
    value = {
        key: any_tensor(getattr(torch, name), *shape, seed=seed)
        for key, (name, shape, seed) in tensors.items()
    }
    theirs, ours = folder / "theirs.safetensors", folder / "ours.safetensors"
    safetensors.torch.save_file(value, theirs, metadata=metadata)
    write(ours, value, metadata)
    for path, stated in ((theirs, metadata), (ours, {"format": "pt", **metadata})):
        tree = tree_of(path)
        assert tree.metadata == stated
        assert_same_tensors(tree.root, {key: value[key] for key in tree.root})
        assert set(tree.root) == set(value)
    assert set(safetensors.torch.load_file(ours)) == set(value)


def test_data_begin_at_a_multiple_of_eight() -> None:
    """Readers that map the file want aligned tensors."""
    for length in range(20):
        plan = writer.layout(Content({"k" * (length + 1): ((2,), "float64")}))
        assert plan.places["k" * (length + 1)][0] % 8 == 0


def test_registered_writer() -> None:
    assert WRITERS[".safetensors"] == writer.__name__


def test_bytes_are_read_where_the_header_says(tmp_path: Path) -> None:
    path = tmp_path / "file.safetensors"
    safetensors.torch.save_file({"w": torch.arange(5, dtype=torch.int16)}, path)
    spec = tree_of(path).root["w"]
    raw = Source(path).read(spec.start, spec.nbytes)
    assert np.frombuffer(raw, "<i2").tolist() == [0, 1, 2, 3, 4]


def test_files_of_one_header_hold_their_own_values(tmp_path: Path) -> None:
    """What is kept of a header must not be kept of the file."""
    trees = []
    for step in (1.0, 2.0):
        path = tmp_path / f"step_{step}.safetensors"
        tensors = {"w": torch.full((3, 2), step), "b": torch.full((4,), -step)}
        safetensors.torch.save_file(tensors, path, {"format": "pt"})
        trees.append((tree_of(path), tensors, path))
    for tree, tensors, path in trees:
        assert_same_tensors({key: tree.root[key] for key in tensors}, tensors)
        assert [source.path for source in tree.sources] == [path]
    first, second = trees[0][0], trees[1][0]
    first.metadata["format"] = "changed"
    del first.root["w"]
    assert second.metadata == {"format": "pt"}
    assert tree_of(trees[1][2]).metadata == {"format": "pt"}
    assert "w" in tree_of(trees[0][2]).root


def test_the_same_header_over_fewer_bytes_is_damaged(tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole.safetensors", tmp_path / "cut.safetensors"
    safetensors.torch.save_file({"w": torch.zeros(8)}, whole)
    cut.write_bytes(whole.read_bytes()[:-4])
    for _ in range(2):
        tree_of(whole)
        with pytest.raises(DamagedError, match=r"cut\.safetensors.*'w'"):
            tree_of(cut)


def test_an_error_names_the_file_that_has_it(tmp_path: Path) -> None:
    """Also when another one of the same header was looked at before."""
    header = b'{"w":{"dtype":"X9","shape":[1],"data_offsets":[0,4]}}'
    for name in ("one", "two"):
        path = tmp_path / f"{name}.safetensors"
        path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
        with pytest.raises(UnsupportedError, match=rf"{name}\.safetensors: 'w': dtype X9"):
            tree_of(path)
