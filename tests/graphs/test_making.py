"""Owns the proof that whole graphs, heads included, are what torch computes, whatever things are
called."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest
import torch
from torch import nn

from ensemblekit.ensemble_module import EnsembleModule, Head
from ensemblekit.errors import IncompatibleError
from ensemblekit.graphs.making import Maker, tidy
from ensemblekit.graphs.template import Exporter, Interface, Port
from tests.graphs.building import counts, session, template

torch.set_num_threads(1)

MEMBERS = 3
ROW = Interface((Port("x", "float32", ("batch", 5)),), None, "logits")


def linears(outputs: int = 4, count: int = MEMBERS) -> list[nn.Module]:
    torch.manual_seed(0)
    return [nn.Linear(5, outputs).eval() for _ in range(count)]


def rows(count: int = 3) -> torch.Tensor:
    return torch.randn(count, 5, generator=torch.Generator().manual_seed(count))


def run(model: ir.Model, **inputs: torch.Tensor) -> npt.NDArray[Any]:
    (found,) = session(model).run(None, {k: v.numpy() for k, v in inputs.items()})
    return np.asarray(found)


def linear_model(of: str) -> dict[str, Any]:
    """The fitted numbers of stacking four outputs of three members."""
    rng = np.random.default_rng(0)
    coef = rng.normal(size=(4, 4 * MEMBERS))
    return {"of": of, "coef": coef.tolist(), "intercept": rng.normal(size=4).tolist()}


HEADS: dict[str, Head] = {
    f"{task}, {combiner}, {kind}": Head(task, combiner, params, kind)
    for task, combiner, params, kind in (
        ("classification", "mean", {}, "logits"),
        ("classification", "mean", {}, "probabilities"),
        ("classification", "mean-logits", {}, "logits"),
        ("classification", "mean-logits", {}, "probabilities"),
        ("classification", "vote", {}, "logits"),
        ("classification", "weighted", {"weights": [0.5, 0.2, 0.3]}, "probabilities"),
        ("classification", "temperature", {"temperature": 1.7}, "probabilities"),
        ("multilabel", "mean", {}, "logits"),
        ("multilabel", "mean", {}, "probabilities"),
        ("multilabel", "vote", {}, "logits"),
        ("multilabel", "temperature", {"temperature": 0.6}, "logits"),
        ("classification", "stack-ridge", linear_model("probabilities"), "logits"),
        ("classification", "stack-logistic", linear_model("log-probabilities"), "logits"),
        ("classification", "stack-logistic", linear_model("log-probabilities"), "probabilities"),
        ("regression", "ridge", linear_model("values"), "logits"),
        ("regression", "mean", {}, "logits"),
        ("regression", "weighted", {"weights": [0.5, 0.2, 0.3]}, "logits"),
    )
}


@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize("name", HEADS)
def test_every_combiner_is_exported(name: str, fuse: bool) -> None:
    head, members = HEADS[name], linears()
    interface = Interface(ROW.ports, None, head.output_name)
    made = Maker(members, head, [rows()], interface).make(fuse=fuse)
    assert made.model.graph.outputs[0].name == head.output_name
    whole = EnsembleModule(members, head)
    for count in (1, 2, 9):
        with torch.no_grad():
            wanted = whole(rows(count)).numpy()
        np.testing.assert_allclose(run(made.model, x=rows(count)), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["logits", "probabilities"])
def test_one_member_needs_no_combiner(kind: str) -> None:
    head = Head("classification", None, {}, kind)
    (model,) = linears(count=1)
    made = Maker([model], head, [rows()], Interface(ROW.ports, None, kind)).make()
    with torch.no_grad():
        said = model(rows())
    wanted = said if kind == "logits" else said.softmax(1)
    np.testing.assert_allclose(run(made.model, x=rows()), wanted.numpy(), rtol=1e-5, atol=1e-6)
    assert made.fused == 0


@pytest.mark.parametrize("fuse", [False, True])
def test_outputs_with_two_open_sizes(fuse: bool) -> None:
    """A segmentation net for images of any size: channels of members cannot be parted."""
    torch.manual_seed(0)
    members = [
        nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 4, 1)).eval()
        for _ in range(MEMBERS)
    ]
    port = Port("x", "float32", ("batch", 3, "height", "width"))
    head = Head("segmentation", "mean")
    maker = Maker(members, head, [torch.randn(2, 3, 6, 7)], Interface((port,), None, "logits"))
    made = maker.make(fuse=fuse)
    whole = EnsembleModule(members, head)
    for shape in ((1, 3, 5, 9), (3, 3, 8, 8)):
        x = torch.randn(shape)
        with torch.no_grad():
            wanted = whole(x).numpy()
        np.testing.assert_allclose(run(made.model, x=x), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("fuse", [False, True])
def test_outputs_of_one_open_size_besides_the_batch(fuse: bool) -> None:
    torch.manual_seed(0)
    members = [
        nn.Sequential(nn.Conv1d(3, 6, 3, padding=1), nn.ReLU(), nn.Conv1d(6, 4, 1)).eval()
        for _ in range(MEMBERS)
    ]
    port = Port("x", "float32", ("batch", 3, "length"))
    head = Head("segmentation", "mean")
    maker = Maker(members, head, [torch.randn(2, 3, 6)], Interface((port,), None, "logits"))
    made = maker.make(fuse=fuse)
    x = torch.randn(3, 3, 11)
    with torch.no_grad():
        wanted = EnsembleModule(members, head)(x).numpy()
    np.testing.assert_allclose(run(made.model, x=x), wanted, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------ names


class Named(nn.Module):
    """A parameter, a submodule and an operator of any name."""

    def __init__(self, parameter: str) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 4)
        self.own = parameter
        self.register_parameter(parameter, nn.Parameter(torch.randn(5)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = torch.relu(self.linear(x + self.get_parameter(self.own)))
        return made


@pytest.mark.parametrize("exporter", ["dynamo", "torchscript"])
@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize(
    "port, output, parameter",
    [
        ("x", "logits", "logits"),
        ("x", "x.1", "x"),
        ("input", "logits", "input"),
        ("relu", "add", "linear_"),
        ("linear.weight", "linear.bias", "scale"),
        ("member_0.scale", "members.scale", "scale"),
        ("head.outputs", "combined", "combined"),
        ("constant", "outputs", "constant_"),
        ("a b/c:d", "größe", "scale"),
    ],
)
def test_names_that_meet(
    port: str, output: str, parameter: str, fuse: bool, exporter: Exporter
) -> None:
    torch.manual_seed(0)
    members = [Named(parameter).eval() for _ in range(MEMBERS)]
    interface = Interface((Port(port, "float32", ("batch", 5)),), None, output)
    head = Head("classification", "mean")
    made = Maker(members, head, [rows()], interface, exporter=exporter).make(fuse=fuse)
    ready = session(made.model)
    assert [v.name for v in ready.get_inputs()] == [port]
    assert [v.name for v in ready.get_outputs()] == [output]
    (found,) = ready.run(None, {port: rows(7).numpy()})
    with torch.no_grad():
        wanted = EnsembleModule(members, head)(rows(7)).numpy()
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("fuse", [False, True])
def test_a_model_that_returns_its_input(fuse: bool) -> None:
    members = [nn.Identity().eval() for _ in range(2)]
    made = Maker(members, Head("regression", "mean"), [rows()], ROW).make(fuse=fuse)
    np.testing.assert_allclose(run(made.model, x=rows()), rows().numpy(), rtol=1e-6)


class Constant(nn.Module):
    """Says its weights, whatever it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.said = nn.Parameter(torch.randn(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.said.expand(x.shape[0], -1)


@pytest.mark.parametrize("fuse", [False, True])
def test_a_model_that_ignores_its_input(fuse: bool) -> None:
    torch.manual_seed(0)
    members = [Constant().eval() for _ in range(MEMBERS)]
    head = Head("regression", "mean")
    made = Maker(members, head, [rows()], ROW).make(fuse=fuse)
    with torch.no_grad():
        wanted = EnsembleModule(members, head)(rows(6)).numpy()
    np.testing.assert_allclose(run(made.model, x=rows(6)), wanted, rtol=1e-6)


def test_members_of_another_structure_are_refused() -> None:
    members = [nn.Sequential(nn.Linear(5, 4)), nn.Sequential(nn.ReLU(), nn.Linear(5, 4))]
    with pytest.raises(IncompatibleError, match=r"a member has no '0\.weight'"):
        Maker(members, Head("classification", "mean"), [rows()], ROW)


def test_making_twice_gives_the_same_graph() -> None:
    maker = Maker(linears(), Head("classification", "mean"), [rows()], ROW)
    first, second = (
        ir.to_proto(maker.make(fuse=fuse).model).SerializeToString() for fuse in (True, True)
    )
    assert first == second
    plain = maker.make(fuse=False)
    assert plain.fused == 0
    assert ir.to_proto(maker.make(fuse=True).model).SerializeToString() == first


def test_members_are_left_as_they_were() -> None:
    members = linears()
    before = [{k: v.clone() for k, v in m.state_dict().items()} for m in members]
    for exporter in ("dynamo", "torchscript"):
        maker = Maker(members, Head("classification", "mean"), [rows()], ROW, exporter=exporter)
        maker.make(fuse=True)
    for model, state in zip(members, before, strict=True):
        assert not model.training
        assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
        assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("opset", [18, 20, 23])
def test_the_operator_set_is_the_one_asked_for(opset: int) -> None:
    torch.manual_seed(0)
    members = [
        nn.Sequential(nn.Linear(5, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 4)).eval()
        for _ in range(MEMBERS)
    ]
    head = Head("classification", "mean")
    maker = Maker(members, head, [rows()], ROW, opset=opset)
    with torch.no_grad():
        wanted = EnsembleModule(members, head)(rows(6)).numpy()
    for fuse in (False, True):
        made = maker.make(fuse=fuse)
        assert made.model.graph.opset_imports[""] == opset
        np.testing.assert_allclose(run(made.model, x=rows(6)), wanted, rtol=1e-5, atol=1e-5)


def test_tidying_merges_and_drops() -> None:
    one = template(
        "a = Relu (x) b = Relu (x) c = Neg (x) y = Add (a, b)", ports={"x": "float[N, 5]"}
    )
    tidy(one.model)
    assert dict(counts(one.model)) == {"Relu": 1, "Add": 1}
