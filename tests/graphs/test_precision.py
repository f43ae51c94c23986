"""Owns the proof that smaller precisions run, keep their interface and most decisions.

The network is trained for a moment: random ones decide by hairs, which no precision keeps.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from ensemblekit.batches import Batch
from ensemblekit.ensemble_module import EnsembleModule, Head
from ensemblekit.errors import UnsupportedError
from ensemblekit.graphs import precision as precisions
from ensemblekit.graphs import saving
from ensemblekit.graphs.making import Maker
from ensemblekit.graphs.precision import PRECISIONS, convert
from ensemblekit.graphs.template import Interface, Port
from ensemblekit.verification import TOLERANCES, Samples, Verification, verify

torch.set_num_threads(1)

CLASSES = 6
INTERFACE = Interface((Port("image", "float32", ("batch", 3, 8, 8)),), None, "logits")
HEAD = Head("classification", "mean")


def data(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Images of six patterns, with noise."""
    own = torch.Generator().manual_seed(seed)
    patterns = torch.randn(CLASSES, 3, 8, 8, generator=torch.Generator().manual_seed(9))
    labels = torch.randint(0, CLASSES, (count,), generator=own)
    return patterns[labels] + 0.7 * torch.randn(count, 3, 8, 8, generator=own), labels


@functools.cache
def members() -> tuple[nn.Module, ...]:
    found = []
    for seed in range(2):
        torch.manual_seed(seed)
        model = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
            nn.MaxPool2d(2), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.Flatten(),
            nn.Linear(16 * 16, 32), nn.ReLU(), nn.Linear(32, CLASSES),
        )  # fmt: skip
        optimiser = torch.optim.Adam(model.parameters(), 3e-3)
        images, labels = data(512, seed)
        for _ in range(3):
            for n in range(0, 512, 64):
                optimiser.zero_grad()
                loss = nn.functional.cross_entropy(model(images[n : n + 64]), labels[n : n + 64])
                loss.backward()  # type: ignore[no-untyped-call]
                optimiser.step()
        found.append(model.eval())
    return tuple(found)


@functools.cache
def maker(opset: int = 20) -> Maker:
    return Maker(members(), HEAD, [data(3, 0)[0]], INTERFACE, opset=opset)


def calibration() -> Iterator[dict[str, torch.Tensor]]:
    images, _ = data(128, 50)
    for n in range(0, 128, 32):
        yield {"image": images[n : n + 32]}


def converted(folder: Path, precision: str, *, fuse: bool = False, opset: int = 20) -> Path:
    plain, target = folder / "plain.onnx", folder / "small.onnx"
    saving.save(maker(opset).make(fuse=fuse).model, plain)
    convert(plain, target, precision, calibration=calibration)
    return target


def checked(path: Path, precision: str) -> Verification:
    images, labels = data(256, 77)
    batch = Batch((images,), labels, 256)
    return verify(
        path,
        EnsembleModule(members(), HEAD).eval(),
        INTERFACE,
        Samples(lambda: [batch], batch, real=True),
        task="classification",
        precision=precision,
        batch_sizes=(1, 2, 7),
    )


def types_of_weights(path: Path) -> set[int]:
    model = onnx.load(str(path))
    return {t.data_type for t in model.graph.initializer if int(np.prod(t.dims)) > 16}


@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize(
    "precision, kind",
    [
        ("fp16", onnx.TensorProto.FLOAT16),
        ("int8-dynamic", onnx.TensorProto.INT8),
        ("int8-static", onnx.TensorProto.INT8),
    ],
)
def test_most_decisions_are_kept(precision: str, kind: int, fuse: bool, tmp_path: Path) -> None:
    path = converted(tmp_path, precision, fuse=fuse)
    found = checked(path, precision)
    assert found.passed, found.failed
    assert found.decision_flips is not None
    assert found.decision_flips <= TOLERANCES[precision].flips * found.samples
    assert found.metric_torch is not None
    assert found.metric_onnx is not None
    assert found.metric_torch > 0.8
    assert abs(found.metric_torch - found.metric_onnx) < 0.05
    assert found.classes_seen == CLASSES
    assert found.max_abs_diff is not None
    assert found.max_abs_diff > 0  # it is another precision
    assert kind in types_of_weights(path)


@pytest.mark.parametrize("precision", ["fp16", "int8-static"])
def test_files_become_smaller(precision: str, tmp_path: Path) -> None:
    path = converted(tmp_path, precision)
    assert path.stat().st_size < 0.75 * (tmp_path / "plain.onnx").stat().st_size


def test_bfloat16_keeps_its_interface_and_does_not_run_on_the_cpu(tmp_path: Path) -> None:
    path = converted(tmp_path, "bf16", opset=22)
    onnx.checker.check_model(str(path), full_check=True)
    model = onnx.load(str(path))
    ends = [*model.graph.input, *model.graph.output]
    assert [end.name for end in ends] == ["image", "logits"]
    assert {end.type.tensor_type.elem_type for end in ends} == {onnx.TensorProto.FLOAT}
    assert onnx.TensorProto.BFLOAT16 in types_of_weights(path)
    found = checked(path, "bf16")
    assert found.failed is not None
    assert found.failed[0] == "session"


def test_the_source_is_left_as_it_was(tmp_path: Path) -> None:
    plain = tmp_path / "plain.onnx"
    saving.save(maker().make().model, plain)
    before = plain.read_bytes()
    for precision in PRECISIONS[1:]:
        convert(plain, tmp_path / f"{precision}.onnx", precision, calibration=calibration)
        assert plain.read_bytes() == before


def test_what_the_tool_cannot_convert_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise ValueError("no such kernel\nand more")

    monkeypatch.setattr(precisions, "_CONVERTERS", {"fp16": broken})
    with pytest.raises(UnsupportedError, match=r"--precision fp16: .* no such kernel \(ValueError"):
        convert(tmp_path / "a.onnx", tmp_path / "b.onnx", "fp16")


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, OSError])
def test_what_is_not_the_tools_fault_is_left_alone(
    error: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_: object) -> None:
        raise error

    monkeypatch.setattr(precisions, "_CONVERTERS", {"fp16": stopped})
    with pytest.raises(error):
        convert(tmp_path / "a.onnx", tmp_path / "b.onnx", "fp16")


@pytest.mark.parametrize("precision", ["fp16", "int8-dynamic", "int8-static"])
def test_the_tools_are_quiet(
    precision: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    converted(tmp_path, precision)
    said = capfd.readouterr()
    assert said.out == ""
    assert said.err == ""
