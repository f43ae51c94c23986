"""Owns simple latency figures of models in eager torch: what one more member costs.

Input: ready members and one batch of real data. Members run one after the other, as a plain
service would run them.
"""

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from ensemblekit.batches import Batch, forward

_WARM_UP = 3
_LEAST, _MOST = 3, 100  # iterations
_SECONDS = 0.3  # for one batch size, all candidates together
_OPAQUE = ("_transformer_encoder_layer_fwd", "_native_multi_head_attention", "mkldnn_rnn_layer")


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
    most = max(counts)
    times: dict[int, list[float]] = {count: [] for count in counts}
    with torch.inference_mode(), precision() as autocast:
        cast = torch.autocast(device.type, autocast, autocast is not None)
        with cast:
            start = time.perf_counter()
            for _ in range(_WARM_UP):
                _run(models[:most], batch, device)
                if time.perf_counter() - start > _SECONDS / 2:
                    break
            end = time.perf_counter() + _SECONDS
            for done in range(_MOST):
                if done >= _LEAST and time.perf_counter() > end:
                    break
                after = _run(models[:most], batch, device)
                # One model alone has its weights in the cache, which the first of many has not.
                after[0] = _run(models[:1], batch, device)[0]
                for count in counts:
                    times[count].append(after[count - 1])
    return {count: _summary(batch_size, values) for count, values in times.items()}


def _run(models: Sequence[nn.Module], batch: Batch, device: torch.device) -> list[float]:
    """Milliseconds from the call until the result of each further model is there."""
    _synchronize(device)
    start = time.perf_counter_ns()
    after = []
    for model in models:
        forward(model, batch)
        _synchronize(device)
        after.append((time.perf_counter_ns() - start) / 1e6)
    return after


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


class _Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch has no types here
    """Sums torch's own formulas over the operators that run; `opaque` are those without one."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0
        self.opaque = False

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # true, the default, imports the compiler: a second for nothing

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        found = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=found)
        self.opaque |= str(func).split(".")[1] in _OPAQUE
        return found


def flops(model: nn.Module, example: Batch, device: torch.device) -> int | None:
    """Floating-point operations of one sample (a multiply-add is two), None where torch cannot count.

    Counted with gradients on: torch then takes the path of plain operators, which have formulas,
    and not one fused operator for a whole layer, which has none.
    """
    batch = sized(example, 1).to(device)
    rnn = torch.backends.mkldnn.flags(enabled=False)  # the same for recurrent layers
    try:
        with warnings.catch_warnings(), torch.enable_grad():
            warnings.simplefilter("ignore")  # about the other switches of `flags`
            with rnn, _Counter() as counter:
                forward(model, batch)
    except Exception:  # noqa: BLE001  # a figure that is nice to have; the model runs elsewhere
        return None
    return None if counter.opaque else counter.total
