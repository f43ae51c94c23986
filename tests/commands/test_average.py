"""`average` as a function: results, files, repetition, strictness, and order of the inputs."""

from __future__ import annotations

import contextlib
import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ensemblekit import average, averaging
from ensemblekit.errors import CheckFailedError, InputError, UnsupportedError, UsageError
from ensemblekit.options import ModelOptions
from ensemblekit.selection import Selection

from ..helpers import (
    contents,
    make_arrays,
    sha256,
    with_batch_norm,
    write_safetensors,
    write_series,
    write_torch,
)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_series(tmp_path / "run", 4)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out" / "averaged.safetensors"


def test_in_memory(run: Path) -> None:
    result = average(run)
    assert (result.output, result.sha256, result.method) == (None, None, "uniform")
    assert result.state is not None
    snapshots = [make_arrays(k) for k in range(1, 5)]
    for key, found in result.state.items():
        expected = np.mean([s[key].astype(np.float64) for s in snapshots], axis=0)
        assert np.array_equal(found, expected.astype(np.float32))
    assert "state" not in result.to_json()
    assert len(result.cosines) == 4
    assert all(0.9 < cosine <= 1 for cosine in result.cosines)


def test_result(run: Path, out: Path) -> None:
    result = average([run], out)
    assert result.sha256 == sha256(out)
    assert [s["coefficient"] for s in result.snapshots] == [0.25] * 4
    assert [s["step"] for s in result.snapshots] == [1, 2, 3, 4]
    assert (result.tensors, result.parameters) == (3, 4 * 24 + 4 + 12)
    assert result.warnings == ()
    assert sorted(contents(out.parent)) == [out.name, out.name + ".json"]
    json.dumps(result.to_json())


def test_dry_run_writes_nothing(run: Path, out: Path) -> None:
    result = average(run, out, dry_run=True)
    assert (result.output, result.sha256) == (str(out), None)
    assert not list(out.parent.iterdir())


def shuffled(files: list[Path]) -> list[list[Path]]:
    return [list(order) for order in itertools.permutations(files)]


NAMES: dict[str, Callable[[int], str]] = {
    "numbered": lambda n: f"snap_{n}.safetensors",
    "nameless": lambda n: f"{'pqrs'[n]}.safetensors",
    "same-number": lambda n: f"{'pqrs'[n]}_7.safetensors",
}


@pytest.mark.parametrize("names", sorted(NAMES))
def test_order_of_naming_does_not_matter(tmp_path: Path, out: Path, names: str) -> None:
    files = [write_safetensors(tmp_path / NAMES[names](n), make_arrays(n)) for n in range(4)]
    orders = shuffled(files)[::5]
    outputs = {average(order, out, force=True).sha256 for order in orders}
    assert outputs == {sha256(out)}


def test_order_of_steps_in_the_files(tmp_path: Path, out: Path) -> None:
    """What the files say counts, not their names; coefficients go from the oldest on."""
    for name, step in (("b", 10), ("a", 30), ("c", 20)):
        state = {"w": torch.full((3,), float(step))}
        write_torch(tmp_path / f"{name}.pt", {"model": state, "step": step})
    files = sorted(tmp_path.glob("*.pt"))
    for order in shuffled(files):
        coefficients = {"coefficients": (1.0, 0.0, 3.0)}
        result = average(order, method="weighted", rule_options=coefficients)
        assert [s["step"] for s in result.snapshots] == [10, 20, 30]
        assert result.state is not None
        assert result.state["w"].tolist() == [25.0] * 3


def test_one_snapshot(run: Path, out: Path) -> None:
    result = average(run / "snap_2.safetensors", out)
    loaded = average(out).state
    assert loaded is not None
    assert {k: v.tobytes() for k, v in loaded.items()} == {
        k: v.tobytes() for k, v in make_arrays(2).items()
    }
    assert result.cosines == (1.0,)


def test_the_same_weights_count_once(run: Path) -> None:
    before = average(run)
    shutil.copy(run / "snap_4.safetensors", run / "best.safetensors")
    (run / "last.safetensors").symlink_to("snap_4.safetensors")
    after = average(run)
    assert before.state is not None
    assert after.state is not None
    assert all(np.array_equal(before.state[key], after.state[key]) for key in before.state)
    assert len(after.skipped) == 2


@pytest.mark.parametrize("method", ["uniform", "weighted"])
def test_our_output_in_the_same_folder_is_left_out(run: Path, method: str) -> None:
    options: dict[str, Any] = {}
    if method == "weighted":
        options = {"method": method, "rule_options": {"coefficients": (1, 2, 3, 4)}}
    first = average(run, run / "averaged.safetensors", **options)
    again = average(run, run / "averaged.safetensors", **options)
    assert again.up_to_date
    assert again.sha256 == first.sha256
    left_out = [s["path"] for s in again.skipped if not s["path"].endswith(".json")]
    assert left_out == [str(run / "averaged.safetensors")]


class TestUpToDate:
    def test_same_request(self, run: Path, out: Path) -> None:
        first = average(run, out)
        before = contents(out.parent)
        again = average(run, out)
        assert again.up_to_date
        assert contents(out.parent) == before
        assert {**again.to_json(), "up_to_date": False, "skipped": []} == {
            **first.to_json(),
            "skipped": [],
        }

    @pytest.mark.parametrize(
        "change",
        [
            {"method": "weighted", "rule_options": {"coefficients": (1, 1, 1, 2)}},
            {"selection": Selection(last=2)},
        ],
        ids=["rule", "selection"],
    )
    def test_another_request_is_refused(self, run: Path, out: Path, change: dict[str, Any]) -> None:
        average(run, out)
        before = contents(out.parent)
        with pytest.raises(UsageError, match="exists"):
            average(run, out, **change)
        assert contents(out.parent) == before
        assert not average(run, out, force=True, **change).up_to_date

    def test_changed_input(self, run: Path, out: Path) -> None:
        average(run, out)
        write_safetensors(run / "snap_2.safetensors", make_arrays(9))
        with pytest.raises(UsageError, match="exists"):
            average(run, out)
        assert average(run, out, force=True).sha256 == sha256(out)

    def test_changed_output(self, run: Path, out: Path) -> None:
        average(run, out)
        out.write_bytes(out.read_bytes()[:-1] + b"\x01")
        with pytest.raises(UsageError, match="exists"):
            average(run, out)

    def test_lost_output(self, run: Path, out: Path) -> None:
        first = average(run, out)
        out.unlink()
        again = average(run, out)
        assert (again.up_to_date, again.sha256) == (False, first.sha256)

    def test_strict_is_not_fooled(self, tmp_path: Path, out: Path) -> None:
        """What was written with a warning does not pass as being up to date without one."""
        run = write_series(tmp_path / "bn", batch_norm=True)
        assert average(run, out).warnings
        with pytest.raises(CheckFailedError):
            average(run, out, strict=True)

    @pytest.mark.parametrize("key", ["batch_norm", "evaluation", "warnings", "cosines", "sha256"])
    @pytest.mark.parametrize("value", [None, 3, "text", [3], {"a": 1}, "absent"])
    def test_edited_manifest(self, run: Path, out: Path, key: str, value: object) -> None:
        """Whatever someone wrote into it, it is an earlier output or it is not."""
        average(run, out)
        path = out.with_name(out.name + ".json")
        manifest = json.loads(path.read_text())
        if value == "absent":
            del manifest[key]
        else:
            manifest[key] = value
        path.write_text(json.dumps(manifest))
        with contextlib.suppress(UsageError):  # "exists already"
            json.dumps(average(run, out).to_json())


class TestWarnings:
    def test_different_basins(self, tmp_path: Path) -> None:
        for seed in range(3):
            rng = np.random.default_rng(seed)
            arrays = {"w": rng.normal(size=(20, 20)).astype(np.float32)}
            write_safetensors(tmp_path / f"seed_{seed}.safetensors", arrays)
        [warning] = average(tmp_path).warnings
        assert "different basins" in warning
        assert "seed_" in warning

    @pytest.mark.parametrize(
        "coefficients, warned",
        [
            ((1, 11, 11, 11), False),
            ((1, 10, 10, 10), True),
            ((1, 1, 1, 1), True),
            ((0, 1, 1, 1), False),
            ((-1, 20, 20, 20), False),
            ((-1, 2, 2, 2), True),
            ((9, 1, 1, 1), True),
        ],
    )
    def test_what_hardly_counts_does_no_harm(
        self, tmp_path: Path, coefficients: tuple[float, ...], warned: bool
    ) -> None:
        """Moving averages give the first snapshots next to nothing."""
        centre = np.random.default_rng(9).normal(size=(20, 20))
        for k in range(4):
            own = np.random.default_rng(k).normal(size=(20, 20))
            array = own if k == 0 else centre + 0.05 * own
            arrays = {"w": array.astype(np.float32)}
            write_safetensors(tmp_path / f"snap_{k}.safetensors", arrays)
        rule = {"coefficients": tuple(map(float, coefficients))}
        warnings = average(tmp_path, method="weighted", rule_options=rule).warnings
        assert [w for w in warnings if "different basins: snap_0" in w] == list(warnings)
        assert bool(warnings) == warned

    def test_outlier(self, tmp_path: Path) -> None:
        for k in range(4):
            arrays = make_arrays(k)
            arrays["fc.weight"] = arrays["fc.weight"] * (50 if k == 2 else 1)
            write_safetensors(tmp_path / f"snap_{k}.safetensors", arrays)
        warnings = average(tmp_path).warnings
        assert any("snap_2" in w and "'fc.weight'" in w and "norm" in w for w in warnings)

    def test_strict(self, tmp_path: Path, out: Path) -> None:
        run = write_series(tmp_path / "bn", batch_norm=True)
        with pytest.raises(CheckFailedError, match="BatchNorm"):
            average(run, out, strict=True)
        assert not list(out.parent.iterdir())


class TestBatchNormWithoutData:
    @pytest.fixture
    def bn_run(self, tmp_path: Path) -> Path:
        return write_series(tmp_path / "bn", 3, batch_norm=True)

    @pytest.mark.parametrize("bn, warned", [("auto", True), ("average", False)])
    def test_averaged(self, bn_run: Path, bn: str, warned: bool) -> None:
        result = average(bn_run, bn=bn)
        assert result.batch_norm == {"layers": 1, "frozen": 0, "policy": "averaged", "samples": 0}
        assert bool(result.warnings) == warned
        assert all("--model" in w and "--train-data" in w for w in result.warnings)
        assert result.state is not None
        assert result.state["bn.num_batches_tracked"] == 30

    def test_error_policy(self, bn_run: Path, out: Path) -> None:
        with pytest.raises(CheckFailedError, match="BatchNorm") as raised:
            average(bn_run, out, bn="error")
        assert "--train-data" in (raised.value.hint or "")
        assert not list(out.parent.iterdir())

    def test_recompute_needs_data(self, bn_run: Path) -> None:
        with pytest.raises(UsageError, match="--bn recompute needs"):
            average(bn_run, bn="recompute")

    @pytest.mark.parametrize("bn", ["auto", "average", "error"])
    def test_a_single_snapshot_keeps_its_own(self, bn_run: Path, bn: str) -> None:
        result = average(bn_run / "snap_1.safetensors", bn=bn)
        assert (result.batch_norm["policy"], result.warnings) == ("none", ())

    def test_frozen_layers_are_kept(self, tmp_path: Path) -> None:
        for k in range(3):
            arrays = with_batch_norm(make_arrays(k), seed=1)
            write_safetensors(tmp_path / f"snap_{k}.safetensors", arrays)
        result = average(tmp_path, bn="error")
        assert result.batch_norm == {"layers": 1, "frozen": 1, "policy": "none", "samples": 0}

    def test_extrapolated_variance(self, bn_run: Path) -> None:
        coefficients = {"coefficients": (-20.0, 1.0, 20.0)}
        with pytest.raises(InputError, match="variance"):
            average(bn_run, method="weighted", rule_options=coefficients)


@pytest.mark.parametrize(
    "wrong, word",
    [
        ({"method": "wieghted"}, "weighted"),
        ({"bn": "recomptue"}, "recompute"),
        ({"method": "weighted"}, "coefficients"),
        ({"output": "x.bin"}, "ending"),
        ({"output": "nosuch/x.safetensors"}, "nosuch"),
        ({"output": "run/snap_1.safetensors"}, "input"),
        ({"output": "run/snap_1.safetensors", "force": True}, "input"),
    ],
)
def test_usage(
    run: Path, wrong: dict[str, Any], word: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(run.parent)
    before = contents(run)
    with pytest.raises(UsageError, match=word):
        average("run", **wrong)
    assert contents(run) == before


@pytest.mark.parametrize(
    "wrong",
    [{"precision": "fp31"}, {"batch_size": 0}, {"limit": -1}, {"bn_samples": 0}],
)
def test_model_options(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        ModelOptions(**wrong)


@pytest.mark.parametrize("dry_run", [False, True])
def test_a_dtype_that_the_output_cannot_hold(tmp_path: Path, out: Path, dry_run: bool) -> None:
    """A dry run says what the real one would say."""
    for k in range(2):
        state = {"w": torch.full((2,), complex(k, 1), dtype=torch.complex128)}
        write_torch(tmp_path / f"snap_{k}.pt", state)
    with pytest.raises(UnsupportedError, match="complex128"):
        average(tmp_path.glob("*.pt"), out, dry_run=dry_run)  # type: ignore[arg-type]
    assert not list(out.parent.iterdir())


def test_every_rule_is_reachable(run: Path) -> None:
    options = {
        "weighted": {"coefficients": (4, 3, 2, 1)},
        "posthoc-ema": {"width": 0.1, "stored_widths": (0.05,)},
    }
    with pytest.raises(UsageError, match="chosen on data"):
        average(run, method="greedy-soup")
    for name in averaging.RULES:
        if name == "greedy-soup":
            continue
        result = average(run, method=name, rule_options=options.get(name))
        assert result.method == name
        assert sum(s["coefficient"] for s in result.snapshots) == pytest.approx(1)
