"""Owns the whole graph: a template, its members' weights and the head become one model.

Input: members in eval mode and a head. Nothing is verified here.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir
import torch
from torch import nn

from ensemblekit.ensemble_module import Head, HeadModule
from ensemblekit.graphs.folding import fold_batch_norm
from ensemblekit.graphs.fusing import RULES
from ensemblekit.graphs.lifting import Layout, Lift, Lifted
from ensemblekit.graphs.template import (
    OPSET,
    Exporter,
    Interface,
    Port,
    export_template,
    export_whole,
    weights_of,
)

_IR_VERSION = 10  # of the file format; newer ones are unknown to runtimes of two years ago


_HEAD_TYPES = {ir.DataType.DOUBLE: "float64", ir.DataType.FLOAT16: "float16"}


@dataclass(frozen=True)
class Made:
    """A graph, and what it took.

    Attributes:
        model: The whole model.
        exporter: What exported the member.
        folded: BatchNorm layers that were folded.
        fused: Operators of the member that run once for all members, on stacked values.
        shared: Operators of the member that run once because nothing in them differs.
        nodes: Operators of the whole graph.
    """

    model: ir.Model
    exporter: Exporter
    folded: int
    fused: int
    shared: int
    nodes: int


class Maker:
    """Graphs of one set of members; the exporter runs once.

    Args:
        members: In eval mode, on the CPU.
        head: How their outputs become one.
        example: One tensor a port, with at least 2 in open dimensions.
        interface: Names and open dimensions.
        logits: Entry of a dict output that is exported.
        exporter: Which of torch's exporters.
        opset: Operator set.

    Raises:
        UnsupportedError: The exporter cannot export this model.
    """

    def __init__(
        self,
        members: Sequence[nn.Module],
        head: Head,
        example: Sequence[torch.Tensor],
        interface: Interface,
        *,
        logits: str | None = None,
        exporter: Exporter = "dynamo",
        opset: int = OPSET,
    ) -> None:
        self.head = head
        self.interface = interface
        self.opset = opset
        first = members[0]
        if any(p.device.type != "cpu" for p in first.parameters()):
            first = copy.deepcopy(first).cpu()
        self.template = export_template(
            first, example, interface, logits=logits, exporter=exporter, opset=opset
        )
        self.weights = [weights_of(member, self.template) for member in members]
        self._head_of: dict[tuple[int | None, ...], ir.Model] = {}

    def make(self, *, fold: bool = True, fuse: bool = False) -> Made:
        """The graph of all members.

        Args:
            fold: Take BatchNorm into the layers before it.
            fuse: Run members as one operator where there is a rule.
        """
        template, weights, folded = self.template, self.weights, 0
        if fold:
            folding = fold_batch_norm(template)
            template, folded = folding.template, len(folding.folds)
            weights = [folding.weights(own) for own in weights]
        lift = Lift(template, weights, RULES if fuse else {})
        (output,) = lift.outputs()
        shared = sum(1 for value in lift.values.values() if Layout.SHARED in value.forms)
        made = self._with_head(lift, output)
        made.name = self.interface.output
        made.shape, made.type = output.template.shape, made.type or output.template.type
        lift.graph.outputs.append(made)
        model = ir.Model(lift.graph, ir_version=_IR_VERSION, producer_name="ensemblekit")
        tidy(model)
        return Made(model, template.exporter, folded, lift.fused, shared, len(model.graph))

    def _with_head(self, lift: Lift, output: Lifted) -> ir.Value:
        if self.head.plain:
            return lift.add("Identity", [lift.member(output, 0)])
        stacked = lift.one(output, Layout.STACKED)
        head = self._exported_head(output)
        return _inlined(lift, head, stacked)

    def _exported_head(self, output: Lifted) -> ir.Model:
        dims = output.dims
        assert dims is not None, "outputs of an exported model have a shape"
        members = len(self.weights)
        sizes = [3 + n if d is None else d for n, d in enumerate(dims)]
        if dims not in self._head_of:
            shape = [d if d is not None else f"d{n}" for n, d in enumerate(dims)]
            dtype = _HEAD_TYPES.get(output.template.dtype or ir.DataType.FLOAT, "float32")
            port = Port("outputs", dtype, (members, *shape))
            example = torch.linspace(-1, 1, members * int(torch.Size(sizes).numel()))
            example = example.to(getattr(torch, dtype))
            self._head_of[dims] = export_whole(
                HeadModule(self.head),
                [example.reshape(members, *sizes)],
                Interface((port,), None, "combined"),
                opset=self.opset,
            )
        return self._head_of[dims]


def _inlined(lift: Lift, head: ir.Model, stacked: ir.Value) -> ir.Value:
    """The head's nodes at the end of the graph."""
    values: dict[ir.Value, ir.Value] = {head.graph.inputs[0]: stacked}
    for value in head.graph.initializers.values():
        assert value.const_value is not None
        values[value] = lift.number(value.const_value.numpy(), f"head.{value.name}")
    for node in head.graph:
        inputs = [None if v is None else values[v] for v in node.inputs]
        made = ir.Node(
            node.domain,
            node.op_type,
            inputs,
            list(node.attributes.values()),
            num_outputs=len(node.outputs),
            version=node.version,
            name=f"head.{node.name}",
        )
        lift.graph.append(made)
        values |= dict(zip(node.outputs, made.outputs, strict=True))
    combined = values[head.graph.outputs[0]]
    combined.type = head.graph.outputs[0].type  # of half members float32, if the head makes it so
    return combined


def tidy(model: ir.Model) -> None:
    """Drop what is not used, merge what is computed twice, give every value a name; in place."""
    from onnx_ir.passes import common

    for step in (
        common.RemoveUnusedNodesPass(),
        common.CommonSubexpressionEliminationPass(),
        common.RemoveUnusedNodesPass(),
        common.NameFixPass(),
    ):
        step(model)
