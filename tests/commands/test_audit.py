"""`audit`: everything in the folder is shown, with what would be used and why not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from ensemblekit import average
from ensemblekit.commands.audit import audit
from ensemblekit.errors import UsageError
from ensemblekit.selection import Selection

from ..helpers import make_arrays, sha256, write_safetensors, write_series, write_torch

KEYS = {
    "path", "format", "step", "epoch", "lr", "metrics", "weights", "weights_available", "tensors",
    "parameters", "dtypes", "sha256", "status", "reason",
}  # fmt: skip


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    for k in (1, 2, 3):
        state = {"w": torch.full((4, 2), float(k)), "ids": torch.arange(3)}
        value = {
            "model": state,
            "model_ema": {key: tensor.clone() for key, tensor in state.items()},
            "epoch": k,
            "step": 100 * k,
            "val_acc": 0.5 + k / 10,
            "optimizer": {"state": {}, "param_groups": [{"lr": 0.1 / k}]},
        }
        write_torch(folder / f"epoch_{k}.pt", value)
    return folder


def test_row(run: Path) -> None:
    report = audit([run])
    assert all(row.keys() == KEYS for row in report.snapshots)
    row = report.snapshots[1]
    assert row["path"].endswith("epoch_2.pt")
    assert (row["step"], row["epoch"], row["lr"]) == (200, 2, 0.05)
    assert row["metrics"] == {"val_acc": 0.7}
    assert (row["weights"], row["weights_available"]) == ("model_ema", ["model", "model_ema"])
    assert (row["tensors"], row["parameters"]) == (2, 8)
    assert row["dtypes"] == {"float32": 1, "int64": 1}
    assert row["sha256"] == sha256(run / "epoch_2.pt")
    assert (row["status"], row["reason"]) == ("used", None)
    assert (report.problems, report.errors, report.ordered_by) == ([], (), "step")
    json.dumps(report.to_json())


def test_digests_of_large_folders_on_demand(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ensemblekit.commands.audit._DIGEST_LIMIT", 10)
    assert {row["sha256"] for row in audit([run]).snapshots} == {None}
    assert None not in {row["sha256"] for row in audit([run], deep=True).snapshots}


def test_selected_and_not(run: Path) -> None:
    rows = audit([run], Selection(best=1, by="val_acc")).snapshots
    states = {Path(row["path"]).name: (row["status"], row["reason"]) for row in rows}
    assert states == {
        "epoch_1.pt": ("skipped", "not selected"),
        "epoch_2.pt": ("skipped", "not selected"),
        "epoch_3.pt": ("used", None),
    }


def test_everything_left_out_has_a_reason(tmp_path: Path) -> None:
    run = write_series(tmp_path / "run")
    average(run, run / "averaged.safetensors")
    shutil.copy(run / "snap_3.safetensors", run / "best.safetensors")
    (run / "notes.txt").write_text("lr too high?")
    write_torch(run / "optimizer.pt", {"state": {}, "param_groups": [{"lr": 1.0}]})
    reasons = {Path(row["path"]).name: row["reason"] for row in audit([run]).snapshots}
    assert reasons["averaged.safetensors"] == "is an average already, says the file"
    assert reasons["best.safetensors"] == "same weights as snap_3.safetensors"
    for name in ("notes.txt", "optimizer.pt", "averaged.safetensors.json"):
        assert reasons[name] == "not a checkpoint"
    assert [name for name, reason in reasons.items() if reason is None] == [
        f"snap_{k}.safetensors" for k in (1, 2, 3)
    ]


def test_mean_of_others_without_a_word_from_the_file(tmp_path: Path) -> None:
    run = write_series(tmp_path / "run", size=60)
    members = [make_arrays(k, size=60) for k in (1, 2, 3)]
    mean = {key: np.mean([m[key] for m in members], axis=0) for key in members[0]}
    write_safetensors(run / "swa.safetensors", mean)
    rows = audit([run]).snapshots
    [row] = [row for row in rows if row["path"].endswith("swa.safetensors")]
    assert row["status"] == "skipped"
    assert "mean of" in row["reason"]


def test_problems_do_not_hide_the_rest(tmp_path: Path) -> None:
    run = write_series(tmp_path / "run")
    (run / "snap_4.safetensors").write_bytes(b"")
    write_safetensors(run / "snap_5.safetensors", {"other": np.ones(3, np.float32)})
    report = audit([run])
    assert len([row for row in report.snapshots if row["status"] == "used"]) == 4
    assert len(report.errors) == 1
    assert "snap_4.safetensors" in report.problems[0]
    (run / "snap_4.safetensors").unlink()
    assert "snap_5.safetensors" in audit([run]).problems[0]


def test_no_such_path(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nosuch"):
        audit([tmp_path / "nosuch"])
