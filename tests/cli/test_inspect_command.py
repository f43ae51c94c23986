"""`ensemblekit inspect` as installed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ..helpers import contents, run, run_json, sha256, write_series, write_torch

KEYS = {
    "path", "format", "step", "epoch", "lr", "metrics", "weights", "weights_available", "tensors",
    "parameters", "dtypes", "sha256", "status", "reason",
}  # fmt: skip


@pytest.fixture
def work(tmp_path: Path) -> Path:
    folder = tmp_path / "ckpts"
    folder.mkdir()
    for k in (1, 2, 3):
        state = {"w": torch.full((40, 50), float(k**2))}
        value = {"model": state, "ema": {"w": state["w"] / 3}, "epoch": k, "step": 1000 * k}
        write_torch(folder / f"snap_{k}.pt", {**value, "lr": 0.01, "val_acc": 0.912345})
    (folder / "log.txt").write_text("")
    return tmp_path


def test_in_words(work: Path) -> None:
    before = contents(work)
    done = run("inspect", "ckpts", cwd=work)
    assert done.returncode == 0
    lines = done.stdout.splitlines()
    [header] = [line.split() for line in lines if "checkpoint" in line]
    assert {"step", "epoch", "lr", "metrics", "weights", "tensors", "status"} <= set(header)
    [row] = [line.split() for line in lines if "snap_2.pt" in line]
    assert {"2000", "0.01", "val_acc=0.9123", "ema", "used"} <= set(row)
    assert "2,000" in row, "parameters"
    assert "3 snapshots, ordered by step" in lines[-1]
    assert contents(work) == before


def test_json(work: Path) -> None:
    value = run_json("inspect", "ckpts", "--last", "2", cwd=work)
    assert value.keys() >= {"snapshots", "problems"}
    described = [row for row in value["snapshots"] if row.get("format")]
    assert all(row.keys() >= KEYS for row in described)
    states = {Path(row["path"]).name: row["status"] for row in value["snapshots"]}
    assert states == {
        "snap_1.pt": "skipped",
        "snap_2.pt": "used",
        "snap_3.pt": "used",
        "log.txt": "skipped",
    }
    digests = {Path(row["path"]).name: row["sha256"] for row in described}
    assert digests == {path.name: sha256(path) for path in (work / "ckpts").glob("*.pt")}
    assert value["problems"] == []


def test_a_bad_file_among_good_ones(tmp_path: Path) -> None:
    """All is shown, what is wrong comes first, and the exit code says that `average` would stop."""
    write_series(tmp_path / "ckpts")
    (tmp_path / "ckpts" / "snap_4.safetensors").write_bytes(b"junk")
    done = run("inspect", "ckpts", cwd=tmp_path)
    assert done.returncode == 3
    assert done.stdout.count("used") == 3
    first, *others = done.stderr.splitlines()
    assert first.startswith("error: ckpts/snap_4.safetensors: ")
    assert not [line for line in others if line.startswith("error: ")]
    value = run_json("inspect", "ckpts", cwd=tmp_path, exit_code=3)
    assert value["error"]["kind"] == "damaged"
    assert len(value["problems"]) == 1
    assert len(value["snapshots"]) >= 3


def test_metric_names_are_no_markup(tmp_path: Path) -> None:
    """Names out of files are shown as they are, whatever the table would make of them."""
    for k in (1, 2):
        value = {"model": {"w": torch.ones(3) * k}, "epoch": k, "[/red] acc[bold]": 0.5}
        write_torch(tmp_path / f"snap_{k}.pt", value)
    done = run("inspect", "*.pt", cwd=tmp_path)
    assert done.returncode == 0
    assert "[/red] acc[bold]=0.5" in done.stdout


def test_no_such_folder(tmp_path: Path) -> None:
    assert run("inspect", "nosuch", cwd=tmp_path).returncode == 2
    assert run_json("inspect", "nosuch", cwd=tmp_path, exit_code=2)["error"]["kind"] == "usage"
