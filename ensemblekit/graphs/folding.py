"""Owns taking BatchNorm into the layer before it: one operator less a layer, the same function.

Input: a template. ONNX Runtime does this by itself only for some exports. Here it is done on open
weights, so that it serves every member; the new weights are worked out in float64.

    y = scale (W x + b - mean) / sqrt(var + eps) + bias = W' x + b'
    W' = scale / sqrt(var + eps) W,  b' = scale / sqrt(var + eps) (b - mean) + bias
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from ensemblekit.graphs.template import Template, Weights

_EPSILON = 1e-5  # of the operator, where a node does not say


@dataclass(frozen=True)
class _Fold:
    """One layer: what goes in, by name or as it is, and the names of what comes out."""

    weight: str
    bias: str | npt.NDArray[Any] | None
    norm: tuple[str | npt.NDArray[Any], ...]  # scale, bias, mean, variance
    epsilon: float
    axis: int  # of output channels in the weight
    made: tuple[str, str]


@dataclass(frozen=True)
class Folding:
    """A template without the BatchNorm that could be folded, and its weights.

    Attributes:
        template: Ready to be filled in.
        folds: What is worked out from the members' own weights.
    """

    template: Template
    folds: tuple[_Fold, ...]

    def weights(self, own: Weights) -> dict[str, npt.NDArray[Any]]:
        """A member's weights for the folded template."""
        found = dict(own)
        for fold in self.folds:
            found |= _folded(fold, own)
        return {name: found[name] for name in self.template.weights}


def fold_batch_norm(template: Template) -> Folding:
    """Fold every BatchNorm that follows a convolution or a linear layer directly."""
    model = template.model.clone()
    graph = model.graph
    opened = set(template.weights)
    ports = list(graph.inputs)[: len(template.ports)]
    folds: list[_Fold] = []
    for node in list(graph):
        if node.op_type != "BatchNormalization":
            continue
        fold = _fold(node, opened, len(folds))
        if fold is None:
            continue
        layer = node.inputs[0].producer()  # type: ignore[union-attr]
        assert layer is not None
        dtype = layer.inputs[1].dtype  # type: ignore[union-attr]
        new = [ir.Value(name=name, type=ir.TensorType(dtype)) for name in fold.made]  # type: ignore[arg-type]
        weight = layer.inputs[1]
        assert weight is not None
        new[0].shape = weight.shape
        graph.inputs.extend(new)
        made = ir.Node(
            layer.domain,
            layer.op_type,
            [layer.inputs[0], *new],
            list(layer.attributes.values()),
            num_outputs=1,
            name=layer.name,
        )
        made.outputs[0].shape = node.outputs[0].shape or layer.outputs[0].shape
        made.outputs[0].type = node.outputs[0].type or layer.outputs[0].type
        graph.insert_after(node, made)
        node.outputs[0].replace_all_uses_with(made.outputs[0], replace_graph_outputs=True)
        name = node.outputs[0].name
        graph.remove(node, safe=True)
        graph.remove(layer, safe=True)
        made.outputs[0].name = name
        folds.append(fold)
    used = []
    for value in list(graph.inputs):
        if value in ports:
            continue
        if value.uses():
            used.append(str(value.name))
        else:
            graph.inputs.remove(value)
    return Folding(replace(template, model=model, weights=tuple(used)), tuple(folds))


def _fold(node: ir.Node, opened: set[str], index: int) -> _Fold | None:
    """How a BatchNorm is folded; None where it cannot be."""
    value = node.inputs[0]
    layer = value.producer() if value is not None else None
    if value is None or layer is None or layer.op_type not in _LAYERS or layer.domain:
        return None
    if len(value.uses()) != 1 or value.is_graph_output():
        return None
    if any(output.uses() for output in node.outputs[1:]):
        return None
    weight, bias = layer.inputs[1], layer.inputs[2] if len(layer.inputs) > 2 else None
    if weight is None or weight.name not in opened:
        return None
    axis = _LAYERS[layer.op_type](layer)
    given = [_given(v, opened) for v in node.inputs[1:5]]
    own_bias = None if bias is None else _given(bias, opened)
    if axis is None or any(g is None for g in given) or (bias is not None and own_bias is None):
        return None
    attribute = node.attributes.get("epsilon")
    epsilon = _EPSILON if attribute is None else attribute.as_float()
    made = (f"{weight.name}.folded{index}", f"{weight.name}.bias.folded{index}")
    norm = tuple(g for g in given if g is not None)
    return _Fold(str(weight.name), own_bias, norm, epsilon, axis, made)


def _given(value: ir.Value | None, opened: set[str]) -> str | npt.NDArray[Any] | None:
    """The name of an open weight, or the numbers of a constant."""
    if value is None:
        return None
    if value.name in opened:
        return str(value.name)
    return None if value.const_value is None else value.const_value.numpy()


def _conv_axis(_: ir.Node) -> int | None:
    return 0


def _transposed_conv_axis(node: ir.Node) -> int | None:
    group = node.attributes.get("group")
    return 1 if group is None or group.as_int() == 1 else None


def _gemm_axis(node: ir.Node) -> int | None:
    def number(name: str, default: float) -> float:
        attribute = node.attributes.get(name)
        return default if attribute is None else float(attribute.value)

    if number("alpha", 1) != 1 or number("beta", 1) != 1 or len(node.inputs) < 3:
        return None
    return 0 if number("transB", 0) else 1


_LAYERS: Mapping[str, Callable[[ir.Node], int | None]] = {
    "Conv": _conv_axis,
    "ConvTranspose": _transposed_conv_axis,
    "Gemm": _gemm_axis,
}


def _folded(fold: _Fold, own: Weights) -> dict[str, npt.NDArray[Any]]:
    def numbers(given: str | npt.NDArray[Any]) -> npt.NDArray[np.float64]:
        return np.asarray(own[given] if isinstance(given, str) else given).astype(np.float64)

    weight = own[fold.weight]
    scale, shift, mean, variance = (numbers(given) for given in fold.norm)
    factor = scale / np.sqrt(variance + fold.epsilon)
    bias = np.zeros_like(mean) if fold.bias is None else numbers(fold.bias)
    shape = [1] * weight.ndim
    shape[fold.axis] = -1
    return {
        fold.made[0]: (weight.astype(np.float64) * factor.reshape(shape)).astype(weight.dtype),
        fold.made[1]: (factor * (bias - mean) + shift).astype(weight.dtype),
    }
