"""Owns simple latency figures of models in eager torch: what one more member costs.

Input: ready members and one batch of real data. Members run one after the other, as a plain
service would run them.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from ensemblekit.batches import Batch, forward

_WARM_UP = 3
_LEAST, _MOST = 3, 100  # iterations
_SECONDS = 0.5  # for one batch size, all candidates together


@dataclass(frozen=True)
class Latency:
    """Wall times of one candidate at one batch size, inputs on the device already.

    Attributes:
        batch_size: Samples.
        iterations: Timed runs.
        mean_ms: Their mean.
        p50_ms: Their median.
        p95_ms: Their 95th percentile.
        p99_ms: Their 99th percentile.
    """

    batch_size: int
    iterations: int
    mean_ms: float
    p50_ms: float
    p95_ms: float
    p99_ms: float

    @property
    def throughput_per_s(self) -> float:
        """Samples a second at the median."""
        return self.batch_size / self.p50_ms * 1000

    def to_json(self) -> dict[str, float | int]:
        """The contract's keys."""
        return {**vars(self), "throughput_per_s": self.throughput_per_s}


def measure(
    models: Sequence[nn.Module],
    counts: Sequence[int],
    example: Batch,
    batch_size: int,
    *,
    device: torch.device,
    precision: Callable[[], AbstractContextManager[torch.dtype | None]],
) -> Mapping[int, Latency]:
    """Time a single model and ensembles of several sizes, interleaved.

    Args:
        models: As many as the largest of `counts`; distinct, so that caches see real traffic.
        counts: Numbers of members to time.
        example: Real inputs; repeated or cut to `batch_size`.
        batch_size: Samples in a run.
        device: Where the models are.
        precision: Context that gives the autocast type.

    Returns:
        Latency by number of members.
    """
    batch = sized(example, batch_size).to(device)
    times: dict[int, list[float]] = {count: [] for count in counts}
    with torch.inference_mode(), precision() as autocast:
        cast = torch.autocast(device.type, autocast, autocast is not None)
        with cast:
            start = time.perf_counter()
            for _ in range(_WARM_UP):
                _run(models[: max(counts)], batch, device)
                if time.perf_counter() - start > _SECONDS / 2:
                    break
            end = time.perf_counter() + _SECONDS
            for done in range(_MOST):
                if done >= _LEAST and time.perf_counter() > end:
                    break
                for count in counts:
                    times[count].append(_run(models[:count], batch, device))
    return {count: _summary(batch_size, values) for count, values in times.items()}


def _run(models: Sequence[nn.Module], batch: Batch, device: torch.device) -> float:
    """Milliseconds from the call until the last result is there."""
    _synchronize(device)
    start = time.perf_counter_ns()
    for model in models:
        forward(model, batch)
    _synchronize(device)
    return (time.perf_counter_ns() - start) / 1e6


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def _summary(batch_size: int, values_ms: list[float]) -> Latency:
    p50, p95, p99 = (float(v) for v in np.percentile(values_ms, [50, 95, 99]))
    return Latency(batch_size, len(values_ms), float(np.mean(values_ms)), p50, p95, p99)


def sized(example: Batch, batch_size: int) -> Batch:
    """The example cut or repeated to a number of samples."""
    if batch_size <= example.size:
        return example.head(batch_size)
    index = torch.arange(batch_size) % example.size

    def take(value: Any) -> Any:
        per_sample = isinstance(value, torch.Tensor) and value.ndim and len(value) == example.size
        return value[index] if per_sample else value

    if isinstance(example.inputs, dict):
        inputs: Any = {key: take(value) for key, value in example.inputs.items()}
    else:
        inputs = tuple(take(value) for value in example.inputs)
    return Batch(inputs, take(example.target), batch_size)


def flops(model: nn.Module, example: Batch, device: torch.device) -> int | None:
    """Floating-point operations of one sample (a multiply-add is two), None where torch cannot count."""
    from torch.utils.flop_counter import FlopCounterMode

    batch = sized(example, 1).to(device)
    try:
        with torch.inference_mode(), FlopCounterMode(display=False) as counter:
            forward(model, batch)
    except Exception:  # noqa: BLE001  # a figure that is nice to have; the model runs elsewhere
        return None
    return int(counter.get_total_flops())
