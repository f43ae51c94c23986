"""Owns the registry of runtimes: ways to run a candidate that is ready.

Input: members and a head. A runtime module offers

    unavailable(device) -> str | None        why it cannot run here, None where it can
    open_sessions(work) -> list of Session   one for each way in which it can run the work
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from ensemblekit.errors import one_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from torch import nn

    from ensemblekit.batches import Batch
    from ensemblekit.ensemble_module import Head
    from ensemblekit.latency import Clock

RUNTIMES: dict[str, str] = {
    "torch": "ensemblekit.runtimes.torch_eager",
    "torch-fused": "ensemblekit.runtimes.torch_fused",
    "torch-compile": "ensemblekit.runtimes.torch_compile",
    "torch-cudagraph": "ensemblekit.runtimes.torch_cudagraph",
    "onnxruntime": "ensemblekit.runtimes.onnx_graph_runtime",
}


@dataclass(frozen=True)
class Work:
    """What is to be run.

    Attributes:
        members: In eval mode, float32, on the device.
        head: How their outputs become one.
        example: A batch of inputs, on the CPU.
        device: Where to run.
        precision: `fp32`, `tf32`, `bf16` or `fp16`.
        logits: Entry of a dict output that holds the logits.
        provider: Of ONNX Runtime.
        threads: Of one operator on the CPU.
    """

    members: "Sequence[nn.Module]"
    head: "Head"
    example: "Batch"
    device: "torch.device"
    precision: str = "fp32"
    logits: str | None = None
    provider: str = "cpu"
    threads: int | None = None


@dataclass(frozen=True)
class Session:
    """One way to run the work.

    Attributes:
        runtime: Its name in the registry.
        execution: `loop`, `streams`, `fused` or `graph`: how the members run.
        provider: What really runs it.
        prepare: `prepare(batch)` puts inputs in place; the function it returns makes one run and
            gives its output.
        clock: Times one run.
        precision: Of the weights.
    """

    runtime: str
    execution: str
    provider: str
    prepare: "Callable[[Batch], Callable[[], Any]]"
    clock: "Clock"
    precision: str = "fp32"


def runtime(name: str) -> ModuleType:
    """The module of a runtime.

    Raises:
        UsageError: There is none of that name.
    """
    return import_module(RUNTIMES[one_of(name, RUNTIMES, what="runtime")])


def unavailable(name: str, device: "torch.device") -> str | None:
    """Why a runtime cannot run here; None where it can."""
    reason: str | None = runtime(name).unavailable(device)
    return reason


def sessions(name: str, work: Work) -> list[Session]:
    """The ways in which a runtime can run the work."""
    found: list[Session] = runtime(name).open_sessions(work)
    return found
