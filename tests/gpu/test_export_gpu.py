"""Exports verified on a GPU provider; skipped without CUDA or without ONNX Runtime for it."""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from ensemblekit import ExportOptions, ModelOptions, export
from ensemblekit.errors import MachineError
from ensemblekit.runtimes.onnx_runtime import check_provider

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
]


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 6),
    )


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("fuse", ["on", "off"])
def test_an_ensemble_on_the_gpu(tmp_path: Path, fuse: str, precision: str) -> None:
    try:
        check_provider("cuda")
    except MachineError as error:
        pytest.skip(error.message)
    (tmp_path / "ckpts").mkdir()
    first = network()
    for k in range(3):
        model = copy.deepcopy(first)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        torch.save({"state_dict": model.state_dict(), "epoch": k}, tmp_path / f"ckpts/m_{k}.pt")
    generator = torch.Generator().manual_seed(1)
    data = (
        torch.randn(200, 3, 16, 16, generator=generator),
        torch.randint(0, 6, (200,), generator=generator),
    )
    found = export(
        tmp_path / "ckpts",
        tmp_path / "m.onnx",
        model=ModelOptions(model=network(), val_data=data),
        options=ExportOptions(ensemble=True, provider="cuda", fuse=fuse, precision=precision),
    )
    assert found.verification["passed"]
    assert found.verification["provider"] == "cuda"
