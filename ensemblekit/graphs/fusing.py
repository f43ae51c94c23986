"""Owns horizontal fusion: the rules by which one operator does the work of K.

Input: a node of the template and its lifted inputs, not all of them shared. A rule adds nodes to
the new graph and returns the lifted outputs, or None: then the node is copied K times. Convolutions
become grouped convolutions, linear layers batched products, and the rest runs on stacked values.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from typing import Any

import numpy as np
import onnx_ir as ir

from ensemblekit.graphs.lifting import CannotError, Layout, Lift, Lifted, Rule

Inputs = Sequence[Lifted | None]

_UNARY = (
    *("Abs", "Cast", "Ceil", "Celu", "Cos", "Dropout", "Elu", "Erf", "Exp", "Floor", "Gelu"),
    *("HardSigmoid", "HardSwish", "Identity", "IsInf", "IsNaN", "LeakyRelu", "Log", "Mish", "Neg"),
    *("Not", "Reciprocal", "Relu", "Round", "Selu", "Sigmoid", "Sign", "Sin", "Softplus"),
    *("Softsign", "Sqrt", "Tanh", "ThresholdedRelu"),
)
_BROADCASTING = (
    *("Add", "And", "Div", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Max"),
    *("Min", "Mod", "Mul", "Or", "Pow", "PRelu", "Sub", "Where", "Xor"),
)
_POOLS = ("AveragePool", "GlobalAveragePool", "GlobalMaxPool", "LpPool", "MaxPool")
_REDUCTIONS = tuple(f"Reduce{name}" for name in ("L1", "L2", "Max", "Mean", "Min", "Prod", "Sum"))


def _rule(function: Callable[[Lift, ir.Node, Any], Sequence[Lifted] | None]) -> Rule:
    """A rule that gives way where a layout cannot be made."""

    @wraps(function)
    def ruled(lift: Lift, node: ir.Node, inputs: Inputs) -> Sequence[Lifted] | None:
        try:
            return function(lift, node, inputs)
        except CannotError:
            return None

    return ruled


# -------------------------------------------------------------------------------- helpers


def _attribute(node: ir.Node, name: str, default: Any) -> Any:
    found = node.attributes.get(name)
    return default if found is None else found.value


def _own(node: ir.Node, **changed: Any) -> dict[str, Any]:
    """The node's attributes, some of them changed."""
    return {name: a.value for name, a in node.attributes.items()} | changed


def _rank(value: Lifted) -> int:
    if value.dims is None:
        raise CannotError
    return len(value.dims)


def _out_rank(node: ir.Node) -> int:
    shape = node.outputs[0].shape
    if shape is None:
        raise CannotError
    return len(shape)


def _axis(axis: int, rank: int) -> int:
    return axis + rank if axis < 0 else axis


def _stays(value: Lifted) -> Layout:
    """The layout to work in: channels where the value has only that."""
    made = value.forms
    if Layout.CHANNELS in made and Layout.STACKED not in made:
        return Layout.CHANNELS
    return Layout.STACKED


def _result(node: ir.Node, layout: Layout, *values: ir.Value) -> list[Lifted]:
    return [Lifted(t, {layout: (v,)}) for t, v in zip(node.outputs, values, strict=False)]


def _ints(value: Lifted | None) -> list[int] | None:
    """The whole numbers of a constant; None where it is none."""
    if value is None or value.constant is None:
        return None
    return [int(v) for v in np.atleast_1d(value.constant)]


def _stacked_at(lift: Lift, value: Lifted, rank: int) -> ir.Value:
    """A value that broadcasts against (K, ...) of `rank` axes a member."""
    if value.shared:
        return lift.one(value, Layout.SHARED)
    own = _rank(value)
    if own == rank:
        return lift.one(value, Layout.STACKED)
    if value.arrays is not None:
        shape = (1,) * (rank - own)
        array = np.stack([a.reshape(shape + a.shape) for a in value.arrays])
        return lift.number(array, f"members.{value.template.name}")
    axes = lift.number(np.arange(1, 1 + rank - own))
    return lift.add("Unsqueeze", [lift.one(value, Layout.STACKED), axes])


def _as_channels(lift: Lift, value: Lifted, rank: int, channels: int | None) -> ir.Value:
    """A value that broadcasts against (N, K C, ...) of `rank` axes and C = `channels`."""
    if value.arrays is None:
        dims = value.dims
        if value.shared or dims is None or len(dims) != rank or dims[1] != channels:
            raise CannotError
        return lift.one(value, Layout.CHANNELS)
    first = value.arrays[0]
    if first.size == 1 and value.shared:
        return lift.one(value, Layout.SHARED)
    if first.ndim > rank:
        raise CannotError
    wide = [a.reshape((1,) * (rank - a.ndim) + a.shape) for a in value.arrays]
    if wide[0].shape[0] != 1:
        raise CannotError
    if value.shared and wide[0].shape[1] == 1:
        return lift.one(value, Layout.SHARED)
    if wide[0].shape[1] != channels:
        raise CannotError  # one number a member for all of its channels
    return lift.number(np.concatenate(wide, axis=1), f"members.{value.template.name}")


# ---------------------------------------------------------------------------- elementwise


@_rule
def _unary(lift: Lift, node: ir.Node, inputs: Inputs) -> Sequence[Lifted] | None:
    (first, *rest) = inputs
    if first is None or any(value is not None and not value.shared for value in rest):
        return None
    if any(output.uses() for output in node.outputs[1:]):
        return None  # the mask of a dropout
    layout = _stays(first)
    others = [None if v is None else lift.one(v, Layout.SHARED) for v in rest]
    made = lift.add(node.op_type, [lift.one(first, layout), *others], **_own(node))
    return [*_result(node, layout, made)[:1], *(Lifted(o, {}) for o in node.outputs[1:])]


@_rule
def _broadcasting(lift: Lift, node: ir.Node, inputs: Inputs) -> Sequence[Lifted] | None:
    values = [value for value in inputs if value is not None]
    rank = max(_rank(value) for value in values)
    own = [v for v in values if not v.shared and v.arrays is None]
    layout = Layout.STACKED
    if own and all(_stays(v) is Layout.CHANNELS and _rank(v) == rank for v in own):
        layout = Layout.CHANNELS
    if layout is Layout.CHANNELS:
        try:
            shape = node.outputs[0].shape
            channels = None if shape is None or not isinstance(shape[1], int) else shape[1]
            made = [_as_channels(lift, value, rank, channels) for value in values]
        except CannotError:
            layout = Layout.STACKED
    if layout is Layout.STACKED:
        made = [_stacked_at(lift, value, rank) for value in values]
        if node.op_type == "PRelu" and values[0].shared:  # its slope may not have the higher rank
            made[0] = lift.one(values[0], Layout.STACKED)
    return _result(node, layout, lift.add(node.op_type, made, **_own(node)))


# --------------------------------------------------------------- convolutions and products


@_rule
def _conv(lift: Lift, node: ir.Node, inputs: Inputs) -> Sequence[Lifted] | None:
    x, weight, *rest = inputs
    bias = rest[0] if rest else None
    if x is None or weight is None or weight.arrays is None:
        return None
    group = _attribute(node, "group", 1)
    if x.shared and group == 1:  # one image, the filters of all members
        value, groups = lift.one(x, Layout.SHARED), 1
    else:
        value, groups = lift.one(x, Layout.CHANNELS), lift.members * group
    name = weight.template.name
    parts = [value, lift.number(np.concatenate(weight.arrays), f"members.{name}")]
    if bias is not None:
        if bias.arrays is None:
            return None
        parts.append(lift.number(np.concatenate(bias.arrays), f"members.{bias.template.name}"))
    made = lift.add(node.op_type, parts, **_own(node, group=groups))
    return _result(node, Layout.CHANNELS, made)


@_rule
def _transposed_conv(lift: Lift, node: ir.Node, inputs: Inputs) -> Sequence[Lifted] | None:
    if inputs[0] is None or inputs[0].shared:
        return None
    return _conv(lift, node, inputs)


@_rule
def _batch_norm(lift: Lift, node: ir.Node, inputs: Inputs) -> Sequence[Lifted] | None:
    x, *parameters = inputs
    if x is None or _rank(x) < 2 or any(o.uses() for o in node.outputs[1:]):
        return None
    parts = [lift.one(x, Layout.CHANNELS)]
    for value in parameters:
        if value is None or value.arrays is None:
            return None
        parts.append(lift.number(np.concatenate(value.arrays), f"members.{value.template.name}"))
    made = lift.add(node.op_type, parts, **_own(node))
    rest = [Lifted(output, {}) for output in node.outputs[1:]]
    return [*_result(node, Layout.CHANNELS, made)[:1], *rest]


@_rule
def _pool(lift: Lift, node: ir.Node, inputs: Inputs) -> Sequence[Lifted] | None:
    (x,) = inputs
    if x is None or (len(node.outputs) > 1 and node.outputs[1].uses()):
        return None
    made = lift.add(node.op_type, [lift.one(x, Layout.CHANNELS)], **_own(node))
    return [*_result(node, Layout.CHANNELS, made)[:1], *(Lifted(o, {}) for o in node.outputs[1:])]


@_rule
def _matmul(lift: Lift, node: ir.Node, inputs: Inputs) -> Sequence[Lifted] | None:
    left, right = inputs
    if left is None or right is None or min(_rank(left), _rank(right)) < 2:
        return None
    rank = max(_rank(left), _rank(right))
    made = lift.add("MatMul", [_stacked_at(lift, left, rank), _stacked_at(lift, right, rank)])
    return _result(node, Layout.STACKED, made)


@_rule
def _gemm(lift: Lift, node: ir.Node, inputs: Inputs) -> Sequence[Lifted] | None:
    left, right, *rest = inputs
    bias = rest[0] if rest else None
    plain = _attribute(node, "alpha", 1.0) == 1 and _attribute(node, "beta", 1.0) == 1
    if left is None or right is None or right.arrays is None or not plain:
        return None
    if _attribute(node, "transA", 0):
        return None
    turned = [a.T if _attribute(node, "transB", 0) else a for a in right.arrays]
    weight = lift.number(np.stack(turned), f"members.{right.template.name}")
    made = lift.add("MatMul", [_stacked_at(lift, left, 2), weight])
    if bias is not None:
        made = lift.add("Add", [made, _stacked_at(lift, bias, 2)])
    return _result(node, Layout.STACKED, made)


# --------------------------------------------------------------- along axes


@_rule
def _along_axis(lift: Lift, node: ir.Node, inputs: Inputs) -> Sequence[Lifted] | None:
    (x,) = inputs
    if x is None:
        return None
    axis = _axis(_attribute(node, "axis", -1), _rank(x))
    made = lift.add(node.op_type, [lift.one(x, Layout.STACKED)], **_own(node, axis=axis + 1))
    return _result(node, Layout.STACKED, made)


@_rule
def _reduce(lift: Lift, node: ir.Node, inputs: Inputs) -> Sequence[Lifted] | None:
    x, *rest = inputs
    axes = _ints(rest[0]) if rest else None
    if x is None or not axes:
        return None
    rank = _rank(x)
    axes = [_axis(axis, rank) for axis in axes]
    layout = _stays(x)
    if layout is Layout.CHANNELS and min(axes) < 2:
        layout = Layout.STACKED
    shift = 1 if layout is Layout.STACKED else 0
    where = lift.number(np.array(axes, np.int64) + shift)
    made = lift.add(node.op_type, [lift.one(x, layout), where], **_own(node))
    return _result(node, layout, made)


@_rule
def _layer_norm(lift: Lift, node: ir.Node, inputs: Inputs) -> Sequence[Lifted] | None:
    x, scale, *rest = inputs
    bias = rest[0] if rest else None
    if x is None or scale is None or any(o.uses() for o in node.outputs[1:]):
        return None
    rank = _rank(x)
    axis = _axis(_attribute(node, "axis", -1), rank)
    stacked = lift.one(x, Layout.STACKED)
    attributes = _own(node, axis=axis + 1)
    if scale.shared and (bias is None or bias.shared):
        rest_ = [lift.one(v, Layout.SHARED) for v in (scale, bias) if v is not None]
        made = lift.add("LayerNormalization", [stacked, *rest_], **attributes)
    else:  # the operator takes one scale for all that comes before the normalised axes
        if scale.arrays is None:
            return None
        ones = lift.number(np.ones_like(scale.arrays[0]))
        made = lift.add("LayerNormalization", [stacked, ones], **attributes)
        made = lift.add("Mul", [made, _stacked_at(lift, scale, rank)])
        if bias is not None:
            made = lift.add("Add", [made, _stacked_at(lift, bias, rank)])
    return [*_result(node, Layout.STACKED, made)[:1], *(Lifted(o, {}) for o in node.outputs[1:])]


# --------------------------------------------------------------- shapes


@_rule
def _transpose(lift: Lift, node: ir.Node, inputs: Inputs) -> Sequence[Lifted] | None:
    (x,) = inputs
    if x is None:
        return None
    perm = _attribute(node, "perm", list(range(_rank(x)))[::-1])
    made = lift.add("Transpose", [lift.one(x, Layout.STACKED)], perm=[0, *(p + 1 for p in perm)])
    return _result(node, Layout.STACKED, made)


@_rule
def _reshape(lift: Lift, node: ir.Node, inputs: Inputs) -> Sequence[Lifted] | None:
    x, shape = inputs
    if x is None or shape is None or not shape.shared:
        return None
    made = lift.add(
        "Reshape", [lift.one(x, Layout.STACKED), _with_members(lift, shape)], **_own(node)
    )
    return _result(node, Layout.STACKED, made)


def _with_members(lift: Lift, shape: Lifted, *, ones: int = 0) -> ir.Value:
    """A shape with K in front of it, and ones between where it is short."""
    front_ = [lift.members, *[1] * ones]
    known = _ints(shape)
    if known is not None:
        return lift.number(np.array([*front_, *known], np.int64))
    front = lift.number(np.array(front_, np.int64))
    return lift.add("Concat", [front, lift.one(shape, Layout.SHARED)], axis=0)


@_rule
def _flatten(lift: Lift, node: ir.Node, inputs: Inputs) -> Sequence[Lifted] | None:
    (x,) = inputs
    if x is None or _axis(_attribute(node, "axis", 1), _rank(x)) != 1:
        return None
    shape = lift.number(np.array([0, 0, -1], np.int64))
    return _result(node, Layout.STACKED, lift.add("Reshape", [lift.one(x, Layout.STACKED), shape]))


@_rule
def _squeeze(lift: Lift, node: ir.Node, inputs: Inputs) -> Sequence[Lifted] | None:
    x, *rest = inputs
    axes = _ints(rest[0]) if rest else None
    if x is None or axes is None:
        return None
    rank = _rank(x) if node.op_type == "Squeeze" else _rank(x) + len(axes)
    where = lift.number(np.array([_axis(a, rank) + 1 for a in axes], np.int64))
    made = lift.add(node.op_type, [lift.one(x, Layout.STACKED), where])
    return _result(node, Layout.STACKED, made)


@_rule
def _concat(lift: Lift, node: ir.Node, inputs: Inputs) -> Sequence[Lifted] | None:
    values = [value for value in inputs if value is not None]
    rank = _out_rank(node)
    axis = _axis(_attribute(node, "axis", 0), rank)
    in_channels = all(v.arrays is None and _stays(v) is Layout.CHANNELS for v in values)
    if in_channels and axis == 1:
        return _result(node, Layout.CHANNELS, _concat_channels(lift, values))
    layout = Layout.CHANNELS if in_channels and axis > 1 else Layout.STACKED
    shift = 1 if layout is Layout.STACKED else 0
    made = lift.add("Concat", [lift.one(v, layout) for v in values], axis=axis + shift)
    return _result(node, layout, made)


def _concat_channels(lift: Lift, values: Sequence[Lifted]) -> ir.Value:
    """Each member's channels behind one another: (N, K C1) and (N, K C2) to (N, K (C1 + C2))."""
    parts, total = [], 0
    for value in values:
        dims = value.dims
        if dims is None or dims[1] is None or sum(d is None for d in dims[2:]) > 1:
            raise CannotError
        spatial = [-1 if d is None else d for d in dims[2:]]
        total += dims[1]
        shape = lift.number(np.array([0, lift.members, dims[1], *spatial], np.int64))
        parts.append(lift.add("Reshape", [lift.one(value, Layout.CHANNELS), shape]))
    joined = lift.add("Concat", parts, axis=2)
    shape = lift.number(np.array([0, lift.members * total, *spatial], np.int64))
    return lift.add("Reshape", [joined, shape])


@_rule
def _slice(lift: Lift, node: ir.Node, inputs: Inputs) -> Sequence[Lifted] | None:
    x, starts, ends, *rest = inputs
    axes = _ints(rest[0]) if rest else None
    steps = rest[1] if len(rest) > 1 else None
    given = [v for v in (starts, ends, steps) if v is not None]
    if x is None or axes is None or not all(v.shared for v in given):
        return None
    rank = _rank(x)
    axes = [_axis(axis, rank) for axis in axes]
    layout = _stays(x)
    if layout is Layout.CHANNELS and 1 in axes:
        layout = Layout.STACKED
    shift = 1 if layout is Layout.STACKED else 0
    bounds = [lift.one(v, Layout.SHARED) for v in given[:2]]
    where = lift.number(np.array(axes, np.int64) + shift)
    last = [] if steps is None else [lift.one(steps, Layout.SHARED)]
    made = lift.add("Slice", [lift.one(x, layout), *bounds, where, *last])
    return _result(node, layout, made)


@_rule
def _gather(lift: Lift, node: ir.Node, inputs: Inputs) -> Sequence[Lifted] | None:
    x, indices = inputs
    if x is None or indices is None or not indices.shared:
        return None
    axis = _axis(_attribute(node, "axis", 0), _rank(x))
    made = lift.add(
        "Gather",
        [lift.one(x, Layout.STACKED), lift.one(indices, Layout.SHARED)],
        axis=axis + 1,
    )
    return _result(node, Layout.STACKED, made)


@_rule
def _split(lift: Lift, node: ir.Node, inputs: Inputs) -> Sequence[Lifted] | None:
    x, *rest = inputs
    sizes = rest[0] if rest else None
    if x is None or (sizes is not None and not sizes.shared):
        return None
    axis = _axis(_attribute(node, "axis", 0), _rank(x))
    parts: list[ir.Value | None] = [lift.one(x, Layout.STACKED)]
    if sizes is not None:
        parts.append(lift.one(sizes, Layout.SHARED))
    made = ir.node("Split", parts, _own(node, axis=axis + 1), num_outputs=len(node.outputs))
    lift.graph.append(made)
    return _result(node, Layout.STACKED, *made.outputs)


@_rule
def _expand(lift: Lift, node: ir.Node, inputs: Inputs) -> Sequence[Lifted] | None:
    x, shape = inputs
    if x is None or shape is None or not shape.shared:
        return None
    rank = _out_rank(node)
    value = _stacked_at(lift, x, rank)
    given = shape.dims
    if given is None or given[0] is None:
        return None
    target = _with_members(lift, shape, ones=rank - given[0])
    return _result(node, Layout.STACKED, lift.add("Expand", [value, target]))


@_rule
def _shape(lift: Lift, node: ir.Node, inputs: Inputs) -> Sequence[Lifted] | None:
    (x,) = inputs
    if x is None:
        return None
    rank = _rank(x)
    start = _axis(_attribute(node, "start", 0), rank)
    end = _axis(_attribute(node, "end", rank), rank)
    stacked = lift.one(x, Layout.STACKED)
    made = lift.add("Shape", [stacked], start=start + 1, end=end + 1)
    return _result(node, Layout.SHARED, made)  # members differ in numbers, never in shape


@_rule
def _pad(lift: Lift, node: ir.Node, inputs: Inputs) -> Sequence[Lifted] | None:
    x, pads, *rest = inputs
    if x is None or (len(rest) > 1 and rest[1] is not None):
        return None
    amounts = _ints(pads)
    value = rest[0] if rest else None
    if amounts is None or (value is not None and not value.shared):
        return None
    rank = _rank(x)
    layout = _stays(x)
    if layout is Layout.CHANNELS and (amounts[1] or amounts[1 + rank]):
        layout = Layout.STACKED
    if layout is Layout.STACKED:
        amounts = [0, *amounts[:rank], 0, *amounts[rank:]]
    parts: list[ir.Value | None] = [
        lift.one(x, layout),
        lift.number(np.array(amounts, np.int64)),
    ]
    if value is not None:
        parts.append(lift.one(value, Layout.SHARED))
    return _result(node, layout, lift.add("Pad", parts, **_own(node)))


RULES: Mapping[str, Rule] = {
    **dict.fromkeys((*_UNARY, "Clip"), _unary),
    **dict.fromkeys(_BROADCASTING, _broadcasting),
    **dict.fromkeys(_POOLS, _pool),
    **dict.fromkeys(_REDUCTIONS, _reduce),
    **dict.fromkeys(("Softmax", "LogSoftmax", "Hardmax"), _along_axis),
    **dict.fromkeys(("Squeeze", "Unsqueeze"), _squeeze),
    "BatchNormalization": _batch_norm,
    "Concat": _concat,
    "Conv": _conv,
    "ConvTranspose": _transposed_conv,
    "Expand": _expand,
    "Flatten": _flatten,
    "Gather": _gather,
    "Gemm": _gemm,
    "InstanceNormalization": _batch_norm,
    "LayerNormalization": _layer_norm,
    "MatMul": _matmul,
    "Pad": _pad,
    "Reshape": _reshape,
    "Shape": _shape,
    "Slice": _slice,
    "Split": _split,
    "Transpose": _transpose,
}
"""By operator; what is missing is copied K times."""
