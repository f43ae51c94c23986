"""Owns running members as a CUDA graph: launched once, without Python between kernels.

Input: work on a GPU. Inputs stay in place; a service copies new ones over them.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ensemblekit.batches import Batch, forward
from ensemblekit.runtimes import Session, Work
from ensemblekit.runtimes.torch_eager import device_clock, executions, in_precision

_WARM_UP = 3  # runs before the capture: cuDNN chooses its algorithms


def unavailable(device: torch.device) -> str | None:
    """It needs a GPU of NVIDIA's."""
    return None if device.type == "cuda" else "CUDA graphs need --device cuda"


def open_sessions(work: Work) -> list[Session]:
    """The captured loop and, of several members, the fused module and the loop over streams."""
    clock = device_clock(work.device)
    return [
        Session(
            "torch-cudagraph", execution, "cuda", _captured(module, work), clock, work.precision
        )
        for execution, module in executions(work, streams=True).items()
    ]


def _captured(module: nn.Module, work: Work) -> Callable[[Batch], Callable[[], Any]]:
    def prepare(batch: Batch) -> Callable[[], Any]:
        placed = in_precision(batch.to(work.device), work.precision)
        stream = torch.cuda.Stream(work.device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(work.device))
        with torch.cuda.stream(stream), torch.no_grad():
            for _ in range(_WARM_UP):
                forward(module, placed)
        torch.cuda.current_stream(work.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.no_grad(), torch.cuda.graph(graph):
            output = forward(module, placed)

        def run() -> Any:
            graph.replay()
            return output

        return run

    return prepare
