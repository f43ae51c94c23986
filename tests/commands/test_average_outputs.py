"""Outputs of every form through `average`: the element type, our own outputs, no order of naming."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from safetensors.torch import load_file as load_safe

from ensemblekit import ModelOptions, average
from ensemblekit.candidates import mean_row
from ensemblekit.dtypes import DTYPES
from ensemblekit.errors import CheckFailedError, NotFiniteError, UsageError

from ..comparing import problem, save
from ..helpers import (
    Array,
    contents,
    make_arrays,
    read_set,
    run_json,
    with_batch_norm,
    write_safetensors,
    write_series,
    write_torch,
)
from ..reference.test_weights_reference import FORMATS, exact_sum, nearest

OUTPUTS = ["out.safetensors", "out.pt", "out.pth", "out.ckpt", "out"]


def drawn(dtype: str, count: int, shape: tuple[int, ...] = (20, 30)) -> list[Array]:
    rng = np.random.default_rng(1)
    base = rng.normal(size=shape)
    return [(base + 0.1 * rng.normal(size=shape)).astype(DTYPES[dtype].numpy) for _ in range(count)]


def series(folder: Path, arrays: list[dict[str, Array]]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for k, values in enumerate(arrays, 1):
        write_safetensors(folder / f"snap_{k}.safetensors", values)
    return folder


def weights(path: Path) -> dict[str, torch.Tensor]:
    if path.is_dir():
        return dict(load_safe(path / "model.safetensors"))
    if path.suffix == ".safetensors":
        return dict(load_safe(path))
    found: Any = torch.load(path, weights_only=True)
    return dict(found.get("state_dict", found))


# ------------------------------------------------------------------------------- element types


@pytest.mark.parametrize("target", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("source", ["float64", "float32", "float16", "bfloat16"])
def test_one_rounding_of_the_exact_mean(tmp_path: Path, source: str, target: str) -> None:
    arrays = drawn(source, 3)
    run = series(tmp_path / "run", [{"w": a} for a in arrays])
    made = average(run, dtype=target).state
    assert made is not None
    assert made["w"].dtype == DTYPES[target].numpy
    columns = np.stack([a.ravel() for a in arrays], axis=1).astype(np.float64).tolist()
    row = mean_row(3)
    expected = [nearest(exact_sum(values, row), target) for values in columns]
    assert made["w"].astype(np.float64).ravel().tolist() == expected


@pytest.mark.parametrize("source", ["float32", "float16", "bfloat16"])
def test_float64_is_the_mean_itself(tmp_path: Path, source: str) -> None:
    arrays = drawn(source, 3)
    made = average(series(tmp_path / "run", [{"w": a} for a in arrays]), dtype="float64").state
    assert made is not None
    wide = [a.astype(np.float64) for a in arrays]
    assert made["w"].tolist() == ((wide[0] + wide[1] + wide[2]) / 3).tolist()


@pytest.mark.parametrize("target", [*FORMATS])
def test_what_is_equal_in_all_is_converted_once(tmp_path: Path, target: str) -> None:
    """Frozen weights at the middle of two values of the new type, with coefficients of a decay."""
    bits = np.random.default_rng(3).integers(0x3F000000, 0x3F800000, 400).astype(np.uint32)
    frozen = ((bits & ~np.uint32(0xFFFF)) | np.uint32(0x8000)).view(np.float32)
    run = series(tmp_path / "run", [{"w": a, "frozen": frozen} for a in drawn("float32", 5, (9,))])
    options = {"method": "ema", "rule_options": {"decay": 0.7}}
    made = average(run, dtype=target, **options).state  # type: ignore[arg-type]
    assert made is not None
    one = average(run / "snap_1.safetensors", dtype=target).state
    assert one is not None
    assert made["frozen"].tobytes() == one["frozen"].tobytes()


@pytest.mark.parametrize("name", OUTPUTS)
@pytest.mark.parametrize("target", ["bfloat16", "float64"])
def test_every_output_in_another_type(tmp_path: Path, name: str, target: str) -> None:
    """Integers, booleans and complex numbers are what they were."""
    states = []
    for k in range(3):
        torch.manual_seed(k)
        state = {
            "w": torch.randn(4, 5),
            "half": torch.randn(7).half(),
            "channels": torch.randn(2, 3, 4, 4).contiguous(memory_format=torch.channels_last),
            "table": torch.arange(6),
            "mask": torch.tensor([True, False]),
            "wave": torch.randn(3, dtype=torch.complex64),
            "count": torch.tensor(10 * k),
            "empty": torch.empty(0, 2),
        }
        states.append(state)
        write_torch(tmp_path / f"snap_{k}.pt", state)
    files = sorted(tmp_path.glob("*.pt"))
    average(files, tmp_path / name, dtype=target)
    found = weights(tmp_path / name)
    kind = getattr(torch, target)
    for key, tensor in states[0].items():
        values = torch.stack([s[key] for s in states])
        if tensor.is_floating_point():
            assert found[key].dtype == kind, key
            assert torch.equal(found[key], values.double().mean(0).to(kind)), key
        elif tensor.is_complex():
            wide = values.to(torch.complex128).mean(0).to(tensor.dtype)
            assert torch.equal(found[key], wide)
        else:
            assert torch.equal(found[key], states[-1][key]), key


def test_tied_tensors_are_converted_together(tmp_path: Path) -> None:
    for k in (1.0, 2.0):
        table = torch.full((3, 3), k)
        write_torch(tmp_path / f"snap_{k:.0f}.pt", {"a": table, "b": table})
    average(sorted(tmp_path.glob("*.pt")), tmp_path / "out.pt", dtype="bfloat16")
    found = weights(tmp_path / "out.pt")
    assert found["a"].data_ptr() == found["b"].data_ptr()
    assert found["a"].dtype == torch.bfloat16
    assert found["b"].tolist() == [[1.5] * 3] * 3


@pytest.mark.parametrize("source", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("target", ["float16", "float8_e4m3fn", "float8_e5m2"])
@pytest.mark.parametrize("name", ["out.safetensors", "out.pt", "out"])
def test_what_does_not_fit(tmp_path: Path, source: str, target: str, name: str) -> None:
    arrays = [{"fine": a, "layer.large": a * a.dtype.type(2**17)} for a in drawn(source, 2, (30,))]
    series(tmp_path / "run", arrays)
    for files in ("run", "run/snap_1.safetensors"):
        with pytest.raises(NotFiniteError, match=r"'layer.large'") as raised:
            average(tmp_path / files, tmp_path / name, dtype=target)
        assert "--dtype" in (raised.value.hint or "")
    assert list(contents(tmp_path)) == ["run/snap_1.safetensors", "run/snap_2.safetensors"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run"]


def test_what_does_not_fit_on_the_command_line(tmp_path: Path) -> None:
    series(tmp_path / "run", [{"w": a * np.float32(2**17)} for a in drawn("float32", 2, (30,))])
    done = run_json("average", "run", "--dtype", "float16", cwd=tmp_path, exit_code=3)
    assert done["error"]["kind"] == "not-finite"
    assert "'w'" in done["error"]["message"]
    value = run_json("average", "run", "--dtype", "bfloat16", cwd=tmp_path)
    assert load_safe(tmp_path / str(value["output"]))["w"].dtype == torch.bfloat16


def test_its_own_type_is_no_change(tmp_path: Path) -> None:
    run = write_series(tmp_path / "run")
    plain, same = average(run).state, average(run, dtype="float32").state
    assert plain is not None
    assert same is not None
    assert {k: v.tobytes() for k, v in plain.items()} == {k: v.tobytes() for k, v in same.items()}


@pytest.mark.parametrize("wrong", ["int8", "complex64", "bool", "double", "fp16", ""])
def test_no_such_type(tmp_path: Path, wrong: str) -> None:
    with pytest.raises(UsageError, match="dtype"):
        average(write_series(tmp_path / "run"), dtype=wrong)


def test_another_type_is_another_request(tmp_path: Path) -> None:
    run = write_series(tmp_path / "run")
    for name in ("out.pt", "out"):
        average(run, tmp_path / name, dtype="bfloat16")
        assert average(run, tmp_path / name, dtype="bfloat16").up_to_date
        with pytest.raises(UsageError, match="exists"):
            average(run, tmp_path / name)


# -------------------------------------------------------------- statistics of BatchNorm layers


@pytest.mark.parametrize("target", ["float16", "bfloat16", "float64"])
@pytest.mark.parametrize("name", ["out.safetensors", "out.pt", "out"])
def test_recomputed_statistics_are_converted(tmp_path: Path, target: str, name: str) -> None:
    one = problem("classes")
    run = save(tmp_path / "run", one.weights)
    options = ModelOptions(model=one.make(), device="cpu", train_data=one.data["train"])
    average(run, tmp_path / name, model=options, dtype=target)
    found = weights(tmp_path / name)
    soup = one.make()
    mean = {
        k: torch.stack([w[k].double() for w in one.weights]).mean(0).float()
        for k in ("0.weight", "0.bias")
    }
    soup.load_state_dict({**one.weights[-1], **mean})
    x, _ = one.data["train"]
    with torch.no_grad():
        hidden = soup[0](x).double()  # type: ignore[index]
    kind = getattr(torch, target)
    for key, exact in (("mean", hidden.mean(0)), ("var", hidden.var(0, unbiased=False))):
        value = found[f"1.running_{key}"]
        assert value.dtype == kind
        bound = torch.finfo(kind).eps if target != "float64" else 1e-5
        torch.testing.assert_close(value.double(), exact, rtol=bound, atol=bound)
    assert found["1.num_batches_tracked"].dtype == torch.int64


@pytest.mark.parametrize("out", [None, "out.pt", "out"])
def test_recomputed_statistics_that_do_not_fit(tmp_path: Path, out: str | None) -> None:
    one = problem("classes")
    run = save(tmp_path / "run", one.weights)
    x, y = one.data["train"]
    options = ModelOptions(model=one.make(), device="cpu", train_data=(x * 3000, y))
    with pytest.raises(NotFiniteError, match=r"'1.running_var'"):
        average(run, out and tmp_path / out, model=options, dtype="float16", bn="recompute")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run"]


def test_averaged_statistics_are_converted(tmp_path: Path) -> None:
    run = series(tmp_path / "run", [with_batch_norm(make_arrays(k), k) for k in (1, 2, 3)])
    made = average(run, dtype="bfloat16", bn="average").state
    assert made is not None
    stack = [with_batch_norm(make_arrays(k), k)["bn.running_var"] for k in (1, 2, 3)]
    mean = sum(a.astype(np.float64) for a in stack) / 3
    assert made["bn.running_var"].dtype == ml_dtypes.bfloat16
    assert made["bn.running_var"].tolist() == mean.astype(ml_dtypes.bfloat16).tolist()
    assert made["bn.num_batches_tracked"].dtype == np.int64


# ------------------------------------------------------------------------------ our own outputs


def tree(path: Path) -> dict[str, bytes]:
    files = [path] if path.is_file() else sorted(path.iterdir())
    return {file.name if file != path else "": file.read_bytes() for file in files}


@pytest.mark.parametrize("name", OUTPUTS)
def test_order_of_naming_does_not_matter(tmp_path: Path, name: str) -> None:
    run = write_series(tmp_path / "run", 3, batch_norm=True)
    found = []
    for order in itertools.permutations(sorted(run.iterdir())):
        average(order, tmp_path / name, force=True, shard_bytes=200)
        found.append(tree(tmp_path / name))
    assert all(one == found[0] for one in found)


@pytest.mark.parametrize("name", OUTPUTS)
def test_our_output_in_the_same_folder_is_left_out(tmp_path: Path, name: str) -> None:
    run = write_series(tmp_path / "run", 4)
    first = average(run, run / name)
    again = average(run, run / name)
    assert again.up_to_date
    assert again.sha256 == first.sha256
    other = average(run, run / "averaged.safetensors")
    assert len(other.snapshots) == 4


@pytest.mark.parametrize("name", ["out.pt", "out.ckpt", "out"])
def test_an_average_that_is_no_plain_mean(tmp_path: Path, name: str) -> None:
    """It is left out all the same."""
    run = write_series(tmp_path / "run", 4)
    average(run, run / name, method="ema", rule_options={"decay": 0.5}, shard_bytes=300)
    assert len(average(run).snapshots) == 4


@pytest.mark.parametrize("name", OUTPUTS)
def test_up_to_date(tmp_path: Path, name: str) -> None:
    run = write_series(tmp_path / "run")
    out = tmp_path / name
    first = average(run, out, shard_bytes=300)
    before = contents(tmp_path)
    again = average(run, out, shard_bytes=300)
    assert (again.up_to_date, again.sha256) == (True, first.sha256)
    assert contents(tmp_path) == before
    file = max(out.iterdir()) if out.is_dir() else out
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    with pytest.raises(UsageError, match="exists"):
        average(run, out, shard_bytes=300)
    average(run, out, shard_bytes=300, force=True)
    assert contents(tmp_path).keys() == before.keys()


@pytest.mark.parametrize("name", OUTPUTS)
def test_outputs_are_inputs(tmp_path: Path, name: str) -> None:
    """Also sharded ones; the values of all forms are the same."""
    run = write_series(tmp_path / "run")
    average(run, tmp_path / name, shard_bytes=200)
    [snapshot] = read_set(tmp_path / name).snapshots
    assert snapshot.parameters == 112
    made, expected = average(tmp_path / name).state, average(run).state
    assert made is not None
    assert expected is not None
    assert {k: v.tobytes() for k, v in made.items()} == {
        k: v.tobytes() for k, v in expected.items()
    }


@pytest.mark.parametrize("name", OUTPUTS)
def test_dry_run_and_strict_write_nothing(tmp_path: Path, name: str) -> None:
    run = write_series(tmp_path / "run", batch_norm=True)
    average(run, tmp_path / name, dry_run=True)
    with pytest.raises(CheckFailedError):
        average(run, tmp_path / name, strict=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run"]


def test_a_name_with_a_dot_is_a_folder_when_there_is_one(tmp_path: Path) -> None:
    run = write_series(tmp_path / "run")
    with pytest.raises(UsageError, match="unknown ending"):
        average(run, tmp_path / "model.v2")
    (tmp_path / "model.v2").mkdir()
    average(run, tmp_path / "model.v2")
    assert load_file(tmp_path / "model.v2/model.safetensors").keys() == make_arrays(1).keys()
    shutil.rmtree(tmp_path / "model.v2")
    with pytest.raises(UsageError, match="unknown ending"):
        average(run, tmp_path / "model.v2")


@pytest.mark.parametrize("name", ["out.pt", "out.ckpt"])
def test_a_folder_where_a_file_should_be(tmp_path: Path, name: str) -> None:
    run = write_series(tmp_path / "run")
    (tmp_path / name).mkdir()
    with pytest.raises(UsageError, match="is a folder"):
        average(run, tmp_path / name, force=True)
    assert (tmp_path / name).is_dir()
