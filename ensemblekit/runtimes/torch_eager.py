"""Owns running members in plain torch, one after the other: what everything else is compared with.

Input: work. Half precisions are those of the weights, not of autocast: what a service would do.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import nn

from ensemblekit.batches import Batch, forward
from ensemblekit.ensemble_module import EnsembleModule, FusedEnsemble, StreamedEnsemble
from ensemblekit.latency import Clock, Effort, Latency, cuda_clock, measure, wall_clock
from ensemblekit.runtimes import Session, Work

HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def unavailable(_: torch.device) -> str | None:
    """It runs everywhere."""
    return None


def open_sessions(work: Work) -> list[Session]:
    """The loop over members; on a GPU also with a stream for each."""
    members = members_in(work)
    kinds: dict[str, type[EnsembleModule]] = {"loop": EnsembleModule, **_streamed(work)}
    clock = device_clock(work.device)
    found = []
    for execution, kind in kinds.items():
        prepare = runner(kind(members, work.head, logits=work.logits).eval(), work)
        found.append(Session("torch", execution, work.device.type, prepare, clock, work.precision))
    return found


def _streamed(work: Work) -> dict[str, type[EnsembleModule]]:
    """Members overlap where there are several, and streams."""
    several = len(work.members) > 1 and work.device.type == "cuda"
    return {"streams": StreamedEnsemble} if several else {}


def members_in(work: Work) -> list[nn.Module]:
    """The members with weights in the precision that was asked for."""
    dtype = HALVES.get(work.precision)
    if dtype is None:
        return list(work.members)
    return [copy.deepcopy(member).to(dtype) for member in work.members]


def executions(work: Work, *, streams: bool = False) -> dict[str, nn.Module]:
    """The members in a loop and, where there are several, as one call and on streams."""
    members = members_in(work)
    found: dict[str, nn.Module] = {
        "loop": EnsembleModule(members, work.head, logits=work.logits).eval()
    }
    if len(members) > 1:
        found["fused"] = FusedEnsemble(members, work.head, logits=work.logits).eval()
    for execution, kind in (_streamed(work) if streams else {}).items():
        found[execution] = kind(members, work.head, logits=work.logits).eval()
    return found


def runner(module: nn.Module, work: Work) -> Callable[[Batch], Callable[[], Any]]:
    """`prepare` of a session that calls a module."""

    def prepare(batch: Batch) -> Callable[[], Any]:
        placed = in_precision(batch.to(work.device), work.precision)

        def run() -> Any:
            with torch.inference_mode():
                return forward(module, placed)

        return run

    return prepare


def in_precision(batch: Batch, precision: str) -> Batch:
    """The batch with its floating-point inputs in the members' precision."""
    dtype = HALVES.get(precision)
    if dtype is None:
        return batch

    return batch.map(lambda x: x.to(dtype) if x.is_floating_point() else x)


def device_clock(device: torch.device) -> Clock:
    """How a run on that device is timed."""
    if device.type == "cuda":
        return cuda_clock(device)
    if device.type == "mps":
        return wall_clock(torch.mps.synchronize)
    return wall_clock()


@contextmanager
def tf32(*, on: bool) -> Iterator[None]:
    """TF32 on or off, put back afterwards."""
    switches: list[Any] = [torch.backends.cuda.matmul, torch.backends.cudnn]
    before = [switch.allow_tf32 for switch in switches]
    for switch in switches:
        switch.allow_tf32 = on
    try:
        yield
    finally:
        for switch, value in zip(switches, before, strict=True):
            switch.allow_tf32 = value


def member_loops(
    ensembles: Mapping[int, Sequence[nn.Module]],
    batch: Batch,
    *,
    device: torch.device,
    precision: Callable[[], AbstractContextManager[torch.dtype | None]],
    effort: Effort,
) -> dict[int, Latency]:
    """Latency of the plain loop over several ensembles, under the autocast that predictions ran in.

    Args:
        ensembles: Models by some key, usually their number.
        batch: Samples of a run.
        device: Where the models are.
        precision: Context that gives the autocast type.
        effort: How long to measure.
    """
    placed = batch.to(device)

    def loop(models: Sequence[nn.Module]) -> Callable[[], None]:
        def run() -> None:
            for model in models:
                forward(model, placed)

        return run

    with (
        torch.inference_mode(),
        precision() as autocast,
        torch.autocast(device.type, autocast, autocast is not None),
    ):
        return measure(
            {key: loop(models) for key, models in ensembles.items()},
            clock=device_clock(device),
            batch_size=batch.size,
            effort=effort,
        )
