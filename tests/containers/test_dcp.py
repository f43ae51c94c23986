"""Folders by torch.distributed.checkpoint: every tensor equals the full one, bit for bit."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint import HuggingFaceStorageWriter

from ensemblekit import average, blocks, containers
from ensemblekit.containers import Piece, TensorSpec
from ensemblekit.containers import dcp as reader
from ensemblekit.dtypes import DTYPES
from ensemblekit.errors import UnsupportedError
from ensemblekit.files import Source

from ..checkpoints import any_tensor, assert_same, assert_same_tensors, mean, state, tree_of
from ..helpers import environment

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


def saved(value: dict[str, Any], folder: Path, **options: Any) -> dict[str, Any]:
    dcp.save(value, checkpoint_id=folder, no_dist=True, **options)
    tree = containers.read_folder(folder)
    assert tree.container == "dcp"
    return dict(tree.root)


# --- one process ------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
def test_dtypes_and_shapes(tmp_path: Path) -> None:
    shapes: list[tuple[int, ...]] = [(), (1,), (0,), (3, 0, 2), (2, 3, 4)]
    tensors = {
        f"{name}-{i}": any_tensor(getattr(torch, name), *shape)
        for name in DTYPES
        for i, shape in enumerate(shapes)
    }
    assert_same_tensors(saved(tensors, tmp_path / "d"), tensors)


def test_views_and_tied_tensors(tmp_path: Path) -> None:
    base = torch.arange(24.0).reshape(4, 6)
    tensors = {"base": base, "tied": base, "t": base.t(), "block": base[1:3, 2:5], "row": base[1]}
    assert_same_tensors(saved(tensors, tmp_path / "d"), tensors)


def test_nested_state(tmp_path: Path) -> None:
    parameters = [nn.Parameter(torch.ones(3))]
    optimizer = torch.optim.AdamW(parameters, lr=0.25)
    parameters[0].sum().backward()
    optimizer.step()
    value = {"model": state(), "optimizer": optimizer.state_dict(), "step": 7, "note": "text"}
    root = saved(value, tmp_path / "d")
    assert_same_tensors(root["model"], state())
    assert (root["step"], root["note"]) == (7, "text")
    assert_same(
        root["optimizer"]["state"]["0"]["exp_avg"], optimizer.state[parameters[0]]["exp_avg"]
    )


def test_large_values_that_are_no_tensors_are_left_alone(tmp_path: Path) -> None:
    root = saved({"w": torch.ones(2), "log": b"x" * (2 << 20)}, tmp_path / "d")
    assert root["log"] is None


def test_many_files(tmp_path: Path) -> None:
    writer = dcp.FileSystemWriter(tmp_path / "d", single_file_per_rank=False, thread_count=2)
    dcp.save(state(), storage_writer=writer, no_dist=True)
    assert len(list((tmp_path / "d").glob("*.distcp"))) > 2
    tree = containers.read_folder(tmp_path / "d")
    assert {source.path.name for source in tree.sources} == reader.members(tmp_path / "d")
    assert_same_tensors(tree.root, state())


def test_description_reads_no_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    plain = Source.read_into

    def counted(self: Source, view: memoryview, offset: int) -> None:
        taken.append(len(view))
        plain(self, view, offset)

    monkeypatch.setattr(Source, "read_into", counted)
    saved({"w": torch.zeros(1 << 20)}, tmp_path / "d")
    assert sum(taken) < 50_000


def test_hugging_face_writer(tmp_path: Path) -> None:
    writer = HuggingFaceStorageWriter(path=str(tmp_path / "d"))
    dcp.save(state(), storage_writer=writer, no_dist=True)
    tree = containers.read_folder(tmp_path / "d")
    assert tree.container == "safetensors-sharded"
    assert_same_tensors(tree.root, state())


# --- two processes ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dcp")
    script = Path(__file__).with_name("dcp_writer.py")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(script), str(folder)],
        capture_output=True, text=True, env=environment(), timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder


def whole(folder: Path, step: int) -> dict[str, Any]:
    return dict(torch.load(folder / f"full_{step}.pt"))


@pytest.mark.parametrize("step", [1, 2, 3])
def test_sharded_tensors_equal_the_full_ones(step: int, written: Path) -> None:
    root = containers.read_folder(written / "run" / f"checkpoint-{step}").root
    expected = whole(written, step)
    assert_same_tensors(root["placed"], expected["placed"])
    assert_same_tensors({k: root["model"][k] for k in expected["model"]}, expected["model"])
    assert root["model"].keys() == expected["model"].keys()
    assert root["step"] == step


def test_uneven_pieces(written: Path) -> None:
    placed = containers.read_folder(written / "run" / "checkpoint-1").root["placed"]
    shapes = {k: [piece.spec.shape for piece in spec.pieces] for k, spec in placed.items()}
    assert shapes["rows"] == [(4, 3), (3, 3)]
    assert shapes["columns"] == [(4, 3, 2), (4, 2, 2)]
    assert shapes["copied"] == []


def test_average_of_sharded_checkpoints(written: Path, tmp_path: Path) -> None:
    out = tmp_path / "averaged.safetensors"
    result = average(written / "run", out, bn="average")
    assert [row["step"] for row in result.snapshots] == [1, 2, 3]
    expected = mean([whole(written, step)["model"] for step in (1, 2, 3)], dtype=torch.float64)
    expected["1.num_batches_tracked"] = whole(written, 3)["model"]["1.num_batches_tracked"]
    found = safetensors.torch.load_file(out)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_tensors_in_pieces_are_not_read_whole(
    written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(spec: Any) -> None:
        raise AssertionError(f"read whole: {spec}")

    monkeypatch.setattr(blocks, "read_array", refused)
    average(written / "run", tmp_path / "averaged.safetensors", bn="average")


def test_what_one_rank_wrote_is_no_checkpoint(written: Path) -> None:
    """Shards of equal size would average to nonsense, silently."""
    for path in (written / "apart").glob("shard-*.safetensors"):
        with pytest.raises(UnsupportedError, match="parts of tensors"):
            tree_of(path)


def test_joined_by_the_hugging_face_writer(written: Path) -> None:
    root = containers.read_folder(written / "joined").root
    expected = whole(written, 3)["placed"]
    assert_same_tensors({key: root[key] for key in expected}, expected)


# --- pieces and the shape that they make ------------------------------------------------------------


def box(offsets: tuple[int, ...], sizes: tuple[int, ...]) -> Piece:
    extent = containers.Extent(None, 0, 0, None)  # type: ignore[arg-type]
    return Piece(offsets, TensorSpec("float32", sizes, None, 0, extent))


GRID = [box((i, j), (2, 3)) for i in (0, 2) for j in (0, 3)]
COVERS: dict[str, tuple[tuple[int, ...], list[Piece], bool]] = {
    "grid": ((4, 6), GRID, True),
    "grid-in-any-order": ((4, 6), GRID[::-1], True),
    "pinwheel": (
        (3, 3),
        [
            box((0, 0), (1, 2)),
            box((0, 2), (2, 1)),
            box((2, 1), (1, 2)),
            box((1, 0), (2, 1)),
            box((1, 1), (1, 1)),
        ],
        True,
    ),
    "empty-pieces": ((4,), [box((0,), (4,)), box((4,), (0,)), box((2,), (0,))], True),
    "nothing": ((0, 3), [box((0, 0), (0, 3))], True),
    "scalar": ((), [box((), ())], True),
    "scalar-twice": ((), [box((), ()), box((), ())], False),
    "hole": ((4, 6), GRID[:-1], False),
    "too-large": ((4, 5), GRID, False),
    "too-small": ((5, 6), GRID, False),
    "the-same-twice": ((4, 6), [*GRID[:-1], GRID[0]], False),
    "overlap-and-hole": ((4,), [box((0,), (2,)), box((1,), (2,))], False),
    "many": ((2000,), [box((i,), (1,)) for i in range(2000)], True),
    "many-overlap-and-hole": (
        (2000,),
        [*(box((i,), (1,)) for i in range(1997)), box((1996,), (2,)), box((1999,), (1,))],
        False,
    ),
    "huge": ((1 << 62, 1 << 62), [box((0, 0), (1 << 62, 1 << 62))], True),
}


@pytest.mark.parametrize("name", COVERS)
def test_pieces_cover_the_shape(name: str) -> None:
    shape, pieces, expected = COVERS[name]
    assert reader._covers(shape, pieces) is expected
