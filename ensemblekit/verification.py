"""Owns the proof that an ONNX file is the model that was measured: run in both, compare.

Input: a file, the module it was made from, and samples. Exporters fail silently: BatchNorm with
wrong constants, a batch size frozen, outputs in another order. Each check is meant for one of these.

Legend of shapes: N samples, C classes, labels or values; `...` are positions of dense tasks.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy.typing as npt
import torch
from torch import nn

from ensemblekit.batches import Batch, forward
from ensemblekit.errors import InputError
from ensemblekit.graphs.interface import inputs_of
from ensemblekit.graphs.template import Interface
from ensemblekit.likeness import TOLERANCES, Likeness, Precision, Unlike
from ensemblekit.runtimes.onnx_runtime import Session, SessionError
from ensemblekit.tasks import IGNORED

CHECKS = ("file", "session", "interface", "batch sizes", "open axes", "numbers", "decisions")

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
        open_sizes: Of other open axes, by name, that were run besides those of the samples.
        real: Whether the samples are data, not generated.
        max_abs_diff: Largest difference of an output between torch and ONNX Runtime.
        max_rel_diff: Largest difference over the largest output of the same sample.
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
    open_sizes: dict[str, list[int]] = field(default_factory=dict)
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
    sides = Likeness(
        task,
        TOLERANCES[precision],
        class_axis=class_axis,
        threshold=0.5 if probabilities else 0.0,
        ignored=samples.ignore_index,
        shifted=samples.shifted,
    )
    try:
        _check_file(path)
        try:
            session = Session(path, provider)
        except SessionError as error:
            raise Unlike("session", error.message) from error
        _check_interface(session, interface)
        for size in batch_sizes:
            wanted, got = _both(module, session, interface, samples.first.sized(size))
            # The same samples in other batches: differences count, decisions once.
            once = not samples.real and size == max(batch_sizes)
            sides.compare(wanted, got, None, counted=once)
            found.batch_sizes.append(size)
        for label, size, batch in _other_sizes(samples.first, interface):
            try:
                wanted = _torch(module, batch)
            except InputError:  # a size that the model itself does not take
                continue
            got = _beside(wanted, session, interface, batch, check="open axes")
            sides.compare(wanted, got, None, counted=False)
            found.open_sizes.setdefault(label, []).append(size)
        if samples.real:
            for batch in samples.batches():
                wanted, got = _both(module, session, interface, batch)
                sides.compare(wanted, got, batch.target)
        sides.conclude()
        found.passed = True
    except Unlike as no:
        found.failed = (no.check, no.reason)
    return replace(found, **sides.figures())


def _check_file(path: Path) -> None:
    """The file is whole, and ONNX's own checker accepts it."""
    import onnx

    try:
        model = onnx.load(str(path), load_external_data=False)
    except Exception as error:  # protobuf's errors have no common base
        raise Unlike("file", f"{path.name} is no ONNX file: {_words(error)}") from error
    for tensor in model.graph.initializer:
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            continue
        place = {entry.key: entry.value for entry in tensor.external_data}
        location = place.get("location", "")
        data = path.parent / location
        if not location or data.parent != path.parent:
            raise Unlike("file", f"'{tensor.name}' lies in no file beside it: '{location}'")
        size = data.stat().st_size if data.is_file() else None
        try:
            end = int(place.get("offset", 0)) + int(place.get("length", 0))
        except ValueError as error:
            raise Unlike("file", f"'{tensor.name}' has no place in {location}") from error
        if size is None or end > size:
            shown = "is not there" if size is None else f"has {size:,} bytes"
            raise Unlike(
                "file", f"'{tensor.name}' ends at byte {end:,} of {data.name}, which {shown}"
            )
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except Exception as error:
        raise Unlike("file", f"onnx.checker: {_words(error)}") from error


def _check_interface(session: Session, interface: Interface) -> None:
    """Names, types and open sizes are those that were asked for."""
    inputs = {slot.name: slot for slot in session.inputs}
    wanted = [port.name for port in interface.ports]
    if list(inputs) != wanted:
        raise Unlike("interface", f"its inputs are {list(inputs)}, expected {wanted}")
    for port in interface.ports:
        slot = inputs[port.name]
        if slot.dtype != _DTYPES.get(port.dtype, slot.dtype):
            raise Unlike("interface", f"input '{port.name}' is {slot.dtype}, not {port.dtype}")
        if len(slot.dims) != len(port.dims):
            raise Unlike("interface", f"input '{port.name}' has sizes {list(slot.dims)}")
        for axis, (got, want) in enumerate(zip(slot.dims, port.dims, strict=True)):
            if isinstance(want, str) and isinstance(got, int):
                raise Unlike(
                    "interface",
                    f"axis {axis} ({want}) of input '{port.name}' is frozen at {got}",
                )
    outputs = [slot.name for slot in session.outputs]
    if outputs != [interface.output]:
        raise Unlike("interface", f"its outputs are {outputs}, expected ['{interface.output}']")
    first = session.outputs[0].dims[0] if session.outputs[0].dims else None
    if isinstance(first, int) and any(
        isinstance(p.dims[0], str) for p in interface.ports if p.dims
    ):
        raise Unlike("interface", f"the output's batch size is frozen at {first}")


def _both(
    module: nn.Module, session: Session, interface: Interface, batch: Batch
) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """A batch in torch and in ONNX Runtime; the outputs have the same shape."""
    wanted = _torch(module, batch)
    return wanted, _beside(wanted, session, interface, batch, check="batch sizes")


def _beside(
    wanted: npt.NDArray[Any], session: Session, interface: Interface, batch: Batch, *, check: str
) -> npt.NDArray[Any]:
    """ONNX Runtime's output of the shape of torch's."""
    inputs = inputs_of(batch, interface)
    shapes = ", ".join(str(list(value.shape)) for value in inputs.values())
    about = f"batch size {batch.size}, inputs of shapes {shapes}"
    try:
        got = session.run(inputs)[0]
    except SessionError as error:
        raise Unlike(check, f"{about}: {error.message}") from error
    if got.shape != wanted.shape:
        raise Unlike(check, f"{about}: the output has shape {got.shape}, torch's {wanted.shape}")
    return got


def _other_sizes(example: Batch, interface: Interface) -> Iterator[tuple[str, int, Batch]]:
    """The example with each open axis but the first shorter and longer."""
    values = inputs_of(example.sized(2), interface)
    sizes = {
        label: int(values[port.name].shape[axis])
        for port in interface.ports
        for axis, label in enumerate(port.dims)
        if axis > 0 and isinstance(label, str)
    }
    for label, now in sizes.items():
        for size in sorted({max(1, now - 1), max(1, now // 2), now + 3, 2 * now} - {now}):
            made = [
                _at_size(
                    values[port.name],
                    [d if n else None for n, d in enumerate(port.dims)],
                    label,
                    size,
                )
                for port in interface.ports
            ]
            inputs: Any = tuple(made)
            if isinstance(example.inputs, dict):
                assert interface.keywords is not None
                inputs = dict(zip(interface.keywords, made, strict=True))
            yield label, size, Batch(inputs, None, 2)


def _at_size(
    value: torch.Tensor, dims: Sequence[int | str | None], label: str, size: int
) -> torch.Tensor:
    """The value cut or repeated along the axes of that name."""
    for axis, name in enumerate(dims):
        if name == label:
            value = value.index_select(axis, torch.arange(size) % value.shape[axis])
    return value


def _torch(module: nn.Module, batch: Batch) -> npt.NDArray[Any]:
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    with torch.inference_mode():
        made: torch.Tensor = forward(module, batch.to(device))
    return made.float().cpu().numpy()


def _words(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__
