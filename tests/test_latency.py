"""Simple latency: what is timed, how often, and what a figure is made of."""

from __future__ import annotations

import time
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from ensemblekit import latency
from ensemblekit.batches import as_batch

CPU = torch.device("cpu")


class Sleeps(nn.Module):
    def __init__(self, seconds: float = 0.0) -> None:
        super().__init__()
        self.seconds = seconds
        self.seen: list[int] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.append(len(x))
        time.sleep(self.seconds)
        return x


def measure(models: list[nn.Module], counts: list[int], size: int) -> Any:
    example = as_batch((torch.randn(4, 3), torch.zeros(4)))
    precision = lambda: nullcontext(None)  # noqa: E731
    return latency.measure(models, counts, example, size, device=CPU, precision=precision)


def test_members_add_up() -> None:
    models = [Sleeps(0.004) for _ in range(3)]
    found = measure(models, [1, 3], 2)
    assert set(found) == {1, 3}
    assert 4.0 <= found[1].p50_ms < 8.0
    assert 12.0 <= found[3].p50_ms < 20.0
    assert found[3].p50_ms / found[1].p50_ms == pytest.approx(3, rel=0.4)
    assert {size for model in models for size in model.seen} == {2}


def test_a_batch_larger_than_the_example_repeats_it() -> None:
    batch = latency.sized(as_batch((torch.arange(3.0)[:, None], torch.arange(3))), 7)
    assert batch.size == 7
    assert batch.inputs[0][:, 0].tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert batch.target is not None
    assert batch.target.tolist() == [0, 1, 2, 0, 1, 2, 0]


def test_figures_are_of_the_times() -> None:
    values = [float(v) for v in range(1, 101)]
    found = latency._summary(8, values)
    assert found.mean_ms == pytest.approx(np.mean(values))
    assert (found.p50_ms, found.p95_ms, found.p99_ms) == tuple(np.percentile(values, [50, 95, 99]))
    assert found.throughput_per_s == pytest.approx(8 / found.p50_ms * 1000)
    assert set(found.to_json()) == {
        *("batch_size", "iterations", "mean_ms", "p50_ms", "p95_ms", "p99_ms"),
        "throughput_per_s",
    }


def test_operations_of_a_linear_layer() -> None:
    batch = as_batch((torch.randn(5, 10), torch.zeros(5)))
    assert latency.flops(nn.Linear(10, 7), batch, CPU) == 2 * 10 * 7


def test_operations_that_cannot_be_counted() -> None:
    class Raises(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise RuntimeError

    assert latency.flops(Raises(), as_batch((torch.randn(5, 10), torch.zeros(5))), CPU) is None
