"""Owns the choice of the fastest way to run an ensemble in torch: measured, and only if it is right.

Input: members and a head. The loop is always among the ways, so the choice is never slower than it
by more than the stopwatch's error.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from ensemblekit.batches import Batch, forward
from ensemblekit.ensemble_module import EnsembleModule, FusedEnsemble, Head, StreamedEnsemble
from ensemblekit.latency import Effort, measure
from ensemblekit.runtimes.torch_eager import device_clock

_AGREES = 1e-4  # of the largest output
_WORTH = 0.98  # of the loop's latency: less gain is no reason to leave it
_EFFORT = Effort(seconds=1.0, error=0.01, least=5, warm_up_s=0.5)


def fastest(
    members: Sequence[nn.Module],
    head: Head,
    *inputs: torch.Tensor,
    logits: str | None = None,
    compiled: bool = False,
    effort: Effort = _EFFORT,
    **keywords: torch.Tensor,
) -> nn.Module:
    """The ensemble as the module that runs these inputs fastest.

    Args:
        members: In eval mode, on one device.
        head: How their outputs become one.
        *inputs: What one member takes, at the batch size that matters, on that device.
        logits: Entry of a dict output that holds the logits.
        compiled: Try each way under `torch.compile`, too, which takes minutes; what comes back is
            then compiled for these sizes alone.
        effort: How long to measure.
        **keywords: Inputs by keyword.

    Returns:
        The loop, or the fastest of its rivals (fused, on a GPU also on streams) that gives the same
        outputs (1e-4 of the largest) and is at least 2% faster.
    """
    loop = EnsembleModule(members, head, logits=logits).eval()
    if len(members) == 1:
        return loop
    first = next((p for p in loop.parameters()), None)
    device = torch.device("cpu") if first is None else first.device
    values: Any = keywords or inputs
    size = len(next(iter(keywords.values() if keywords else inputs)))
    batch = Batch(values, None, size)
    kinds = [FusedEnsemble, *([StreamedEnsemble] if device.type == "cuda" else [])]
    makers: list[Callable[[], Any]] = [
        partial(kind, members, head, logits=logits) for kind in kinds
    ]
    if compiled:
        eager = [lambda: loop, *makers]
        makers += [partial(_compiled, make) for make in eager]
    ways: list[nn.Module] = [loop]
    with torch.inference_mode():
        wanted = forward(loop, batch)
        for make in makers:
            try:
                rival: Any = make().eval()
                got = forward(rival, batch)
            except Exception:  # noqa: BLE001, S112  # no rule of vmap, no memory: not a way
                continue
            if bool((got - wanted).abs().max() <= _AGREES * wanted.abs().max()):
                ways.append(rival)
        found = measure(
            {place: partial(forward, way, batch) for place, way in enumerate(ways)},
            clock=device_clock(device),
            batch_size=size,
            effort=effort,
        )
    best = min(found, key=lambda place: found[place].p50_ms)
    return ways[best] if found[best].p50_ms < _WORTH * found[0].p50_ms else loop


def _compiled(make: Callable[[], nn.Module]) -> Any:
    return torch.compile(make(), dynamic=False)
