"""Any part of a tensor in pieces equals the same part of the whole, and nothing else is read."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import tempfile
import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ensemblekit import containers
from ensemblekit.containers import Extent, Piece, TensorSpec, read_array
from ensemblekit.dtypes import DTYPES
from ensemblekit.errors import DamagedError
from ensemblekit.files import Source
from ensemblekit.pieces import PiecesReader

from .helpers import environment

Array = npt.NDArray[Any]
Box = tuple[slice, ...]


class Form(NamedTuple):
    """How a piece lies in its file: the axes from outermost to innermost, elements per element."""

    order: tuple[int, ...]
    gap: int


def numbered(dtype: str, shape: tuple[int, ...]) -> Array:
    """An array of which no two bytes nearby are alike."""
    form = DTYPES[dtype].numpy
    count = int(np.prod(shape, dtype=int)) * form.itemsize
    raw = np.random.default_rng(0).integers(0, 2 if dtype == "bool" else 256, count, np.uint8)
    return raw.view(form).reshape(shape)


def stored(folder: Path, dtype: str, part: Array, form: Form | None = None) -> TensorSpec:
    """The array in a file of its own, behind some other bytes."""
    number = len(list(folder.iterdir()))
    path, before, itemsize = folder / f"{number}.bin", 8 + number % 5, part.itemsize
    order, gap = form or Form(tuple(range(part.ndim)), 1)
    steps, step = [0] * part.ndim, gap
    for axis in reversed(order):
        steps[axis], step = step, step * max(1, part.shape[axis])
    turned = np.ascontiguousarray(part.view(f"V{itemsize}").transpose(order)).reshape(-1)
    gapped = np.zeros(turned.size * gap, turned.dtype)
    gapped[::gap] = turned
    path.write_bytes(b"\xee" * (before + itemsize) + gapped.tobytes() + b"\xee" * 7)
    extent = Extent(Source(path), before, itemsize + gapped.nbytes, None)
    spec = containers.checked_spec(
        dtype=dtype, shape=part.shape, stride=tuple(steps), offset=1, extent=extent
    )
    assert isinstance(spec, TensorSpec)
    return spec


def in_pieces(
    folder: Path, dtype: str, whole: Array, boxes: Sequence[Box], forms: Sequence[Form | None] = ()
) -> TensorSpec:
    """The array in files, one for each box."""
    pieces = []
    for box, form in itertools.zip_longest(boxes, forms):
        place = tuple(cut.start for cut in box)
        pieces.append(Piece(place, stored(folder, dtype, whole[box], form)))
    return TensorSpec(dtype, whole.shape, None, 0, pieces[0].spec.extent, tuple(pieces))


def grid(shape: tuple[int, ...], cuts: Sequence[Sequence[int]]) -> list[Box]:
    """Boxes between the cuts of each axis."""
    edges = [(0, *sorted(own), size) for own, size in zip(cuts, shape, strict=True)]
    return list(itertools.product(*([slice(*e) for e in itertools.pairwise(x)] for x in edges)))


def even(shape: tuple[int, ...], axis: int, count: int) -> list[Box]:
    """As many slices of an axis."""
    step = shape[axis] // count
    cuts = [range(step, n, step) if a == axis else () for a, n in enumerate(shape)]
    return grid(shape, cuts)


def part_of(reader: PiecesReader, start: int, stop: int) -> bytes:
    """What lands in the middle of a buffer, of which the rest must stay as it was."""
    buffer = bytearray(b"\xaa" * (stop - start + 20))
    reader.read_into(memoryview(buffer)[10:-10], start)
    assert buffer[:10] == buffer[-10:] == b"\xaa" * 10
    return bytes(buffer[10:-10])


def in_blocks(reader: PiecesReader, step: int) -> bytes:
    """The whole, block by block."""
    starts = range(0, reader.nbytes, step)
    return b"".join(part_of(reader, s, min(s + step, reader.nbytes)) for s in starts)


# --- the same bytes ---------------------------------------------------------------------------


class Case(NamedTuple):
    """A tensor and how it is stored, without files."""

    dtype: str
    shape: tuple[int, ...]
    boxes: list[Box]
    forms: list[Form | None]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    shape = tuple(draw(st.lists(st.integers(0, 7), max_size=4)))
    boxes = grid(shape, [draw(st.lists(st.integers(0, n), max_size=2)) for n in shape])
    boxes = draw(st.permutations(boxes))
    strided = st.builds(Form, st.permutations(range(len(shape))).map(tuple), st.integers(1, 2))
    form = st.none() | strided if draw(st.booleans()) else st.none()
    forms = draw(st.lists(form, min_size=len(boxes), max_size=len(boxes)))
    return Case(draw(st.sampled_from(sorted(DTYPES))), shape, boxes, forms)


@settings(max_examples=300, deadline=None)
@given(cases(), st.data())
def test_any_range_of_any_pieces(case: Case, data: st.DataObject) -> None:
    whole = numbered(case.dtype, case.shape)
    expected = whole.tobytes()
    with tempfile.TemporaryDirectory(prefix="pieces-") as name:
        spec = in_pieces(Path(name), case.dtype, whole, case.boxes, case.forms)
        assert read_array(spec).tobytes() == expected
        reader = PiecesReader(spec)
        ends = st.integers(0, len(expected))
        for start, stop in map(sorted, data.draw(st.lists(st.tuples(ends, ends), max_size=6))):
            assert part_of(reader, start, stop) == expected[start:stop]
        step = data.draw(st.integers(1, 2 + len(expected) // whole.itemsize)) * whole.itemsize
        assert in_blocks(reader, max(step, len(expected) // 50)) == expected
        for piece in spec.pieces:
            piece.spec.extent.source.file.close()


@pytest.mark.parametrize("form", [None, Form((1, 2, 0), 1)], ids=["plain", "strided"])
def test_a_tensor_that_is_one_piece(form: Form | None, tmp_path: Path) -> None:
    whole = numbered("bfloat16", (5, 3, 4))
    reader = PiecesReader(stored(tmp_path, "bfloat16", whole, form))
    assert part_of(reader, 0, reader.nbytes) == whole.tobytes()
    assert in_blocks(reader, 14) == whole.tobytes()


# First and last row, first and last column of each piece.
NO_GRIDS = {
    "around-a-fifth": [(0, 3, 0, 6), (0, 6, 6, 9), (6, 9, 3, 9), (3, 9, 0, 3), (3, 6, 3, 6)],
    "beside-a-tall-one": [(0, 9, 0, 3), *((row, row + 1, 3, 9) for row in range(9))],
}


@pytest.mark.parametrize("name", NO_GRIDS)
def test_pieces_that_are_no_grid(name: str, tmp_path: Path) -> None:
    """They do not end in the order in which they begin."""
    whole = numbered("int32", (9, 9))
    boxes = [(slice(a, b), slice(c, d)) for a, b, c, d in NO_GRIDS[name]]
    reader = PiecesReader(in_pieces(tmp_path, "int32", whole, boxes))
    for step in (4, 12, 28, 36, 100):
        assert in_blocks(reader, step) == whole.tobytes()


@pytest.mark.parametrize("columns", [4096, 4096 + 8, 3 * 4096])
def test_long_rows(columns: int, tmp_path: Path) -> None:
    """On both sides of the length up to which a row is copied as one item."""
    whole = numbered("uint8", (6, 2 * columns))
    reader = PiecesReader(in_pieces(tmp_path, "uint8", whole, even(whole.shape, 1, 2)))
    for step in (1000, columns, 3 * columns + 5, whole.nbytes):
        assert in_blocks(reader, step) == whole.tobytes()


def test_a_file_that_was_cut_short(tmp_path: Path) -> None:
    whole = numbered("float32", (8, 8))
    spec = in_pieces(tmp_path, "float32", whole, even((8, 8), 1, 2))
    reader = PiecesReader(spec)
    os.truncate(spec.pieces[1].spec.extent.source.path, 60)
    with pytest.raises(DamagedError):
        in_blocks(reader, 64)


# --- what is read, and what it takes --------------------------------------------------------------


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """File and length of each read."""
    reads: list[tuple[str, int]] = []
    plain = Source.read_into

    def counted(self: Source, view: memoryview, offset: int) -> None:
        reads.append((self.path.name, len(view)))
        plain(self, view, offset)

    monkeypatch.setattr(Source, "read_into", counted)
    return reads


@pytest.mark.parametrize("step", [4, 36, 1 << 10, 1000, 1 << 12, 1 << 15])
def test_reads_of_rows(step: int, tmp_path: Path, taken: list[tuple[str, int]]) -> None:
    """One for each block, and one more where a piece ends within a block."""
    whole = numbered("float32", (64, 32))
    reader = PiecesReader(in_pieces(tmp_path, "float32", whole, even((64, 32), 0, 8)))
    assert in_blocks(reader, step) == whole.tobytes()
    ends = {*range(0, whole.nbytes, step), *range(0, whole.nbytes, whole.nbytes // 8)}
    assert len(taken) == len(ends)
    assert sum(length for _, length in taken) == whole.nbytes


@pytest.mark.parametrize("axis", [1, 2])
@pytest.mark.parametrize("step", [8, 36, 1 << 10, 1000, 1 << 12, 1 << 15])
def test_reads_of_columns(
    axis: int, step: int, tmp_path: Path, taken: list[tuple[str, int]]
) -> None:
    """One for each piece and block at most, and no byte twice or in vain."""
    whole = numbered("float32", (16, 8, 16))
    reader = PiecesReader(in_pieces(tmp_path, "float32", whole, even(whole.shape, axis, 8)))
    assert in_blocks(reader, step) == whole.tobytes()
    assert len(taken) <= 8 * -(-whole.nbytes // step)
    assert sum(length for _, length in taken) == whole.nbytes


def test_reads_of_a_part(tmp_path: Path, taken: list[tuple[str, int]]) -> None:
    whole = numbered("float32", (16, 16))
    boxes = grid((16, 16), [(8,), (4,)])
    reader = PiecesReader(in_pieces(tmp_path, "float32", whole, boxes))
    assert part_of(reader, 9 * 64 + 8, 9 * 64 + 24) == whole.tobytes()[584:600]
    assert sorted(taken) == [("2.bin", 8), ("3.bin", 8)]
    assert part_of(reader, 80, 80) == b""
    assert len(taken) == 2


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("step", [16, 100, 5000])
def test_strided_pieces_are_read_once(
    axis: int, step: int, tmp_path: Path, taken: list[tuple[str, int]]
) -> None:
    """Also where many blocks in a row hold nothing of a piece that goes on behind them."""
    whole = numbered("float32", (40, 40))
    boxes = even((40, 40), axis, 2)
    spec = in_pieces(tmp_path, "float32", whole, boxes, [Form((1, 0), 1)] * 2)
    reader = PiecesReader(spec)
    assert in_blocks(reader, step) == whole.tobytes()
    assert taken == [("0.bin", whole.nbytes // 2), ("1.bin", whole.nbytes // 2)]
    assert not reader._held


def test_strided_pieces_are_let_go(tmp_path: Path) -> None:
    whole = numbered("float32", (40, 40))
    spec = in_pieces(tmp_path, "float32", whole, even((40, 40), 0, 4), [Form((1, 0), 1)] * 4)
    reader = PiecesReader(spec)
    held = [len(reader._held) for s in range(0, 6400, 400) if part_of(reader, s, s + 400)]
    assert held == [1, 1, 1, 0] * 4
    for start in (0, 4800, 0, 3200):  # forwards and backwards
        part_of(reader, start, start + 4)
        assert len(reader._held) == 1


@pytest.mark.parametrize("axis", [0, 1])
def test_memory(axis: int, tmp_path: Path) -> None:
    """Less than one block beside the block, for a tensor of a thousand."""
    block, shape = 1 << 16, (1 << 10, 1 << 14)
    pieces = []
    for number, box in enumerate(even(shape, axis, 4)):
        path = tmp_path / f"{number}.bin"
        path.touch()
        os.truncate(path, 4 * 1024 * 4096)
        sizes = tuple(cut.stop - cut.start for cut in box)
        extent = Extent(Source(path), 0, 4 * 1024 * 4096, None)
        place = tuple(cut.start for cut in box)
        pieces.append(Piece(place, TensorSpec("float32", sizes, None, 0, extent)))
    reader = PiecesReader(
        TensorSpec("float32", shape, None, 0, pieces[0].spec.extent, tuple(pieces))
    )
    view = memoryview(bytearray(block))
    tracemalloc.start()
    try:
        for offset in range(0, reader.nbytes, block):
            reader.read_into(view, offset)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < block


# --- what torch writes --------------------------------------------------------------------------


def test_what_two_processes_wrote(tmp_path: Path) -> None:
    script = Path(__file__).with_name("containers") / "dcp_writer.py"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(script), str(tmp_path)],
        capture_output=True, text=True, env=environment(), timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    root = containers.read_folder(tmp_path / "run" / "checkpoint-1").root
    specs = [*root["placed"].values(), *root["model"].values()]
    assert sum(len(spec.pieces) == 2 for spec in specs) >= 3
    for spec in specs:
        expected = read_array(spec).tobytes()
        for count in (1, 3, 7, spec.size):
            assert in_blocks(PiecesReader(spec), count * spec.type.itemsize) == expected
