"""Owns running a candidate as one ONNX graph in ONNX Runtime.

Input: work. The graph is the one that `export` would write: folded, shared, fused where measured to
be faster. Inputs are bound once where the provider allows it, so that no copy is timed.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ensemblekit.batches import Batch
from ensemblekit.errors import MachineError, UnsupportedError
from ensemblekit.graphs import interface as interfaces
from ensemblekit.graphs import precision as precisions
from ensemblekit.graphs import saving
from ensemblekit.graphs.choosing import attempts
from ensemblekit.latency import wall_clock
from ensemblekit.runtimes import Session, Work
from ensemblekit.runtimes.onnx_runtime import Session as File
from ensemblekit.runtimes.onnx_runtime import check_provider


def unavailable(_: torch.device) -> str | None:
    """Providers are looked at when a session is opened."""
    return None


def open_sessions(work: Work) -> list[Session]:
    """One session on the provider of the work.

    Raises:
        MachineError: The provider is missing or fell back.
        UnsupportedError: The model cannot be exported.
    """
    check_provider(work.provider)
    if work.precision == "tf32" and work.provider == "cpu":
        raise MachineError("tf32 is a precision of GPUs")
    interface = interfaces.interface_of(work.members[0], work.example, (), work.head.output_name)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        found = next(
            (
                choice
                for choice in attempts(
                    work.members,
                    work.head,
                    interfaces.example_of(work.example, interface),
                    interface,
                    work.example,
                    folder,
                    logits=work.logits,
                    provider=work.provider,
                )
                if choice.made is not None
            ),
            None,
        )
        if found is None or found.made is None:
            raise UnsupportedError("the model cannot be exported")
        path = folder / "plain.onnx"
        saving.save(found.made.model, path)
        if work.precision in ("fp16", "bf16"):
            half = folder / "half.onnx"
            precisions.convert(path, half, work.precision)
            path = half
        session = File(path, work.provider, threads=work.threads, tf32=work.precision == "tf32")

    def prepare(batch: Batch) -> Callable[[], Any]:
        return session.bound(interfaces.inputs_of(batch, interface))

    execution = "fused" if found.fuse else "loop" if len(work.members) > 1 else "graph"
    return [Session("onnxruntime", execution, work.provider, prepare, wall_clock())]
