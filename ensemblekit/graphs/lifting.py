"""Owns filling a template with the weights of K members: one graph that computes all of them.

Input: a template and K sets of weights. The template's nodes are copied in order. Where nothing
that goes into a node differs between members, one copy serves all: this is how a trunk that all
members share runs once. Elsewhere there are K copies, or, where a rule of `fusing` knows how, one
operator over stacked inputs.

A value of the template exists in up to four layouts in the new graph, made from each other when
something asks for them. For a value (N, C, ...) of one member:
    SHARED    one value (N, C, ...), the same for all members
    SEPARATE  K values (N, C, ...)
    STACKED   one value (K, N, C, ...)
    CHANNELS  one value (N, K C, ...), as grouped convolutions have it
"""

import hashlib
import itertools
from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from ensemblekit.errors import UnsupportedError
from ensemblekit.graphs.template import Template, Weights

Array = npt.NDArray[Any]
_MOVES_DATA = ("Transpose", "Reshape", "Unsqueeze", "Squeeze", "Slice", "Concat", "Identity")


class Layout(Enum):
    """See the module."""

    SHARED = "shared"
    SEPARATE = "separate"
    STACKED = "stacked"
    CHANNELS = "channels"


class Lifted:
    """A value of the template in the new graph, in the layouts that were asked for so far.

    Attributes:
        template: The template's value: name, shape, type.
        forms: The new graph's values by layout.
        arrays: K arrays, where the value is known: weights and constants.
    """

    def __init__(
        self,
        template: ir.Value,
        forms: Mapping[Layout, tuple[ir.Value, ...]] | None = None,
        *,
        arrays: Sequence[Array] | None = None,
    ) -> None:
        self.template = template
        self.forms = dict(forms or {})
        self.arrays = None if arrays is None else list(arrays)
        self._equal: bool | None = None

    @property
    def shared(self) -> bool:
        """Whether all members have the same."""
        if self.arrays is None:
            return Layout.SHARED in self.forms
        if self._equal is None:
            first = self.arrays[0]
            self._equal = all(a is first or _same(a, first) for a in self.arrays[1:])
        return self._equal

    @property
    def dims(self) -> tuple[int | None, ...] | None:
        """Sizes of one member's value, None for open ones; None where even the rank is unknown."""
        if self.arrays is not None:
            return self.arrays[0].shape
        if self.template.shape is None:
            return None
        return tuple(d if isinstance(d, int) else None for d in self.template.shape)

    @property
    def constant(self) -> Array | None:
        """The array that all members share."""
        return self.arrays[0] if self.arrays is not None and self.shared else None


Rule = Callable[["Lift", ir.Node, Sequence[Lifted | None]], "Sequence[Lifted] | None"]


class Lift:
    """One graph under construction.

    Args:
        template: To be filled in.
        weights: Of K members.
        rules: How operators run over stacked inputs, by operator; none: K copies.
    """

    def __init__(
        self, template: Template, weights: Sequence[Weights], rules: Mapping[str, Rule]
    ) -> None:
        self.template = template
        self.members = len(weights)
        self.rules = rules
        self.values: dict[ir.Value, Lifted] = {}
        self.fused = 0
        self._constants: dict[tuple[str, tuple[int, ...], bytes], ir.Value] = {}
        source = template.graph
        ports = list(source.inputs)[: len(template.ports)]
        inputs = []
        for name, port in zip(template.ports, ports, strict=True):
            made = ir.Value(name=name, shape=port.shape, type=port.type)
            inputs.append(made)
            self.values[port] = Lifted(port, {Layout.SHARED: (made,)})
        self.graph = ir.Graph(
            inputs, [], nodes=[], opset_imports=dict(source.opset_imports), name="ensemble"
        )
        for value in source.inputs:
            if value not in self.values:
                arrays = [own[str(value.name)] for own in weights]
                self.values[value] = Lifted(value, arrays=arrays)
        for value in source.initializers.values():
            assert value.const_value is not None
            array = value.const_value.numpy()
            self.values[value] = Lifted(value, arrays=[array] * self.members)
        for node in source:
            self._node(node)

    def outputs(self) -> list[Lifted]:
        """The template's outputs."""
        return [self.values[value] for value in self.template.graph.outputs]

    # ------------------------------------------------------------------------ nodes

    def _node(self, node: ir.Node) -> None:
        if any(
            a.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
            for a in node.attributes.values()
        ):
            raise UnsupportedError(
                f"the graph has control flow ({node.op_type}), which has no place in an ensemble"
            )
        inputs = [None if value is None else self.values[value] for value in node.inputs]
        for value, made in zip(node.outputs, self._made(node, inputs), strict=True):
            self.values[value] = made

    def _made(self, node: ir.Node, inputs: Sequence[Lifted | None]) -> Sequence[Lifted]:
        known = self._worked_out(node, inputs)
        if known is not None:
            return [known]
        if all(value is None or value.shared for value in inputs):
            plain = [
                None if value is None else self.get(value, Layout.SHARED)[0] for value in inputs
            ]
            made = self._copy(node, plain, prefix="")
            return [
                Lifted(t, {Layout.SHARED: (v,)}) for t, v in zip(node.outputs, made, strict=True)
            ]
        rule = self.rules.get(node.op_type) if not node.domain else None
        if rule is not None:
            found = rule(self, node, inputs)
            if found is not None:
                self.fused += 1
                return found
        copies = []
        for k in range(self.members):
            own = [None if value is None else self.member(value, k) for value in inputs]
            copies.append(self._copy(node, own, prefix=f"member_{k}."))
        return [
            Lifted(t, {Layout.SEPARATE: values})
            for t, values in zip(node.outputs, zip(*copies, strict=True), strict=True)
        ]

    def _worked_out(self, node: ir.Node, inputs: Sequence[Lifted | None]) -> Lifted | None:
        """Weights that are only moved about are moved here, once and for all."""
        if node.op_type not in _MOVES_DATA or node.domain or len(node.outputs) != 1:
            return None
        if any(value is not None and value.arrays is None for value in inputs):
            return None
        if all(value is None or value.shared for value in inputs):
            one = _evaluate(node, [_array(value, 0) for value in inputs], self.template)
            return Lifted(node.outputs[0], arrays=[one] * self.members)
        arrays = [
            _evaluate(node, [_array(value, k) for value in inputs], self.template)
            for k in range(self.members)
        ]
        return Lifted(node.outputs[0], arrays=arrays)

    def _copy(
        self, node: ir.Node, inputs: Sequence[ir.Value | None], *, prefix: str
    ) -> Sequence[ir.Value]:
        made = ir.Node(
            node.domain,
            node.op_type,
            inputs,
            list(node.attributes.values()),
            num_outputs=len(node.outputs),
            version=node.version,
            name=None if node.name is None else prefix + node.name,
        )
        for value, old in zip(made.outputs, node.outputs, strict=True):
            value.type, value.shape = old.type, old.shape
            value.name = None if old.name is None else prefix + old.name
        self.graph.append(made)
        return made.outputs

    def add(self, op_type: str, inputs: Sequence[ir.Value | None], **attributes: Any) -> ir.Value:
        """A new node with one output."""
        node = ir.node(op_type, inputs, attributes or None)
        self.graph.append(node)
        return node.outputs[0]

    def split(self, value: ir.Value, axis: int, parts: int) -> Sequence[ir.Value]:
        """Equal parts of a value."""
        node = ir.node("Split", [value], {"axis": axis, "num_outputs": parts}, num_outputs=parts)
        self.graph.append(node)
        return node.outputs

    def number(self, array: Any, name: str = "constant") -> ir.Value:
        """An initialiser; the same numbers are stored once."""
        array = np.asarray(array, order="C")
        code = hashlib.blake2b(array.reshape(-1).view(np.uint8), digest_size=16).digest()
        key = (array.dtype.str, array.shape, code)
        if key not in self._constants:
            taken, base = {*self.graph.initializers, *self.template.ports}, name
            for place in itertools.count(len(taken)):
                if name not in taken:
                    break
                name = f"{base}.{place}"
            value = ir.Value(name=name, const_value=ir.tensor(array, name=name))
            value.shape = ir.Shape(array.shape)
            value.type = ir.TensorType(value.const_value.dtype)  # type: ignore[union-attr]
            self.graph.register_initializer(value)
            self._constants[key] = value
        return self._constants[key]

    # ---------------------------------------------------------------------- layouts

    def member(self, value: Lifted, k: int) -> ir.Value:
        """One member's value."""
        if value.shared:
            return self.get(value, Layout.SHARED)[0]
        return self.get(value, Layout.SEPARATE)[k]

    def get(self, value: Lifted, layout: Layout) -> tuple[ir.Value, ...]:
        """The value in a layout.

        Raises:
            CannotError: The sizes that this needs are not known.
        """
        if layout not in value.forms:
            value.forms[layout] = _MAKERS[layout](self, value)
        return value.forms[layout]

    def one(self, value: Lifted, layout: Layout) -> ir.Value:
        """The only value of a layout."""
        (found,) = self.get(value, layout)
        return found


class CannotError(Exception):
    """A layout that cannot be made here; the rule that asked for it gives way to K copies."""


def _shared(lift: Lift, value: Lifted) -> tuple[ir.Value, ...]:
    constant = value.constant
    assert constant is not None, "only known values become shared"
    return (lift.number(constant, str(value.template.name)),)


def _separate(lift: Lift, value: Lifted) -> tuple[ir.Value, ...]:
    name, K = value.template.name, lift.members
    if value.arrays is not None:
        return tuple(lift.number(a, f"member_{k}.{name}") for k, a in enumerate(value.arrays))
    if Layout.SHARED in value.forms:
        return value.forms[Layout.SHARED] * K
    if Layout.CHANNELS in value.forms:
        return tuple(lift.split(value.forms[Layout.CHANNELS][0], 1, K))
    parts = lift.split(value.forms[Layout.STACKED][0], 0, K)
    first = lift.number(np.array([0], np.int64))
    return tuple(lift.add("Squeeze", [part, first]) for part in parts)


def _stacked(lift: Lift, value: Lifted) -> tuple[ir.Value, ...]:
    first = lift.number(np.array([0], np.int64))
    if value.arrays is not None:
        return (lift.number(np.stack(value.arrays), f"members.{value.template.name}"),)
    if Layout.CHANNELS in value.forms:
        if _sizes_known(value):
            return (_channels_to_stacked(lift, value),)
        lift.get(value, Layout.SEPARATE)
    if Layout.SEPARATE in value.forms:
        parts = [lift.add("Unsqueeze", [v, first]) for v in value.forms[Layout.SEPARATE]]
        return (lift.add("Concat", parts, axis=0),)
    rank = len(_dims(value))
    wide = lift.add("Unsqueeze", [value.forms[Layout.SHARED][0], first])
    shape = lift.number(np.array([lift.members] + [1] * rank, np.int64))
    return (lift.add("Expand", [wide, shape]),)


def _channels(lift: Lift, value: Lifted) -> tuple[ir.Value, ...]:
    if value.arrays is not None and value.arrays[0].ndim >= 2:
        return (
            lift.number(np.concatenate(value.arrays, axis=1), f"members.{value.template.name}"),
        )
    if Layout.STACKED in value.forms or Layout.SHARED in value.forms:
        if not _sizes_known(value):
            return (lift.add("Concat", list(lift.get(value, Layout.SEPARATE)), axis=1),)
        dims = _dims(value)
        K, C, spatial = lift.members, dims[1] or 0, dims[2:]
        rank = len(dims)
        stacked = lift.one(value, Layout.STACKED)
        turned = lift.add("Transpose", [stacked], perm=[1, 0, *range(2, rank + 1)])
        shape = [0, K * C, *(-1 if d is None else d for d in spatial)]
        return (lift.add("Reshape", [turned, lift.number(np.array(shape, np.int64))]),)
    return (lift.add("Concat", list(value.forms[Layout.SEPARATE]), axis=1),)


def _sizes_known(value: Lifted) -> bool:
    """Whether a reshape can tell members from channels: at most one size is open besides."""
    dims = _dims(value)
    return len(dims) > 1 and dims[1] is not None and sum(d is None for d in dims[2:]) <= 1


def _channels_to_stacked(lift: Lift, value: Lifted) -> ir.Value:
    dims = _dims(value)
    C, spatial = dims[1] or 0, dims[2:]
    shape = [0, lift.members, C, *(-1 if d is None else d for d in spatial)]
    parted = lift.add(
        "Reshape",
        [value.forms[Layout.CHANNELS][0], lift.number(np.array(shape, np.int64))],
    )
    return lift.add("Transpose", [parted], perm=[1, 0, *range(2, len(dims) + 1)])


_MAKERS: Mapping[Layout, Callable[[Lift, Lifted], tuple[ir.Value, ...]]] = {
    Layout.SHARED: _shared,
    Layout.SEPARATE: _separate,
    Layout.STACKED: _stacked,
    Layout.CHANNELS: _channels,
}


def _dims(value: Lifted) -> tuple[int | None, ...]:
    dims = value.dims
    if dims is None:
        raise CannotError
    return dims


def _array(value: Lifted | None, k: int) -> Array | None:
    if value is None:
        return None
    assert value.arrays is not None
    return value.arrays[k]


def _evaluate(node: ir.Node, inputs: Sequence[Array | None], template: Template) -> Array:
    """One node over known inputs, by ONNX's own reference."""
    import onnx
    from onnx.reference import ReferenceEvaluator

    names = ["" if a is None else f"i{n}" for n, a in enumerate(inputs)]
    given = {name: a for name, a in zip(names, inputs, strict=True) if a is not None}
    attributes = [ir.serde.serialize_attribute(a) for a in node.attributes.values()]
    proto = onnx.helper.make_node(node.op_type, names, ["o"])
    proto.attribute.extend(attributes)
    opset = template.graph.opset_imports.get("", 20)
    graph = onnx.helper.make_graph(
        [proto],
        "one",
        [
            onnx.helper.make_tensor_value_info(
                name, onnx.helper.np_dtype_to_tensor_dtype(a.dtype), a.shape
            )
            for name, a in given.items()
        ],
        [onnx.helper.make_empty_tensor_value_info("o")],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)])
    (found,) = ReferenceEvaluator(model).run(None, given)
    return np.asarray(found)


def _same(one: Array, other: Array) -> bool:
    """Bitwise: NaN equals NaN, and -0 differs from 0."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    first, second = (np.asarray(a, order="C").reshape(-1).view(np.uint8) for a in (one, other))
    return bool(np.array_equal(first, second))
