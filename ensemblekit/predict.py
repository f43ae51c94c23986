"""Owns the forward pass that quality is measured on; nothing else runs a model over labels.

Input: ready members, batches, and logs to keep the outputs in. All members see a batch before the
next one is loaded; what a log already holds for exactly this batch is not computed again.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from time import monotonic
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from ensemblekit.batches import Batch, digest, forward
from ensemblekit.cache import Log
from ensemblekit.distributed import World
from ensemblekit.errors import InputError, NotFiniteError
from ensemblekit.rivals import find_rivals, half
from ensemblekit.tasks import Form

Progress = Callable[[int], None]

_FLUSH_SECONDS = 5.0  # what a crash may cost


@dataclass(frozen=True)
class Seen:
    """What a walk over a split saw.

    Attributes:
        targets: One a row: classes (R,), or labels and values (R, C).
        sizes_N: Rows of each sample; None where each has one.
        samples: How many.
    """

    targets: npt.NDArray[Any]
    sizes_N: npt.NDArray[np.int64] | None
    samples: int


@dataclass(frozen=True)
class Keep:
    """How outputs are kept.

    Attributes:
        form: What the outputs are.
        dtype: Element type on disk, `float32` or `float16`.
        jointly: Members share one log, which holds the true class and its rivals (segmentation).
    """

    form: Form
    dtype: str
    jointly: bool

    @property
    def width(self) -> int:
        """Columns of a row: tokens keep the true class and whether it is the most probable."""
        return 2 if self.form.task == "tokens" else self.form.classes

    def record(self, outputs_RC: torch.Tensor, targets_R: torch.Tensor) -> bytes:
        """One member's outputs for a batch as they are kept."""
        if self.form.task == "tokens":
            true_R = outputs_RC.gather(1, targets_R[:, None])[:, 0]
            right_R = outputs_RC.argmax(1) == targets_R
            outputs_RC = torch.stack([true_R, right_R.to(true_R.dtype)], dim=1)
        values = outputs_RC.cpu().numpy()
        kept = half(values) if self.dtype == "float16" else values
        return np.ascontiguousarray(kept).tobytes()


class Stale(Exception):  # not an error: a reason to start the pass anew
    """Logs that hold predictions of other data under the same name."""

    def __init__(self, logs: set[int]) -> None:
        super().__init__(f"{len(logs)} logs are of other data")
        self.logs = logs


@dataclass(frozen=True)
class _Known:
    """What a log holds already."""

    digests: list[bytes]
    complete: bool

    def has(self, place: int, code: bytes) -> bool:
        """Whether the record of this batch is there."""
        return place < len(self.digests) and self.digests[place] == code

    def expects(self, place: int) -> bool:
        """Whether it has something to say of a batch at this place."""
        return self.complete or place < len(self.digests)


@dataclass
class _Part:
    """What one process has to say about one batch."""

    code: bytes
    samples: int
    stale: set[int]
    records: dict[int, bytes]
    targets: npt.NDArray[Any]
    sizes: npt.NDArray[np.int64] | None


def run_pass(
    logs: Sequence[Log] | None,
    member: Callable[[int, int], nn.Module],
    members: int,
    batches: Iterable[Batch],
    keep: Keep,
    *,
    device: torch.device,
    autocast: torch.dtype | None = None,
    world: World | None = None,
    progress: Progress | None = None,
    names: Sequence[str] = (),
) -> Seen | None:
    """Predict every sample once with every member.

    Args:
        logs: Of each member, or the one they share; None on processes that write nothing.
        member: `member(log, index)`: the module, in eval mode, of a member of a log; called only
            where something is left to predict.
        members: Members behind each log: 1, or all of them when they share one.
        batches: This process's share.
        keep: How outputs are kept.
        device: Where batches go.
        autocast: Element type of the forward pass, None for the weights' own.
        world: The processes that share the batches.
        progress: Called with the number of samples done.
        names: Of the members, for errors.

    Returns:
        Targets, on process 0.

    Raises:
        Stale: On every process; clear these logs and call again.
        InputError: The data do not fit the model.
        NotFiniteError: NaN in the outputs.
    """
    world = world or World()
    known = world.from_first(
        None if logs is None else [_Known(log.digests, complete=log.complete) for log in logs]
    )
    assert known is not None
    flushed = monotonic()
    mine = iter(batches)
    targets: list[npt.NDArray[Any]] = []
    sizes: list[npt.NDArray[np.int64]] = []
    samples = place = 0
    precision = torch.autocast(device.type, autocast, autocast is not None)
    with torch.inference_mode(), precision:
        while True:
            batch = next(mine, None)
            part = None
            if batch is not None:
                at = place + world.rank
                part = _predict_batch(
                    batch, at, known, member, members, keep, device=device, names=names
                )
            heads = world.gather(None if part is None else (part.stale, part.samples))
            if stale := {m for head in heads if head for m in head[0]}:
                raise Stale(stale)
            for got in world.to_first(part):
                if got is None or logs is None:
                    continue
                targets.append(got.targets)
                if got.sizes is not None:
                    sizes.append(got.sizes)
                for m, record in got.records.items():
                    logs[m].append(got.code, record, got.samples)
            if logs is not None and monotonic() - flushed > _FLUSH_SECONDS:
                for log in logs:
                    log.flush()
                flushed = monotonic()
            samples += sum(head[1] for head in heads if head)
            place += world.size
            if progress is not None:
                progress(samples)
            if any(head is None for head in heads):
                break
    if samples == 0:
        raise InputError(
            "the data are empty: no sample came out of them",
            hint="check what the data target returns for this split",
        )
    if logs is None:
        return None
    for log in logs:
        log.finish(len(targets))
    return Seen(np.concatenate(targets), np.concatenate(sizes) if sizes else None, samples)


def _predict_batch(
    batch: Batch,
    place: int,
    known: Sequence["_Known"],
    member: Callable[[int, int], nn.Module],
    members: int,
    keep: Keep,
    *,
    device: torch.device,
    names: Sequence[str],
) -> _Part:
    code = digest(batch)
    here = [log.has(place, code) for log in known]
    stale = {m for m, log in enumerate(known) if not here[m] and log.expects(place)}
    truth = keep.form.targets(batch)
    wanted = [m for m in range(len(known)) if not here[m]] if not stale else []
    records: dict[int, bytes] = {}
    if wanted:
        moved = batch.to(device)
        on_device = truth.values_R.to(device)
        for m in wanted:
            outputs = [
                _outputs(member(m, i), moved, keep, _name(names, m + i)) for i in range(members)
            ]
            if keep.jointly:
                arrays = [one.cpu().numpy() for one in outputs]
                records[m] = find_rivals(arrays, truth.values_R.cpu().numpy()).to_bytes(keep.dtype)
            else:
                records[m] = keep.record(outputs[0], on_device)
    sizes = None if truth.sizes_N is None else truth.sizes_N.cpu().numpy()
    return _Part(code, batch.size, stale, records, truth.values_R.cpu().numpy(), sizes)


def _outputs(model: nn.Module, batch: Batch, keep: Keep, name: str) -> torch.Tensor:
    try:
        return keep.form.outputs(forward(model, batch), batch)
    except NotFiniteError as error:
        named = batch.inputs.values() if isinstance(batch.inputs, dict) else batch.inputs
        floats = [v for v in named if isinstance(v, torch.Tensor) and v.is_floating_point()]
        if not all(bool(torch.isfinite(value).all()) for value in floats):
            raise NotFiniteError(
                "the inputs contain NaN or Inf", hint="check the preprocessing of the data"
            ) from error
        raise NotFiniteError(
            f"{name}: {error.message}",
            hint="its weights diverged or do not fit the data; leave it out with --exclude",
        ) from error


def _name(names: Sequence[str], index: int) -> str:
    return names[index] if index < len(names) else f"member {index}"
