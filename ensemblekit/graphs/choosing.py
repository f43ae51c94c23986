"""Owns which of several equal graphs is kept: folded or not, fused or not, by measured latency.

Input: members and a head. Which is faster depends on the runtime, the provider and the model, so
it is measured on the provider that will serve it, at batch size 1.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ensemblekit.batches import Batch
from ensemblekit.ensemble_module import Head
from ensemblekit.errors import UnsupportedError
from ensemblekit.graphs import saving
from ensemblekit.graphs.interface import inputs_of
from ensemblekit.graphs.making import Made, Maker
from ensemblekit.graphs.template import EXPORTERS, OPSET, Exporter, Interface
from ensemblekit.latency import Effort, measure, wall_clock
from ensemblekit.runtimes.onnx_runtime import Session, SessionError

_EFFORT = Effort(seconds=1.0, error=0.01, least=5, warm_up_s=0.3)
_WORTH = 0.98  # of the plainer graph's latency: less gain is no reason for a less plain graph

Say = Callable[[str], None]


@dataclass
class Choice:
    """One attempt at a graph.

    Attributes:
        exporter: Which was tried.
        fold: BatchNorm was to be folded.
        fuse: Members were to run as one operator.
        made: The graph; None where there was none.
        reason: Why there was none.
        latency: What was measured to choose, fastest first.
    """

    exporter: Exporter
    fold: bool = True
    fuse: bool = False
    made: Made | None = None
    reason: str | None = None
    latency: list[dict[str, Any]] = field(default_factory=list)

    def facts(self) -> dict[str, Any]:
        """For the report."""
        return {
            "exporter": self.exporter,
            "folded": None if self.made is None else self.made.folded,
            "fused": None if self.made is None else self.made.fused,
            "nodes": None if self.made is None else self.made.nodes,
        }


def attempts(
    members: Sequence[nn.Module],
    head: Head,
    example: Sequence[torch.Tensor],
    interface: Interface,
    batch: Batch,
    folder: Path,
    *,
    logits: str | None = None,
    exporter: str = "auto",
    opset: int = OPSET,
    fuse: str = "auto",
    provider: str = "cpu",
    say: Say = lambda _: None,
) -> Iterator[Choice]:
    """Graphs in order of hope: the fastest of one exporter, its plain one, then the other exporter.

    Args:
        members: In eval mode, on the CPU.
        head: How their outputs become one.
        example: One tensor a port.
        interface: Names and open dimensions.
        batch: Samples to measure on.
        folder: For files on the way.
        logits: Entry of a dict output that is exported.
        exporter: `auto` or one of `EXPORTERS`.
        opset: Operator set.
        fuse: `auto`, `on` or `off`.
        provider: To measure on.
        say: Told what is being done.
    """
    chosen: Sequence[Exporter] = EXPORTERS
    if exporter != "auto":
        chosen = [one for one in EXPORTERS if one == exporter]
    for one in chosen:
        say(f"exporting with {one}")
        try:
            maker = Maker(
                members, head, example, interface, logits=logits, exporter=one, opset=opset
            )
            choice = _fastest(maker, one, interface, batch, folder, fuse, provider, say)
        except UnsupportedError as error:
            yield Choice(one, reason=error.message)
            continue
        yield choice
        if choice.fold or choice.fuse:
            plain = maker.make(fold=False, fuse=False)
            if choice.made is not None and plain.nodes != choice.made.nodes:
                yield Choice(one, False, False, plain)


def _fastest(
    maker: Maker,
    exporter: Exporter,
    interface: Interface,
    batch: Batch,
    folder: Path,
    fuse: str,
    provider: str,
    say: Say,
) -> Choice:
    many = len(maker.weights) > 1
    folded = Choice(exporter, True, False, maker.make(fold=True))
    assert folded.made is not None
    variants = [folded]
    if folded.made.folded:
        variants.insert(0, Choice(exporter, False, False, maker.make(fold=False)))
    if many and fuse != "off":
        variants.append(Choice(exporter, True, True, maker.make(fold=True, fuse=True)))
        if fuse == "on":
            variants = variants[-1:]
    if len(variants) == 1:
        return variants[0]
    say(f"measuring {len(variants)} graphs on {provider}")
    times = _times(variants, interface, batch.sized(1), folder, provider)
    best = 0
    for n in range(1, len(variants)):  # from the plainest on
        if times[n] < _WORTH * times[best]:
            best = n
    order = sorted(range(len(variants)), key=lambda n: times[n])
    variants[best].latency = [
        {
            "folded": variants[n].fold,
            "fused": variants[n].fuse,
            "batch_size": 1,
            "provider": provider,
            "p50_ms": times[n] if math.isfinite(times[n]) else None,
        }
        for n in order
    ]
    return variants[best]


def _times(
    variants: Sequence[Choice], interface: Interface, batch: Batch, folder: Path, provider: str
) -> list[float]:
    """Median milliseconds of each, measured in turns; infinite where it does not run."""
    inputs = inputs_of(batch, interface)
    sessions: list[Session | None] = []
    for n, variant in enumerate(variants):
        assert variant.made is not None
        path = folder / f"variant{n}.onnx"
        saving.save(variant.made.model, path)
        try:
            opened = Session(path, provider)
            opened.run(inputs)
            sessions.append(opened)
        except SessionError:
            sessions.append(None)
    runs = {n: partial(s.run, inputs) for n, s in enumerate(sessions) if s is not None}
    found = measure(runs, clock=wall_clock(), batch_size=1, effort=_EFFORT)
    for path in folder.glob("variant*"):
        path.unlink()
    return [found[n].p50_ms if n in found else math.inf for n in range(len(variants))]
