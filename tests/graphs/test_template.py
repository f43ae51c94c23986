"""Owns the proof that a template has every weight open, and says with any weights what torch says."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from ensemblekit.ensemble_module import OneOutput
from ensemblekit.errors import IncompatibleError, UnsupportedError
from ensemblekit.graphs.template import (
    EXPORTERS,
    Exporter,
    Interface,
    Port,
    Template,
    export_template,
    export_whole,
    weights_of,
)
from tests.architectures import ARCHITECTURES, members
from tests.graphs.building import one_by_one, session

torch.set_num_threads(1)

ROW = Interface((Port("x", "float32", ("batch", 5)),), None, "logits")
by_each = pytest.mark.parametrize("exporter", EXPORTERS)


def exported(module: nn.Module, exporter: Exporter, interface: Interface = ROW) -> Template:
    return export_template(module.eval(), [torch.randn(3, 5)], interface, exporter=exporter)


class Mixed(nn.Module):
    """Equal weights, a buffer, something unused, a constant, a scalar."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.ones(5))
        self.second = nn.Parameter(torch.ones(5))
        self.register_buffer("offset", torch.zeros(5))
        self.register_buffer("local", torch.full((5,), 2.0), persistent=False)
        self.unused = nn.Linear(5, 5)
        self.scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x * self.first + self.second + self.get_buffer("offset")) * self.scale * 2


@by_each
def test_every_weight_that_is_used_is_open(exporter: Exporter) -> None:
    """Equal ones stay apart, for in other members they differ; zeros and ones are not constants."""
    made = exported(Mixed(), exporter)
    assert set(made.weights) == {"first", "second", "offset", "scale"}
    assert made.ports == ("x",)
    assert [value.name for value in made.graph.inputs][1:] == [*made.weights]
    assert made.exporter == exporter


@by_each
def test_other_weights_can_be_filled_in(exporter: Exporter) -> None:
    made = exported(Mixed(), exporter)
    torch.manual_seed(1)
    other = Mixed().eval()
    for tensor in (*other.parameters(), other.get_buffer("offset")):
        nn.init.normal_(tensor.data) if tensor.ndim else tensor.data.fill_(3.0)
    x = torch.randn(7, 5)
    (found,) = one_by_one(made, [weights_of(other, made)], {"x": x.numpy()})
    with torch.no_grad():
        np.testing.assert_allclose(found, other(x).numpy(), rtol=1e-6)


class WithLocal(Mixed):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * self.get_buffer("local")


@by_each
def test_buffers_that_are_not_saved_are_constants(exporter: Exporter) -> None:
    made = exported(WithLocal(), exporter)
    assert "local" not in made.weights
    model = WithLocal().eval()
    x = torch.randn(2, 5)
    (found,) = one_by_one(made, [weights_of(model, made)], {"x": x.numpy()})
    with torch.no_grad():
        np.testing.assert_allclose(found, model(x).numpy(), rtol=1e-6)


@by_each
def test_tied_weights_are_one(exporter: Exporter) -> None:
    one = ARCHITECTURES["gpt"]
    (model,) = members(one, 1)
    port = Port("idx", "int64", ("batch", "length"))
    ids = one.inputs(3, 0)
    assert isinstance(ids, tuple)
    made = export_template(model, list(ids), Interface((port,), None, "logits"), exporter=exporter)
    assert len({"wte.weight", "lm_head.weight"} & set(made.weights)) == 1
    for other in members(one, 2):
        for shape in ((1, 4), (2, 12)):
            given = torch.randint(0, 50, shape)
            (found,) = one_by_one(made, [weights_of(other, made)], {"idx": given.numpy()})
            with torch.no_grad():
                wanted = other(given).numpy()
            np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)


class Branching(nn.Module):
    """Takes a way that depends on values."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2 if float(x.sum()) > 0 else x - 1


class Unknown(nn.Module):
    """An operator that ONNX has not."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        values: torch.Tensor = torch.linalg.eigvals(x.T @ x).real
        return values.expand(x.shape[0], -1)


def test_what_the_default_exporter_cannot_is_told() -> None:
    with pytest.raises(UnsupportedError, match="the dynamo exporter failed: "):
        exported(Branching(), "dynamo")


@by_each
def test_unknown_operators_are_told_in_one_line(
    exporter: Exporter, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UnsupportedError) as caught:
        exported(Unknown(), exporter)
    assert caught.value.message.startswith(f"the {exporter} exporter failed: ")
    assert "\n" not in caught.value.message
    said = capfd.readouterr()
    assert said.out == said.err == ""


@by_each
def test_exports_are_quiet(exporter: Exporter, capfd: pytest.CaptureFixture[str]) -> None:
    exported(nn.Sequential(nn.Linear(5, 5), nn.GELU()), exporter)
    said = capfd.readouterr()
    assert said.out == said.err == ""


@by_each
def test_the_model_is_left_as_it_was(exporter: Exporter) -> None:
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4)).eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    exported(model, exporter)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not model.training
    assert torch.is_grad_enabled()


@by_each
def test_batch_norm_stays_as_it_is(exporter: Exporter) -> None:
    """It is folded when the weights are known."""
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.ReLU())
    made = exported(model, exporter)
    assert "BatchNormalization" in {node.op_type for node in made.graph}
    assert {"1.running_mean", "1.running_var", "1.weight", "1.bias"} <= set(made.weights)


def test_weights_of_a_member_without_one() -> None:
    made = exported(nn.Sequential(nn.Linear(5, 4)), "torchscript")
    with pytest.raises(IncompatibleError, match=r"a member has no '0\."):
        weights_of(nn.Sequential(nn.ReLU(), nn.Linear(5, 4)), made)


def test_weights_of_a_member_of_other_sizes() -> None:
    made = exported(nn.Sequential(nn.Linear(5, 4)), "torchscript")
    with pytest.raises(IncompatibleError):
        weights_of(nn.Sequential(nn.Linear(5, 3)), made)


def test_a_whole_export_has_no_open_weights() -> None:
    model = nn.Sequential(nn.Linear(5, 4), nn.ReLU()).eval()
    made = export_whole(OneOutput(model), [torch.randn(3, 5)], ROW)
    x = torch.randn(4, 5)
    (found,) = session(made).run(None, {"x": x.numpy()})
    with torch.no_grad():
        np.testing.assert_allclose(found, model(x).numpy(), rtol=1e-5, atol=1e-6)


def test_a_port_reads_as_input_is_written() -> None:
    assert str(Port("ids", "int64", ("batch", 7))) == "ids:int64[batch,7]"
