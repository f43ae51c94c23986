"""`save`: complete or absent, verified, with a manifest beside it, and what it refuses."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from ensemblekit import writers
from ensemblekit.atomic import AtomicFile
from ensemblekit.errors import MachineError, UnsupportedError, UsageError
from ensemblekit.writers import Content, Layout, check_format, manifest_path, read_manifest
from ensemblekit.writers.safetensors import layout
from ensemblekit.writers.saving import save

from ..helpers import Array, contents, sha256

ARRAYS: dict[str, Array] = {
    "small": np.arange(3, dtype=np.uint8),
    "wide": np.linspace(0, 1, 5),
    "empty": np.empty((0, 4), np.float32),
    "scalar": np.array(7, np.int64),
    "matrix": np.arange(300_000, dtype=np.float32).reshape(300, 1000),
}
NAMES = {"uint8": "uint8", "float64": "float64", "float32": "float32", "int64": "int64"}
SIGNATURE = {key: (array.shape, NAMES[array.dtype.name]) for key, array in ARRAYS.items()}
Sink = Callable[[str, int, Any], None]


def fill(sink: Sink) -> None:
    """In pieces, the way that blocks come."""
    for key, array in ARRAYS.items():
        data = array.reshape(-1).view(np.uint8)
        for start in range(0, data.size, 4096):
            sink(key, start, data[start : start + 4096])


class Filled:
    """A filler that is one function."""

    def __init__(self, function: Callable[[Sink], object]) -> None:
        self.function = function

    def fill(self, sink: Sink, keys: Any = None) -> None:
        self.function(sink)

    def notes(self) -> dict[str, Any]:
        return {}

    def resume(self, notes: dict[str, Any]) -> None:
        pass

    def done(self) -> None:
        pass


def write(path: Path, **changes: Any) -> str:
    options: dict[str, Any] = {"inputs": [], "force": False, "fill": fill, **changes}
    return save(
        path, Content(SIGNATURE, metadata={"who": "me"}), Filled(options["fill"]),
        lambda digest: {"sha256": digest},
        inputs=options["inputs"], force=options["force"],
    )  # fmt: skip


def test_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "out.safetensors"
    digest = write(path)
    assert digest == sha256(path)
    assert read_manifest(path) == {"ensemblekit": True, "sha256": digest}
    loaded = load_file(path)
    assert {k: (v.shape, v.tobytes()) for k, v in loaded.items()} == {
        k: (v.shape, v.tobytes()) for k, v in ARRAYS.items()
    }
    assert sorted(contents(tmp_path)) == ["out.safetensors", "out.safetensors.json"]


def head(found: Layout) -> bytes:
    """What stands before the tensors of a safetensors file."""
    [(start, data)] = found.frame({})
    assert start == 0
    return data


def test_every_tensor_is_aligned_and_the_file_has_no_gaps() -> None:
    found = layout(Content(SIGNATURE))
    spans = sorted((start, start + n, key) for key, (start, n) in found.places.items())
    assert spans[0][0] == len(head(found))
    assert len(head(found)) % 8 == 0
    assert all(end == start for (_, end, _), (start, _, _) in pairwise(spans))
    assert all(start % ARRAYS[key].dtype.itemsize == 0 for start, _, key in spans)


def test_same_content_same_bytes() -> None:
    backwards = dict(reversed(list(SIGNATURE.items())))
    one, other = (Content(s, metadata={"a": "1"}) for s in (SIGNATURE, backwards))
    assert head(layout(one)) == head(layout(other))


@pytest.mark.parametrize("key", ['quote"d', "newline\n", "émoji \N{SNOWMAN}", "a" * 5000, ""])
def test_odd_keys(tmp_path: Path, key: str) -> None:
    array = np.ones(2, np.float32)
    path = tmp_path / "out.safetensors"
    save(
        path, Content({key: ((2,), "float32")}),
        Filled(lambda sink: sink(key, 0, array.view(np.uint8))),
        lambda _: {}, inputs=[], force=False,
    )  # fmt: skip
    assert load_file(path)[key].tolist() == [1.0, 1.0]


@pytest.mark.parametrize("dtype", ["complex128", "complex32"])
def test_what_safetensors_cannot_hold(dtype: str) -> None:
    with pytest.raises(UnsupportedError, match=f"'w'.*{dtype}"):
        layout(Content({"w": ((1,), dtype)}))


@pytest.mark.parametrize("name", ["out.xyz", "out.safetensor", "out.safetensors.json"])
def test_unknown_ending(name: str) -> None:
    with pytest.raises(UsageError, match=r"\.safetensors"):
        check_format(Path(name))


@pytest.mark.parametrize("force", [False, True])
def test_existing_output(tmp_path: Path, force: bool) -> None:
    path = tmp_path / "out.safetensors"
    path.write_text("precious")
    if force:
        assert write(path, force=True) == sha256(path)
        return
    with pytest.raises(UsageError, match="exists"):
        write(path)
    assert path.read_text() == "precious"
    assert list(contents(tmp_path)) == ["out.safetensors"]


def test_output_that_appears_meanwhile(tmp_path: Path) -> None:
    path = tmp_path / "out.safetensors"

    def fill_slowly(sink: Sink) -> None:
        fill(sink)
        path.write_text("another writer's")

    with pytest.raises(UsageError, match="exists"):
        write(path, fill=fill_slowly)
    assert path.read_text() == "another writer's"
    assert list(contents(tmp_path)) == ["out.safetensors"]


def test_someone_elses_json_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "out.safetensors"
    manifest_path(path).write_text('{"precious": 1}')
    with pytest.raises(UsageError, match="no manifest of ours"):
        write(path)
    assert contents(tmp_path).keys() == {"out.safetensors.json"}
    assert json.loads(manifest_path(path).read_text()) == {"precious": 1}


@pytest.mark.parametrize("link", [os.link, os.symlink, None])
@pytest.mark.parametrize("suffix", ["", ".json"])
def test_output_or_manifest_is_an_input(
    tmp_path: Path, suffix: str, link: Callable[[Path, Path], None] | None
) -> None:
    path = tmp_path / "out.safetensors"
    target = Path(f"{path}{suffix}")
    source = target
    if link:
        source = tmp_path / "input"
        source.write_text("precious")
        link(source, target)
    else:
        source.write_text("precious")
    with pytest.raises(UsageError, match="input"):
        write(path, inputs=[source], force=True)
    assert source.read_text() == "precious"


@pytest.mark.parametrize("kind", [KeyboardInterrupt, RuntimeError, MemoryError])
def test_failure_leaves_nothing(tmp_path: Path, kind: type[BaseException]) -> None:
    def fail(sink: Sink) -> None:
        sink("wide", 0, np.zeros(8, np.uint8))
        raise kind

    with pytest.raises(kind):
        write(tmp_path / "out.safetensors", fill=fail)
    assert not list(tmp_path.iterdir())


def test_a_disk_that_forgets_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = AtomicFile.write_at

    def lossy(self: AtomicFile, data: bytes | memoryview, offset: int) -> None:
        raw = bytearray(data)
        if len(raw) == 4096 and offset > 100_000:
            raw[17] ^= 4
        honest(self, bytes(raw), offset)

    monkeypatch.setattr(AtomicFile, "write_at", lossy)
    with pytest.raises(MachineError, match="other bytes"):
        write(tmp_path / "out.safetensors")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", "[" * 100_000, '{"a": 1}', "\ud800", '{"ensemblekit": 1'],
    ids=["empty", "cut", "list", "null", "deep", "other", "surrogate", "unclosed"],
)  # fmt: skip
def test_no_manifest_of_ours(tmp_path: Path, text: str) -> None:
    path = tmp_path / "out.safetensors"
    manifest_path(path).write_bytes(text.encode("utf-8", "surrogatepass"))
    assert read_manifest(path) is None


def test_registry_entries_make_layouts() -> None:
    for suffix, module in writers.WRITERS.items():
        assert suffix.startswith(".")
        made = __import__(module, fromlist=["layout"]).layout(Content({"w": ((2,), "float32")}))
        assert isinstance(made, Layout)
        assert made.places["w"][1] == 8
        parts = [(start, len(data)) for start, data in made.frame({"w": 1})]
        ends = sorted([*parts, made.places["w"]])
        assert [a + n for a, n in ends[:-1]] == [a for a, _ in ends[1:]]
