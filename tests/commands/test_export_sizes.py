"""What a graph could hide: sizes that were frozen, converters that fail, other files in the way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ensemblekit import BenchOptions, ExportOptions, ModelOptions, bench, export
from ensemblekit.errors import CheckFailedError, UnsupportedError, UsageError
from ensemblekit.graphs import precision as precisions

QUICK = ExportOptions(exporter="torchscript", inputs=("ids:int64[batch,seq=16]",))


class Positions(nn.Module):
    """Takes the length as a number (`len`) or as a size, as it is told."""

    def __init__(self, *, frozen: bool) -> None:
        super().__init__()
        self.frozen = frozen
        self.words = nn.Embedding(20, 8)
        self.places = nn.Parameter(torch.randn(64, 8))
        self.head = nn.Linear(8, 5)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        length = len(ids[0]) if self.frozen else ids.shape[1]
        return self.head((self.words(ids) + self.places[:length]).sum(1) / length)


def snapshots(model: nn.Module, folder: Path, count: int = 2) -> Path:
    folder.mkdir()
    for k in range(count):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
        torch.save({"state_dict": model.state_dict(), "epoch": k}, folder / f"m_{k}.pt")
    return folder


def test_a_length_that_is_frozen_inside_is_not_shipped(tmp_path: Path) -> None:
    model = Positions(frozen=True)
    folder = snapshots(model, tmp_path / "ckpts")
    with pytest.raises(CheckFailedError, match="open axes"):
        export(folder, tmp_path / "m.onnx", model=ModelOptions(model=model), options=QUICK)
    assert not (tmp_path / "m.onnx").exists()


def test_other_lengths_are_run(tmp_path: Path) -> None:
    model = Positions(frozen=False)
    folder = snapshots(model, tmp_path / "ckpts")
    found = export(folder, tmp_path / "m.onnx", model=ModelOptions(model=model), options=QUICK)
    sizes = found.verification["open_sizes"]["seq"]
    assert min(sizes) < 16 < max(sizes) <= 64
    assert found.verification["passed"]


def points(folder: Path) -> tuple[nn.Module, Path]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 5))
    return model, snapshots(model, folder / "ckpts", count=3)


def test_a_conversion_that_fails_once_is_not_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, folder = points(tmp_path)
    real, calls = precisions.convert, []

    def convert(*arguments: Any, **options: Any) -> None:
        calls.append(1)
        if len(calls) == 1:
            raise UnsupportedError("no shapes here")
        real(*arguments, **options)

    monkeypatch.setattr(precisions, "convert", convert)
    options = ExportOptions(precision="fp16", inputs=("x:float32[batch,6]",))
    found = export(folder, tmp_path / "m.onnx", model=ModelOptions(model=model), options=options)
    assert [attempt["passed"] for attempt in found.attempts] == [False, True]
    assert "no shapes here" in str(found.attempts[0]["reason"])


def test_other_versions_in_a_triton_repository_stay(tmp_path: Path) -> None:
    model, folder = points(tmp_path)
    place = tmp_path / "models/m"
    (place / "1").mkdir(parents=True)
    (place / "1/model.onnx").write_text("old")
    (place / "2").mkdir()
    (place / "2/model.onnx").write_text("another version")
    (place / "labels.txt").write_text("mine")
    options = ExportOptions(
        exporter="torchscript", inputs=("x:float32[batch,6]",), triton=str(tmp_path / "models")
    )
    given = ModelOptions(model=model)
    export(folder, tmp_path / "m.onnx", model=given, options=options, force=True)
    assert (place / "2/model.onnx").read_text() == "another version"
    assert (place / "labels.txt").read_text() == "mine"
    assert (place / "1/model.onnx").read_bytes() == (tmp_path / "m.onnx").read_bytes()
    assert {path.name for path in place.iterdir()} == {"1", "2", "labels.txt", "config.pbtxt"}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_members_of_other_types(tmp_path: Path, dtype: torch.dtype) -> None:
    model, folder = points(tmp_path)
    name = str(dtype).removeprefix("torch.")
    options = ExportOptions(ensemble=True, inputs=(f"x:{name}[batch,6]",))
    found = export(
        folder, tmp_path / "m.onnx", model=ModelOptions(model=model.to(dtype)), options=options
    )
    assert found.verification["passed"]
    assert found.precision == ("fp16" if dtype == torch.float16 else "fp32")


def test_several_processes_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, folder = points(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="one process"):
        export(folder, tmp_path / "m.onnx", model=ModelOptions(model=model))
    with pytest.raises(UsageError, match="one process"):
        bench(folder, model=ModelOptions(model=model))


def test_bench_takes_other_combiners(tmp_path: Path) -> None:
    model, folder = points(tmp_path)
    options = BenchOptions(
        ensemble=True,
        combiner="vote",
        runtimes=("torch", "torch-fused"),
        batches=(2,),
        inputs=("x:float32[batch,6]",),
    )
    found = bench(folder, model=ModelOptions(model=model), options=options)
    assert [row.agrees for row in found.rows] == [True, True]
