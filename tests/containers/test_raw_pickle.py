"""Plain pickles of state dicts: every tensor equals what pickle.load makes, bit for bit."""

from __future__ import annotations

import pickle
import time
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ensemblekit import average, containers
from ensemblekit.containers import Unusable
from ensemblekit.dtypes import DTYPES
from ensemblekit.errors import DamagedError, HostileError, UnsupportedError
from ensemblekit.files import Source

from ..checkpoints import any_tensor, assert_same_tensors, reading_of, state, tree_of
from ..faults import forge
from .test_torch_zip import SHAPES, TENSORS

PROTOCOLS = range(6)


def dump(value: Any, path: Path, protocol: int = 4) -> Path:
    path.write_bytes(pickle.dumps(value, protocol))
    return path


def same_as_pickle(value: Any, path: Path, protocol: int) -> dict[str, Any]:
    dump(value, path, protocol)
    tree = tree_of(path)
    assert tree.container == "pickle"
    assert_same_tensors(tree.root, pickle.loads(path.read_bytes()))
    return dict(tree.root)


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
def test_dtype(name: str, tmp_path: Path) -> None:
    """Compared with what was saved: torch cannot load the types without a storage class."""
    dtype = getattr(torch, name)
    tensors = {str(shape): any_tensor(dtype, *shape) for shape in SHAPES}
    assert_same_tensors(tree_of(dump(tensors, tmp_path / "file.pkl")).root, tensors)


@pytest.mark.parametrize("name", TENSORS)
def test_tensor(name: str, tmp_path: Path) -> None:
    for protocol in PROTOCOLS:
        same_as_pickle({"w": TENSORS[name](), "v": torch.ones(2)}, tmp_path / "a.pkl", protocol)


@pytest.mark.parametrize("name", ["file.pkl", "file.pth", "file.pickle", "file"])
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_found_by_content(name: str, protocol: int, tmp_path: Path) -> None:
    """The two text protocols announce themselves by nothing; they need their ending."""
    path = dump(OrderedDict(state()), tmp_path / name, protocol)
    if protocol < 2 and path.suffix not in (".pkl", ".pickle"):
        with pytest.raises(UnsupportedError, match="not a checkpoint of a known format"):
            tree_of(path)
    else:
        assert_same_tensors(tree_of(path).root, state())


def test_tied_parameters_have_the_same_values(tmp_path: Path) -> None:
    """Each tensor of a plain pickle brings a storage of its own; the same object comes once."""
    weight = torch.randn(3, 2)
    root = same_as_pickle({"a": weight, "b": weight, "c": weight[:]}, tmp_path / "a.pkl", 4)
    assert root["a"] == root["b"]
    assert root["a"].extent != root["c"].extent


def test_equal_values_are_not_taken_for_tied_ones(tmp_path: Path) -> None:
    root = same_as_pickle({"a": torch.zeros(4), "b": torch.zeros(4)}, tmp_path / "a.pkl", 5)
    assert root["a"].extent != root["b"].extent


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_whole_module(protocol: int, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    path = dump(model, tmp_path / "model.pkl", protocol)
    assert_same_tensors(reading_of(path).weights["model"].tensors, model.state_dict())


def test_values_around_tensors(tmp_path: Path) -> None:
    value = {"model": state(), "epoch": 3, "args": (1, 2.5, None, True, b"bytes")}
    root = tree_of(dump(value, tmp_path / "file.pkl")).root
    assert_same_tensors(root["model"], state())
    assert (root["epoch"], root["args"]) == (3, value["args"])


def test_average_equals_the_one_of_torch_save(tmp_path: Path) -> None:
    digests = []
    for kind, write in (("raw", dump), ("torch", torch.save)):
        (tmp_path / kind).mkdir()
        for step in (1, 2, 3):
            write({"model": state(step), "epoch": step}, tmp_path / kind / f"snap_{step}.pkl")
        digests.append(average(tmp_path / kind, tmp_path / f"{kind}.safetensors").sha256)
    assert digests[0] == digests[1]


# --- what is refused ------------------------------------------------------------------------------


def load_from_bytes(data: bytes) -> forge.Code:
    return forge.call("torch.storage._load_from_bytes", data)


def written(code: object, path: Path) -> Path:
    path.write_bytes(forge.pickled(code, protocol=4))
    return path


def test_every_truncation_is_an_error(tmp_path: Path) -> None:
    good = dump({"w": torch.ones(3), "b": torch.ones(2)}, tmp_path / "a.pkl").read_bytes()
    for length in range(len(good)):
        (tmp_path / "a.pkl").write_bytes(good[:length])
        with pytest.raises((DamagedError, UnsupportedError)):
            tree_of(tmp_path / "a.pkl")
    (tmp_path / "a.pkl").write_bytes(good + b"\0")
    with pytest.raises(DamagedError, match="1 bytes lie behind"):
        tree_of(tmp_path / "a.pkl")


def test_storage_within_a_storage(tmp_path: Path) -> None:
    """One level is what pickle writes; a torch file in a torch file in a pickle is refused."""
    inner = pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2) + pickle.dumps({}, 2)
    data = inner + forge.pickled(load_from_bytes(inner)) + pickle.dumps([], 2)
    root = tree_of(written({"w": load_from_bytes(data)}, tmp_path / "a.pkl")).root
    assert isinstance(root["w"], Unusable)
    assert root["w"].damaged


def test_hostile_call_in_a_nested_file(tmp_path: Path) -> None:
    data = forge.pickled(forge.call("os.system", "true"))
    with pytest.raises(HostileError, match=r"os\.system"):
        tree_of(written({"w": load_from_bytes(data)}, tmp_path / "a.pkl"))


def test_the_same_bytes_are_read_once(tmp_path: Path) -> None:
    """A megabyte of opcodes, asked for a thousand times over, would take minutes."""
    inner = pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2) + pickle.dumps({}, 2)
    data = inner + forge.pickled(forge.Code(b"N0" * 500_000 + b"N")) + pickle.dumps([], 2)
    name = forge.named("torch.storage._load_from_bytes")
    again = b"".join(b"h\0h\1\x85R" for _ in range(1000))
    code = name + b"q\0" + b"0" + forge.push(data) + b"q\1" + b"0" + b"(" + again + b"l"
    start = time.perf_counter()
    assert tree_of(written(forge.Code(code), tmp_path / "a.pkl")).root == [None] * 1000
    assert time.perf_counter() - start < 10


def test_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ensemblekit.containers.raw_pickle._MAX_PICKLE", 100)
    path = dump(state(), tmp_path / "a.pkl")
    with pytest.raises(UnsupportedError, match=r"save the weights|limit 100"):
        containers.read(Source(path))
