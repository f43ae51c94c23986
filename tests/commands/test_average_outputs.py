"""Outputs of every form through `average`: the element type, our own outputs, no order of naming."""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from safetensors.torch import load_file as load_safe

from ensemblekit import ModelOptions, average, discover
from ensemblekit.candidates import mean_row
from ensemblekit.commands import provenance
from ensemblekit.commands.audit import audit
from ensemblekit.commands.result import AverageResult
from ensemblekit.dtypes import DTYPES
from ensemblekit.errors import (
    CheckFailedError,
    EnsembleKitError,
    NotFiniteError,
    UnsupportedError,
    UsageError,
)
from ensemblekit.files import Source, sha256
from ensemblekit.selection import Selection
from ensemblekit.writers import manifest_path
from ensemblekit.writers.saving import Filling

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


def reasons(folder: Path, result: AverageResult) -> dict[str, str]:
    """Why what lies in a folder was left out."""
    return {Path(s["path"]).relative_to(folder).parts[0]: s["reason"] for s in result.skipped}


@pytest.mark.parametrize("name", [*OUTPUTS, "b.safetensors"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_our_output_of_another_type_in_the_same_folder(
    tmp_path: Path, name: str, dtype: str
) -> None:
    """It is left out before anyone finds that its types differ from the snapshots'."""
    run = write_series(tmp_path / "run", 4)
    first = average(run, run / name, dtype=dtype)
    again = average(run, run / name, dtype=dtype)
    assert (again.up_to_date, again.sha256) == (True, first.sha256)
    for files in (run, sorted(run.iterdir())):
        other = average(files)
        assert len(other.snapshots) == 4
        assert reasons(run, other)[name] == "is an average already, says the file"
    found = audit([run])
    assert found.errors == ()
    assert [s["status"] for s in found.snapshots].count("used") == 4


def test_only_averages(tmp_path: Path) -> None:
    """Of one type they are snapshots like others; of two they do not fit together."""
    for k in (1, 2):
        run = write_series(tmp_path / f"run{k}", k + 1)
        average(run, tmp_path / f"mean_{k}.safetensors")
    files = sorted(tmp_path.glob("mean_*.safetensors"))
    assert len(average(files).snapshots) == 2
    average(tmp_path / "run1", files[0], dtype="float64", force=True)
    with pytest.raises(EnsembleKitError, match="float"):
        average(files)


@pytest.mark.parametrize("name", OUTPUTS)
def test_all_that_a_shell_finds(tmp_path: Path, name: str) -> None:
    """`ckpts/*` names our output and its manifest, too."""
    run = write_series(tmp_path / "run", 3)
    average(run, run / name)
    for line in (sorted(run.iterdir()), sorted(run.iterdir(), reverse=True)):
        again = average(line, run / name)
        assert again.up_to_date
        assert reasons(run, again) == {
            name: "is an average already, says the file",
            f"{name}.json": "what we noted of an output",
        }


# ------------------------------------------------------------------------- take-up, and not again


def stopped(monkeypatch: pytest.MonkeyPatch, after: int, call: Callable[[], object]) -> None:
    """Ctrl-C when so many shards are done."""
    honest, done = Filling.seal, list[Filling]()

    def seal(self: Filling) -> str:
        if len(done) == after:
            raise KeyboardInterrupt
        done.append(self)
        return honest(self)

    with monkeypatch.context() as patched:
        patched.setattr(Filling, "seal", seal)
        with pytest.raises(KeyboardInterrupt):
            call()


def changed_in_place(path: Path) -> None:
    """Other values, the same size, and the time set back, as rsync and backups do."""
    before, raw = path.stat(), bytearray(path.read_bytes())
    start = 8 + int.from_bytes(raw[:8], "little")  # of the first tensor: it is in the first shard
    raw[start : start + 8] = np.array([3, 4], np.float32).tobytes()
    with path.open("r+b") as file:
        file.write(raw)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = path.stat()
    assert (after.st_size, after.st_mtime_ns, after.st_ino) == (
        before.st_size,
        before.st_mtime_ns,
        before.st_ino,
    )


def test_fingerprints_notice_a_change_in_place(tmp_path: Path) -> None:
    run = write_series(tmp_path / "run", 2)
    first = provenance.fingerprints(discover(run))
    assert provenance.fingerprints(discover(run)) == first
    changed_in_place(run / "snap_1.safetensors")
    second = provenance.fingerprints(discover(run))
    assert [row[0] for row in second] == [row[0] for row in first]
    assert second[0] != first[0]
    assert second[1] == first[1]


@pytest.mark.parametrize("changed", [True, False])
def test_take_up_is_for_unchanged_inputs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: bool
) -> None:
    run = write_series(tmp_path / "run", 3)
    stopped(monkeypatch, 2, lambda: average(run, tmp_path / "out", shard_bytes=50))
    [partial] = tmp_path.glob(".out.*.partial")
    done = {p.name: p.stat().st_ino for p in partial.glob("model-*")}
    assert len(done) == 2
    if changed:
        changed_in_place(run / "snap_2.safetensors")
    average(run, tmp_path / "out", shard_bytes=50)
    average(run, tmp_path / "fresh", shard_bytes=50)
    assert tree(tmp_path / "out") == tree(tmp_path / "fresh")
    taken_up = {p.name for p in (tmp_path / "out").iterdir() if p.stat().st_ino in done.values()}
    assert changed or taken_up == set(done)
    assert not list(tmp_path.glob(".*"))


def test_shards_of_another_size_are_another_output(tmp_path: Path) -> None:
    run = write_series(tmp_path / "run")
    average(run, tmp_path / "out", shard_bytes=300)
    before = contents(tmp_path)
    for options in ({"shard_bytes": 200}, {}):
        with pytest.raises(UsageError, match="exists already"):
            average(run, tmp_path / "out", **options)  # type: ignore[arg-type]
    assert contents(tmp_path) == before
    assert average(run, tmp_path / "out", shard_bytes=300).up_to_date
    average(run, tmp_path / "out", shard_bytes=50, force=True)
    assert len(list((tmp_path / "out").glob("model-*"))) == 3


def test_the_size_of_shards_does_not_matter_to_files(tmp_path: Path) -> None:
    run = write_series(tmp_path / "run")
    average(run, tmp_path / "out.pt", shard_bytes=300)
    assert average(run, tmp_path / "out.pt", shard_bytes=200).up_to_date


def test_a_shard_size_and_a_stopped_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = write_series(tmp_path / "run")
    stopped(monkeypatch, 1, lambda: average(run, tmp_path / "out", shard_bytes=50))
    average(run, tmp_path / "out", shard_bytes=60)
    average(run, tmp_path / "fresh", shard_bytes=60)
    assert tree(tmp_path / "out") == tree(tmp_path / "fresh")
    assert not list(tmp_path.glob(".*"))


SELECTIONS: dict[str, tuple[Selection, list[int]]] = {
    "last": (Selection(last=2), [3, 4]),
    "every": (Selection(every=2), [2, 4]),
    "from": (Selection(from_step=4), [4]),
    "to": (Selection(to_step=1), [1]),
    "best": (Selection(best=1, by="val_acc"), [2]),
    "exclude": (Selection(exclude=("*_1.*", "*_2.*")), [3, 4]),
    "all": (Selection(), [1, 2, 3, 4]),
}


@pytest.mark.parametrize("name", sorted(SELECTIONS))
def test_only_what_takes_part_is_hashed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Once each: a folder may hold a hundred files of many gigabytes, of which `--last 5` take part."""
    for k in range(1, 5):
        value = {"model": {"w": torch.full((50,), float(k))}, "val_acc": {2: 0.9}.get(k, 0.1 * k)}
        write_torch(tmp_path / f"snap_{k}.pt", value)
    hashed = []

    def counted(source: Source, *more: Any) -> str:
        hashed.append(source.path.name)
        return sha256(source, *more)

    monkeypatch.setattr(provenance, "sha256", counted)
    selection, expected = SELECTIONS[name]
    files = sorted(tmp_path.glob("*.pt"))
    average(files, tmp_path / "out.pt", selection=selection)
    names = [f"snap_{k}.pt" for k in expected]
    assert sorted(hashed) == names
    assert average(files, tmp_path / "out.pt", selection=selection).up_to_date
    assert sorted(hashed) == sorted(2 * names)


# ---------------------------------------------------------------------- what formats cannot hold


def with_key(path: Path, key: str) -> Path:
    path.mkdir()
    for k in (1.0, 2.0):
        state = {key: torch.full((3,), k), "a": torch.full((4,), k)}
        write_torch(path / f"snap_{k:.0f}.pt", state)
    return path


@pytest.mark.parametrize("dry_run", [False, True])
@pytest.mark.parametrize("name", ["out.safetensors", "out"])
def test_a_name_that_safetensors_keeps(tmp_path: Path, name: str, dry_run: bool) -> None:
    run = with_key(tmp_path / "run", "__metadata__")
    with pytest.raises(UnsupportedError, match="__metadata__") as raised:
        average(run, tmp_path / name, dry_run=dry_run)
    assert raised.value.exit_code == 3
    assert ".pt" in (raised.value.hint or "")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run"]


@pytest.mark.parametrize("name", ["out.pt", "out.pth", "out.ckpt"])
def test_a_name_that_other_formats_can_hold(tmp_path: Path, name: str) -> None:
    average(with_key(tmp_path / "run", "__metadata__"), tmp_path / name)
    found = weights(tmp_path / name)
    assert {k: v.tolist() for k, v in found.items()} == {"__metadata__": [1.5] * 3, "a": [1.5] * 4}


@pytest.mark.parametrize("dry_run", [False, True])
def test_complex_numbers_in_a_folder(tmp_path: Path, dry_run: bool) -> None:
    for k in (1, 2):
        write_torch(tmp_path / f"snap_{k}.pt", {"c": torch.ones(3, dtype=torch.complex128) * k})
    with pytest.raises(UnsupportedError, match="complex128"):
        average(sorted(tmp_path.glob("*.pt")), tmp_path / "out", dry_run=dry_run)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dry_run", [False, True])
def test_an_adapter_into_a_folder(tmp_path: Path, dry_run: bool) -> None:
    """Its folder has files of its own form, which we do not write."""
    for k in (1, 2):
        folder = tmp_path / f"run/checkpoint-{k}"
        folder.mkdir(parents=True)
        keys = [f"base_model.model.q.lora_{side}.weight" for side in "AB"]
        arrays = {key: np.full((2, 2), k, np.float32) for key in keys}
        write_safetensors(folder / "adapter_model.safetensors", arrays)
        (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2}')
    with pytest.raises(UsageError, match="adapter") as raised:
        average(tmp_path / "run", tmp_path / "out", dry_run=dry_run)
    assert "adapter_config.json" in (raised.value.hint or "")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run"]
    average(tmp_path / "run", tmp_path / "adapter_model.safetensors")
    found = load_file(tmp_path / "adapter_model.safetensors")
    assert {key: float(a.max()) for key, a in found.items()} == dict.fromkeys(keys, 1.5)


@pytest.mark.parametrize("name", [".safetensors", ".pt", ".pth", ".ckpt", "sub/.pt", "..", "/"])
def test_an_output_without_a_name(tmp_path: Path, name: str) -> None:
    """`-o $NAME.pt` of a variable that is not set."""
    run = write_series(tmp_path / "run")
    (tmp_path / "sub").mkdir()
    with pytest.raises(UsageError, match="has no name"):
        average(run, tmp_path / name)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run", "sub"]


# --------------------------------------------------------------------- what stands in the way


def foreign(path: Path, what: str) -> None:
    if what == "folder":
        path.mkdir()
    elif what == "fifo":
        os.mkfifo(path)
    elif what == "device":
        path.symlink_to(os.devnull)
    else:
        path.write_text(what)


@pytest.mark.parametrize("dry_run", [False, True])
@pytest.mark.parametrize("what", ["hello", "{}", '{"a": 1}', "folder", "fifo", "device"])
@pytest.mark.parametrize("name", ["out.pt", "out"])
def test_something_else_in_the_manifests_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, what: str, dry_run: bool
) -> None:
    """Said before any weights are read; nothing waits for a FIFO."""
    run = write_series(tmp_path / "run")
    note = manifest_path(tmp_path / name)
    foreign(note, what)
    before = note.lstat()
    with monkeypatch.context() as patched:
        patched.setattr(Filling, "__init__", None)
        with pytest.raises(UsageError, match=r"\.json"):
            average(run, tmp_path / name, dry_run=dry_run)
    assert sorted(p.name for p in tmp_path.iterdir()) == [note.name, "run"]
    assert (note.lstat().st_ino, note.lstat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    if note.is_file():
        average(run, tmp_path / name, force=True)
        assert average(run, tmp_path / name).up_to_date
    else:
        with pytest.raises(UsageError):
            average(run, tmp_path / name, force=True)


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("what", ["fifo", "device"])
@pytest.mark.parametrize("name", ["out.pt", "out.safetensors"])
def test_an_output_that_is_no_file(tmp_path: Path, name: str, what: str, force: bool) -> None:
    run = write_series(tmp_path / "run")
    foreign(tmp_path / name, what)
    with pytest.raises(UsageError, match="neither a file nor a folder"):
        average(run, tmp_path / name, force=force)
    assert sorted(p.name for p in tmp_path.iterdir()) == [name, "run"]


@pytest.mark.parametrize("name", OUTPUTS)
def test_dry_run_of_what_is_there(tmp_path: Path, name: str) -> None:
    run = write_series(tmp_path / "run", batch_norm=True)
    first = average(run, tmp_path / name)
    before = contents(tmp_path)
    again = average(run, tmp_path / name, dry_run=True)
    assert (again.up_to_date, again.sha256) == (True, first.sha256)
    assert again.warnings == first.warnings != ()
    with pytest.raises(CheckFailedError, match="BatchNorm"):
        average(run, tmp_path / name, dry_run=True, strict=True)
    with pytest.raises(CheckFailedError, match="BatchNorm"):
        average(run, tmp_path / "new.pt", dry_run=True, strict=True)
    assert contents(tmp_path) == before
