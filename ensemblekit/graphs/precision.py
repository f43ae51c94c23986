"""Owns other precisions of a finished graph: half, bfloat16 and int8, by ONNX Runtime's own tools.

Input: a float32 file. Inputs and outputs stay float32, so that a service need not change.
"""

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import onnx_ir as ir

from ensemblekit.errors import UnsupportedError
from ensemblekit.graphs.saving import data_name

PRECISIONS = ("fp32", "fp16", "bf16", "int8-dynamic", "int8-static")
Calibration = Callable[[], Iterable[Mapping[str, Any]]]
"""Gives inputs of training samples by name, anew at each call."""


def convert(
    source: Path, target: Path, precision: str, *, calibration: Calibration | None = None
) -> None:
    """Write a float32 file in another precision.

    Args:
        source: The float32 file.
        target: What to write.
        precision: One of `PRECISIONS` but fp32.
        calibration: For `int8-static`: samples that the ranges of activations are taken from.

    Raises:
        UnsupportedError: The tool cannot convert this graph.
    """
    if source.with_name(data_name(source.name)).exists():
        raise UnsupportedError(
            f"--precision {precision}: of more than 2 GB of weights only fp32 can be written",
            hint="--precision fp32; or export fewer members",
        )
    try:
        with _quiet():
            _CONVERTERS[precision](source, target, calibration)
    except (KeyboardInterrupt, MemoryError, OSError):
        raise
    except Exception as error:  # the tools raise anything
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise UnsupportedError(
            f"--precision {precision}: the graph cannot be converted: "
            f"{lines[0][:300] if lines else ''} ({type(error).__name__})"
        ) from error


def _half(source: Path, target: Path, _: Calibration | None) -> None:
    import onnx
    from onnxruntime.transformers.float16 import convert_float_to_float16

    made = convert_float_to_float16(onnx.load(str(source)), keep_io_types=True)
    model = ir.serde.deserialize_model(made)
    model.graph.sort()  # casts are put at the end
    ir.save(model, target)


def _bfloat16(source: Path, target: Path, _: Calibration | None) -> None:
    """No tool of ONNX Runtime's does it: types are changed, with a cast at each end."""
    model = ir.load(source)
    graph = model.graph
    ins = [v for v in graph.inputs if v.dtype == ir.DataType.FLOAT]
    outs = [v for v in graph.outputs if v.dtype == ir.DataType.FLOAT]
    for value in graph.initializers.values():
        tensor = value.const_value
        if tensor is not None and tensor.dtype == ir.DataType.FLOAT:
            array = tensor.numpy().astype(ml_dtypes.bfloat16)
            value.const_value = ir.tensor(array, name=value.name)
            value.type = ir.TensorType(ir.DataType.BFLOAT16)
    for node in graph:
        for name, attribute in list(node.attributes.items()):
            if node.op_type == "Cast" and name == "to" and attribute.value == ir.DataType.FLOAT:
                node.attributes["to"] = ir.AttrInt64("to", int(ir.DataType.BFLOAT16))
            if attribute.type == ir.AttributeType.TENSOR and attribute.value.dtype == (
                ir.DataType.FLOAT
            ):
                array = attribute.value.numpy().astype(ml_dtypes.bfloat16)
                node.attributes[name] = ir.AttrTensor(name, ir.tensor(array))
        for value in node.outputs:
            if value.dtype == ir.DataType.FLOAT:
                value.type = ir.TensorType(ir.DataType.BFLOAT16)
    for value in ins:
        cast = ir.node("Cast", [value], {"to": int(ir.DataType.BFLOAT16)})
        value.replace_all_uses_with(cast.outputs[0])
        cast.replace_input_with(0, value)
        first = next(iter(graph), None)
        assert first is not None
        graph.insert_before(first, cast)
    for place, value in enumerate(graph.outputs):
        if value not in outs:
            continue
        cast = ir.node("Cast", [value], {"to": int(ir.DataType.FLOAT)})
        graph.append(cast)
        own, made = str(value.name), cast.outputs[0]
        value.name = f"{own}.bf16"
        made.name, made.shape = own, value.shape
        made.type = ir.TensorType(ir.DataType.FLOAT)
        graph.outputs[place] = made
    ir.save(model, target)


def _dynamic(source: Path, target: Path, _: Calibration | None) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    ready = _prepared(source, target)
    # Convolutions stay: ONNX Runtime's CPU provider has no kernel for dynamic ones of signed weights.
    quantize_dynamic(
        str(ready),
        str(target),
        weight_type=QuantType.QInt8,
        op_types_to_quantize=["MatMul", "Gemm"],
    )


def _static(source: Path, target: Path, calibration: Calibration | None) -> None:
    from onnxruntime.quantization import (
        CalibrationDataReader,
        QuantFormat,
        QuantType,
        quantize_static,
    )

    samples = calibration
    assert samples is not None

    class Reader(CalibrationDataReader):  # type: ignore[misc]  # they have no types
        """Their way of asking for samples."""

        def __init__(self) -> None:
            self.rewind()

        def get_next(self) -> dict[str, Any] | None:
            one = next(self.left, None)
            return None if one is None else {k: v.numpy() for k, v in one.items()}

        def rewind(self) -> None:
            assert samples is not None
            self.left = iter(samples())

    ready = _prepared(source, target)
    quantize_static(
        str(ready),
        str(target),
        Reader(),
        quant_format=QuantFormat.QDQ,
        per_channel=not _has_batched_products(ready),
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )


def _has_batched_products(path: Path) -> bool:
    """Whether weights of several members are multiplied at once: those have one scale in all."""
    return any(
        node.op_type == "MatMul"
        and any(
            v is not None and v.is_initializer() and len(v.shape or ()) > 2 for v in node.inputs
        )
        for node in ir.load(path).graph
    )


def _prepared(source: Path, target: Path) -> Path:
    """With the shapes of all values, and without what their own optimiser takes away."""
    from onnxruntime.quantization.shape_inference import quant_pre_process

    ready = target.with_name(f"prepared.{target.name}")
    try:
        quant_pre_process(str(source), str(ready))
    except Exception:  # noqa: BLE001  # symbolic shapes that it cannot follow
        quant_pre_process(str(source), str(ready), skip_symbolic_shape=True)
    return ready


_CONVERTERS: Mapping[str, Callable[[Path, Path, Calibration | None], None]] = {
    "fp16": _half,
    "bf16": _bfloat16,
    "int8-dynamic": _dynamic,
    "int8-static": _static,
}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
