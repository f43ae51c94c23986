"""Averaged weights against exact rational arithmetic, against torch, and through safetensors."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from torch.optim.swa_utils import AveragedModel

import ensemblekit
from ensemblekit import average
from ensemblekit.candidates import Row, mean_row
from ensemblekit.dtypes import DTYPES
from ensemblekit.state import materialize

from ..helpers import (
    Array,
    as_torch,
    read_set,
    sha256,
    with_batch_norm,
    write_safetensors,
    write_torch,
)

# significant bits, exponent of the smallest normal number
FORMATS = {
    "float64": (53, -1022),
    "float32": (24, -126),
    "float16": (11, -14),
    "bfloat16": (8, -126),
    "float8_e4m3fn": (4, -6),
    "float8_e5m2": (3, -14),
}
NARROWER = [name for name in FORMATS if name != "float64"]
ROWS = {
    "mean": mean_row(5),
    "weighted": Row((1.0, 2.0, 3.0, 4.0, 5.0), 15.0),
    "some": Row((0.0, 1.0, 0.0, 1.0, 1.0), 3.0),
    "beyond": Row((-1.0, 0.0, 0.0, 1.0, 3.0), 3.0),
    "tenths": Row((0.1, 0.2, 0.3, 0.1, 0.2), math.fsum((0.1, 0.2, 0.3, 0.1, 0.2))),
}


def nearest(exact: Fraction, dtype: str) -> float:
    """The nearest value of the format, ties to even."""
    digits, lowest = FORMATS[dtype]
    if exact == 0:
        return 0.0
    exponent = abs(exact.numerator).bit_length() - exact.denominator.bit_length()
    exponent -= abs(exact) < Fraction(2) ** exponent
    step = Fraction(2) ** (max(exponent, lowest) - digits + 1)
    return float(round(exact / step) * step)


def exact_sum(values: Sequence[float], row: Row) -> Fraction:
    terms = (Fraction(c) * Fraction(v) for c, v in zip(row.coefficients, values, strict=True))
    return sum(terms, Fraction(0)) / Fraction(row.divisor)


def drawn(dtype: str, count: int, *, size: int = 500) -> list[Array]:
    """Values around 1 in magnitude, some zero: sums of them lose nothing in float64."""
    rng = np.random.default_rng(FORMATS[dtype][0])
    form = DTYPES[dtype].numpy
    found = []
    for _ in range(count):
        signs = rng.choice([-1, 0, 1], p=[0.45, 0.1, 0.45], size=size)
        found.append((signs * rng.uniform(0.05, 4, size)).astype(form))
    return found


def made(folder: Path, arrays: Sequence[Array], row: Row) -> Array:
    names = [folder / f"snap_{k}.safetensors" for k in range(len(arrays))]
    paths = [write_safetensors(p, {"w": a}) for p, a in zip(names, arrays, strict=True)]
    [result], _ = materialize(read_set(*paths), [row])
    return result["w"].astype(np.float64)


@pytest.mark.parametrize("row", [name for name in ROWS if name != "tenths"])
@pytest.mark.parametrize("dtype", NARROWER)
def test_one_rounding_of_the_exact_sum(tmp_path: Path, dtype: str, row: str) -> None:
    arrays = drawn(dtype, 5)
    values_NK = np.stack(arrays, axis=1).astype(np.float64).tolist()
    expected = [nearest(exact_sum(values, ROWS[row]), dtype) for values in values_NK]
    assert made(tmp_path, arrays, ROWS[row]).tolist() == expected


@pytest.mark.parametrize("count", [2, 3, 7, 9, 31])
def test_float64_mean_against_fsum(tmp_path: Path, count: int) -> None:
    arrays = drawn("float64", count)
    found = made(tmp_path, arrays, mean_row(count)).tolist()
    for n, value in enumerate(found):
        expected = math.fsum(float(a[n]) for a in arrays) / count
        assert abs(value - expected) <= math.ulp(expected)


@pytest.mark.parametrize("row", sorted(ROWS))
def test_float64_against_the_exact_sum(tmp_path: Path, row: str) -> None:
    """Within one unit in the last place, also where large terms cancel."""
    rng = np.random.default_rng(3)
    base = rng.normal(size=500)
    arrays = [base + 1e-3 * rng.normal(size=500) for _ in range(5)]
    if row == "beyond":
        arrays[0] = arrays[3] + 3 * arrays[4] * (1 + 1e-9 * rng.normal(size=500))
    found = made(tmp_path, arrays, ROWS[row]).tolist()
    for n, value in enumerate(found):
        expected = nearest(exact_sum([float(a[n]) for a in arrays], ROWS[row]), "float64")
        assert abs(value - expected) <= math.ulp(expected)


@pytest.mark.parametrize("dtype", NARROWER)
def test_plain_float64_formula(tmp_path: Path, dtype: str) -> None:
    """Sum in canonical order, divide once, round once."""
    rng = np.random.default_rng(8)
    form = DTYPES[dtype].numpy
    arrays = [(rng.normal(size=400) * rng.choice([0.1, 1, 9], 400)).astype(form) for _ in range(5)]
    wide = [a.astype(np.float64) for a in arrays]
    total = sum(wide[1:], wide[0]) / 5
    expected = [nearest(Fraction(x), dtype) for x in total.tolist()]
    assert made(tmp_path, arrays, mean_row(5)).tolist() == expected


class Net(nn.Module):
    """Convolution, BatchNorm, and an output layer tied to the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.bn = nn.BatchNorm2d(8)
        self.embed = nn.Embedding(11, 6)
        self.out = nn.Linear(6, 11, bias=False)
        self.out.weight = self.embed.weight


@pytest.fixture
def training(tmp_path: Path) -> tuple[list[Path], AveragedModel]:
    """Five snapshots of a random walk, and torch's running average over them."""
    torch.manual_seed(0)
    net = Net()
    averaged = AveragedModel(net, use_buffers=True)
    paths = []
    for k in range(5):
        with torch.no_grad():
            for tensor in net.parameters():
                tensor.add_(torch.randn_like(tensor), alpha=0.1)
            net.bn.running_mean += torch.randn(8)  # type: ignore[operator]
        net.bn.num_batches_tracked += 10  # type: ignore[operator]
        averaged.update_parameters(net)
        paths.append(write_torch(tmp_path / f"step_{k}.pt", net.state_dict()))
    return paths, averaged


def test_averaged_model_of_torch(
    training: tuple[list[Path], AveragedModel], tmp_path: Path
) -> None:
    paths, averaged = training
    out = tmp_path / "averaged.safetensors"
    average(paths, out, bn="average")
    found = load_file(out)
    expected = averaged.module.state_dict()
    assert found.keys() == expected.keys()
    for key, theirs in expected.items():
        if not theirs.is_floating_point():
            continue
        bound = 8 * torch.finfo(torch.float32).eps * theirs.abs().max()
        assert (found[key] - theirs).abs().max() <= bound, key
    assert found["bn.num_batches_tracked"] == 50, "the newest; torch takes a mean"
    Net().load_state_dict(found)


def test_safetensors_reads_what_was_meant(
    training: tuple[list[Path], AveragedModel], tmp_path: Path
) -> None:
    """Bit by bit the same in memory and through the file; tied tensors under both names."""
    paths, _ = training
    out = tmp_path / "averaged.safetensors"
    state = average(paths).state
    average(paths, out)
    found = load_file(out)
    assert state is not None
    assert found.keys() == state.keys()
    for key, tensor in found.items():
        assert tensor.numpy().tobytes() == state[key].tobytes()
        assert tensor.shape == state[key].shape
    assert torch.equal(found["out.weight"], found["embed.weight"])
    with safe_open(out, "pt") as opened:
        metadata = opened.metadata()
    assert metadata["format"] == "pt"
    assert json.loads(metadata["tied"]) == [["embed.weight", "out.weight"]]
    facts = json.loads(metadata["ensemblekit"])
    assert facts["method"] == "uniform"
    assert facts["version"] == ensemblekit.__version__
    assert facts["batch_norm"]["policy"] == "averaged"
    assert [s["file"] for s in facts["snapshots"]] == [p.name for p in paths]
    assert [s["coefficient"] for s in facts["snapshots"]] == [0.2] * 5


@pytest.mark.parametrize("dtype", sorted(name for name in DTYPES if DTYPES[name].safetensors))
def test_every_dtype_through_safetensors(tmp_path: Path, dtype: str) -> None:
    form = DTYPES[dtype].numpy
    kind = DTYPES[dtype].kind
    values = np.arange(6) % 2 if kind in ("int", "bool") else np.linspace(-3, 3, 6)
    table = values.astype(form).reshape(2, 3)
    for k in range(2):
        arrays = {"w": np.full(3, k, np.float32), "table": table}
        write_safetensors(tmp_path / f"snap_{k}.safetensors", arrays)
    out = tmp_path / "out.safetensors"
    average([tmp_path / f"snap_{k}.safetensors" for k in range(2)], out)
    found = load_file(out)
    assert found["w"].tolist() == [0.5] * 3
    assert found["table"].dtype == getattr(torch, dtype)
    expected = as_torch(table)
    assert torch.equal(found["table"].view(torch.uint8), expected.view(torch.uint8))


def test_manifest(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    run = tmp_path / "run"
    run.mkdir()
    for k in (1, 2, 3):
        weights = {"w": rng.normal(size=(9, 9)).astype(np.float32)}
        write_safetensors(run / f"snap_{k}.safetensors", with_batch_norm(weights, k))
    out = tmp_path / "out.safetensors"
    line = ["ensemblekit", "average", "run"]
    options: dict[str, Any] = {"coefficients": (1.0, 2.0, 1.0)}
    result = average(run, out, method="weighted", rule_options=options, command=line)
    manifest = json.loads(out.with_name("out.safetensors.json").read_text())
    assert manifest["sha256"] == sha256(out) == result.sha256
    assert manifest["method"] == "weighted"
    assert manifest["command"] == line
    assert manifest["batch_norm"]["policy"] == "averaged"
    assert manifest["versions"]["ensemblekit"] == ensemblekit.__version__
    assert manifest["versions"]["numpy"] == np.__version__
    assert [s["coefficient"] for s in manifest["snapshots"]] == [0.25, 0.5, 0.25]
    assert manifest["candidate"]["rows"] == [{"coefficients": [1.0, 2.0, 1.0], "divisor": 4.0}]
    assert manifest["warnings"] == list(result.warnings)
    assert {Path(i["file"]).name: i["sha256"] for i in manifest["request"]["inputs"]} == {
        path.name: sha256(path) for path in run.iterdir()
    }


def test_the_reference_itself() -> None:
    """`nearest` rounds as numpy and ml_dtypes do where one rounding is all they make."""
    rng = np.random.default_rng(1)
    values = rng.normal(size=300).astype(np.float32)
    for dtype, form in (("float16", np.float16), ("bfloat16", ml_dtypes.bfloat16)):
        assert [nearest(Fraction(float(x)), dtype) for x in values] == values.astype(form).astype(
            np.float64
        ).tolist()
