"""Owns the proof that an ONNX file is the model that was measured: run in both, compare.

Input: a file, the module it was made from, and samples. Exporters fail silently: BatchNorm with
wrong constants, a batch size frozen, outputs in another order. Each check is meant for one of these.

Legend of shapes: N samples, C classes, labels or values; `...` are positions of dense tasks.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from ensemblekit.batches import Batch, forward
from ensemblekit.errors import NotFiniteError
from ensemblekit.graphs.interface import inputs_of
from ensemblekit.graphs.template import Interface
from ensemblekit.runtimes.onnx_runtime import Session, SessionError
from ensemblekit.tasks import IGNORED

Precision = str
"""`fp32`, `fp16`, `bf16`, `int8-dynamic` or `int8-static`: what the file computes in."""


@dataclass(frozen=True)
class Tolerance:
    """What a precision may change.

    Attributes:
        ratio: Largest difference over the largest output; None: any.
        flips: Share of decisions that may change; differences of a tie do not count.
    """

    ratio: float | None
    flips: float


TOLERANCES: Mapping[Precision, Tolerance] = {
    "fp32": Tolerance(1e-4, 0.0),
    "fp16": Tolerance(2e-2, 0.01),
    "bf16": Tolerance(1e-1, 0.03),
    "int8-dynamic": Tolerance(None, 0.05),
    "int8-static": Tolerance(None, 0.05),
}
CHECKS = ("file", "session", "interface", "batch sizes", "numbers", "decisions")

_DTYPES = {
    "float32": "tensor(float)",
    "float64": "tensor(double)",
    "float16": "tensor(float16)",
    "bfloat16": "tensor(bfloat16)",
    "int64": "tensor(int64)",
    "int32": "tensor(int32)",
    "int16": "tensor(int16)",
    "int8": "tensor(int8)",
    "uint8": "tensor(uint8)",
    "bool": "tensor(bool)",
}


@dataclass
class Verification:
    """What the checks found.

    Attributes:
        provider: That ran the file.
        samples: That were compared.
        batch_sizes: That were run.
        real: Whether the samples are data, not generated.
        max_abs_diff: Largest difference of an output between torch and ONNX Runtime.
        max_rel_diff: The same over the largest output.
        decision_flips: Decisions that differ, ties left out.
        ties: Decisions that differ where torch's two choices are equal within the tolerance.
        classes_seen: Different classes that torch decided for.
        metric: Name of the figure below: accuracy, or mse of a regression.
        metric_torch: On labelled samples; None without labels.
        metric_onnx: The same samples in ONNX Runtime.
        passed: Whether all checks said yes.
        failed: The check that said no, and why.
    """

    provider: str
    samples: int = 0
    batch_sizes: list[int] = field(default_factory=list)
    real: bool = False
    max_abs_diff: float | None = None
    max_rel_diff: float | None = None
    decision_flips: int | None = None
    ties: int = 0
    classes_seen: int | None = None
    metric: str | None = None
    metric_torch: float | None = None
    metric_onnx: float | None = None
    passed: bool = False
    failed: tuple[str, str] | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        found = dict(vars(self))
        failed = found.pop("failed")
        return {**found, "failed": failed and {"check": failed[0], "reason": failed[1]}}


class _NoError(Exception):
    """A check said no."""

    def __init__(self, check: str, reason: str) -> None:
        super().__init__(reason)
        self.check = check
        self.reason = reason


@dataclass(frozen=True)
class Samples:
    """What both sides are run on.

    Attributes:
        batches: Gives the batches anew each time it is called.
        first: One of them, for the different batch sizes.
        real: Whether they are data.
        ignore_index: Label of positions that do not count.
        shifted: The label of a position is what the output before it predicts.
    """

    batches: Callable[[], Iterable[Batch]]
    first: Batch
    real: bool
    ignore_index: int = IGNORED
    shifted: bool = False


def verify(
    path: Path,
    module: nn.Module,
    interface: Interface,
    samples: Samples,
    *,
    task: str,
    class_axis: int = 1,
    probabilities: bool = False,
    provider: str = "cpu",
    precision: Precision = "fp32",
    batch_sizes: Sequence[int] = (1, 2, 7, 64),
) -> Verification:
    """Run a file and the module it was made from side by side.

    Args:
        path: The ONNX file.
        module: In eval mode, float32; gives one tensor (N, C, ...).
        interface: What the file's inputs and output have to be.
        samples: To run both on.
        task: What the outputs mean.
        class_axis: Where an output has its classes.
        probabilities: The outputs are probabilities, not logits.
        provider: Of ONNX Runtime.
        precision: What the file computes in; it sets the tolerance.
        batch_sizes: To try; labelled data are run through as a whole besides.

    Returns:
        The outcome; `failed` names the first check that said no.

    Raises:
        MachineError: The provider is missing or fell back.
        InputError: The module cannot take the samples.
    """
    found = Verification(provider, real=samples.real)
    rule = TOLERANCES[precision]
    sides = _Sides(task, class_axis, 0.5 if probabilities else 0.0, rule, samples)
    try:
        _check_file(path)
        try:
            session = Session(path, provider)
        except SessionError as error:
            raise _NoError("session", error.message) from error
        _check_interface(session, interface)
        for size in batch_sizes:
            wanted, got = _both(module, session, interface, samples.first.sized(size))
            # The same samples in other batches: differences count, decisions once.
            once = not samples.real and size == max(batch_sizes)
            sides.compare(wanted, got, None, counted=once)
            found.batch_sizes.append(size)
        if samples.real:
            for batch in samples.batches():
                wanted, got = _both(module, session, interface, batch)
                sides.compare(wanted, got, batch.target)
        sides.conclude(found)
        found.passed = True
    except _NoError as no:
        sides.tell(found)
        found.failed = (no.check, no.reason)
    return found


class _Sides:
    """What the two sides said so far, as sums."""

    def __init__(
        self, task: str, class_axis: int, threshold: float, rule: Tolerance, samples: Samples
    ) -> None:
        self.task = task
        self.class_axis = class_axis
        self.threshold = threshold  # of a label
        self.rule = rule
        self.ignored = samples.ignore_index
        self.shifted = samples.shifted
        self.samples = 0
        self.difference = 0.0
        self.largest = 0.0
        self.flips: list[npt.NDArray[np.float64]] = []  # torch's margin at each
        self.decisions = 0
        self.seen: set[int] = set()
        self.scored = 0
        self.right = np.zeros(2)

    def compare(
        self,
        wanted: npt.NDArray[Any],
        got: npt.NDArray[Any],
        target: torch.Tensor | None,
        *,
        counted: bool = True,
    ) -> None:
        """Add one batch; `counted`: its decisions, too."""
        wanted, got = wanted.astype(np.float64), got.astype(np.float64)
        if np.isnan(wanted).any():
            raise NotFiniteError(
                "the model's output contains NaN: nothing can be compared with it",
                hint="check the checkpoints and the data in torch first",
            )
        finite = np.isfinite(wanted)
        if (np.isfinite(got) != finite).any() or (got[~finite] != wanted[~finite]).any():
            raise _NoError("numbers", "NaN or Inf in ONNX Runtime's output and not in torch's")
        if finite.any():
            apart = np.abs(wanted[finite] - got[finite])
            self.difference = max(self.difference, float(apart.max()))
            self.largest = max(self.largest, float(np.abs(wanted[finite]).max()))
        if not counted:
            return
        self.samples += len(wanted)
        if self.task == "regression":
            self._score(wanted, got, target)
            return
        ours, theirs, margin = self._decisions(wanted, got)
        self.decisions += ours.size
        self.seen.update(np.unique(ours).tolist())
        self.flips.append(margin[ours != theirs])
        self._score(ours, theirs, target)

    def _decisions(self, wanted: npt.NDArray[Any], got: npt.NDArray[Any]) -> tuple[Any, Any, Any]:
        if self.task == "multilabel":
            return wanted > self.threshold, got > self.threshold, np.abs(wanted - self.threshold)
        axis = self.class_axis
        ours, theirs = wanted.argmax(axis), got.argmax(axis)
        picked = [
            np.take_along_axis(wanted, np.expand_dims(one, axis), axis) for one in (ours, theirs)
        ]
        return ours, theirs, np.squeeze(picked[0] - picked[1], axis)

    def _score(
        self, ours: npt.NDArray[Any], theirs: npt.NDArray[Any], target: torch.Tensor | None
    ) -> None:
        if target is None:
            return
        true = target.detach().cpu().numpy()
        if self.shifted:
            ours, theirs, true = ours[:, :-1], theirs[:, :-1], true[:, 1:]
        if true.shape != ours.shape:
            true = true.reshape(ours.shape) if true.size == ours.size else true
        if true.shape != ours.shape:
            return  # labels that the model shifts or scales: no figure of ours
        kept = true != self.ignored
        self.scored += int(kept.sum())
        for side, values in enumerate((ours, theirs)):
            if self.task == "regression":
                self.right[side] += float(((values - true) ** 2).sum())
            else:
                self.right[side] += int((values == true)[kept].sum())

    def tell(self, found: Verification) -> None:
        """Put the figures so far into the outcome."""
        found.samples = self.samples
        if self.largest == 0 and self.difference == 0 and not self.samples:
            return
        found.max_abs_diff = self.difference
        found.max_rel_diff = self.difference / max(self.largest, 1e-30)
        if self.task != "regression":
            margins = np.concatenate(self.flips) if self.flips else np.zeros(0)
            tie = 2 * (self.rule.ratio or 0.0) * self.largest
            found.decision_flips = int((margins > tie).sum())
            found.ties = int((margins <= tie).sum())
            found.classes_seen = len(self.seen)
        if self.scored:
            found.metric = "mse" if self.task == "regression" else "accuracy"
            found.metric_torch, found.metric_onnx = (float(v) for v in self.right / self.scored)

    def conclude(self, found: Verification) -> None:
        """The last checks."""
        self.tell(found)
        limit = self.rule.ratio
        if limit is not None and self.difference > limit * max(self.largest, 1e-30):
            raise _NoError(
                "numbers",
                f"outputs differ by up to {self.difference:.3g}, {found.max_rel_diff:.1e} of the "
                f"largest ({self.largest:.3g}); allowed: {limit:g}",
            )
        flips = found.decision_flips or 0
        if flips > self.rule.flips * self.decisions:
            raise _NoError(
                "decisions",
                f"{flips} of {self.decisions:,} decisions differ from torch's; allowed: "
                f"{self.rule.flips:.1%}",
            )


def _check_file(path: Path) -> None:
    """The file is whole, and ONNX's own checker accepts it."""
    import onnx

    try:
        model = onnx.load(str(path), load_external_data=False)
    except Exception as error:  # protobuf's errors have no common base
        raise _NoError("file", f"{path.name} is no ONNX file: {_words(error)}") from error
    for tensor in model.graph.initializer:
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            continue
        place = {entry.key: entry.value for entry in tensor.external_data}
        location = place.get("location", "")
        data = path.parent / location
        if not location or data.parent != path.parent:
            raise _NoError("file", f"'{tensor.name}' lies in no file beside it: '{location}'")
        size = data.stat().st_size if data.is_file() else None
        try:
            end = int(place.get("offset", 0)) + int(place.get("length", 0))
        except ValueError as error:
            raise _NoError("file", f"'{tensor.name}' has no place in {location}") from error
        if size is None or end > size:
            shown = "is not there" if size is None else f"has {size:,} bytes"
            raise _NoError(
                "file", f"'{tensor.name}' ends at byte {end:,} of {data.name}, which {shown}"
            )
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except Exception as error:
        raise _NoError("file", f"onnx.checker: {_words(error)}") from error


def _check_interface(session: Session, interface: Interface) -> None:
    """Names, types and open sizes are those that were asked for."""
    inputs = {slot.name: slot for slot in session.inputs}
    wanted = [port.name for port in interface.ports]
    if list(inputs) != wanted:
        raise _NoError("interface", f"its inputs are {list(inputs)}, expected {wanted}")
    for port in interface.ports:
        slot = inputs[port.name]
        if slot.dtype != _DTYPES.get(port.dtype, slot.dtype):
            raise _NoError("interface", f"input '{port.name}' is {slot.dtype}, not {port.dtype}")
        if len(slot.dims) != len(port.dims):
            raise _NoError("interface", f"input '{port.name}' has sizes {list(slot.dims)}")
        for axis, (got, want) in enumerate(zip(slot.dims, port.dims, strict=True)):
            if isinstance(want, str) and isinstance(got, int):
                raise _NoError(
                    "interface",
                    f"axis {axis} ({want}) of input '{port.name}' is frozen at {got}",
                )
    outputs = [slot.name for slot in session.outputs]
    if outputs != [interface.output]:
        raise _NoError("interface", f"its outputs are {outputs}, expected ['{interface.output}']")
    first = session.outputs[0].dims[0] if session.outputs[0].dims else None
    if isinstance(first, int) and any(
        isinstance(p.dims[0], str) for p in interface.ports if p.dims
    ):
        raise _NoError("interface", f"the output's batch size is frozen at {first}")


def _both(
    module: nn.Module, session: Session, interface: Interface, batch: Batch
) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """A batch in torch and in ONNX Runtime; the outputs have the same shape."""
    wanted = _torch(module, batch)
    try:
        got = session.run(inputs_of(batch, interface))[0]
    except SessionError as error:
        raise _NoError("batch sizes", f"batch size {batch.size}: {error.message}") from error
    if got.shape != wanted.shape:
        raise _NoError(
            "batch sizes",
            f"batch size {batch.size}: the output has shape {got.shape}, torch's {wanted.shape}",
        )
    return wanted, got


def _torch(module: nn.Module, batch: Batch) -> npt.NDArray[Any]:
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    with torch.inference_mode():
        made: torch.Tensor = forward(module, batch.to(device))
    return made.float().cpu().numpy()


def _words(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__
