"""Owns the proof that a template filled with K sets of weights computes K members, and no more often
than needed: what is equal is stored once, what depends on nothing of a member's own runs once."""

from __future__ import annotations

from collections.abc import Mapping

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ensemblekit.errors import UnsupportedError
from ensemblekit.graphs.lifting import Layout, Lift, Lifted, Rule
from ensemblekit.graphs.template import Template
from tests.graphs.building import (
    ALL,
    Array,
    Arrays,
    assert_equal_to_single_runs,
    counts,
    drawn,
    lifted,
    session,
    sets_of_weights,
    template,
)

both = pytest.mark.parametrize("rules", [{}, ALL], ids=["copied", "fused"])


def two_layers() -> Template:
    return template(
        "h = Gemm (x, w1, b1) r = Relu (h) y = Gemm (r, w2, b2)",
        ports={"x": "float[N, 4]"},
        weights={"w1": "float[4, 5]", "b1": "float[5]", "w2": "float[5, 3]", "b2": "float[3]"},
    )


def feed(count: int = 3) -> Arrays:
    return {"x": drawn((count, 4), np.random.default_rng(count))}


def initialisers(model: ir.Model) -> list[Array]:
    found = [value.const_value for value in model.graph.initializers.values()]
    return [tensor.numpy() for tensor in found if tensor is not None]


@both
def test_members_are_computed(rules: Mapping[str, Rule]) -> None:
    one = two_layers()
    assert_equal_to_single_runs(
        one, sets_of_weights(one, members=4), [feed(1), feed(6)], rules=rules
    )


@both
def test_a_shared_trunk_runs_once(rules: Mapping[str, Rule]) -> None:
    one = two_layers()
    first, *others = sets_of_weights(one)
    weights = [first, *({**own, "w1": first["w1"].copy(), "b1": first["b1"]} for own in others)]
    _, model = assert_equal_to_single_runs(one, weights, [feed()], rules=rules)
    found = counts(model)
    assert found["Relu"] == 1
    assert found["Gemm"] == (1 if rules else 1 + len(weights))


@both
def test_equal_members_are_one(rules: Mapping[str, Rule]) -> None:
    one = two_layers()
    (own,) = sets_of_weights(one, members=1)
    lift, model = lifted(one, [own, dict(own), {k: v.copy() for k, v in own.items()}], rules)
    assert counts(model)["Gemm"] == 2
    assert lift.fused == 0
    assert len(initialisers(model)) == 4


@pytest.mark.parametrize("which", ["w1", "b1", "w2", "b2"])
@both
def test_one_number_of_one_member_is_enough(which: str, rules: Mapping[str, Rule]) -> None:
    one = two_layers()
    (own,) = sets_of_weights(one, members=1)
    other = own[which].copy()
    other.flat[-1] += np.float32(1)
    weights = [own, own, {**own, which: other}]
    assert_equal_to_single_runs(one, weights, [feed()], rules=rules)


def test_equal_numbers_are_stored_once() -> None:
    """Within a member, between members, whatever the names."""
    one = template(
        "a = Add (x, p) b = Mul (a, q) y = Sub (b, r)",
        ports={"x": "float[N, 4]"},
        weights=dict.fromkeys("pqr", "float[4]"),
    )
    left, right = drawn((4,), np.random.default_rng(0)), drawn((4,), np.random.default_rng(1))
    weights = [{"p": left, "q": left.copy(), "r": right}, {"p": right, "q": left, "r": right}]
    _, model = assert_equal_to_single_runs(one, weights, [feed()], rules={})
    assert len(initialisers(model)) == 2


def test_numbers_of_other_types_or_shapes_are_others() -> None:
    lift = Lift(two_layers(), sets_of_weights(two_layers()), {})
    zeros: list[Array] = [
        np.zeros(4, np.float32), np.zeros((2, 2), np.float32), np.zeros(4, np.int32),
        np.zeros(8, np.float16), np.zeros(2, np.int64), np.zeros((), np.float32),
        np.zeros(0, np.float32), np.zeros((0, 3), np.float32), np.zeros(4, bool),
    ]  # fmt: skip
    made = [lift.number(array) for array in zeros]
    assert len(set(made)) == len(zeros)
    assert len({value.name for value in made}) == len(zeros)
    assert [lift.number(array.copy()) for array in zeros] == made


def test_small_types_of_one_size_are_others() -> None:
    """Both kinds of bfloat16's and of float8's cousins have the same bits for zero."""
    lift = Lift(two_layers(), sets_of_weights(two_layers()), {})
    eights = [np.zeros(4, ml_dtypes.float8_e4m3fn), np.zeros(4, ml_dtypes.float8_e5m2)]
    first, second = (lift.number(array) for array in eights)
    assert first is not second


def test_names_of_numbers_never_meet() -> None:
    lift = Lift(two_layers(), sets_of_weights(two_layers()), {})
    before = len(lift.graph.initializers)
    names = ["a", "a.1", f"a.{before + 3}", "a", "a", "a"]
    arrays = [np.array([n], np.float32) for n in range(len(names))]
    made = [lift.number(array, name) for array, name in zip(arrays, names, strict=True)]
    assert len(lift.graph.initializers) == before + len(names)
    for array, value in zip(arrays, made, strict=True):
        assert value.const_value is not None
        assert np.array_equal(value.const_value.numpy(), array)


def test_minus_zero_is_not_zero() -> None:
    """1 / -0 is minus infinity: equal to `==`, not the same number."""
    one = template("y = Div (x, w)", ports={"x": "float[N, 4]"}, weights={"w": "float[4]"})
    weights = [{"w": np.array([z, 1, 1, 1], np.float32)} for z in (0.0, -0.0)]
    for rules in ({}, ALL):
        _, model = lifted(one, weights, rules)
        first, second = session(model).run(None, dict(feed()))
        assert (first[:, 0] == -second[:, 0]).all()
        assert np.isinf(first[:, 0]).all()


def test_nan_equals_the_same_nan() -> None:
    one = template("y = Mul (x, w)", ports={"x": "float[N, 4]"}, weights={"w": "float[4]"})
    nans = [np.array([np.nan, 1, 2, 3], np.float32) for _ in range(3)]
    _, model = lifted(one, [{"w": array} for array in nans])
    assert counts(model)["Mul"] == 1
    nans[1][1] = 5
    _, model = lifted(one, [{"w": array} for array in nans], {})
    assert counts(model)["Mul"] >= 2
    first, second, third = session(model).run(None, dict(feed()))
    assert np.isnan(first[:, 0]).all()
    assert np.isnan(second[:, 0]).all()
    assert np.array_equal(second[:, 1], 5 * feed()["x"][:, 1])
    assert np.array_equal(first, third, equal_nan=True)


@both
def test_tied_weights_are_stored_once(rules: Mapping[str, Rule]) -> None:
    one = template(
        "e = Gather (w, ids) t = Transpose <perm = [1, 0]> (w) y = MatMul (e, t)",
        ports={"ids": "int64[N, T]"},
        weights={"w": "float[9, 5]"},
    )
    ids = {"ids": np.random.default_rng(0).integers(0, 9, (2, 7))}
    _, model = assert_equal_to_single_runs(one, sets_of_weights(one), [ids], rules=rules)
    assert counts(model)["Transpose"] == 0  # moved once and for all
    assert sum(array.size for array in initialisers(model)) <= 2 * 3 * 45 + 8


@pytest.mark.parametrize(
    "moved, constants",
    [
        ("m = Transpose (w)", {}),
        ("m = Reshape (w, s)", {"int64[2] s": "{4, -1}"}),
        ("u = Unsqueeze (w, a) m = Squeeze (u, a)", {"int64[1] a": "{0}"}),
        ("m = Slice (w, s, e, a)", {"int64[1] s": "{0}", "int64[1] e": "{4}", "int64[1] a": "{0}"}),
        ("m = Concat <axis = 0> (w, w)", {}),
        ("m = Identity (w)", {}),
    ],
)
@both
def test_weights_are_moved_in_advance(
    moved: str, constants: dict[str, str], rules: Mapping[str, Rule]
) -> None:
    one = template(
        f"{moved} p = ReduceSum (m, z) y = Add (x, p)",
        ports={"x": "float[N, 4]"},
        weights={"w": "float[4, 4]"},
        constants={**constants, "int64[1] z": "{0}"},
    )
    _, model = assert_equal_to_single_runs(one, sets_of_weights(one), [feed()], rules=rules)
    assert set(counts(model)) <= {"ReduceSum", "Add", "Identity", "Split", "Squeeze"}


def test_control_flow_is_refused() -> None:
    one = template(
        "c = ReduceMax <keepdims = 0> (x) d = Greater (c, zero) "
        "y = If <then_branch = t () => (float[] o) { o = Identity (x) }, "
        "else_branch = f () => (float[] p) { p = Neg (x) }> (d)",
        ports={"x": "float[N, 4]"},
        constants={"float zero": "{0.0}"},
    )
    with pytest.raises(UnsupportedError, match=r"control flow \(If\)"):
        Lift(one, [{}, {}], {})


def test_nothing_of_the_template_is_changed() -> None:
    one = two_layers()
    before = ir.to_proto(one.model).SerializeToString()
    lifted(one, sets_of_weights(one))
    assert ir.to_proto(one.model).SerializeToString() == before


def test_optional_inputs_stay_empty() -> None:
    one = template(
        "y = Clip (v, , high) v = Mul (x, w)".replace("y = Clip (v, , high) v = Mul (x, w)",
                                                      'v = Mul (x, w) y = Clip (v, "", high)'),
        ports={"x": "float[N, 4]"}, weights={"w": "float[4]"}, constants={"float high": "{0.1}"},
    )  # fmt: skip
    for rules in ({}, ALL):
        assert_equal_to_single_runs(one, sets_of_weights(one), [feed()], rules=rules)


# ------------------------------------------------------------------------------ layouts

SHAPE = (2, 3, 4)


def lift_of(members: int) -> tuple[Lift, ir.Value]:
    """A lift with a member's (N, 3, 4) as a value that nothing depends on yet."""
    one = template("y = Relu (x)", ports={"x": "float[N, 3, 4]"})
    return Lift(one, [{}] * members, {}), one.graph.outputs[0]


def start(lift: Lift, template_value: ir.Value, layout: Layout, members: int) -> Lifted:
    """A value in one layout, whose parts are inputs of the graph."""
    shapes: dict[Layout, list[tuple[int | str, ...]]] = {
        Layout.SEPARATE: [("N", 3, 4)] * members,
        Layout.STACKED: [(members, "N", 3, 4)],
        Layout.CHANNELS: [("N", 3 * members, 4)],
    }
    made = [
        ir.Value(name=f"in_{n}", shape=ir.Shape(s), type=ir.TensorType(ir.DataType.FLOAT))
        for n, s in enumerate(shapes[layout])
    ]
    lift.graph.inputs.extend(made)
    return Lifted(template_value, {layout: tuple(made)})


def laid_out(arrays: list[Array], layout: Layout) -> list[Array]:
    if layout is Layout.SEPARATE:
        return arrays
    if layout is Layout.STACKED:
        return [np.stack(arrays)]
    return [np.concatenate(arrays, axis=1)]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    members=st.integers(1, 5),
    batch=st.integers(1, 4),
    path=st.lists(
        st.sampled_from([Layout.SEPARATE, Layout.STACKED, Layout.CHANNELS]), min_size=2, max_size=4
    ),
)
def test_layouts_are_made_from_one_another(members: int, batch: int, path: list[Layout]) -> None:
    lift, value = lift_of(members)
    one = start(lift, value, path[0], members)
    for layout in path[1:]:
        lift.get(one, layout)
    wanted = path[-1]
    for n, made in enumerate(lift.get(one, wanted)):
        out = lift.add("Identity", [made])
        out.name, out.type = f"out_{n}", ir.TensorType(ir.DataType.FLOAT)
        out.shape = ir.Shape([None] * (4 if wanted is Layout.STACKED else 3))
        lift.graph.outputs.append(out)
    rng = np.random.default_rng(members)
    arrays = [drawn((batch, *SHAPE[1:]), rng) for _ in range(members)]
    feeds = {f"in_{n}": a for n, a in enumerate(laid_out(arrays, path[0]))}
    feeds["x"] = arrays[0]
    found = session(ir.Model(lift.graph, ir_version=10)).run(None, feeds)
    for one_, other in zip(found, laid_out(arrays, wanted), strict=True):
        assert np.array_equal(one_, other)
