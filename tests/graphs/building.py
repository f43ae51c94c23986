"""Owns what tests of graphs need: templates written as text, filled with weights, run, compared.

The reference is the template itself, run K times in ONNX Runtime with each member's weights as
ordinary inputs: nothing of ours takes part in it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import onnxruntime
from onnx import parser, shape_inference

from ensemblekit.graphs.fusing import RULES
from ensemblekit.graphs.lifting import Layout, Lift, Rule
from ensemblekit.graphs.making import tidy
from ensemblekit.graphs.template import Template

Array = npt.NDArray[Any]
Arrays = Mapping[str, Array]
ALL: Mapping[str, Rule] = RULES
MEMBERS = 3


def template(
    body: str,
    *,
    ports: Mapping[str, str],
    weights: Mapping[str, str] | None = None,
    constants: Mapping[str, str] | None = None,
    output: str = "float[] y",
    opset: int = 20,
) -> Template:
    """A template from ONNX's textual syntax.

    Args:
        body: The nodes.
        ports: Type by name, such as `float[N, 4]`.
        weights: Type by name of what members have each for themselves.
        constants: `{1, 2}` by type and name, such as `int64[2] axes`.
        output: Type and name.
        opset: Operator set.
    """
    weights = weights or {}
    inputs = ", ".join(f"{kind} {name}" for name, kind in {**ports, **weights}.items())
    fixed = ", ".join(f"{name} = {value}" for name, value in (constants or {}).items())
    text = (
        f'<ir_version: 10, opset_import: ["" : {opset}]> one ({inputs}) => ({output}) '
        f"{f'<{fixed}>' if fixed else ''} {{ {body} }}"
    )
    model = shape_inference.infer_shapes(parser.parse_model(text), strict_mode=True, data_prop=True)
    onnx.checker.check_model(model)
    return Template(ir.serde.deserialize_model(model), tuple(ports), tuple(weights), "dynamo")


def session(model: ir.Model | onnx.ModelProto) -> onnxruntime.InferenceSession:
    """Ready to run, on one thread."""
    proto = ir.serde.serialize_model(model) if isinstance(model, ir.Model) else model
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    return onnxruntime.InferenceSession(
        proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def drawn(shape: Sequence[int], rng: np.random.Generator) -> Array:
    """Numbers away from zero, of both signs."""
    signs = np.where(rng.random(shape) < 0.5, -1, 1)
    return np.asarray(signs * rng.uniform(0.3, 1.5, shape)).astype(np.float32)


def sets_of_weights(given: Template, *, members: int = MEMBERS, seed: int = 0) -> list[Arrays]:
    """Different numbers for each member; names that end in `positive` are positive."""
    rng = np.random.default_rng(seed)
    found: list[Arrays] = []
    for _ in range(members):
        own = {}
        for value in given.graph.inputs:
            if value.name in given.weights:
                assert value.shape is not None
                made = drawn(value.shape.numpy(), rng)
                own[str(value.name)] = np.abs(made) if "positive" in str(value.name) else made
        found.append(own)
    return found


def lifted(
    given: Template, weights: Sequence[Arrays], rules: Mapping[str, Rule] = ALL
) -> tuple[Lift, ir.Model]:
    """The lifted graph; member k's output is `out_k`."""
    lift = Lift(given, weights, rules)
    (output,) = lift.outputs()
    for k in range(len(weights)):
        made = lift.add("Identity", [lift.member(output, k)])
        made.name = f"out_{k}"
        made.type, made.shape = output.template.type, output.template.shape
        lift.graph.outputs.append(made)
    model = ir.Model(lift.graph, ir_version=10)
    tidy(model)
    return lift, model


def one_by_one(given: Template, weights: Sequence[Arrays], feed: Arrays) -> list[Array]:
    """The template run with each member's weights."""
    ready = session(given.model)
    inner = dict(zip(given.ports, (v.name for v in given.graph.inputs), strict=False))
    named = {str(inner[name]): value for name, value in feed.items()}
    return [np.asarray(ready.run(None, {**named, **own})[0]) for own in weights]


def assert_equal_to_single_runs(
    given: Template,
    weights: Sequence[Arrays],
    feeds: Sequence[Arrays],
    *,
    rules: Mapping[str, Rule] = ALL,
    tolerance: float = 1e-5,
) -> tuple[Lift, ir.Model]:
    """Lift, run, and compare with single runs; gives back the lifted graph."""
    lift, model = lifted(given, weights, rules)
    onnx.checker.check_model(ir.serde.serialize_model(model), full_check=True)
    ready = session(model)
    for feed in feeds:
        wanted = one_by_one(given, weights, feed)
        found = ready.run(None, dict(feed))
        for k, (one, other) in enumerate(zip(wanted, found, strict=True)):
            assert one.shape == other.shape, (k, one.shape, other.shape)
            scale = max(1.0, float(np.abs(one).max())) if one.size else 1.0
            np.testing.assert_allclose(
                other.astype(np.float64), one.astype(np.float64), rtol=0, atol=tolerance * scale
            )
    return lift, model


def counts(model: ir.Model) -> Counter[str]:
    """Nodes of a graph by operator."""
    return Counter(node.op_type for node in model.graph)


def layout_of(lift: Lift, name: str) -> set[Layout]:
    """The layouts in which a value of the template exists."""
    return next(set(v.forms) for v in lift.values.values() if v.template.name == name)
