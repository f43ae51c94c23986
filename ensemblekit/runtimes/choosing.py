"""Owns the choice of the fastest way to run an ensemble in torch: measured, and only if it is right.

Input: members and a head. The loop is always among the ways, so the choice is never slower than it
by more than the stopwatch's error.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ensemblekit.batches import Batch, forward
from ensemblekit.ensemble_module import EnsembleModule, FusedEnsemble, Head
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
    effort: Effort = _EFFORT,
    **keywords: torch.Tensor,
) -> EnsembleModule | FusedEnsemble:
    """The ensemble as the module that runs these inputs fastest.

    Args:
        members: In eval mode, on one device.
        head: How their outputs become one.
        *inputs: What one member takes, at the batch size that matters, on that device.
        logits: Entry of a dict output that holds the logits.
        effort: How long to measure.
        **keywords: Inputs by keyword.

    Returns:
        The loop, or the fused module where it gives the same outputs (1e-4 of the largest) and is
        at least 2% faster.
    """
    loop = EnsembleModule(members, head, logits=logits).eval()
    if len(members) == 1:
        return loop
    first = next((p for p in loop.parameters()), None)
    device = torch.device("cpu") if first is None else first.device
    values: Any = keywords or inputs
    size = len(next(iter(keywords.values() if keywords else inputs)))
    batch = Batch(values, None, size)
    with torch.inference_mode():
        wanted = forward(loop, batch)
        try:
            fused = FusedEnsemble(members, head, logits=logits).eval()
            got = forward(fused, batch)
        except (torch.OutOfMemoryError, MemoryError):
            return loop
        except Exception:  # noqa: BLE001  # whatever vmap has no rule for runs in the loop
            return loop
        if not bool((got - wanted).abs().max() <= _AGREES * wanted.abs().max()):
            return loop
        found = measure(
            {"loop": lambda: forward(loop, batch), "fused": lambda: forward(fused, batch)},
            clock=device_clock(device),
            batch_size=size,
            effort=effort,
        )
    return fused if found["fused"].p50_ms < _WORTH * found["loop"].p50_ms else loop
