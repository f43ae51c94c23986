"""Owns the proof of each rule: one operator over stacked inputs says what K operators say.

Each rule is tried on values in every layout in which a value may arrive, with several batch sizes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import hypothesis
import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import settings
from hypothesis import strategies as st

from ensemblekit.graphs.fusing import RULES
from ensemblekit.graphs.lifting import Layout, Lift, Lifted, Rule
from ensemblekit.graphs.template import Template
from tests.graphs.building import (
    MEMBERS,
    Arrays,
    assert_equal_to_single_runs,
    counts,
    drawn,
    layout_of,
    sets_of_weights,
    template,
)

CHANNELS, SIDE = 4, 6
BATCHES = (1, 2, 5)
LAYOUTS = {
    "shared": "v = Identity (x)",
    "stacked": "v = Mul (x, w0)",
    "channels": "v = Conv (x, w0)",
}


@dataclass(frozen=True)
class Case:
    """An operator over `v` (N, 4, 6, 6), with weights of its own.

    Attributes:
        body: Nodes from `v` to `y`.
        weights: Type by name.
        constants: Value by type and name.
        copied: There is no rule for this form, and K copies are right.
    """

    body: str
    weights: dict[str, str] = field(default_factory=dict)
    constants: dict[str, str] = field(default_factory=dict)
    copied: bool = False


W = "float[4]"
POINTWISE = {
    name: Case(f"y = {name} (v)")
    for name in (
        *("Abs", "Ceil", "Celu", "Cos", "Dropout", "Elu", "Erf", "Exp", "Floor", "Gelu"),
        *("HardSigmoid", "HardSwish", "Identity", "LeakyRelu", "Mish", "Neg", "Relu", "Round"),
        *("Selu", "Sigmoid", "Sign", "Sin", "Softplus", "Softsign", "Tanh", "ThresholdedRelu"),
    )
}
POINTWISE["Reciprocal"] = Case("p = Exp (v) y = Reciprocal (p)")
POINTWISE["Log"] = Case("p = Exp (v) y = Log (p)")
POINTWISE["Sqrt"] = Case("p = Abs (v) y = Sqrt (p)")
POINTWISE["Cast"] = Case("p = Cast <to = 11> (v) y = Cast <to = 1> (p)")
POINTWISE["Not"] = Case(
    "c = Greater (v, zero) d = Not (c) y = Cast <to = 1> (d)", constants={"float zero": "{0.0}"}
)
POINTWISE["IsNaN"] = Case("r = Sqrt (v) c = IsNaN (r) y = Cast <to = 1> (c)")
POINTWISE["IsInf"] = Case(
    "r = Div (v, zero) c = IsInf (r) y = Cast <to = 1> (c)", constants={"float zero": "{0.0}"}
)
POINTWISE["Clip"] = Case(
    "y = Clip (v, low, high)", constants={"float low": "{-0.5}", "float high": "{0.7}"}
)

ARITHMETIC = {
    f"{name}_{how}": Case(f"{before} y = {name} (v, {other})", weights, constants)
    for name in ("Add", "Div", "Max", "Min", "Mul", "Sub")
    for how, before, other, weights, constants in (
        ("own_scalar", "", "b", {"b": "float[1]"}, {}),
        ("own_rank_0", "", "b", {"b": "float"}, {}),
        ("own_channel", "", "b", {"b": "float[4, 1, 1]"}, {}),
        ("own_full_rank", "", "b", {"b": "float[1, 4, 1, 1]"}, {}),
        ("own_last_axis", "", "b", {"b": "float[6]"}, {}),
        ("constant", "", "b", {}, {"float b": "{0.7}"}),
        ("input", "", "x", {}, {}),
        ("own_times_input", "b = Mul (x, bw)", "b", {"bw": "float[4, 1, 1]"}, {}),
    )
}
LOGIC = {
    **{
        name: Case(f"c = {name} (v, b) y = Cast <to = 1> (c)", {"b": "float[4, 1, 1]"})
        for name in ("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual")
    },
    **{
        name: Case(
            f"c = Less (v, b) d = Greater (x, b) e = {name} (c, d) y = Cast <to = 1> (e)",
            {"b": "float[4, 1, 1]"},
        )
        for name in ("And", "Or", "Xor")
    },
    "Where_of_members": Case("c = Less (v, b) y = Where (c, v, b)", {"b": "float[4, 1, 1]"}),
    "Where_mask_of_the_input": Case(
        "c = Less (x, zero) y = Where (c, v, low)",
        constants={"float zero": "{0.0}", "float low": "{-1000.0}"},
    ),
    "Where_lower_rank": Case(
        "c = Less (b, zero) y = Where (c, v, b)", {"b": "float[6]"}, {"float zero": "{0.0}"}
    ),
    "Pow": Case("a = Abs (v) y = Pow (a, two)", constants={"float two": "{2.5}"}),
    "Mod": Case("y = Mod <fmod = 1> (v, b)", {"b": "float[4, 1, 1]"}),
    "PRelu_per_channel": Case("y = PRelu (v, b)", {"b": "float[4, 1, 1]"}),
    "PRelu_single": Case("y = PRelu (v, b)", {"b": "float[1]"}),
    "SqueezeExcite": Case(
        "m = GlobalAveragePool (v) s = Conv (m, sw) t = Sigmoid (s) y = Mul (v, t)",
        {"sw": "float[4, 4, 1, 1]"},
    ),
    "SpatialAttention": Case(
        "m = Conv (v, sw) t = Sigmoid (m) y = Mul (v, t)", {"sw": "float[1, 4, 1, 1]"}
    ),
    "one_map_beside_many": Case(
        "m = Conv (v, sw) n = Conv (x, sv) y = Add (m, n)",
        {"sw": "float[1, 4, 1, 1]", "sv": "float[4, 4, 1, 1]"},
    ),
    "channel_mean_subtracted": Case(
        "m = ReduceMean (v, axes) y = Sub (v, m)", constants={"int64[1] axes": "{1}"}
    ),
}
CONVOLUTIONS = {
    "Conv": Case("y = Conv <pads = [1, 1, 1, 1]> (v, w)", {"w": "float[5, 4, 3, 3]"}),
    "Conv_bias_stride": Case(
        "y = Conv <strides = [2, 2]> (v, w, b)", {"w": "float[5, 4, 3, 3]", "b": "float[5]"}
    ),
    "Conv_dilated": Case(
        "y = Conv <dilations = [2, 2], pads = [2, 2, 2, 2]> (v, w)", {"w": "float[4, 4, 3, 3]"}
    ),
    "Conv_depthwise": Case(
        "y = Conv <group = 4, pads = [1, 1, 1, 1]> (v, w, b)",
        {"w": "float[8, 1, 3, 3]", "b": "float[8]"},
    ),
    "Conv_grouped": Case("y = Conv <group = 2> (v, w)", {"w": "float[6, 2, 3, 3]"}),
    "Conv_twice": Case(
        "u = Conv (v, w) r = Relu (u) y = Conv (r, w2)",
        {"w": "float[5, 4, 3, 3]", "w2": "float[2, 5, 1, 1]"},
    ),
    "ConvTranspose": Case(
        "y = ConvTranspose <strides = [2, 2]> (v, w, b)",
        {"w": "float[4, 3, 2, 2]", "b": "float[3]"},
    ),
    "ConvTranspose_grouped": Case(
        "y = ConvTranspose <group = 2> (v, w)", {"w": "float[4, 3, 2, 2]"}
    ),
    "BatchNormalization": Case(
        "y = BatchNormalization (v, s, b, m, positive)",
        {"s": W, "b": W, "m": W, "positive": W},
    ),
    "BatchNormalization_before_conv": Case(
        "n = BatchNormalization (v, s, b, m, positive) r = Relu (n) y = Conv (r, w)",
        {"s": W, "b": W, "m": W, "positive": W, "w": "float[3, 4, 3, 3]"},
    ),
    "InstanceNormalization": Case("y = InstanceNormalization (v, s, b)", {"s": W, "b": W}),
    **{
        name: Case(f"y = {name} <{rest}> (v)" if rest else f"y = {name} (v)")
        for name, rest in (
            ("AveragePool", "kernel_shape = [2, 2], strides = [2, 2]"),
            ("GlobalAveragePool", ""),
            ("GlobalMaxPool", ""),
            ("LpPool", "kernel_shape = [2, 2]"),
            ("MaxPool", "kernel_shape = [3, 3], pads = [1, 1, 1, 1], strides = [2, 2]"),
        )
    },
}
PRODUCTS = {
    "MatMul_own_matrix": Case("y = MatMul (v, w)", {"w": "float[6, 5]"}),
    "MatMul_own_batched": Case("y = MatMul (v, w)", {"w": "float[4, 6, 5]"}),
    "MatMul_own_left": Case("y = MatMul (w, v)", {"w": "float[5, 6]"}),
    "MatMul_input": Case("y = MatMul (v, x)"),
    "MatMul_attention": Case(
        "t = Transpose <perm = [0, 1, 3, 2]> (v) q = MatMul (v, w) a = MatMul (q, t) "
        "y = Softmax <axis = -1> (a)",
        {"w": "float[6, 6]"},
    ),
    "MatMul_vector": Case("y = MatMul (v, w)", {"w": "float[6]"}, copied=True),
    "Gemm": Case("f = Flatten (v) y = Gemm (f, w, b)", {"w": "float[144, 5]", "b": "float[5]"}),
    "Gemm_transB": Case(
        "f = Flatten (v) y = Gemm <transB = 1> (f, w, b)", {"w": "float[5, 144]", "b": "float[5]"}
    ),
    "Gemm_no_bias": Case("f = Flatten (v) y = Gemm <transB = 1> (f, w)", {"w": "float[5, 144]"}),
    "Gemm_bias_rank_0": Case(
        "f = Flatten (v) y = Gemm (f, w, b)", {"w": "float[144, 5]", "b": "float"}
    ),
    "Gemm_bias_rank_2": Case(
        "f = Flatten (v) y = Gemm (f, w, b)", {"w": "float[144, 5]", "b": "float[1, 5]"}
    ),
    "Gemm_shared_bias": Case(
        "f = Flatten (v) y = Gemm (f, w, b)",
        {"w": "float[144, 2]"},
        {"float[2] b": "{1.0, 2.0}"},
    ),
    "Gemm_alpha": Case(
        "f = Flatten (v) y = Gemm <alpha = 2.0, beta = 0.5> (f, w, b)",
        {"w": "float[144, 5]", "b": "float[5]"},
        copied=True,
    ),
}
ALONG_AXES = {
    **{
        f"{name}_{axis}": Case(f"y = {name} <axis = {axis}> (v)")
        for name in ("Softmax", "LogSoftmax", "Hardmax")
        for axis in (1, -1, 2)
    },
    **{
        f"Reduce{name}_{keep}_{code}": Case(
            f"p = Sigmoid (v) y = Reduce{name} <keepdims = {keep}> (p, axes)",
            constants={f"int64[{len(axes)}] axes": "{" + ", ".join(map(str, axes)) + "}"},
        )
        for name in ("L1", "L2", "Max", "Mean", "Min", "Prod", "Sum")
        for keep in (0, 1)
        for code, axes in (("spatial", (2, 3)), ("last", (-1,)), ("channels", (1,)))
    },
    "LayerNormalization_own": Case(
        "y = LayerNormalization (v, s, b)", {"s": "float[6]", "b": "float[6]"}
    ),
    "LayerNormalization_own_scale": Case("y = LayerNormalization (v, s)", {"s": "float[6]"}),
    "LayerNormalization_own_bias": Case(
        "y = LayerNormalization (v, s, b)",
        {"b": "float[6]"},
        {"float[6] s": "{1.0, 2.0, 3.0, 0.5, 0.7, 0.9}"},
    ),
    "LayerNormalization_two_axes": Case(
        "y = LayerNormalization <axis = 2, epsilon = 0.1> (v, s, b)",
        {"s": "float[6, 6]", "b": "float[6, 6]"},
    ),
    "LayerNormalization_plain": Case(
        "y = LayerNormalization <axis = -1> (v, s)",
        constants={"float[6] s": "{1.0, 2.0, 3.0, 0.5, 0.7, 0.9}"},
    ),
    "LayerNormalization_channels_last": Case(
        "t = Transpose <perm = [0, 2, 3, 1]> (v) n = LayerNormalization (t, s, b) "
        "y = Transpose <perm = [0, 3, 1, 2]> (n)",
        {"s": W, "b": W},
    ),
}
SHAPES = {
    "Transpose": Case("y = Transpose <perm = [2, 0, 3, 1]> (v)"),
    "Transpose_default": Case("y = Transpose (v)"),
    "Reshape_0_and_-1": Case("y = Reshape (v, s)", constants={"int64[3] s": "{0, 4, -1}"}),
    "Reshape_inferred_batch": Case("y = Reshape (v, s)", constants={"int64[2] s": "{-1, 144}"}),
    "Reshape_0_in_the_middle": Case("y = Reshape (v, s)", constants={"int64[3] s": "{0, 0, -1}"}),
    "Reshape_split_heads": Case("y = Reshape (v, s)", constants={"int64[5] s": "{0, 2, 2, 6, 6}"}),
    "Reshape_by_its_own_shape": Case(
        "n = Shape <start = 0, end = 1> (v) s = Concat <axis = 0> (n, rest) y = Reshape (v, s)",
        constants={"int64[2] rest": "{4, -1}"},
    ),
    "Shape_in_arithmetic": Case(
        "n = Shape (v) i = Gather (n, zero) f = Cast <to = 1> (i) y = Mul (v, f)",
        constants={"int64 zero": "{0}"},
    ),
    "Shape_negative_start": Case(
        "n = Shape <start = -2> (v) f = Cast <to = 1> (n) p = ReduceProd <keepdims = 0> (f, z) "
        "y = Div (v, p)",
        constants={"int64[1] z": "{0}"},
    ),
    "Flatten": Case("y = Flatten (v)"),
    "Flatten_axis_2": Case("y = Flatten <axis = 2> (v)", copied=True),
    "Unsqueeze": Case("y = Unsqueeze (v, a)", constants={"int64[2] a": "{1, -1}"}),
    "Squeeze": Case(
        "u = GlobalAveragePool (v) y = Squeeze (u, a)", constants={"int64[2] a": "{-1, 2}"}
    ),
    "Expand": Case(
        "u = GlobalAveragePool (v) y = Expand (u, s)", constants={"int64[4] s": "{1, 1, 3, 2}"}
    ),
    "Expand_more_axes": Case(
        "y = Expand (v, s)", constants={"int64[5] s": "{2, 1, 1, 1, 1}"}
    ),
    "Expand_fewer_axes": Case(
        "u = GlobalAveragePool (v) y = Expand (u, s)", constants={"int64[2] s": "{3, 2}"}
    ),
    "Expand_token": Case(
        "n = Shape <start = 0, end = 1> (v) s = Concat <axis = 0> (n, rest) e = Expand (t, s) "
        "f = ReduceMean <keepdims = 0> (v, last) y = Concat <axis = 1> (e, f)",
        {"t": "float[1, 1, 6]"},
        {"int64[2] rest": "{1, 6}", "int64[1] last": "{-1}"},
    ),
    "Concat_channels": Case(
        "u = Conv (v, w) y = Concat <axis = 1> (v, u, v)", {"w": "float[3, 4, 1, 1]"}
    ),
    "Concat_channels_then_conv": Case(
        "u = Conv (v, w) c = Concat <axis = 1> (u, v) y = Conv (c, w2)",
        {"w": "float[3, 4, 1, 1]", "w2": "float[2, 7, 3, 3]"},
    ),
    "Concat_with_the_input": Case("y = Concat <axis = 1> (x, v)"),
    "Concat_last_axis": Case("y = Concat <axis = -1> (v, v)"),
    "Concat_batch": Case("y = Concat <axis = 0> (v, x)"),
    "Pad_space": Case(
        "y = Pad (v, p, c)",
        constants={"int64[8] p": "{0, 0, 1, 2, 0, 0, 0, 1}", "float c": "{0.5}"},
    ),
    "Pad_channels": Case("y = Pad (v, p)", constants={"int64[8] p": "{0, 1, 0, 0, 0, 2, 0, 0}"}),
    "Pad_reflect": Case(
        'y = Pad <mode = "reflect"> (v, p)', constants={"int64[8] p": "{0, 0, 1, 1, 0, 0, 1, 1}"}
    ),
    "Slice_space": Case(
        "y = Slice (v, s, e, a, t)",
        constants={
            "int64[2] s": "{1, 0}",
            "int64[2] e": "{5, 100}",
            "int64[2] a": "{2, -1}",
            "int64[2] t": "{1, 2}",
        },
    ),
    "Slice_channels": Case(
        "y = Slice (v, s, e, a)",
        constants={"int64[1] s": "{1}", "int64[1] e": "{3}", "int64[1] a": "{1}"},
    ),
    "Slice_backwards": Case(
        "y = Slice (v, s, e, a, t)",
        constants={
            "int64[1] s": "{-1}",
            "int64[1] e": "{-100}",
            "int64[1] a": "{-3}",
            "int64[1] t": "{-1}",
        },
    ),
    "Slice_no_axes": Case(
        "y = Slice (v, s, e)",
        constants={"int64[2] s": "{0, 1}", "int64[2] e": "{100, 3}"},
        copied=True,
    ),
    "Gather_scalar": Case("y = Gather <axis = 2> (v, i)", constants={"int64 i": "{1}"}),
    "Gather_negative_axis": Case(
        "y = Gather <axis = -1> (v, i)", constants={"int64[2] i": "{-1, 2}"}
    ),
    "Gather_table": Case("y = Gather <axis = 1> (v, i)", constants={"int64[2,2] i": "{0, 1, 2, 3}"}),
    "Split_even": Case(
        "a, b = Split <axis = 1, num_outputs = 2> (v) y = Sub (b, a)",
    ),
    "Split_sizes": Case(
        "a, b, c = Split <axis = -1> (v, s) d = Add (a, c) r = ReduceSum (b, last) y = Mul (d, r)",
        constants={"int64[3] s": "{2, 2, 2}", "int64[1] last": "{3}"},
    ),
}  # fmt: skip
CASES = {
    **POINTWISE, **ARITHMETIC, **LOGIC, **CONVOLUTIONS, **PRODUCTS, **ALONG_AXES, **SHAPES
}  # fmt: skip


def feeds(seed: int = 0) -> list[Arrays]:
    rng = np.random.default_rng(seed)
    return [{"x": drawn((n, CHANNELS, SIDE, SIDE), rng)} for n in BATCHES]


def prepared(case: Case, layout: str) -> Template:
    own = {"stacked": "float[1, 4, 1, 1]", "channels": "float[4, 4, 1, 1]"}
    weights = {**case.weights, **({"w0": own[layout]} if layout in own else {})}
    return template(
        f"{LAYOUTS[layout]} {case.body}",
        ports={"x": f"float[N, {CHANNELS}, {SIDE}, {SIDE}]"},
        weights=weights,
        constants=case.constants,
    )


def copied_values(lift: Lift) -> list[str]:
    """Values that are made once for each member."""
    names = [str(value.name) for node in lift.graph for value in node.outputs]
    return [name for name in names if name.startswith("member_0.")]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", CASES)
def test_one_operator_says_what_k_say(name: str, layout: str) -> None:
    case = CASES[name]
    one = prepared(case, layout)
    lift, _ = assert_equal_to_single_runs(one, sets_of_weights(one), feeds())
    if layout == "stacked":
        assert Layout.STACKED in layout_of(lift, "v")
        assert bool(copied_values(lift)) == case.copied
    if layout == "channels":
        assert Layout.CHANNELS in layout_of(lift, "v")
        assert bool(copied_values(lift)) == case.copied


@pytest.mark.parametrize(
    "name", ["Relu", "Add_own_channel", "Conv", "Concat_channels", "Softmax_1"]
)
def test_values_that_exist_only_one_by_one_are_joined(name: str) -> None:
    one = prepared(CASES[name], "channels")
    rules = {key: rule for key, rule in RULES.items() if key != "Conv"} | {"Conv": first_copied()}
    lift, _ = assert_equal_to_single_runs(one, sets_of_weights(one), feeds(), rules=rules)
    assert Layout.SEPARATE in layout_of(lift, "v")
    assert copied_values(lift) == ["member_0.v"]


def first_copied() -> Rule:
    """The rule of Conv, but for the first one."""
    seen: list[str] = []

    def rule(lift: Lift, node: ir.Node, inputs: Sequence[Lifted | None]) -> Any:
        seen.append(node.op_type)
        return None if len(seen) == 1 else RULES["Conv"](lift, node, inputs)

    return rule


def test_every_rule_is_tried() -> None:
    tried = {node.op_type for case in CASES.values() for node in prepared(case, "stacked").graph}
    assert not set(RULES) - tried


def test_equal_filters_over_different_images() -> None:
    """A convolution frozen behind a layer that was not."""
    one = prepared(CASES["Conv_bias_stride"], "channels")
    first, *others = sets_of_weights(one)
    weights = [first, *({**own, "w": first["w"], "b": first["b"]} for own in others)]
    assert_equal_to_single_runs(one, weights, feeds())


def test_the_first_convolution_of_one_image_needs_no_groups() -> None:
    one = prepared(CASES["Conv"], "shared")
    _, model = assert_equal_to_single_runs(one, sets_of_weights(one), feeds())
    (conv,) = [node for node in model.graph if node.op_type == "Conv"]
    assert conv.attributes["group"].as_int() == 1
    assert conv.inputs[1] is not None
    assert conv.inputs[1].shape == (MEMBERS * 5, 4, 3, 3)


def test_dropout_with_a_mask_that_nobody_uses() -> None:
    one = prepared(Case("y, mask = Dropout (v)"), "stacked")
    assert_equal_to_single_runs(one, sets_of_weights(one), feeds())


def test_max_pool_with_indices() -> None:
    body = "p, i = MaxPool <kernel_shape = [2, 2]> (v) f = Cast <to = 1> (i) y = Add (p, f)"
    one = prepared(Case(body), "channels")
    assert_equal_to_single_runs(one, sets_of_weights(one), feeds())


def test_a_reduction_over_everything() -> None:
    one = prepared(Case("y = ReduceMean (v)"), "stacked")
    assert_equal_to_single_runs(one, sets_of_weights(one), feeds())
    one = prepared(Case("y = ReduceMean (v, axes)", constants={"int64[0] axes": "{}"}), "stacked")
    assert_equal_to_single_runs(one, sets_of_weights(one), feeds())


def test_embeddings_of_members() -> None:
    one = template(
        "e = Gather (table, ids) p = Gather (places, first) y = Add (e, p)",
        ports={"ids": "int64[N, T]"},
        weights={"table": "float[11, 6]", "places": "float[9, 6]"},
        constants={"int64[1] first": "{2}"},
    )
    rng = np.random.default_rng(1)
    given = [{"ids": rng.integers(0, 11, shape)} for shape in ((1, 1), (2, 5), (4, 3))]
    lift, model = assert_equal_to_single_runs(one, sets_of_weights(one), given)
    assert lift.fused == counts(model)["Gather"] + 1 == 3


def test_open_height_and_width_give_way_to_copies() -> None:
    """(N, K C, H, W) cannot be parted with two open sizes; the result is right all the same."""
    one = template(
        "u = Conv <pads = [1, 1, 1, 1]> (x, w) r = Relu (u) y = Softmax <axis = 1> (r)",
        ports={"x": "float[N, 4, H, W]"},
        weights={"w": "float[3, 4, 3, 3]"},
    )
    rng = np.random.default_rng(2)
    given = [{"x": drawn((n, 4, 5, n + 4), rng)} for n in BATCHES]
    assert_equal_to_single_runs(one, sets_of_weights(one), given)


@settings(max_examples=25, deadline=None, derandomize=True)
@hypothesis.given(
    left=st.lists(st.sampled_from([1, 2, 3]), min_size=0, max_size=4),
    right=st.lists(st.sampled_from([1, 2, 3]), min_size=0, max_size=4),
    own_left=st.booleans(),
    operator=st.sampled_from(["Add", "Mul", "Max"]),
)
def test_broadcasting_of_any_ranks(
    left: list[int], right: list[int], own_left: bool, operator: str
) -> None:
    """Sizes that do not fit are made to: the smaller becomes 1."""
    for axis in range(1, min(len(left), len(right)) + 1):
        if left[-axis] != right[-axis]:
            right[-axis] = 1
    sides = {"l": f"float{left or ''}", "r": f"float{right or ''}"}
    weights = {"r": sides["r"], "s": "float"} if own_left else {"r": sides["r"]}
    body = f"v = Mul (l, s) y = {operator} (v, r)" if own_left else f"y = {operator} (l, r)"
    one = template(body, ports={"l": sides["l"]}, weights=weights)
    feed = {"l": drawn(left, np.random.default_rng(3))}
    assert_equal_to_single_runs(one, sets_of_weights(one), [feed])
