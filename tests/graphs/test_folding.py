"""Owns the proof that a folded BatchNorm changes nothing, and that what must not be folded is not.

The reference is written out in numpy, in float64.
"""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ensemblekit.ensemble_module import Head
from ensemblekit.graphs.folding import Folding, fold_batch_norm
from ensemblekit.graphs.making import Maker
from ensemblekit.graphs.template import EXPORTERS, Exporter, Interface, Port, Template
from tests.graphs.building import (
    ALL,
    Array,
    Arrays,
    counts,
    drawn,
    lifted,
    one_by_one,
    session,
    sets_of_weights,
    template,
)

torch.set_num_threads(1)

NORM = {"s": "float[4]", "b": "float[4]", "m": "float[4]", "positive": "float[4]"}
PORT = {"x": "float[N, 3, 6, 6]"}
LAYERS = {
    "Conv": ("u = Conv <pads = [1, 1, 1, 1]> (x, w)", {"w": "float[4, 3, 3, 3]"}),
    "Conv with bias": ("u = Conv (x, w, c)", {"w": "float[4, 3, 3, 3]", "c": "float[4]"}),
    "Conv with groups": (
        "e = Conv (x, v) u = Conv <group = 2> (e, w)",
        {"v": "float[6, 3, 1, 1]", "w": "float[4, 3, 3, 3]"},
    ),
    "ConvTranspose": (
        "u = ConvTranspose <strides = [2, 2]> (x, w, c)",
        {"w": "float[3, 4, 2, 2]", "c": "float[4]"},
    ),
    "ConvTranspose without bias": ("u = ConvTranspose (x, w)", {"w": "float[3, 4, 2, 2]"}),
    "Gemm": (
        "f = Flatten (x) u = Gemm <transB = 1> (f, w, c)",
        {"w": "float[4, 108]", "c": "float[4]"},
    ),
    "Gemm not turned": (
        "f = Flatten (x) u = Gemm (f, w, c)",
        {"w": "float[108, 4]", "c": "float[4]"},
    ),
    "Gemm with a bias of rank 2": (
        "f = Flatten (x) u = Gemm (f, w, c)",
        {"w": "float[108, 4]", "c": "float[1, 4]"},
    ),
}


def normed(
    before: str, weights: dict[str, str], after: str = "y = Relu (n)", **rest: str
) -> Template:
    return template(
        f"{before} n = BatchNormalization <epsilon = 0.01> (u, s, b, m, positive) {after}",
        ports=PORT,
        weights={**weights, **NORM},
        constants=rest,
    )


def feed(count: int = 3) -> Arrays:
    return {"x": drawn((count, 3, 6, 6), np.random.default_rng(count))}


def assert_unchanged(one: Template, folds: int) -> Folding:
    """Folded and unfolded say the same, for each member."""
    folding = fold_batch_norm(one)
    assert len(folding.folds) == folds
    norms = sum(node.op_type == "BatchNormalization" for node in one.graph)
    assert counts(folding.template.model)["BatchNormalization"] == norms - folds
    assert {v.name for v in folding.template.graph.inputs} == {"x", *folding.template.weights}
    weights = sets_of_weights(one)
    for size in (1, 4):
        wanted = one_by_one(one, weights, feed(size))
        folded = [folding.weights(own) for own in weights]
        found = one_by_one(folding.template, folded, feed(size))
        for one_, other in zip(wanted, found, strict=True):
            scale = max(1.0, float(np.abs(one_).max()))
            np.testing.assert_allclose(other, one_, rtol=0, atol=2e-5 * scale)
        for own, new in zip(weights, folded, strict=True):
            assert set(new) == set(folding.template.weights)
            assert all(array.dtype == np.float32 for array in new.values())
            assert all(own[k] is v for k, v in new.items() if k in own)
    return folding


@pytest.mark.parametrize("name", LAYERS)
def test_a_folded_layer_says_the_same(name: str) -> None:
    before, weights = LAYERS[name]
    folding = assert_unchanged(normed(before, weights), 1)
    assert len(folding.template.weights) == 2 + ("v" in weights)


@pytest.mark.parametrize("name", LAYERS)
def test_a_folded_layer_may_be_the_last(name: str) -> None:
    before, weights = LAYERS[name]
    folding = assert_unchanged(normed(before, weights, after="y = Identity (n)"), 1)
    assert "y" in [value.name for value in folding.template.graph.outputs]


def test_the_new_weights_are_those_of_the_formula() -> None:
    one = normed(*LAYERS["Conv with bias"])
    folding = fold_batch_norm(one)
    (own,) = sets_of_weights(one, members=1)
    new = folding.weights(own)
    wide = {key: value.astype(np.float64) for key, value in own.items()}
    factor = wide["s"] / np.sqrt(wide["positive"] + np.float64(np.float32(0.01)))
    weight, bias = (new[name] for name in folding.template.weights)
    wanted = (factor[:, None, None, None] * wide["w"]).astype(np.float32)
    assert np.array_equal(weight, wanted)
    shift = (factor * (wide["c"] - wide["m"]) + wide["b"]).astype(np.float32)
    assert np.array_equal(bias, shift)


def test_an_output_that_is_used_twice_is_left_alone() -> None:
    assert_unchanged(normed(*LAYERS["Conv"], after="y = Add (n, u)"), 0)


def test_two_norms_of_one_convolution_are_left_alone() -> None:
    body = (
        "u = Conv (x, w) n = BatchNormalization (u, s, b, m, positive) "
        "o = BatchNormalization (u, b, s, m, positive) y = Mul (n, o)"
    )
    one = template(body, ports=PORT, weights={"w": "float[4, 3, 3, 3]", **NORM})
    assert_unchanged(one, 0)


def test_a_convolution_that_is_an_output_is_left_alone() -> None:
    one = template(
        "u = Conv (x, w) y = BatchNormalization (u, s, b, m, positive)",
        ports=PORT,
        weights={"w": "float[4, 3, 3, 3]", **NORM},
        output="float[] u, float[] y",
    )
    assert not fold_batch_norm(one).folds


def test_a_grouped_transposed_convolution_is_left_alone() -> None:
    weights = {"v": "float[4, 3, 1, 1]", "w": "float[4, 2, 2, 2]"}
    before = "e = Conv (x, v) u = ConvTranspose <group = 2> (e, w)"
    assert_unchanged(normed(before, weights), 0)


@pytest.mark.parametrize("attribute", ["alpha = 2.0", "beta = 0.5"])
def test_a_scaled_product_is_left_alone(attribute: str) -> None:
    weights = {"w": "float[108, 4]", "c": "float[4]"}
    assert_unchanged(normed(f"f = Flatten (x) u = Gemm <{attribute}> (f, w, c)", weights), 0)


def test_a_norm_before_its_convolution_is_left_alone() -> None:
    before = "e = Conv (x, v) u = Relu (e)"
    weights = {"v": "float[4, 3, 1, 1]", "w": "float[2, 4, 1, 1]"}
    assert_unchanged(normed(before, weights, after="y = Conv (n, w)"), 0)


def test_convolutions_that_share_weights_get_their_own() -> None:
    body = (
        "u = Conv (x, w) n = BatchNormalization (u, s, b, m, positive) "
        "h = Neg (x) v = Conv (h, w) o = BatchNormalization (v, b, s, m, positive) "
        "y = Mul (n, o)"
    )
    one = template(body, ports=PORT, weights={"w": "float[4, 3, 3, 3]", **NORM})
    folding = assert_unchanged(one, 2)
    assert len(folding.template.weights) == 4


def test_weights_that_somebody_else_uses_stay_as_they_are() -> None:
    """One convolution is folded, the other has no norm."""
    body = (
        "u = Conv (x, w) n = BatchNormalization (u, s, b, m, positive) "
        "h = Neg (x) v = Conv (h, w) y = Mul (n, v)"
    )
    one = template(body, ports=PORT, weights={"w": "float[4, 3, 3, 3]", **NORM})
    folding = assert_unchanged(one, 1)
    assert "w" in folding.template.weights


def test_one_norm_after_two_convolutions_is_folded_into_both() -> None:
    body = (
        "u = Conv (x, w) n = BatchNormalization (u, s, b, m, positive) "
        "h = Conv (x, v) o = BatchNormalization (h, s, b, m, positive) y = Mul (n, o)"
    )
    kernels = {"w": "float[4, 3, 3, 3]", "v": "float[4, 3, 3, 3]"}
    assert_unchanged(template(body, ports=PORT, weights={**kernels, **NORM}), 2)


def test_constants_that_are_no_weights_are_folded_too() -> None:
    """A norm without scale and shift: ones and zeros in the graph."""
    one = template(
        "u = Conv (x, w) n = BatchNormalization (u, s, b, m, positive) y = Relu (n)",
        ports=PORT,
        weights={"w": "float[4, 3, 3, 3]", "m": "float[4]", "positive": "float[4]"},
        constants={"float[4] s": "{1.0, 1.0, 1.0, 1.0}", "float[4] b": "{0.0, 0.0, 0.0, 0.0}"},
    )
    assert_unchanged(one, 1)


def test_a_template_is_not_changed_by_folding() -> None:
    one = normed(*LAYERS["Conv"])
    before = counts(one.model)
    names = [value.name for value in one.graph.inputs]
    fold_batch_norm(one)
    assert counts(one.model) == before
    assert [value.name for value in one.graph.inputs] == names


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 1000),
    small=st.sampled_from([1e-12, 1e-6, 1e-3, 1.0]),
    large=st.sampled_from([1.0, 1e3]),
)
def test_folding_is_exact_in_float64(seed: int, small: float, large: float) -> None:
    """With tiny variances and large means: no worse than rounding the weights to float32."""
    one = normed(*LAYERS["Conv"], after="y = Identity (n)")
    (own,) = (dict(w) for w in sets_of_weights(one, members=1, seed=seed))
    own["positive"] = own["positive"] * np.float32(small)
    own["m"] = own["m"] * np.float32(large)
    folding = fold_batch_norm(one)
    x = feed()["x"]
    wanted = _by_hand(x, own, 0.01)
    (found,) = one_by_one(folding.template, [folding.weights(own)], {"x": x})
    np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-6 * np.abs(wanted).max())


def _by_hand(x: Array, own: Arrays, epsilon: float) -> Array:
    wide = {key: torch.from_numpy(np.asarray(value)).double() for key, value in own.items()}
    said = nn.functional.conv2d(torch.from_numpy(x).double(), wide["w"], padding=1)
    normed_ = nn.functional.batch_norm(
        said, wide["m"], wide["positive"], wide["s"], wide["b"], training=False, eps=epsilon
    )
    return np.asarray(normed_.numpy())


class Table(nn.Module):
    """Linear layers with and without bias, before BatchNorm1d."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.bn1 = nn.Linear(5, 8), nn.BatchNorm1d(8, eps=0.1)
        self.second, self.bn2 = nn.Linear(8, 6, bias=False), nn.BatchNorm1d(6, affine=False)
        for norm in (self.bn1, self.bn2):
            nn.init.normal_(norm.running_mean)  # type: ignore[arg-type]
            nn.init.uniform_(norm.running_var, 0.2, 3)  # type: ignore[arg-type]
        nn.init.normal_(self.bn1.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.bn1(self.first(x)))
        made: torch.Tensor = self.bn2(self.second(x))
        return made


@pytest.mark.parametrize("exporter", EXPORTERS)
def test_linear_layers_of_torch_are_folded(exporter: Exporter) -> None:
    torch.manual_seed(0)
    models = [Table().eval() for _ in range(2)]
    interface = Interface((Port("x", "float32", ("batch", 5)),), None, "logits")
    example = torch.randn(3, 5)
    maker = Maker(models, Head("regression", "mean"), [example], interface, exporter=exporter)
    x = torch.randn(9, 5)
    with torch.no_grad():
        wanted = torch.stack([copy_in_double(m)(x.double()) for m in models]).mean(0)
    for fold in (False, True):
        made = maker.make(fold=fold)
        assert made.folded == int(fold)  # a product without bias is a MatMul, which has no place
        (found,) = session(made.model).run(None, {"x": x.numpy()})
        np.testing.assert_allclose(found, wanted.numpy(), rtol=1e-5, atol=1e-5)


def copy_in_double(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).double()


def test_folded_weights_are_lifted() -> None:
    one = normed(*LAYERS["Conv"])
    folding = fold_batch_norm(one)
    weights = sets_of_weights(one)
    wanted = one_by_one(one, weights, feed())
    own = [folding.weights(member) for member in weights]
    for rules in ({}, ALL):
        _, model = lifted(folding.template, own, rules)
        found = session(model).run(None, dict(feed()))
        for one_, other in zip(wanted, found, strict=True):
            np.testing.assert_allclose(other, one_, rtol=0, atol=1e-4)
