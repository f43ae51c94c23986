"""Tar archives: a NeMo file equals its checkpoint, torch's of 2016 what torch.load reads."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from ensemblekit import average
from ensemblekit.containers import Unusable
from ensemblekit.errors import DamagedError, HostileError, UnsupportedError
from ensemblekit.files import Source

from ..checkpoints import assert_same_tensors, reading_of, save, state, tree_of
from ..faults import archives, forge

ARRAYS = {
    "double": np.arange(6.0).reshape(2, 3),
    "float": np.linspace(-1, 1, 7, dtype=np.float32),
    "half": np.arange(4, dtype=np.float16).reshape(2, 2),
    "long": np.array(-5, np.int64),
    "int": np.arange(3, dtype=np.int32),
    "byte": np.arange(9, dtype=np.uint8).reshape(3, 3),
    "empty": np.zeros((0, 2), np.float32),
}


def packed(path: Path, *, form: int = tarfile.PAX_FORMAT, **members: bytes) -> Path:
    """A tar file by the standard library; `__` in a name is a dot."""
    with tarfile.open(path, "w", format=form) as archive:
        for name, data in members.items():
            entry = tarfile.TarInfo(f"./{name.replace('__', '.')}")
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return path


def checkpoint(step: int, folder: Path, **options: Any) -> bytes:
    return save(state(step), folder / "weights.pt", **options).read_bytes()


# --- NeMo ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("zipped", [True, False])
def test_nemo(form: int, zipped: bool, tmp_path: Path) -> None:
    weights = checkpoint(1, tmp_path, _use_new_zipfile_serialization=zipped)
    path = packed(
        tmp_path / "a.nemo", form=form, model_config__yaml=b"lr: 1", model_weights__ckpt=weights
    )
    tree = tree_of(path)
    assert tree.container == ("tar+torch-zip" if zipped else "tar+torch-legacy")
    assert_same_tensors(tree.root, torch.load(io.BytesIO(weights)))
    assert [source.path for source in tree.sources] == [path]


def test_nemo_with_long_names_and_folders(tmp_path: Path) -> None:
    weights = checkpoint(1, tmp_path)
    path = tmp_path / "a.nemo"
    with tarfile.open(path, "w") as archive:
        folder = tarfile.TarInfo("./" + "deep/" * 40)
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
        for name, data in (("x" * 300 + ".model", b"tokenizer"), ("weights.ckpt", weights)):
            entry = tarfile.TarInfo(folder.name + "/" + name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    assert_same_tensors(tree_of(path).root, state(1))


def test_average_of_nemo_files(tmp_path: Path) -> None:
    for kind in ("nemo", "pt"):
        (tmp_path / kind).mkdir()
    for step in (1, 2, 3):
        weights = checkpoint(step, tmp_path)
        (tmp_path / "pt" / f"snap_{step}.pt").write_bytes(weights)
        packed(tmp_path / "nemo" / f"snap_{step}.nemo", a__yaml=b"", w__ckpt=weights)
    found = [tmp_path / f"{kind}.safetensors" for kind in ("nemo", "pt")]
    for path in found:
        average(tmp_path / path.stem, path)
    assert_same_tensors(tree_of(found[0]).root, safetensors.torch.load_file(found[1]))


def test_description_reads_no_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = save({"w": torch.zeros(1 << 20)}, tmp_path / "w.pt").read_bytes()
    path = packed(tmp_path / "a.nemo", a__yaml=b"", w__ckpt=weights)
    taken: list[int] = []
    plain = Source.read_into

    def counted(self: Source, view: memoryview, offset: int) -> None:
        taken.append(len(view))
        plain(self, view, offset)

    monkeypatch.setattr(Source, "read_into", counted)
    tree_of(path)
    assert sum(taken) < 50_000


def nested_tar(path: Path, levels: int) -> Path:
    data = b""
    for _ in range(levels):
        data = archives.tar_bytes(archives.member("w.ckpt", data))
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("levels", [2, 300])
def test_tar_in_tar(levels: int, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="a tar archive within another file"):
        tree_of(nested_tar(tmp_path / "a.nemo", levels))


# --- torch's tar of 2016 -----------------------------------------------------------------------


def old(path: Path, **changes: bytes) -> Path:
    members = {**archives.old_members(ARRAYS, epoch=3), **changes}
    path.write_bytes(archives.tar_bytes(*(archives.member(k, v) for k, v in members.items())))
    return path


def same_as_torch(path: Path) -> dict[str, Any]:
    expected = torch.load(path, weights_only=False)
    tree = tree_of(path)
    assert tree.container == "torch-tar"
    assert_same_tensors(tree.root["model"], expected["model"])
    return dict(tree.root)


def test_old_torch(tmp_path: Path) -> None:
    root = same_as_torch(old(tmp_path / "old.pt"))
    assert root["epoch"] == 3
    assert list(root["model"]) == list(ARRAYS)


FLOATS = archives.storage_row(
    1, forge.named("torch.FloatStorage"), 24, np.arange(24, dtype=np.float32).tobytes()
)
STRIDED = {
    "whole": (1, (24,), (1,), 0),
    "matrix": (1, (4, 6), (6, 1), 0),
    "transposed": (1, (6, 4), (1, 6), 0),
    "block": (1, (2, 3), (6, 1), 8),
    "expanded": (1, (3, 4), (0, 1), 20),
    "of-a-view": (2, (2, 2), (2, 1), 1),
    "scalar": (1, (), (), 5),
}


def test_old_torch_views_and_strides(tmp_path: Path) -> None:
    """Storages that are parts of others stand in a table of their own."""
    rows = [
        archives.tensor_row(100 + i, storage, shape, stride, offset=offset)
        for i, (storage, shape, stride, offset) in enumerate(STRIDED.values())
    ]
    model = {key: forge.persistent(str(100 + i)) for i, key in enumerate(STRIDED)}
    path = old(
        tmp_path / "old.pt",
        storages=archives.table([FLOATS], [(2, 1, 7, 6)]),
        tensors=archives.table(rows),
        pickle=forge.pickled({"model": model}),
    )
    root = same_as_torch(path)
    assert len({spec.extent.start for spec in root["model"].values()}) == 2


def test_old_torch_with_many_views(tmp_path: Path) -> None:
    """Their list may be longer than the first block that is read."""
    views = [(10 + i, 1, i % 20, 4) for i in range(1000)]
    rows = [archives.tensor_row(101, 1009, (4,))]
    path = old(
        tmp_path / "old.pt",
        storages=archives.table([FLOATS], views),
        tensors=archives.table(rows),
        pickle=forge.pickled({"model": {"w": forge.persistent("101")}}),
    )
    same_as_torch(path)


def test_old_torch_module(tmp_path: Path) -> None:
    """A class comes as a tuple, with its source behind it."""
    cls = forge.persistent((forge.named("torch.nn.modules.linear.Linear"), None, None))
    parameters = {"weight": forge.persistent("101"), "bias": None}
    module = forge.build(
        forge.Code(cls + forge.push(()) + b"\x81"), {"_parameters": parameters, "_modules": {}}
    )
    data = np.arange(6, dtype=np.float32)
    row = archives.storage_row(1, forge.named("torch.FloatStorage"), 6, data.tobytes())
    path = old(
        tmp_path / "old.pt",
        storages=archives.table([row], []),
        tensors=archives.table([archives.tensor_row(101, 1, (2, 3))]),
        pickle=forge.pickled(module),
    )
    found = reading_of(path).weights["model"].tensors
    assert_same_tensors(found, {"weight": torch.arange(6.0).reshape(2, 3)})


def test_missing_tensor(tmp_path: Path) -> None:
    path = old(tmp_path / "old.pt", pickle=forge.pickled({"w": forge.persistent("999")}))
    spec = tree_of(path).root["w"]
    assert isinstance(spec, Unusable)
    assert spec.damaged


KIND = forge.named("torch.FloatStorage")
TABLES: dict[str, dict[str, bytes]] = {
    "view-past-the-end": {"storages": archives.table([FLOATS], [(2, 1, 20, 6)])},
    "view-negative": {"storages": archives.table([FLOATS], [(2, 1, -1, 6)])},
    "view-of-nothing": {"storages": archives.table([FLOATS], [(2, 9, 0, 6)])},
    "view-not-a-row": {"storages": archives.table([FLOATS], [5])},
    "views-missing": {"storages": archives.table([FLOATS])},
    "count-high": {"storages": archives.table([FLOATS], [], count=2)},
    "count-huge": {"storages": archives.table([FLOATS], [], count=1 << 60)},
    "count-negative": {"tensors": archives.table([], count=-1)},
    "count-text": {"tensors": archives.table([], count="1")},
    "numel-negative": {"storages": archives.table([archives.storage_row(1, KIND, -3, b"")], [])},
    "numel-huge": {"storages": archives.table([archives.storage_row(1, KIND, 1 << 60, b"")], [])},
    "kind-unknown": {
        "storages": archives.table([archives.storage_row(1, forge.named("torch.Foo"), 1, b"")], [])
    },
    "kind-text": {"storages": archives.table([archives.storage_row(1, "torch.Foo", 1, b"")], [])},
    "dimensions": {"tensors": archives.table([archives.tensor_row(101, 1, (), dimensions=1000)])},
    "storage-unknown": {"tensors": archives.table([archives.tensor_row(101, 77, (1,))])},
    "tensors-empty": {"tensors": b""},
    "pickle-cut": {"pickle": forge.pickled({"model": {}})[:-1]},
}


@pytest.mark.parametrize("name", TABLES)
def test_damaged_tables(name: str, tmp_path: Path) -> None:
    with pytest.raises(DamagedError):
        tree_of(old(tmp_path / "old.pt", **TABLES[name]))


@pytest.mark.parametrize("where", ["storages", "tensors", "pickle"])
def test_hostile_pickles(where: str, tmp_path: Path) -> None:
    attack = forge.pickled(forge.call("os.system", "true"))
    with pytest.raises(HostileError, match=r"os\.system"):
        tree_of(old(tmp_path / "old.pt", **{where: attack}))


def test_every_truncation_is_an_error_or_harmless(tmp_path: Path) -> None:
    """The blocks of zeros at the end carry nothing."""
    path = tmp_path / "a.nemo"
    member = archives.member("w.ckpt", checkpoint(1, tmp_path))
    for length in range(0, len(member) + 1024, 97):
        path.write_bytes(archives.tar_bytes(member)[:length])
        if length >= len(member):
            assert_same_tensors(tree_of(path).root, state(1))
        else:
            with pytest.raises((DamagedError, UnsupportedError)):
                tree_of(path)
