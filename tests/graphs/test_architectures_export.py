"""Owns the proof that twelve kinds of networks export right: alone, as ensembles, fused, frozen.

Every network is exported once by each exporter; what is compared with are plain runs in torch.
"""

from __future__ import annotations

import copy
import functools
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import nn

from ensemblekit.batches import Batch
from ensemblekit.ensemble_module import EnsembleModule, Head
from ensemblekit.graphs import saving
from ensemblekit.graphs.choosing import attempts
from ensemblekit.graphs.interface import example_of, inputs_of, interface_of
from ensemblekit.graphs.making import Made, Maker
from ensemblekit.graphs.template import EXPORTERS, Exporter, Interface, weights_of
from ensemblekit.runtimes.onnx_runtime import Session
from ensemblekit.verification import Samples, Verification, verify
from tests.architectures import ARCHITECTURES, logits, members

torch.set_num_threads(1)

SIZES = (1, 2, 7, 64)
FIVE, TEN = 5, 10
THREE = ("resnet", "vit", "mlp")  # of which ten members are exported
UNSUPPORTED: dict[tuple[str, Exporter], str] = {}
"""What an exporter cannot, and the words in which it says so: none of these."""
FULLY_FUSED = ("resnet", "preact_resnet", "vgg", "densenet", "mobilenet", "convnext", "vit")
WORK = ("Conv", "Gemm", "MatMul", "BatchNormalization", "LayerNormalization", "Softmax", "Gelu")

each = pytest.mark.parametrize("name", ARCHITECTURES)
by_each_exporter = pytest.mark.parametrize("exporter", EXPORTERS)


@functools.cache
def models(name: str, count: int = FIVE, *, frozen: bool = False) -> tuple[nn.Module, ...]:
    return tuple(members(ARCHITECTURES[name], count, frozen=frozen))


@functools.cache
def batch_of(name: str) -> Batch:
    return Batch(ARCHITECTURES[name].inputs(64, 3), None, 64)


@functools.cache
def interface(name: str) -> Interface:
    return interface_of(models(name)[0], batch_of(name), [], "logits")


@functools.cache
def exported(name: str, exporter: Exporter) -> Maker:
    """The only export of a network; whatever is made of it shares its template."""
    return Maker(
        models(name)[:1],
        Head(ARCHITECTURES[name].task),
        example_of(batch_of(name), interface(name)),
        interface(name),
        exporter=exporter,
    )


@functools.cache
def head_graphs(name: str, count: int) -> dict[Any, Any]:
    """Exported heads, which depend on nothing but shapes."""
    return {}


@functools.cache
def maker(
    name: str, exporter: Exporter = "dynamo", count: int = FIVE, *, frozen: bool = False
) -> Maker:
    made_of = copy.copy(exported(name, exporter))
    every = models(name, count, frozen=frozen)
    made_of.weights = [weights_of(model, made_of.template) for model in every]
    made_of.head = Head(ARCHITECTURES[name].task, "mean")
    made_of._head_of = head_graphs(name, count)
    return made_of


@functools.cache
def made(
    name: str,
    exporter: Exporter = "dynamo",
    count: int = FIVE,
    *,
    frozen: bool = False,
    fuse: bool = False,
) -> Made:
    return maker(name, exporter, count, frozen=frozen).make(fuse=fuse)


@functools.cache
def single(name: str, exporter: Exporter, *, fold: bool = True) -> Made:
    return exported(name, exporter).make(fold=fold)


def checked(path: Path, name: str, module: nn.Module) -> Verification:
    head = Head(ARCHITECTURES[name].task)
    return verify(
        path,
        module,
        interface(name),
        Samples(lambda: (), batch_of(name), real=False),
        task=head.task,
        class_axis=head.class_axis,
        batch_sizes=SIZES,
    )


def mean_of_softmax(every: Sequence[nn.Module], batch: Batch) -> npt.NDArray[np.float64]:
    """Log of the mean of the members' probabilities, in float64 after their logits."""
    said_MNC = np.stack([logits(model, batch.inputs).double().numpy() for model in every])
    shifted = said_MNC - said_MNC.max(-1, keepdims=True)
    odds = np.exp(shifted)
    return np.asarray(np.log((odds / odds.sum(-1, keepdims=True)).mean(0)))


def operators(model: Any) -> Counter[str]:
    return Counter(node.op_type for node in model.graph)


@each
@by_each_exporter
def test_a_member_is_verified(name: str, exporter: Exporter, tmp_path: Path) -> None:
    path = tmp_path / "one.onnx"
    for fold in (True, False):
        saving.save(single(name, exporter, fold=fold).model, path)
        module = EnsembleModule(models(name)[:1], Head(ARCHITECTURES[name].task)).eval()
        found = checked(path, name, module)
        assert found.passed, found.failed
        assert found.batch_sizes == list(SIZES)
        assert found.max_rel_diff is not None
        assert found.max_rel_diff <= 1e-4
        assert found.decision_flips == 0
        assert found.classes_seen is not None
        assert found.classes_seen >= 5


def test_no_exporter_fails_on_these() -> None:
    """Should one begin to, its words belong into the table."""
    assert not UNSUPPORTED


def assert_equals_the_loop(
    found: Made, name: str, every: Sequence[nn.Module], folder: Path
) -> None:
    path = folder / "all.onnx"
    saving.save(found.model, path)
    session = Session(path, threads=1)
    whole = EnsembleModule(every, Head(ARCHITECTURES[name].task, "mean"))
    for size in (1, 2, 64):
        batch = batch_of(name).head(size)
        (said,) = session.run(inputs_of(batch, interface(name)))
        wanted = mean_of_softmax(every, batch)
        assert said.shape == wanted.shape
        scale = np.abs(wanted).max()
        np.testing.assert_allclose(said, wanted, rtol=0, atol=1e-5 * scale)
        with torch.inference_mode():
            ours = whole(**batch.inputs) if isinstance(batch.inputs, dict) else whole(*batch.inputs)
        np.testing.assert_allclose(ours.numpy(), wanted, rtol=0, atol=1e-5 * scale)
    assert len(np.unique(wanted.argmax(-1))) >= 5


@each
@by_each_exporter
@pytest.mark.parametrize("fuse", [False, True])
def test_five_members_are_one_file(
    name: str, exporter: Exporter, fuse: bool, tmp_path: Path
) -> None:
    found = made(name, exporter, fuse=fuse)
    assert (found.fused > 0) == fuse
    assert_equals_the_loop(found, name, models(name), tmp_path)


@pytest.mark.parametrize("name", THREE)
@pytest.mark.parametrize("fuse", [False, True])
def test_ten_members_are_one_file(name: str, fuse: bool, tmp_path: Path) -> None:
    found = made(name, "dynamo", TEN, fuse=fuse)
    assert_equals_the_loop(found, name, models(name, TEN), tmp_path)


@each
@pytest.mark.parametrize("fuse", [False, True])
def test_a_frozen_trunk_runs_once(name: str, fuse: bool, tmp_path: Path) -> None:
    every = models(name, frozen=True)
    found = made(name, frozen=True, fuse=fuse)
    assert_equals_the_loop(found, name, every, tmp_path)
    alone, apart = single(name, "dynamo").nodes, made(name).nodes
    head = heads_nodes(name)
    assert found.shared > 0
    if not fuse:
        assert found.nodes <= alone + FIVE * head + 20
        assert apart - found.nodes >= (FIVE - 1) * (alone - head) * 0.8 - 20


def heads_nodes(name: str) -> int:
    """Operators of one member that depend on weights of its own, when the trunk is frozen."""
    every = maker(name, frozen=True)
    differing = {
        key
        for key in every.template.weights
        if any((every.weights[0][key] != own[key]).any() for own in every.weights[1:])
    }
    reached = {v for v in every.template.graph.inputs if v.name in differing}
    count = 0
    for node in every.template.graph:
        if any(value in reached for value in node.inputs):
            reached.update(node.outputs)
            count += 1
    return count


@each
@pytest.mark.parametrize("fuse", [False, True])
def test_weights_of_a_frozen_trunk_are_stored_once(name: str, fuse: bool) -> None:
    def numbers(graph: Any) -> int:
        return sum(int(np.prod(v.shape)) for v in graph.initializers.values())

    own = [dict(model.named_parameters()) for model in models(name, frozen=True)]
    head = sum(
        value.numel() for key, value in own[0].items() if not torch.equal(value, own[1][key])
    )
    whole = numbers(single(name, "dynamo").model.graph)
    found = numbers(made(name, frozen=True, fuse=fuse).model.graph)
    assert found <= whole + FIVE * head * 1.05 + 4000


@pytest.mark.parametrize("name", FULLY_FUSED)
@by_each_exporter
def test_no_operator_runs_once_a_member(name: str, exporter: Exporter) -> None:
    one = operators(single(name, exporter).model)
    every = operators(made(name, exporter, fuse=True).model)
    for kind in WORK:
        gemms = one["Gemm"] if kind == "MatMul" else 0  # which become batched products
        assert every[kind] <= one[kind] + gemms, kind
    assert made(name, exporter, fuse=True).nodes < 2.5 * single(name, exporter).nodes


@pytest.mark.parametrize("name", ["resnet", "gpt", "dict_input", "multi_input"])
def test_the_chosen_graph_is_verified(name: str, tmp_path: Path) -> None:
    """As `export` does it: the first of the attempts."""
    every, head = models(name)[:2], Head(ARCHITECTURES[name].task, "mean")
    batch = batch_of(name)
    choice = next(
        attempts(
            every, head, example_of(batch, interface(name)), interface(name), batch, tmp_path,
            exporter="torchscript",  # the quicker one
        )
    )  # fmt: skip
    assert choice.made is not None
    assert not list(tmp_path.iterdir())
    path = tmp_path / "chosen.onnx"
    saving.save(choice.made.model, path)
    found = checked(path, name, EnsembleModule(every, head).eval())
    assert found.passed, found.failed
    assert (found.classes_seen or 0) >= 5
