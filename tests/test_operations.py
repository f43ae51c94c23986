"""Floating-point operations: torch's formulas over what really runs."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ensemblekit import operations
from ensemblekit.batches import as_batch

CPU = torch.device("cpu")


def test_operations_of_a_linear_layer() -> None:
    batch = as_batch((torch.randn(5, 10), torch.zeros(5)))
    assert operations.flops(nn.Linear(10, 7), batch, CPU) == 2 * 10 * 7


def test_operations_that_cannot_be_counted() -> None:
    class Raises(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise RuntimeError

    assert operations.flops(Raises(), as_batch((torch.randn(5, 10), torch.zeros(5))), CPU) is None


def encoder() -> nn.Module:
    return nn.TransformerEncoderLayer(16, nhead=4, dim_feedforward=32, batch_first=True)


@pytest.mark.filterwarnings("ignore:TF32 acceleration")  # about the other switches of `flags`
@pytest.mark.parametrize(
    "make",
    [
        encoder,
        lambda: nn.TransformerEncoder(encoder(), 2, enable_nested_tensor=False),  # type: ignore[arg-type]
        lambda: nn.LSTM(16, 12, num_layers=2, batch_first=True),
        lambda: nn.LSTM(16, 12, bidirectional=True, batch_first=True),
        lambda: nn.GRU(16, 12, num_layers=2, batch_first=True),
    ],
    ids=["encoder-layer", "encoder", "lstm", "bidirectional-lstm", "gru"],
)
def test_operations_of_layers_with_a_fused_path(make: Callable[[], nn.Module]) -> None:
    """Layers that torch runs as one operator without a formula when there are no gradients."""
    model = make().eval()
    x = torch.randn(5, 7, 16)
    with torch.backends.mkldnn.flags(enabled=False), FlopCounterMode(display=False) as counter:
        model(x[:1])
    expected = counter.get_total_flops()
    before = torch.backends.mkldnn.enabled
    for context in (nullcontext, torch.no_grad, torch.inference_mode):
        with context():
            found = operations.flops(model, as_batch((x, torch.zeros(5))), CPU)
        assert found == expected
    assert expected > 2 * 7 * 16 * 12
    assert torch.backends.mkldnn.enabled == before


def test_frozen_layers_are_counted_too() -> None:
    model = encoder().eval()
    x = torch.randn(5, 7, 16)
    expected = operations.flops(model, as_batch((x, torch.zeros(5))), CPU)
    model.requires_grad_(requires_grad=False)
    assert expected
    assert operations.flops(model, as_batch((x, torch.zeros(5))), CPU) == expected
    assert torch.backends.mha.get_fastpath_enabled()
