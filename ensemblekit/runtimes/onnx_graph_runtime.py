"""Owns running a candidate as one ONNX graph in ONNX Runtime.

Input: work. The graph is the one that `export` would write: folded, shared, fused where measured to
be faster. Inputs are bound once where the provider allows it, so that no copy is timed.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ensemblekit.batches import Batch, forward
from ensemblekit.ensemble_module import EnsembleModule
from ensemblekit.errors import MachineError, UnsupportedError
from ensemblekit.graphs import interface as interfaces
from ensemblekit.graphs import precision as precisions
from ensemblekit.graphs import saving
from ensemblekit.graphs.choosing import attempts
from ensemblekit.graphs.template import Interface
from ensemblekit.latency import wall_clock
from ensemblekit.runtimes import Session, Work
from ensemblekit.runtimes.onnx_runtime import Session as File
from ensemblekit.runtimes.onnx_runtime import check_provider

_AGREES = 1e-3  # of the largest output


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
        session, fused = _first_that_agrees(work, interface, Path(name))

    def prepare(batch: Batch) -> Callable[[], Any]:
        return session.bound(interfaces.inputs_of(batch, interface))

    execution = "fused" if fused else "loop" if len(work.members) > 1 else "graph"
    return [Session("onnxruntime", execution, work.provider, prepare, wall_clock(), work.precision)]


def _first_that_agrees(work: Work, interface: Interface, folder: Path) -> tuple[File, bool]:
    """The graph that `export` would write: the fastest whose outputs are the plain loop's.

    Raises:
        UnsupportedError: No graph could be made, or none is right.
    """
    module = EnsembleModule(work.members, work.head, logits=work.logits).eval()
    few = work.example.sized(2)
    with torch.inference_mode():
        wanted = forward(module, few.to(work.device)).float().cpu().numpy()
    reason = "the model cannot be exported"
    for choice in attempts(
        work.members,
        work.head,
        interfaces.example_of(work.example, interface),
        interface,
        work.example,
        folder,
        logits=work.logits,
        provider=work.provider,
    ):
        if choice.made is None:
            reason = choice.reason or reason
            continue
        path = folder / "plain.onnx"
        saving.save(choice.made.model, path)
        plain = File(path, work.provider, threads=work.threads)
        got = plain.run(interfaces.inputs_of(few, interface))[0]
        finite = np.isfinite(wanted)
        scale = np.abs(wanted[finite]).max(initial=1e-30)
        if (
            got.shape != wanted.shape
            or np.abs(got - wanted)[finite].max(initial=0) > _AGREES * scale
        ):
            reason = "the exported graph is not the model"
            continue
        if work.precision in ("fp16", "bf16"):
            half = folder / "half.onnx"
            precisions.convert(path, half, work.precision)
            path = half
        tf32 = work.precision == "tf32"
        return File(path, work.provider, threads=work.threads, tf32=tf32), choice.fuse
    raise UnsupportedError(reason)
