"""`audit`: everything in the folder is shown, with what would be used and why not."""

from __future__ import annotations

import json
import re
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


def break_a_byte(path: Path, tensor: torch.Tensor) -> None:
    """Change a value in the file; its checksum stays."""
    data = path.read_bytes()
    place = data.index(tensor.numpy().tobytes())
    path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])


@pytest.mark.parametrize(
    "kind, expected",
    [("nan", "NaN|not finite"), ("inf", "Inf|inf|not finite"), ("damage", "checksum|CRC")],
)
def test_deep_reads_every_value(kind: str, expected: str, tmp_path: Path) -> None:
    for k in (1, 2, 3):
        tensor = torch.full((40, 2), float(k))
        if k == 2 and kind != "damage":
            tensor[7, 1] = float(kind)
        write_torch(tmp_path / f"epoch_{k}.pt", {"w": tensor, "b": torch.full((3,), 0.1 * k)})
    if kind == "damage":
        break_a_byte(tmp_path / "epoch_2.pt", torch.full((40, 2), 2.0))
    assert not audit([tmp_path]).errors
    report = audit([tmp_path], deep=True)
    [error] = report.errors
    assert re.search(expected, error.message), error.message
    assert "epoch_2.pt" in error.message
    assert "'w'" in error.message
    assert error.exit_code == 3
    assert error.message in report.problems
    assert [row["status"] for row in report.snapshots] == ["used"] * 3


def test_deep_names_every_damaged_file(run: Path) -> None:
    for k in (1, 3):
        break_a_byte(run / f"epoch_{k}.pt", torch.full((4, 2), float(k)))
    report = audit([run], Selection(weights="model"), deep=True)
    assert [Path(e.message.partition(":")[0]).name for e in report.errors] == [
        "epoch_1.pt",
        "epoch_3.pt",
    ]


DISTANCES = {"to_previous", "cosine_to_previous", "to_mean"}


def test_distances_on_demand(run: Path) -> None:
    assert not any(row.keys() & DISTANCES for row in audit([run]).snapshots)
    report = audit([run], Selection(last=2), with_distances=True)
    rows = {Path(row["path"]).name: row for row in report.snapshots}
    assert not rows["epoch_1.pt"].keys() & DISTANCES
    first, second = rows["epoch_2.pt"], rows["epoch_3.pt"]
    assert (first["to_previous"], first["cosine_to_previous"]) == (None, None)
    assert second["to_previous"] == pytest.approx(8**0.5)
    assert second["cosine_to_previous"] == pytest.approx(1)
    assert first["to_mean"] == second["to_mean"] == pytest.approx(2**0.5)
    json.dumps(report.to_json())


def test_no_distances_of_what_does_not_fit(tmp_path: Path) -> None:
    run = write_series(tmp_path / "run")
    write_safetensors(run / "snap_4.safetensors", {"other": np.ones(3, np.float32)})
    report = audit([run], with_distances=True)
    assert report.errors
    assert not any(row.keys() & DISTANCES for row in report.snapshots)


@pytest.mark.parametrize("first, advised", [(1, 6), (5, None)])
def test_early_training(first: int, advised: int | None, tmp_path: Path) -> None:
    for k in range(first, 11):
        write_torch(tmp_path / f"{k}.pt", {"model": {"w": torch.randn(3)}, "step": 100 * k})
    texts = [text for text in audit([tmp_path]).problems if "begin early" in text]
    if advised is None:
        assert texts == []
    else:
        [text] = texts
        assert f"--last {advised}" in text
        assert not audit([tmp_path], Selection(last=advised)).problems


def test_several_runs_in_one_folder(tmp_path: Path) -> None:
    write_series(tmp_path / "a")
    (tmp_path / "b").mkdir()
    for n in (1, 2, 3):
        write_safetensors(tmp_path / "b" / f"snap_{n}.safetensors", make_arrays(n + 10))
    report = audit([tmp_path])
    [error] = report.errors
    assert error.exit_code == 3
    assert "several runs" in error.message
    for name in ("a", "b"):
        assert f"{name} (3 snapshots)" in error.message
    assert len([row for row in report.snapshots if row["status"] == "used"]) == 6
    assert not audit([tmp_path / "a"]).errors


def test_members_at_the_top_of_a_cycle(tmp_path: Path) -> None:
    for k, rate in enumerate([5e-4, 1e-2, 5e-4, 1e-2]):
        state = {"w": torch.randn(40, generator=torch.Generator().manual_seed(k))}
        optimizer = {"state": {}, "param_groups": [{"lr": rate}]}
        write_torch(tmp_path / f"fge-{k}.pt", {"model_state": state, "optimizer_state": optimizer})
    [text] = [text for text in audit([tmp_path]).problems if "learning rate" in text]
    assert "fge-1.pt, fge-3.pt" in text
    chosen = Selection(exclude=("fge-1.pt", "fge-3.pt"))
    assert not audit([tmp_path], chosen).problems
