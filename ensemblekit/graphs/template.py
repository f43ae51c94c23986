"""Owns the export of one member: a graph whose weights are open, to be filled in for each member.

Input: a module in eval mode and example inputs. torch's exporter (the one on torch.export) runs
first; the older one, on TorchScript, is the second choice.
"""

import contextlib
import copy
import io
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch
from torch import nn

from ensemblekit.build import plain_attention
from ensemblekit.ensemble_module import OneOutput
from ensemblekit.errors import IncompatibleError, UnsupportedError

Exporter = Literal["dynamo", "torchscript"]
EXPORTERS: tuple[Exporter, ...] = ("dynamo", "torchscript")
OPSET = 20
"""Default operator set: what torch's exporter writes without conversion, with LayerNormalization
and Gelu as single operators; ONNX Runtime reads it since 1.17 (2024)."""

_CONSTANT_ELEMENTS = 1 << 20  # constants that are worked out in advance are no larger
Weights = Mapping[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class Port:
    """An input of the exported graph.

    Attributes:
        name: In the graph.
        dtype: As torch names it, without `torch.`.
        dims: Sizes; a string where the size is open, and its name.
    """

    name: str
    dtype: str
    dims: tuple[int | str, ...]

    def __str__(self) -> str:
        return f"{self.name}:{self.dtype}[{','.join(map(str, self.dims))}]"


@dataclass(frozen=True)
class Interface:
    """How a model is called.

    Attributes:
        ports: Its inputs in order.
        keywords: Names of the model's parameters that they go to; None where they are positional.
        output: Name of the output.
    """

    ports: tuple[Port, ...]
    keywords: tuple[str, ...] | None
    output: str


@dataclass(frozen=True)
class Template:
    """One member's graph with open weights.

    Attributes:
        model: Its graph's inputs are the ports, then the weights; not to be changed.
        ports: Names that its first inputs will have.
        weights: Names of the weights that the graph uses, as they are among its inputs.
        exporter: What made it.
    """

    model: ir.Model
    ports: tuple[str, ...]
    weights: tuple[str, ...]
    exporter: Exporter

    @property
    def graph(self) -> ir.Graph:
        """The graph."""
        return self.model.graph


def export_template(
    module: nn.Module,
    example: Sequence[torch.Tensor],
    interface: Interface,
    *,
    logits: str | None = None,
    exporter: Exporter = "dynamo",
    opset: int = OPSET,
) -> Template:
    """Export one member with open weights.

    Args:
        module: In eval mode, on the CPU.
        example: One tensor a port, with at least 2 in open dimensions.
        interface: Names and open dimensions.
        logits: Entry of a dict output that is exported.
        exporter: Which of torch's two exporters.
        opset: Operator set of the graph.

    Raises:
        UnsupportedError: The exporter cannot; its last words are in the message.
    """
    if exporter == "torchscript":
        module = _distinct(module)
    wrapped = OneOutput(module, logits=logits, names=interface.keywords).eval()
    model = _export(wrapped, example, interface, exporter=exporter, opset=opset)
    _complete(model.graph, interface)
    own = {f"model.{key}": value for key, value in module.state_dict(keep_vars=True).items()}
    graph = model.graph
    opened = []
    for name in list(graph.initializers):
        value = graph.initializers[name]
        if name not in own:
            continue
        tensor = own[name]
        if value.const_value is None or tuple(value.const_value.shape) != tuple(tensor.shape):
            raise UnsupportedError(f"the {exporter} exporter changed the weight '{name}'")
        del graph.initializers[name]
        value.const_value = None
        value.shape = ir.Shape(tuple(tensor.shape))
        value.name = name.removeprefix("model.")
        graph.inputs.append(value)
        opened.append(value)
    optimize(model)
    used = []
    for value in opened:
        if value.uses() or value.is_graph_output():
            used.append(str(value.name))
        else:
            graph.inputs.remove(value)
    return Template(model, tuple(port.name for port in interface.ports), tuple(used), exporter)


def _distinct(module: nn.Module) -> nn.Module:
    """A copy with other numbers: the older exporter makes one weight of several equal ones."""
    other = copy.deepcopy(module)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in other.state_dict(keep_vars=True).values():  # what is not in it is a constant
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
                tensor.copy_(0.5 + torch.rand(tensor.shape, generator=generator))
    return other


def export_whole(
    module: nn.Module, example: Sequence[torch.Tensor], interface: Interface, *, opset: int = OPSET
) -> ir.Model:
    """Export a module with everything in it, without cleverness; for heads, and to compare with."""
    model = _export(module.eval(), example, interface, exporter="dynamo", opset=opset)
    optimize(model)
    for value, port in zip(model.graph.inputs, interface.ports, strict=True):
        value.name = port.name
    return model


def optimize(model: ir.Model) -> None:
    """Work out constants and drop what is not used, in place; onnxscript's optimizer."""
    import onnxscript.optimizer

    with _silence():
        onnxscript.optimizer.optimize(
            model, input_size_limit=_CONSTANT_ELEMENTS, output_size_limit=_CONSTANT_ELEMENTS
        )


def _complete(graph: ir.Graph, interface: Interface) -> None:
    """All inputs in their order; the older exporter drops what the model does not use."""
    if len(graph.inputs) == len(interface.ports):
        return
    present = {value.name for value in graph.inputs}
    for place, (name, port) in enumerate(zip(_internal(interface), interface.ports, strict=True)):
        if name not in present:
            value = ir.Value(name=name, shape=ir.Shape(port.dims))
            value.type = ir.TensorType(ir.DataType.from_numpy(np.dtype(port.dtype)))
            graph.inputs.insert(place, value)


def _internal(interface: Interface) -> list[str]:
    """Names of the inputs while they are edited: an input may be called as a weight is."""
    return [f"ensemblekit.port.{n}" for n in range(len(interface.ports))]


def _export(
    module: nn.Module,
    example: Sequence[torch.Tensor],
    interface: Interface,
    *,
    exporter: Exporter,
    opset: int,
) -> ir.Model:
    names = _internal(interface)
    try:
        with _silence(), plain_attention():
            if exporter == "dynamo":
                return _by_dynamo(module, example, interface, names, opset)
            return _by_torchscript(module, example, interface, names, opset)
    except (KeyboardInterrupt, MemoryError):
        raise
    except Exception as error:  # the exporters raise anything
        raise UnsupportedError(f"the {exporter} exporter failed: {_words(error)}") from error


@contextlib.contextmanager
def _no_graphs_on_stdout() -> Iterator[None]:
    """The older exporter prints whole graphs from C++ when it fails, past Python's stdout."""
    choose: Any = getattr(torch._C, "_jit_set_onnx_log_output_stream", lambda _: None)
    choose("stderr")
    sys.stderr.flush()
    kept, sink = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(sink, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(sink)
        choose("stdout")


def _words(error: BaseException) -> str:
    """What went wrong in the first place, in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{lines[0][:300] if lines else ''} ({type(error).__name__})"


def _by_dynamo(
    module: nn.Module,
    example: Sequence[torch.Tensor],
    interface: Interface,
    names: list[str],
    opset: int,
) -> ir.Model:
    dims: dict[str, Any] = {}
    shapes = []
    for port in interface.ports:
        open_axes = {axis: d for axis, d in enumerate(port.dims) if isinstance(d, str)}
        for label in open_axes.values():
            dims.setdefault(label, torch.export.Dim(label, min=1))
        shapes.append({axis: dims[label] for axis, label in open_axes.items()})
    program = torch.onnx.export(
        module,
        tuple(example),
        input_names=names,
        output_names=[interface.output],
        dynamic_shapes=(tuple(shapes),),  # of *args
        opset_version=opset,
        dynamo=True,
        optimize=False,
        verbose=False,
    )
    assert program is not None
    return program.model


def _by_torchscript(
    module: nn.Module,
    example: Sequence[torch.Tensor],
    interface: Interface,
    names: list[str],
    opset: int,
) -> ir.Model:
    import onnx

    buffer = io.BytesIO()
    axes = {
        name: {axis: d for axis, d in enumerate(port.dims) if isinstance(d, str)}
        for name, port in zip(names, interface.ports, strict=True)
    }
    batch = next((d for port in interface.ports for d in port.dims if isinstance(d, str)), None)
    if batch is not None:
        axes[interface.output] = {0: batch}
    with _no_graphs_on_stdout():
        torch.onnx.export(
            module,
            tuple(example),
            buffer,  # type: ignore[arg-type]  # a file-like object is what it wants
            input_names=names,
            output_names=[interface.output],
            dynamic_axes=axes,
            opset_version=min(opset, 20),
            dynamo=False,
            do_constant_folding=False,
            training=torch.onnx.TrainingMode.PRESERVE,  # eval, but with BatchNorm left as it is
            keep_initializers_as_inputs=False,
        )
    return ir.serde.deserialize_model(onnx.load_from_string(buffer.getvalue()))


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """What the exporters say while they work is for their developers."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with (
            warnings.catch_warnings(),
            open(os.devnull, "w", encoding="utf-8") as sink,  # noqa: PTH123  # a device
            contextlib.redirect_stdout(sink),
            contextlib.redirect_stderr(sink),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _numpy(tensor: torch.Tensor) -> npt.NDArray[Any]:
    if tensor.dtype == torch.bfloat16:  # which numpy has not
        return tensor.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    array: npt.NDArray[Any] = tensor.numpy()
    return array


def weights_of(module: nn.Module, template: Template) -> dict[str, npt.NDArray[Any]]:
    """The weights of a member that the template leaves open.

    Raises:
        IncompatibleError: The member has another structure than the one that was exported.
    """
    state = module.state_dict(keep_vars=True)
    shapes = {value.name: value.shape for value in template.graph.inputs}
    found = {}
    for name in template.weights:
        if name not in state:
            raise IncompatibleError(f"a member has no '{name}', which the exported one has")
        found[name] = _numpy(state[name].detach().cpu())
        wanted = shapes[name]
        if wanted is not None and found[name].shape != tuple(wanted.numpy()):
            raise IncompatibleError(
                f"a member's '{name}' has shape {found[name].shape}, the exported one's "
                f"{tuple(wanted.numpy())}"
            )
    return found
