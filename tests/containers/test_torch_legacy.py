"""Files in torch's format before zip: every tensor equals torch.load's, bit for bit."""

from __future__ import annotations

import pickle
import struct
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ensemblekit import average
from ensemblekit.containers import TensorSpec, Unusable, torch_legacy
from ensemblekit.containers.pickle_globals import Storage
from ensemblekit.dtypes import DTYPES
from ensemblekit.errors import DamagedError, UnsupportedError
from ensemblekit.files import Source

from ..checkpoints import any_tensor, assert_same_tensors, reading_of, save, state, tree_of
from ..faults import forge
from .test_torch_zip import BASE, SHAPES, TENSORS

PROTOCOLS = (1, 2, 3, 4, 5)
SYS_INFO = {"protocol_version": 1001, "little_endian": True}


def legacy(value: Any, path: Path, **options: Any) -> Path:
    return save(value, path, _use_new_zipfile_serialization=False, **options)


def same_as_torch(value: Any, folder: Path, **options: Any) -> dict[str, Any]:
    path = legacy(value, folder / "file.pt", **options)
    tree = tree_of(path)
    assert tree.container == "torch-legacy"
    assert_same_tensors(tree.root, torch.load(path, weights_only=False))
    return dict(tree.root)


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
def test_dtype(name: str, tmp_path: Path) -> None:
    """Compared with what was saved: torch itself cannot load the types without a storage class."""
    dtype = getattr(torch, name)
    tensors = {str(shape): any_tensor(dtype, *shape) for shape in SHAPES}
    assert_same_tensors(tree_of(legacy(tensors, tmp_path / "file.pt")).root, tensors)


@pytest.mark.parametrize("name", TENSORS)
def test_tensor(name: str, tmp_path: Path) -> None:
    for protocol in PROTOCOLS:
        value = {"w": TENSORS[name](), "v": torch.ones(2)}
        same_as_torch(value, tmp_path, pickle_protocol=protocol)


def test_protocol_0_is_lost_for_everyone(tmp_path: Path) -> None:
    """It writes a storage's name as the text of a tuple, which torch cannot read either."""
    path = legacy(state(), tmp_path / "file.pt", pickle_protocol=0)
    with pytest.raises(AssertionError):
        torch.load(path, weights_only=False)
    with pytest.raises(DamagedError):
        tree_of(path)


def test_views_share_their_storage(tmp_path: Path) -> None:
    root = same_as_torch({"a": BASE[:100], "b": BASE[50:], "c": BASE.reshape(12, 20).t()}, tmp_path)
    assert len({spec.extent for spec in root.values()}) == 1
    assert [spec.start - root["a"].start for spec in root.values()] == [0, 200, 0]


def test_tied_parameters_lie_in_one_place(tmp_path: Path) -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(7, 4), "head": nn.Linear(4, 7, bias=False)})
    model["head"].weight = model["embed"].weight
    root = same_as_torch(model.state_dict(), tmp_path)
    assert root["embed.weight"] == root["head.weight"]


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_whole_module(protocol: int, tmp_path: Path) -> None:
    """Classes come as persistent ids, with their source behind them."""
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2), nn.Linear(2, 2))
    path = legacy(model, tmp_path / "file.pt", pickle_protocol=protocol)
    assert_same_tensors(reading_of(path).weights["model"].tensors, model.state_dict())


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_values_around_tensors(protocol: int, tmp_path: Path) -> None:
    optimizer = torch.optim.AdamW([nn.Parameter(torch.ones(3))], lr=0.25)
    value = {"model": OrderedDict(state()), "optimizer": optimizer.state_dict(), "epoch": 3}
    root = tree_of(legacy(value, tmp_path / "file.pt", pickle_protocol=protocol)).root
    assert_same_tensors(root["model"], state())
    assert root["optimizer"]["param_groups"][0]["lr"] == 0.25
    assert root["epoch"] == 3


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
def test_bare_storages(tmp_path: Path) -> None:
    values = {"typed": torch.arange(5.0).storage(), "raw": torch.arange(3.0).untyped_storage()}
    root = tree_of(legacy(values, tmp_path / "file.pt")).root
    assert isinstance(root["typed"], Storage)
    assert (root["typed"].dtype, root["typed"].extent.nbytes) == ("float32", 20)
    assert (root["raw"].dtype, root["raw"].extent.nbytes) == (None, 12)


def test_nothing_is_stored(tmp_path: Path) -> None:
    assert tree_of(legacy({"epoch": 3}, tmp_path / "file.pt")).root == {"epoch": 3}


def test_large_object_pickle(tmp_path: Path) -> None:
    """Its end is not known beforehand, and lies behind the first block that is read."""
    value = {"log": ["x" * 997 + str(i) for i in range(1200)], "w": torch.randn(3)}
    path = legacy(value, tmp_path / "file.pt")
    assert path.stat().st_size > torch_legacy._FIRST_READ
    root = tree_of(path).root
    assert root["log"] == value["log"]
    assert_same_tensors({"w": root["w"]}, {"w": value["w"]})  # type: ignore[dict-item]


# --- what today's torch no longer writes, but reads ---------------------------------------------


def file_of(code: bytes, storages: dict[str, bytes], *, itemsize: int = 4) -> bytes:
    """The five pickles and the storages, from the opcodes of the object."""
    parts = [pickle.dumps(v, 2) for v in (torch_legacy.MAGIC, 1001, SYS_INFO)]
    parts += [forge.pickled(forge.Code(code)), pickle.dumps(list(storages), 2)]
    parts += [struct.pack("<q", len(data) // itemsize) + data for data in storages.values()]
    return b"".join(parts)


def held(key: str, numel: int, view: object, *, kind: str = "torch.FloatStorage") -> forge.Code:
    return forge.persistent(("storage", forge.named(kind), key, "cpu", numel, view))


def test_views_of_storages(tmp_path: Path) -> None:
    """Before 0.4 a storage could be a part of another; offsets count from the part's start."""
    data = torch.arange(12.0).numpy().tobytes()
    whole = forge.tensor(held("7", 12, None), (3, 4), (4, 1))
    part = forge.tensor(held("7", 12, ("8", 5, 6)), (2, 2), (2, 1), offset=1)
    path = tmp_path / "file.pt"
    path.write_bytes(file_of(forge.push({"whole": whole, "part": part}), {"7": data}))
    expected = torch.load(path, weights_only=False)
    assert expected["part"].tolist() == [[6, 7], [8, 9]]
    assert_same_tensors(tree_of(path).root, expected)


def test_a_view_may_be_tied_to_its_storage(tmp_path: Path) -> None:
    """By another key and from another start, but the same elements."""
    data = torch.arange(12.0).numpy().tobytes()
    tensors = {
        "encoder.weight": forge.tensor(held("7", 12, None), (2, 2), (2, 1), offset=6),
        "decoder.weight": forge.tensor(held("7", 12, ("8", 5, 6)), (2, 2), (2, 1), offset=1),
        "other.weight": forge.tensor(held("7", 12, None), (2, 2), (2, 1)),
    }
    path = tmp_path / "file.pt"
    path.write_bytes(file_of(forge.push(tensors), {"7": data}))
    loaded = torch.load(path, weights_only=False)
    assert loaded["encoder.weight"].data_ptr() == loaded["decoder.weight"].data_ptr()
    assert reading_of(path).weights["model"].ties == (("decoder.weight", "encoder.weight"),)


@pytest.mark.parametrize(
    "view", [("8", 5, 8), ("8", -1, 4), ("8", 0, -4), ("8", 2**62, 1), ("8", "0", 4), (), 5, "x"]
)
def test_views_outside_of_their_storage(view: object, tmp_path: Path) -> None:
    path = tmp_path / "file.pt"
    tensor = forge.tensor(held("7", 12, view), (2, 2), (2, 1))
    path.write_bytes(file_of(forge.push({"w": tensor}), {"7": b"\0" * 48}))
    spec = tree_of(path).root["w"]
    assert isinstance(spec, Unusable)
    assert spec.damaged


def test_length_counts_elements_of_the_first_user(tmp_path: Path) -> None:
    """A storage may be named a second time by another type; the first one measures it."""
    raw = held("7", 48, None, kind="torch.ByteStorage")
    other = held("7", 12, None, kind="torch.FloatStorage")
    code = forge.push(
        {"raw": forge.tensor(raw, (48,), (1,)), "w": forge.tensor(other, (12,), (1,))}
    )
    path = tmp_path / "file.pt"
    path.write_bytes(file_of(code, {"7": bytes(range(48))}, itemsize=1))
    root = tree_of(path).root
    assert isinstance(root["w"], TensorSpec)
    assert_same_tensors({"raw": root["raw"]}, {"raw": torch.arange(48, dtype=torch.uint8)})


# --- what is refused ------------------------------------------------------------------------------


def test_big_endian(tmp_path: Path) -> None:
    good = legacy(state(), tmp_path / "file.pt").read_bytes()
    info = forge.pickled({"protocol_version": 1001, "little_endian": False})
    start = len(pickle.dumps(torch_legacy.MAGIC, 2) + pickle.dumps(1001, 2))
    stop = good.index(b".", start) + 1
    (tmp_path / "file.pt").write_bytes(good[:start] + info + good[stop:])
    with pytest.raises(UnsupportedError, match="big-endian"):
        tree_of(tmp_path / "file.pt")


def test_every_truncation_is_an_error(tmp_path: Path) -> None:
    path = legacy({"w": torch.ones(3, 2), "b": torch.ones(2)}, tmp_path / "file.pt")
    good = path.read_bytes()
    for length in range(len(good)):
        path.write_bytes(good[:length])
        with pytest.raises((DamagedError, UnsupportedError)):
            tree_of(path)
    path.write_bytes(good + b"\0")
    with pytest.raises(DamagedError, match="1 bytes lie behind"):
        tree_of(path)


def test_description_reads_no_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = legacy({"w": torch.zeros(3 << 20)}, tmp_path / "file.pt")
    taken: list[int] = []
    plain = Source.read_into

    def counted(self: Source, view: memoryview, offset: int) -> None:
        taken.append(len(view))
        plain(self, view, offset)

    monkeypatch.setattr(Source, "read_into", counted)
    tree_of(path)
    assert max(taken) <= torch_legacy._FIRST_READ
    assert sum(taken) < path.stat().st_size


def test_average_equals_the_one_of_zip_files(tmp_path: Path) -> None:
    for kind, flag in (("old", False), ("new", True)):
        for step in (1, 2, 3):
            value = {"model": state(step), "epoch": step}
            path = tmp_path / kind / f"snap_{step}.pt"
            save(value, path, _use_new_zipfile_serialization=flag)
    results = [
        average(tmp_path / kind, tmp_path / f"{kind}.safetensors") for kind in ("old", "new")
    ]
    assert results[0].sha256 == results[1].sha256
