"""`.pt` and `.pth`: torch opens them without trust, zipfile and our own reader see the same bits."""

from __future__ import annotations

import io
import pickletools
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ensemblekit import average
from ensemblekit.dtypes import DTYPES
from ensemblekit.writers import Content
from ensemblekit.writers.torch_zip import layout

from ..checkpoints import assert_same_tensors, reading_of, tensor_bytes
from ..helpers import run_json, sha256, write_torch
from .filling import every_type, raw_bits, write

pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")


def opened(path: Path, **options: Any) -> Any:
    return torch.load(path, weights_only=True, **options)


@pytest.mark.parametrize("mmap", [False, True])
@pytest.mark.parametrize("ending", ["pt", "pth"])
def test_every_type_through_torch(tmp_path: Path, ending: str, *, mmap: bool) -> None:
    arrays = every_type()
    path = tmp_path / f"out.{ending}"
    assert write(path, arrays) == sha256(path)
    found = opened(path, mmap=mmap)
    assert type(found).__name__ == "OrderedDict"
    assert list(found) == [key for key, _ in arrays]
    for (key, dtype), array in arrays.items():
        assert found[key].dtype == getattr(torch, dtype), key
        assert tuple(found[key].shape) == array.shape
        assert found[key].is_contiguous()
        assert not found[key].requires_grad
        assert tensor_bytes(found[key]) == array.tobytes(), key


def test_our_own_reader(tmp_path: Path) -> None:
    path = tmp_path / "out.pt"
    write(path, every_type())
    tensors = opened(path)
    assert_same_tensors(reading_of(path).weights["model"].tensors, tensors)


def test_an_archive_like_any_other(tmp_path: Path) -> None:
    arrays = every_type()
    path = tmp_path / "out.pt"
    write(path, arrays, metadata={"ensemblekit": '{"a": 1}'})
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        names = archive.namelist()
        assert names[:3] == ["archive/data.pkl", "archive/byteorder", "archive/version"]
        assert archive.read("archive/byteorder") == b"little"
        assert archive.read("archive/version") == b"3\n"
        assert archive.read("archive/ensemblekit.json") == b'{"a": 1}'
        for place, array in enumerate(arrays.values()):
            assert archive.read(f"archive/data/{place}") == array.tobytes()
        assert {i.compress_type for i in archive.infolist()} == {zipfile.ZIP_STORED}
        assert {i.date_time for i in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}
        pickletools.dis(archive.read("archive/data.pkl"), out=io.StringIO())
        data = path.read_bytes()
        for info in archive.infolist():
            name, extra = struct.unpack_from("<HH", data, info.header_offset + 26)
            start = info.header_offset + 30 + name + extra
            assert start % 64 == 0, info.filename


def test_the_same_bytes_as_the_same_content(tmp_path: Path) -> None:
    first, second = write(tmp_path / "a.pt", every_type()), write(tmp_path / "b.pth", every_type())
    assert first == second


@pytest.mark.parametrize("mmap", [False, True])
def test_tied_tensors_share_a_storage(tmp_path: Path, *, mmap: bool) -> None:
    table, other = raw_bits("float32", (7, 4)), raw_bits("float32", (7, 4), seed=1)
    arrays = {
        ("head", "float32"): table,
        ("body", "float32"): other,
        ("embed", "float32"): table,
        ("more", "float32"): table,
    }
    write(tmp_path / "tied.pt", arrays, ties=[("embed", "head", "more")])
    write(tmp_path / "loose.pt", arrays)
    found = opened(tmp_path / "tied.pt", mmap=mmap)
    assert list(found) == ["head", "body", "embed", "more"]
    assert found["embed"].data_ptr() == found["head"].data_ptr() == found["more"].data_ptr()
    assert found["body"].data_ptr() != found["head"].data_ptr()
    for (key, _), array in arrays.items():
        assert tensor_bytes(found[key]) == array.tobytes()
    saved = (tmp_path / "loose.pt").stat().st_size - (tmp_path / "tied.pt").stat().st_size
    assert saved >= 2 * table.nbytes
    assert reading_of(tmp_path / "tied.pt").weights["model"].ties == (("embed", "head", "more"),)


@pytest.mark.parametrize(
    "key", ['quote"d', "newline\n", "émoji \N{SNOWMAN}", "a" * 5000, "", "half \ud800", "\x00"]
)
def test_odd_keys(tmp_path: Path, key: str) -> None:
    path = tmp_path / "out.pt"
    write(
        path, {(key, "float32"): np.ones(2, np.float32), ("w", "float32"): np.ones(1, np.float32)}
    )
    try:
        found = opened(path)
    except UnicodeError:
        found = torch.load(path, weights_only=False)
    assert found[key].tolist() == [1.0, 1.0]


def test_no_gaps_and_no_overlaps() -> None:
    signature = {f"w{n}": ((n,), "float32") for n in range(40)}
    made = layout(Content(signature, metadata={"ensemblekit": "{}"}))
    parts = [(start, len(data)) for start, data in made.frame(dict.fromkeys(signature, 7))]
    spans = sorted([*parts, *made.places.values()])
    end = 0
    for start, nbytes in spans:
        assert start == end
        end = start + nbytes


# ------------------------------------------------------------------------- through `average`


def snapshots(folder: Path, *states: dict[str, torch.Tensor]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for k, state in enumerate(states, 1):
        write_torch(folder / f"snap_{k}.pt", state)
    return folder


@pytest.mark.parametrize("dtype", [n for n in DTYPES if DTYPES[n].kind in ("float", "complex")])
def test_every_averaged_type(tmp_path: Path, dtype: str) -> None:
    """What comes out of `average` in memory stands in the file."""
    rng = np.random.default_rng(5)
    states = []
    for _ in range(3):
        values = torch.from_numpy(rng.normal(size=(4, 6)))
        kind = getattr(torch, dtype)
        wide = torch.complex(values, values.flip(0)) if kind.is_complex else values
        empty, scalar = torch.empty(0, 2, dtype=kind), wide[0, 0].to(kind)
        states.append({"w": wide.to(kind), "empty": empty, "scalar": scalar})
    run = snapshots(tmp_path / "run", *states)
    made = average(run).state
    assert made is not None
    average(run, tmp_path / "out.pt")
    found = opened(tmp_path / "out.pt")
    assert {key: tensor_bytes(t) for key, t in found.items()} == {
        key: array.tobytes() for key, array in made.items()
    }
    assert {key: t.dtype for key, t in found.items()} == dict.fromkeys(states[0], kind)


def test_ties_of_the_snapshots_hold_in_the_output(tmp_path: Path) -> None:
    states = []
    for k in (1.0, 2.0, 6.0):
        table = torch.full((5, 2), k)
        states.append({"embed": table, "other": torch.full((5, 2), -k), "head": table})
    run = snapshots(tmp_path / "run", *states)
    average(run, tmp_path / "out.pt")
    found = opened(tmp_path / "out.pt")
    assert found["embed"].data_ptr() == found["head"].data_ptr()
    assert found["head"].tolist() == [[3.0, 3.0]] * 5
    assert found["other"].tolist() == [[-3.0, -3.0]] * 5


def test_inspect_and_average_of_outputs(tmp_path: Path) -> None:
    snapshots(tmp_path / "run", *({"w": torch.full((3,), float(k))} for k in (1, 2, 6)))
    for n, last in ((1, 2), (2, 3)):
        value = run_json("average", "run", "--last", last, "-o", f"mean_{n}.pt", cwd=tmp_path)
        assert value["sha256"] == sha256(tmp_path / f"mean_{n}.pt")
    listed = run_json("inspect", "mean_1.pt", "mean_2.pt", "--deep", cwd=tmp_path)
    assert {Path(s["path"]).name for s in listed["snapshots"]} == {"mean_1.pt", "mean_2.pt"}
    made = average([tmp_path / "mean_1.pt", tmp_path / "mean_2.pt"]).state
    assert made is not None
    assert made["w"].tolist() == [3.5] * 3


def test_memory_format_does_not_matter(tmp_path: Path) -> None:
    """The output is in C order, whatever order the inputs lie in."""
    states = [{"w": torch.randn(2, 3, 4, 5)} for _ in range(2)]
    other = [{"w": s["w"].contiguous(memory_format=torch.channels_last)} for s in states]
    average(snapshots(tmp_path / "a", *states), tmp_path / "a.pt")
    average(snapshots(tmp_path / "b", *other), tmp_path / "b.pt")
    assert (tmp_path / "a.pt").read_bytes() == (tmp_path / "b.pt").read_bytes()
