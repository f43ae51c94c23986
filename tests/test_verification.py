"""Owns the proof that a sabotaged file is caught, and by the check that is meant for it."""

from __future__ import annotations

import functools
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest
import torch
from torch import nn

from ensemblekit.batches import Batch
from ensemblekit.ensemble_module import EnsembleModule, Head
from ensemblekit.errors import NotFiniteError
from ensemblekit.graphs import saving
from ensemblekit.graphs.making import Maker
from ensemblekit.graphs.template import Interface, Port
from ensemblekit.verification import CHECKS, TOLERANCES, Samples, Verification, verify
from tests.graphs.building import template

torch.set_num_threads(1)

SIDE, CLASSES = 6, 7
IMAGE = Port("image", "float32", ("batch", 3, SIDE, SIDE))
INTERFACE = Interface((IMAGE,), None, "logits")


class Net(nn.Module):
    """BatchNorm, a reshape, a head: what exporters get wrong."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.conv = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.fc = nn.Linear(8 * SIDE * SIDE, CLASSES)
        nn.init.uniform_(self.bn.running_mean, -1, 1)  # type: ignore[arg-type]
        nn.init.uniform_(self.bn.running_var, 0.5, 2)  # type: ignore[arg-type]

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.bn(self.conv(image)))
        made: torch.Tensor = self.fc(x.reshape(x.shape[0], -1))
        return made


@functools.cache
def net() -> nn.Module:
    return Net().eval()


def images(count: int = 64, seed: int = 1) -> torch.Tensor:
    return torch.randn(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))


@functools.cache
def exported() -> bytes:
    """The honest graph, BatchNorm not folded."""
    made = Maker([net()], Head("classification"), [images(3)], INTERFACE).make(fold=False)
    return bytes(ir.to_proto(made.model).SerializeToString())


def graph() -> ir.Model:
    import onnx

    return ir.from_proto(onnx.load_from_string(exported()))


def samples(target: torch.Tensor | None = None) -> Samples:
    batch = Batch((images(),), target, 64)
    return Samples(lambda: [batch], batch, real=target is not None)


def checked(
    path: Path,
    *,
    module: nn.Module | None = None,
    interface: Interface = INTERFACE,
    given: Samples | None = None,
    task: str = "classification",
    precision: str = "fp32",
) -> Verification:
    return verify(
        path, module or net(), interface, given or samples(), task=task, precision=precision
    )


def saved(model: ir.Model, folder: Path, *, external: bool = False) -> Path:
    path = folder / "net.onnx"
    saving.save(model, path, external_above=0 if external else saving.EXTERNAL_ABOVE)
    return path


def node(model: ir.Model, op_type: str) -> ir.Node:
    return next(n for n in model.graph if n.op_type == op_type)


def replaced(value: ir.Value | None, array: npt.NDArray[Any]) -> None:
    assert value is not None
    value.const_value = ir.tensor(array, name=value.name)
    value.shape = ir.Shape(array.shape)


def numbers(value: ir.Value | None) -> npt.NDArray[Any]:
    assert value is not None
    assert value.const_value is not None
    return value.const_value.numpy().copy()


# ------------------------------------------------------------------------------ honest files


@pytest.mark.parametrize("external", [False, True])
def test_an_honest_file_passes(tmp_path: Path, external: bool) -> None:
    found = checked(saved(graph(), tmp_path, external=external))
    assert found.passed, found.failed
    assert found.failed is None
    assert found.batch_sizes == [1, 2, 7, 64]
    assert found.samples == 64
    assert found.decision_flips == found.ties == 0
    assert found.classes_seen is not None
    assert found.classes_seen >= 5
    assert found.max_abs_diff is not None
    assert found.max_rel_diff is not None
    largest = float(net()(images()).detach().abs().max())
    assert found.max_rel_diff >= found.max_abs_diff / largest * (1 - 1e-3)  # of its own sample
    assert found.max_rel_diff < 1e-5
    assert found.metric is None
    shown = found.to_json()
    assert shown["failed"] is None
    assert shown["passed"] is True


def test_the_metric_is_measured_on_both_sides(tmp_path: Path) -> None:
    with torch.no_grad():
        target = net()(images()).argmax(1)
    target[:16] = (target[:16] + 1) % CLASSES
    target[-8:] = -100  # ignored
    found = checked(saved(graph(), tmp_path), given=samples(target))
    assert found.passed, found.failed
    assert found.real
    assert found.metric == "accuracy"
    assert found.metric_torch == found.metric_onnx == pytest.approx(40 / 56)


def test_the_metric_of_a_regression(tmp_path: Path) -> None:
    with torch.no_grad():
        target = net()(images()) + 0.5
    found = checked(saved(graph(), tmp_path), given=samples(target), task="regression")
    assert found.passed, found.failed
    assert found.metric == "mse"
    assert found.decision_flips is None
    assert found.classes_seen is None


@pytest.mark.parametrize("probabilities", [False, True])
def test_labels_are_decided_at_one_half(tmp_path: Path, probabilities: bool) -> None:
    kind = "probabilities" if probabilities else "logits"
    head = Head("multilabel", None, {}, kind)
    interface = Interface((IMAGE,), None, kind)
    made = Maker([net()], head, [images(3)], interface).make()
    target = (torch.rand(64, CLASSES, generator=torch.Generator().manual_seed(4)) < 0.5).float()
    module = EnsembleModule([net()], head).eval()
    found = verify(
        saved(made.model, tmp_path),
        module,
        interface,
        samples(target),
        task="multilabel",
        probabilities=probabilities,
    )
    assert found.passed, found.failed
    with torch.no_grad():
        right = ((net()(images()) > 0) == (target > 0)).float().mean()
    assert found.classes_seen == 2
    assert found.metric_torch == pytest.approx(float(right))


# ------------------------------------------------------------------------------ sabotage


def wrong_batch_norm(model: ir.Model) -> None:
    mean = node(model, "BatchNormalization").inputs[3]
    replaced(mean, np.zeros_like(numbers(mean)))


def wrong_epsilon(model: ir.Model) -> None:
    norm = node(model, "BatchNormalization")
    norm.attributes["epsilon"] = ir.AttrFloat32("epsilon", 0.1)


def slightly_wrong_weights(model: ir.Model) -> None:
    weight = node(model, "Conv").inputs[1]
    array = numbers(weight)
    array.flat[0] += 0.05
    replaced(weight, array)


def permuted_classes(model: ir.Model) -> None:
    gemm = node(model, "Gemm")
    order = np.roll(np.arange(CLASSES), 1)
    for value in gemm.inputs[1:]:
        replaced(value, numbers(value)[order])


def not_a_number(model: ir.Model) -> None:
    bias = node(model, "Gemm").inputs[2]
    array = numbers(bias)
    array[3] = np.nan
    replaced(bias, array)


def infinite(model: ir.Model) -> None:
    bias = node(model, "Gemm").inputs[2]
    array = numbers(bias)
    array[3] = -np.inf
    replaced(bias, array)


def frozen_input(model: ir.Model) -> None:
    model.graph.inputs[0].shape = ir.Shape((64, 3, SIDE, SIDE))


def frozen_output(model: ir.Model) -> None:
    model.graph.outputs[0].shape = ir.Shape((64, CLASSES))


def frozen_reshape(model: ir.Model) -> None:
    """Where ONNX Runtime sees it, so that it freezes the output's size."""
    reshape = node(model, "Reshape")
    reshape.replace_input_with(1, constant(model, "frozen", np.array([64, -1])))


def frozen_out_of_sight(model: ir.Model) -> None:
    """A size that is worked out while the graph runs, and is 64 whatever it is given."""
    reshape = node(model, "Reshape")
    port = model.graph.inputs[0]
    parts = [
        ir.node("ReduceMax", [port], {"keepdims": 0}),
    ]
    parts.append(
        ir.node("Clip", [parts[-1].outputs[0], *2 * [constant(model, "n", np.float32(64))]])
    )
    parts.append(ir.node("Cast", [parts[-1].outputs[0]], {"to": int(ir.DataType.INT64)}))
    first = constant(model, "axis", np.array([0]))
    parts.append(ir.node("Unsqueeze", [parts[-1].outputs[0], first]))
    rest = constant(model, "rest", np.array([8 * SIDE * SIDE]))
    parts.append(ir.node("Concat", [parts[-1].outputs[0], rest], {"axis": 0}))
    for n, part in enumerate(parts):
        part.outputs[0].name = f"sight_{n}"
        model.graph.insert_before(reshape, part)
    reshape.replace_input_with(1, parts[-1].outputs[0])
    reshape.outputs[0].shape = None


def constant(model: ir.Model, name: str, array: Any) -> ir.Value:
    tensor = ir.tensor(np.asarray(array), name=name)
    value = ir.Value(name=name, const_value=tensor, shape=ir.Shape(np.shape(array)))
    value.type = ir.TensorType(tensor.dtype)
    model.graph.register_initializer(value)
    return value


def renamed_output(model: ir.Model) -> None:
    model.graph.outputs[0].name = "scores"


def renamed_input(model: ir.Model) -> None:
    model.graph.inputs[0].name = "picture"


def double_input(model: ir.Model) -> None:
    """Takes float64 and makes float32 of it."""
    port = model.graph.inputs[0]
    port.type = ir.TensorType(ir.DataType.DOUBLE)
    cast = ir.node("Cast", [port], {"to": int(ir.DataType.FLOAT)})
    first = next(iter(model.graph))
    port.replace_all_uses_with(cast.outputs[0])
    cast.replace_input_with(0, port)
    model.graph.insert_before(first, cast)
    cast.outputs[0].name = "as_float"


def missing_axis(model: ir.Model) -> None:
    model.graph.inputs[0].shape = ir.Shape(("batch", 3, SIDE * SIDE))
    conv = node(model, "Conv")
    shape = constant(model, "in_space_shape", np.array([0, 3, SIDE, SIDE]))
    made = ir.node("Reshape", [model.graph.inputs[0], shape])
    made.outputs[0].name = "in_space"
    model.graph.insert_before(conv, made)
    conv.replace_input_with(0, made.outputs[0])


def second_output(model: ir.Model) -> None:
    made = ir.node("Identity", [node(model, "Relu").outputs[0]])
    made.outputs[0].name = "features"
    made.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    made.outputs[0].shape = ir.Shape(("batch", 8, SIDE, SIDE))
    model.graph.append(made)
    model.graph.outputs.insert(0, made.outputs[0])


def swapped_outputs(model: ir.Model) -> None:
    """Two outputs under each other's names."""
    second_output(model)
    features, said = model.graph.outputs
    said.name = "swapped"
    features.name = "logits"
    said.name = "features"


def another_output(model: ir.Model) -> None:
    """The right name, on something else."""
    second_output(model)
    model.graph.outputs.pop().name = "was_logits"
    model.graph.outputs[0].name = "logits"


def an_operator_that_does_not_exist(model: ir.Model) -> None:
    relu = node(model, "Relu")
    relu.op_type, relu.domain = "Relux", "nowhere"
    model.graph.opset_imports["nowhere"] = 1


SABOTAGE: dict[str, tuple[Callable[[ir.Model], None], str, str]] = {
    "wrong BatchNorm constants": (wrong_batch_norm, "numbers", "outputs differ"),
    "wrong epsilon": (wrong_epsilon, "numbers", "outputs differ"),
    "one wrong weight": (slightly_wrong_weights, "numbers", "outputs differ"),
    "permuted classes": (permuted_classes, "numbers", "outputs differ"),
    "NaN": (not_a_number, "numbers", "NaN or Inf"),
    "Inf": (infinite, "numbers", "NaN or Inf"),
    "batch frozen in the input": (frozen_input, "interface", "frozen at 64"),
    "batch frozen in the output": (frozen_output, "interface", "frozen at 64"),
    "batch frozen in a Reshape in sight": (frozen_reshape, "interface", "frozen at 64"),
    "batch frozen in a Reshape": (frozen_out_of_sight, "batch sizes", "batch size 1"),
    "another output": (another_output, "batch sizes", "shape"),
    "output renamed": (renamed_output, "interface", "scores"),
    "outputs swapped": (swapped_outputs, "interface", "features"),
    "output added": (second_output, "interface", "features"),
    "input renamed": (renamed_input, "interface", "picture"),
    "wrong type of input": (double_input, "interface", "tensor(double)"),
    "wrong rank of input": (missing_axis, "interface", "sizes"),
    "unknown operator": (an_operator_that_does_not_exist, "session", "refuses"),
}


@pytest.mark.parametrize("what", SABOTAGE)
def test_sabotage_is_caught(what: str, tmp_path: Path) -> None:
    harm, check, words = SABOTAGE[what]
    model = graph()
    harm(model)
    found = checked(saved(model, tmp_path))
    assert not found.passed
    assert found.failed is not None
    assert found.failed[0] == check, found.failed
    assert words in found.failed[1]
    assert found.failed[0] in CHECKS
    assert found.to_json()["failed"]["check"] == check


def data_cut_short(path: Path) -> None:
    data = path.with_name(saving.data_name(path.name))
    data.write_bytes(data.read_bytes()[:-100])


def data_missing(path: Path) -> None:
    path.with_name(saving.data_name(path.name)).unlink()


def data_elsewhere(path: Path) -> None:
    folder = path.parent / "deep"
    folder.mkdir()
    shutil.move(path, folder / path.name)
    moved = (folder / path.name).read_bytes()
    path.write_bytes(moved.replace(b"net.onnx.data", b"../nt.onnx.da"))


def garbage(path: Path) -> None:
    path.write_bytes(b"not a graph" * 100)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-300])


def gone(path: Path) -> None:
    path.unlink()


@pytest.mark.parametrize(
    "harm", [data_cut_short, data_missing, data_elsewhere, garbage, empty, cut_short, gone]
)
def test_a_broken_file_is_caught(harm: Callable[[Path], None], tmp_path: Path) -> None:
    path = saved(graph(), tmp_path, external=True)
    assert checked(path).passed
    harm(path)
    found = checked(path)
    assert found.failed is not None
    assert found.failed[0] == "file", found.failed
    assert not found.batch_sizes


def test_data_of_another_model_are_caught_by_the_numbers(tmp_path: Path) -> None:
    path = saved(graph(), tmp_path, external=True)
    data = path.with_name(saving.data_name(path.name))
    data.write_bytes(data.read_bytes()[::-1])
    found = checked(path)
    assert found.failed is not None
    assert found.failed[0] == "numbers"


def test_a_module_with_other_outputs_is_caught(tmp_path: Path) -> None:
    class Fewer(nn.Module):
        def forward(self, image: torch.Tensor) -> torch.Tensor:
            made: torch.Tensor = net()(image)
            return made[:, :-1]

    found = checked(saved(graph(), tmp_path), module=Fewer())
    assert found.failed is not None
    assert found.failed[0] == "batch sizes"


# ------------------------------------------------------------------------------ decisions


class Fixed(nn.Module):
    """Logits as they are given, whatever the sample: rows by the sample's first number."""

    def __init__(self, rows: torch.Tensor) -> None:
        super().__init__()
        self.rows = nn.Parameter(rows)

    def forward(self, index: torch.Tensor) -> torch.Tensor:
        return self.rows[index]


def compared(wanted: list[list[float]], got: list[list[float]], precision: str) -> Verification:
    """Torch says `wanted`, the file says `got`."""
    rows = len(wanted)
    interface = Interface((Port("index", "int64", ("batch",)),), None, "logits")
    one = template(
        "logits = Gather (rows, index)",
        ports={"index": "int64[batch]"},
        weights={"rows": f"float[{rows}, {len(wanted[0])}]"},
        output=f"float[batch, {len(wanted[0])}] logits",
    )
    value = one.graph.inputs.pop()
    value.const_value = ir.tensor(np.array(got, np.float32), name="rows")
    one.graph.register_initializer(value)
    batch = Batch((torch.arange(rows),), None, rows)
    with tempfile.TemporaryDirectory() as folder:
        return verify(
            saved(one.model, Path(folder)),
            Fixed(torch.tensor(wanted)).eval(),
            interface,
            Samples(lambda: (), batch, real=False),
            task="classification",
            precision=precision,
            batch_sizes=(rows,),
        )


def test_ties_are_not_flips() -> None:
    found = compared([[1.0, 1.0 - 1e-7], [0, 1], [3, 0]], [[1 - 1e-7, 1.0], [0, 1], [3, 0]], "fp32")
    assert found.passed, found.failed
    assert (found.decision_flips, found.ties) == (0, 1)


def test_one_large_output_hides_no_flip_elsewhere() -> None:
    top = 1e6
    found = compared([[top, 0], [1e-2, 0], [0, 3]], [[top, 0], [0, 1e-3], [0, 3]], "fp32")
    assert found.failed is not None
    assert (found.decision_flips, found.ties) == (1, 0)


def test_classes_that_a_model_rules_out_hide_nothing() -> None:
    wanted = [[-1e9, 1.0, 2.0], [-1e9, 0.5, 0.0], [-1e9, 0.0, 3.0]]
    got = [[-1e9, 1.0, 2.0], [-1e9, 0.0, 0.5], [-1e9, 0.0, 3.0]]
    assert compared(wanted, wanted, "fp32").passed
    found = compared(wanted, got, "fp32")
    assert found.failed is not None
    assert found.decision_flips == 1
    risen = [[2.0, 1.0, 2.0], *wanted[1:]]
    assert compared(wanted, risen, "fp32").failed is not None


def test_int8_may_change_numbers_and_few_decisions() -> None:
    wanted = [[float(n % 4 == c) for c in range(4)] for n in range(100)]
    got = [[2 * v for v in row] for row in wanted]
    assert compared(wanted, got, "int8-dynamic").passed
    for n in range(5):
        got[n] = got[n][::-1]
    found = compared(wanted, got, "int8-static")
    assert found.passed, found.failed
    assert found.decision_flips == 5
    got[5] = got[5][::-1]
    found = compared(wanted, got, "int8-static")
    assert found.failed is not None
    assert found.failed[0] == "decisions"
    assert "6 of 100" in found.failed[1]


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_the_tolerance_of_a_precision(precision: str) -> None:
    ratio = TOLERANCES[precision].ratio
    assert ratio is not None
    wanted = [[10.0, 0.0], [0.0, 10.0], [10.0, 5.0]]
    for share, passes in ((0.9, True), (1.1, False)):
        got = [[a + share * 10 * ratio, b] for a, b in wanted]
        found = compared(wanted, got, precision)
        allowed = found.max_abs_diff is not None and found.max_abs_diff <= 10 * ratio
        assert allowed is passes
        assert found.passed is passes
        assert passes or (found.failed or ("", ""))[0] == "numbers"


def test_a_model_that_gives_nan_is_no_reference() -> None:
    nan = float("nan")
    with pytest.raises(NotFiniteError, match="NaN"):
        compared([[1.0, nan], [0, 1], [3, 0]], [[1.0, nan], [0, 1], [3, 0]], "fp32")


def test_infinity_on_both_sides_has_the_same_sign() -> None:
    inf = float("inf")
    rows: list[list[float]] = [[1.0, -inf], [0, 1], [3, 0]]
    assert compared(rows, rows, "fp32").passed
    assert not compared(rows, [[1.0, inf], [0, 1], [3, 0]], "fp32").passed


def test_nan_where_torch_has_a_number_is_caught() -> None:
    nan = float("nan")
    found = compared([[1.0, 0.5], [0, 1], [3, 0]], [[1.0, nan], [0, 1], [3, 0]], "fp32")
    assert found.failed is not None
    assert found.failed[0] == "numbers"


class Total(nn.Module):
    """The sum of rows of any length, once and twice."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.sum(1, keepdim=True) * torch.tensor([1.0, 2.0])


def test_a_length_frozen_out_of_sight_is_caught_on_real_samples(tmp_path: Path) -> None:
    """What fails only on one of the real batches is a failed check like any other."""
    one = template(
        "f = Reshape (x, shape) s = ReduceSum (f, axis) logits = Mul (s, twice)",
        ports={"x": "float[batch, length]"},
        constants={
            "int64[2] shape": "{-1, 8}",
            "int64[1] axis": "{1}",
            "float[1, 2] twice": "{1.0, 2.0}",
        },
        output="float[n, 2] logits",
    )
    interface = Interface((Port("x", "float32", ("batch", "length")),), None, "logits")
    whole, others = (
        Batch((torch.randn(4, length),), torch.zeros(4, dtype=torch.long), 4) for length in (8, 5)
    )
    for broken in (others, Batch((torch.randn(4, 16),), torch.zeros(4, dtype=torch.long), 4)):
        found = verify(
            saved(one.model, tmp_path),
            Total(),
            interface,
            Samples(lambda broken=broken: [whole, broken], whole, real=True),  # type: ignore[misc]
            task="classification",
        )
        assert not found.passed
        assert found.failed is not None
        assert found.failed[0] in ("batch sizes", "open axes", "numbers")
