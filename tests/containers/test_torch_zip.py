"""Files by the real torch.save: every tensor equals torch.load's, bit for bit."""

from __future__ import annotations

import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ensemblekit.containers import TensorSpec, Unusable, torch_zip
from ensemblekit.dtypes import DTYPES
from ensemblekit.files import Source

from ..checkpoints import any_tensor, assert_same, assert_same_tensors, save, state, tree_of

BASE = torch.arange(240.0)


def same_as_torch(value: Any, folder: Path, **options: Any) -> dict[str, Any]:
    path = save(value, folder / "file.pt", **options)
    tree = tree_of(path)
    assert tree.container == "torch-zip"
    assert_same_tensors(tree.root, torch.load(path, weights_only=False))
    return dict(tree.root)


SHAPES: list[tuple[int, ...]] = [(), (1,), (0,), (3, 0, 2), (5,), (2, 3, 4)]


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
def test_dtype(name: str, tmp_path: Path) -> None:
    dtype = getattr(torch, name)
    same_as_torch({str(shape): any_tensor(dtype, *shape) for shape in SHAPES}, tmp_path)


def test_unknown_dtypes_are_named_not_guessed(tmp_path: Path) -> None:
    path = save({"scale": torch.ones(4).to(torch.float8_e8m0fnu)}, tmp_path / "file.pt")
    spec = tree_of(path).root["scale"]
    assert isinstance(spec, Unusable)
    assert "float8_e8m0fnu" in spec.reason


TENSORS: dict[str, Callable[[], Tensor]] = {
    "scalar": lambda: torch.tensor(3.5),
    "empty": lambda: torch.empty(0),
    "empty-3d": lambda: torch.empty(2, 0, 5),
    "slice": lambda: BASE[7:19],
    "every-third": lambda: BASE[5::3],
    "last-element": lambda: BASE[-1:],
    "transposed": lambda: BASE.reshape(12, 20).t(),
    "permuted": lambda: BASE.reshape(4, 5, 12).permute(2, 0, 1),
    "inner-block": lambda: BASE.reshape(12, 20)[3:7, 4:9],
    "column": lambda: BASE.reshape(12, 20)[:, 3],
    "channels-last": lambda: torch.randn(4, 3, 5, 5).to(memory_format=torch.channels_last),
    "channels-last-3d": lambda: torch.randn(2, 3, 2, 3, 2).to(memory_format=torch.channels_last_3d),
    "channels-last-1x1": lambda: torch.randn(4, 3, 1, 1).to(memory_format=torch.channels_last),
    "size-one-dims": lambda: BASE.reshape(1, 240, 1).transpose(0, 2),
    "unfolded": lambda: torch.arange(10.0).unfold(0, 4, 2),
    "expanded": lambda: torch.arange(3.0).reshape(3, 1).expand(3, 4),
    "expanded-scalar": lambda: torch.tensor(2.0).expand(5),
    "diagonal": lambda: BASE.reshape(12, 20).diagonal(),
    "flipped": lambda: BASE.flip(0),
    "parameter": lambda: nn.Parameter(torch.randn(3, 2)),
    "frozen-parameter": lambda: nn.Parameter(torch.randn(3), requires_grad=False),
    "buffer": lambda: nn.Buffer(torch.randn(3)),
    "requires-grad": lambda: torch.randn(3, requires_grad=True),
    "attribute": lambda: with_attribute(torch.randn(3)),
    "parameter-attribute": lambda: with_attribute(nn.Parameter(torch.randn(3))),
}


def with_attribute(tensor: Tensor) -> Tensor:
    tensor.tensor_model_parallel = True  # type: ignore[attr-defined]  # as Megatron does
    return tensor


@pytest.mark.parametrize("name", TENSORS)
def test_tensor(name: str, tmp_path: Path) -> None:
    for protocol in (2, 3, 4, 5):
        value = {"w": TENSORS[name](), "v": torch.ones(2)}
        same_as_torch(value, tmp_path, pickle_protocol=protocol)


@pytest.mark.parametrize("protocol", [2, 5])
def test_lazily_conjugated_and_negated_tensors(protocol: int, tmp_path: Path) -> None:
    """Torch stores `conj()` and its `.imag` as flags beside the plain values."""
    values = torch.randn(4, dtype=torch.complex64)
    path = tmp_path / "file.pt"
    save(
        {"conj": values.conj(), "neg": torch.randn(4, dtype=torch.complex64).conj().imag},
        path,
        pickle_protocol=protocol,
    )
    for key, tensor in torch.load(path, weights_only=False).items():
        spec = tree_of(path).root[key]
        if not isinstance(spec, Unusable):  # to refuse them would do
            assert_same(spec, tensor)


def test_views_share_their_storage(tmp_path: Path) -> None:
    root = same_as_torch({"a": BASE[:100], "b": BASE[50:], "c": BASE.reshape(12, 20).t()}, tmp_path)
    assert len({spec.extent for spec in root.values()}) == 1
    assert [spec.start - root["a"].start for spec in root.values()] == [0, 200, 0]


def test_tied_parameters_lie_in_one_place(tmp_path: Path) -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(7, 4), "head": nn.Linear(4, 7, bias=False)})
    model["head"].weight = model["embed"].weight
    root = same_as_torch(model.state_dict(), tmp_path)
    assert root["embed.weight"] == root["head.weight"]


def test_contiguous_tensors_are_read_without_strides(tmp_path: Path) -> None:
    root = same_as_torch({k: TENSORS[k]() for k in ("slice", "size-one-dims", "empty")}, tmp_path)
    assert all(spec.stride is None for spec in root.values())


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_nested_values_around_tensors(protocol: int, tmp_path: Path) -> None:
    optimizer = torch.optim.AdamW([nn.Parameter(torch.ones(3))], lr=0.25)
    value = {
        "model": OrderedDict(state()),
        "optimizer": optimizer.state_dict(),
        "args": (1, 2.5, None, True, "text", b"bytes", [torch.ones(2)]),
        "shape": torch.Size([2, 3]),
        "device": torch.device("cpu"),
        "dtype": torch.bfloat16,
    }
    root = tree_of(save(value, tmp_path / "file.pt", pickle_protocol=protocol)).root
    assert_same_tensors(root["model"], value["model"])  # type: ignore[arg-type]
    assert root["optimizer"]["param_groups"][0]["lr"] == 0.25
    assert root["args"][:6] == value["args"][:6]  # type: ignore[index]
    assert_same(root["args"][6][0], torch.ones(2))
    assert root["shape"] == (2, 3)
    assert root["device"] == "cpu"


@pytest.fixture
def no_crcs() -> Iterator[None]:
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    yield
    torch.serialization.set_crc32_options(before)


@pytest.mark.usefixtures("no_crcs")
def test_file_without_crcs(tmp_path: Path) -> None:
    root = same_as_torch(state(), tmp_path)
    assert all(spec.extent.crc32 is None for spec in root.values())


def test_file_with_crcs(tmp_path: Path) -> None:
    root = same_as_torch(state(), tmp_path)
    with zipfile.ZipFile(tmp_path / "file.pt") as archive:
        expected = {i.CRC for i in archive.infolist() if "/data/" in i.filename}
    assert {spec.extent.crc32 for spec in root.values()} == expected


@pytest.mark.parametrize(
    "options", [{"_use_new_zipfile_serialization": True}, {"pickle_protocol": 5}], ids=str
)
def test_options_of_save(options: dict[str, Any], tmp_path: Path) -> None:
    same_as_torch(OrderedDict(state()), tmp_path, **options)


@pytest.mark.parametrize("name", ["file.pt", "archive.ckpt", "näme with blanks.bin", "none"])
def test_archive_name_follows_the_file(name: str, tmp_path: Path) -> None:
    path = save(state(), tmp_path / name)
    assert_same_tensors(tree_of(path).root, state())


def test_saved_through_a_stream(tmp_path: Path) -> None:
    path = tmp_path / "file.pt"
    with path.open("wb") as stream:
        torch.save(state(), stream)
    assert_same_tensors(tree_of(path).root, state())


def test_directory_agrees_with_zipfile(tmp_path: Path) -> None:
    path = save(state(), tmp_path / "file.pt")
    with zipfile.ZipFile(path) as archive:
        expected = [(i.filename, i.file_size, i.CRC) for i in archive.infolist()]
    found = torch_zip.directory(Source(path))
    assert [(r.name, r.nbytes, r.crc32) for r in found] == expected
    data = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        for record in found:
            assert data[record.start : record.start + record.nbytes] == archive.read(record.name)


def test_many_records(tmp_path: Path) -> None:
    same_as_torch({f"layers.{i}.weight": torch.full((3,), float(i)) for i in range(300)}, tmp_path)


def test_description_reads_no_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save({"w": torch.zeros(1 << 20)}, tmp_path / "file.pt")
    taken: list[int] = []
    plain = Source.read_into

    def counted(self: Source, view: memoryview, offset: int) -> None:
        taken.append(len(view))
        plain(self, view, offset)

    monkeypatch.setattr(Source, "read_into", counted)
    assert isinstance(tree_of(path).root["w"], TensorSpec)
    assert sum(taken) < 20_000
