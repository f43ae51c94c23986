"""From paths to the ordered snapshots of one run: by what files say, never by text or time."""

from __future__ import annotations

import itertools
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from ensemblekit import discover
from ensemblekit.commands.audit import audit
from ensemblekit.errors import (
    DamagedError,
    IncompatibleError,
    InputError,
    UnsupportedError,
    UsageError,
)
from ensemblekit.selection import Selection
from ensemblekit.snapshots import SnapshotSet

from .checkpoints import State, mean, save, state


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A folder whose name holds no number."""
    made = tmp_path / "run"
    made.mkdir()
    return made


def names(found: SnapshotSet) -> list[str]:
    return [snapshot.path.name for snapshot in found.snapshots]


def reasons(found: SnapshotSet) -> dict[str, str]:
    return {item.name: item.reason for item in found.skipped}


# --- order


def bare(i: int) -> Any:
    return state(i)


def with_step(i: int) -> Any:
    return {"model": state(i), "step": 10 * i, "epoch": 1}


def with_epoch(i: int) -> Any:
    return {"model": state(i), "epoch": i / 4}


@pytest.mark.parametrize(
    "make, ordered_by", [(bare, "number"), (with_step, "step"), (with_epoch, "epoch")]
)
def test_order(run: Path, make: Callable[[int], Any], ordered_by: str) -> None:
    for i in (10, 9, 100, 1):
        save(make(i), run / f"net-{i}.pt")
    found = discover(run)
    assert names(found) == ["net-1.pt", "net-9.pt", "net-10.pt", "net-100.pt"]
    assert found.ordered_by == ordered_by


def test_files_know_better_than_their_names(run: Path) -> None:
    for i, step in ((1, 30), (2, 20), (3, 10)):
        save({"model": state(i), "step": step}, run / f"net-{i}.pt")
    assert names(discover(run)) == ["net-3.pt", "net-2.pt", "net-1.pt"]


def test_steps_that_begin_anew_in_each_epoch_do_not_order(run: Path) -> None:
    for i, step in ((1, 30), (2, 20), (3, 10)):
        save({"model": state(i), "step": step, "epoch": i}, run / f"net-{i}.pt")
    found = discover(run)
    assert (found.ordered_by, names(found)) == ("epoch", ["net-1.pt", "net-2.pt", "net-3.pt"])


def test_epoch_when_one_step_is_missing(run: Path) -> None:
    save({"model": state(1), "step": 30, "epoch": 1}, run / "c.pt")
    save({"model": state(2), "epoch": 2}, run / "b.pt")
    save({"model": state(3), "step": 10, "epoch": 3}, run / "a.pt")
    found = discover(run)
    assert (found.ordered_by, names(found)) == ("epoch", ["c.pt", "b.pt", "a.pt"])


def test_steps_that_are_all_equal_say_nothing(run: Path) -> None:
    for i in (2, 10):
        save({"model": state(i), "step": 5, "epoch": 3}, run / f"net-{i}.pt")
    assert discover(run).ordered_by == "number"


@pytest.mark.parametrize(
    "pattern",
    ["{}.pt", "epoch={}-step={}.ckpt.pt", "net_v2_{}.pth.tar", "e{}of20.pt", "w{:05d}.pt"],
)
def test_numbers_in_names(run: Path, pattern: str) -> None:
    expected = [pattern.format(i, 7 * i) for i in (2, 9, 10, 11)]
    for i, name in zip((2, 9, 10, 11), expected, strict=True):
        save(state(i), run / name)
    found = discover(run)
    assert (found.ordered_by, names(found)) == ("number", expected)


def test_numbered_folders(run: Path) -> None:
    for i in (100, 20, 3):
        save(state(i), run / f"checkpoint-{i}" / "model.pt")
    found = discover(run)
    assert found.ordered_by == "number"
    assert [s.name for s in found.snapshots] == [f"checkpoint-{i}/model.pt" for i in (3, 20, 100)]


def test_text_and_time_are_never_used(run: Path) -> None:
    for i, name in enumerate(("b", "a", "c")):
        os.utime(save(state(i), run / f"{name}.pt"), ns=(i, i))
    first = discover(run)
    assert first.ordered_by == "content"
    assert any("tell an order" in text for text in first.warnings)
    order = [s.tensors["fc.bias"].extent.crc32 for s in first.snapshots]
    other = run.parent / "other"
    for i, name in enumerate(("x", "z", "y")):
        os.utime(save(state(i), other / f"{name}.pt"), ns=(9 - i, 9 - i))
    assert [s.tensors["fc.bias"].extent.crc32 for s in discover(other).snapshots] == order


def test_times_do_not_matter(run: Path) -> None:
    for i in (1, 2, 3):
        os.utime(save(state(i), run / f"net-{i}.pt"), ns=(100 - i, 100 - i))
    assert names(discover(run)) == ["net-1.pt", "net-2.pt", "net-3.pt"]


@pytest.mark.parametrize("make", [bare, with_step])
def test_order_of_naming_does_not_matter(run: Path, make: Callable[[int], Any]) -> None:
    files = [save(make(i), run / f"net-{i}.pt") for i in (1, 2, 10)]
    results = {tuple(names(discover(*order))) for order in itertools.permutations(files)}
    assert results == {("net-1.pt", "net-2.pt", "net-10.pt")}


def test_ties_are_broken_by_content(run: Path) -> None:
    def order(folder: Path, letters: str) -> list[int | None]:
        for i, letter in enumerate(letters):
            save({"model": state(i), "step": 5 + i // 3}, folder / f"{letter}.pt")
        found = discover(folder)
        assert found.ordered_by == "step"
        return [s.tensors["fc.bias"].extent.crc32 for s in found.snapshots]

    assert order(run, "abcd") == order(run.parent / "other", "dcab")


def test_order_despite_a_copy_without_a_number(run: Path) -> None:
    """`last.pt` counts once, but has already spoiled the order by numbers."""
    for i in (9, 10):
        save(state(i), run / f"net-{i}.pt")
    shutil.copy(run / "net-10.pt", run / "last.pt")
    found = discover(run)
    assert (found.ordered_by, names(found)) == ("number", ["net-9.pt", "net-10.pt"])


def test_order_despite_a_mean_without_a_number(run: Path) -> None:
    """Likewise for a file that is skipped as the mean of the others."""
    for i in (8, 9, 10):
        save(state(i), run / f"net-{i}.pt")
    save(mean([state(i) for i in (8, 9, 10)]), run / "swa.pt")
    found = discover(run)
    assert found.ordered_by == "number"
    assert names(found) == ["net-8.pt", "net-9.pt", "net-10.pt"]


def test_number_of_the_folder_for_one_file_only(tmp_path: Path) -> None:
    """`best.pt` in `run7/` has no number, and is not between the sixth and the eighth."""
    for i in (6, 8):
        save(state(i), tmp_path / "run7" / f"net-{i}.pt")
    save(state(99), tmp_path / "run7" / "best.pt")
    found = discover(tmp_path / "run7")
    assert (found.ordered_by, names(found)) == ("number", ["best.pt", "net-6.pt", "net-8.pt"])
    assert any("best.pt" in warning for warning in found.warnings)


# --- the same weights count once


def copy(source: Path, target: Path) -> None:
    shutil.copy(source, target)


def hard_link(source: Path, target: Path) -> None:
    os.link(source, target)


def soft_link(source: Path, target: Path) -> None:
    target.symlink_to(source.name)


@pytest.mark.parametrize("name", ["last.pt", "best.pt", "a-copy-of-the-best.pt"])
@pytest.mark.parametrize("make", [copy, hard_link, soft_link])
def test_second_name(run: Path, make: Callable[[Path, Path], None], name: str) -> None:
    for i in (1, 2, 3):
        save(with_step(i), run / f"net-{i}.pt")
    make(run / "net-3.pt", run / name)
    found = discover(run)
    assert names(found) == ["net-1.pt", "net-2.pt", "net-3.pt"]
    assert reasons(found) == {name: "same weights as net-3.pt"}


def test_weights_alone_beside_the_whole_checkpoint(run: Path) -> None:
    """One of two names of the same weights states no step, so no step counts."""
    for i in (1, 2, 3):
        save(with_step(i), run / f"net-{i}.pt")
    safetensors.torch.save_file(state(3), run / "export.safetensors")
    found = discover(run)
    assert names(found) == ["net-1.pt", "net-2.pt", "net-3.pt"]
    assert reasons(found) == {"export.safetensors": "same weights as net-3.pt"}


def test_one_snapshot_under_two_names(run: Path) -> None:
    save(state(), run / "net-1.pt")
    copy(run / "net-1.pt", run / "last.pt")
    assert names(discover(run)) == ["net-1.pt"]


# --- averages are not averaged again


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_mean_of_the_others(run: Path, dtype: torch.dtype) -> None:
    states = [state(i) for i in range(1, 6)]
    for i, value in enumerate(states, start=1):
        save({"model": value, "step": i}, run / f"net-{i}.pt")
    save({"model": mean(states, dtype=dtype), "step": 6}, run / "mean.pt")
    found = discover(run)
    assert names(found) == [f"net-{i}.pt" for i in range(1, 6)]
    assert reasons(found)["mean.pt"].startswith("equals the mean of net-1.pt")


def test_similar_snapshots_are_all_used(run: Path) -> None:
    for i in range(1, 6):
        save(state(i, noise=1e-5), run / f"net-{i}.pt")
    assert len(discover(run)) == 5


def test_output_of_ours_is_not_averaged_again(run: Path) -> None:
    for i in (1, 2, 3):
        save(state(i), run / f"net-{i}.pt")
    safetensors.torch.save_file(
        state(7), run / "averaged-1.safetensors", metadata={"ensemblekit": "{}"}
    )
    found = discover(run)
    assert names(found) == ["net-1.pt", "net-2.pt", "net-3.pt"]
    assert "is an average already" in reasons(found)["averaged-1.safetensors"]


def test_averages_alone_may_be_averaged(run: Path) -> None:
    for i in (1, 2):
        path = run / f"averaged-{i}.safetensors"
        safetensors.torch.save_file(state(i), path, metadata={"ensemblekit": "{}"})
    assert len(discover(run)) == 2


def test_moving_average_in_each_file_is_a_snapshot(run: Path) -> None:
    for i in (1, 2, 3):
        save({"model": state(i), "ema": state(i + 10), "step": i}, run / f"net-{i}.pt")
    found = discover(run)
    assert [s.variant for s in found.snapshots] == ["ema"] * 3
    raw = discover(run, selection=Selection(weights="model"))
    assert [s.variant for s in raw.snapshots] == ["model"] * 3


# --- several runs


def fill(folder: Path, *numbers: int, seed: int = 0) -> None:
    for i in numbers:
        save(state(i, seed=seed), folder / f"net-{i}.pt")


@pytest.mark.parametrize("inner", ["", "checkpoints/"])
def test_several_runs(run: Path, inner: str) -> None:
    fill(run / f"first/{inner}", 1, 2)
    fill(run / f"second/{inner}", 1, 2, 3, seed=1)
    with pytest.raises(InputError, match="holds several runs") as caught:
        discover(run)
    assert "first" in caught.value.message
    assert "(2 snapshots)" in caught.value.message
    assert "second" in caught.value.message
    assert "(3 snapshots)" in caught.value.message


def test_run_beside_loose_files(run: Path) -> None:
    fill(run, 1, 2)
    fill(run / "old", 3, 4)
    with pytest.raises(InputError, match="holds several runs"):
        discover(run)


@pytest.mark.parametrize("pattern", ["run{}", "seed_{}", "version_{}", "2024-01-0{}", "fold{}"])
def test_runs_with_numbers_in_their_names(run: Path, pattern: str) -> None:
    """Folders with several snapshots each are runs, numbered or not."""
    fill(run / pattern.format(1), 1, 2, seed=0)
    fill(run / pattern.format(2), 1, 2, seed=1)
    with pytest.raises(InputError, match="holds several runs"):
        discover(run)


def test_side_files_make_no_run(run: Path) -> None:
    fill(run / "ckpts", 1, 2)
    save({"param_groups": [], "state": {}}, run / "states" / "optim.pt")
    (run / "logs").mkdir()
    (run / "logs" / "notes").write_text("x")
    assert len(discover(run)) == 2


# --- what does not fit


def without_a_key(value: State) -> None:
    del value["fc.bias"]


def with_another_key(value: State) -> None:
    value["fc.scale"] = torch.ones(1)


def with_another_shape(value: State) -> None:
    value["fc.bias"] = torch.ones(11)


def with_another_dtype(value: State) -> None:
    value["fc.bias"] = value["fc.bias"].half()


@pytest.mark.parametrize(
    "change, message",
    [
        (without_a_key, r"1 keys missing \(fc.bias\)"),
        (with_another_key, r"1 keys not expected \(fc.scale\)"),
        (with_another_shape, r"shape differs for 'fc.bias' \(11,\) instead of \(10,\)"),
        (with_another_dtype, "dtype differs for 'fc.bias' float16 instead of float32"),
    ],
)
def test_network_that_differs(run: Path, change: Callable[[State], None], message: str) -> None:
    fill(run, 1, 2, 3)
    odd = state(2)
    change(odd)
    save(odd, run / "net-2.pt")
    with pytest.raises(IncompatibleError, match=message) as caught:
        discover(run)
    assert "net-2.pt does not fit" in caught.value.message
    assert "--exclude 'net-2.pt'" in str(caught.value.hint)
    assert len(discover(run, selection=Selection(exclude=("net-2.pt",)))) == 2


def test_everything_that_differs_is_listed(run: Path) -> None:
    fill(run, 1, 2, 3)
    odd = state(2)
    for change in (without_a_key, with_another_key):
        change(odd)
    odd["conv.weight"], odd["bn.weight"] = odd["conv.weight"][:2], odd["bn.weight"].double()
    save(odd, run / "net-2.pt")
    with pytest.raises(IncompatibleError) as caught:
        discover(run)
    for text in ("keys missing", "keys not expected", "shape differs", "dtype differs"):
        assert text in caught.value.message


MIXED: dict[str, list[Any]] = {
    "both-and-raw": [{"model": state(1), "ema": state(2)}, {"model": state(3)}],
    "both-and-bare": [{"model": state(1), "ema": state(2)}, state(3)],
    "timm-and-raw": [{"state_dict": state(1), "state_dict_ema": state(2)}, {"model": state(3)}],
    "average-alone-and-raw": [{"ema": state(1)}, {"model": state(2)}],
    "average-alone-and-bare": [{"model_ema": state(1)}, state(2)],
}


@pytest.mark.parametrize("name", MIXED)
def test_moving_averages_and_raw_weights_are_not_mixed(run: Path, name: str) -> None:
    """Names are compared, not what the weights are."""
    for i, value in enumerate(MIXED[name]):
        save(value, run / f"net-{i}.pt")
    with pytest.raises(IncompatibleError, match="must not mix"):
        discover(run)


def test_raw_weights_of_a_mixed_folder(run: Path) -> None:
    for i, value in enumerate(MIXED["both-and-raw"]):
        save(value, run / f"net-{i}.pt")
    with pytest.raises(IncompatibleError) as caught:
        discover(run)
    assert caught.value.hint == "--weights model"
    assert len(discover(run, selection=Selection(weights="model"))) == 2


def test_one_network_under_several_keys(run: Path) -> None:
    for i, key in enumerate(("model", "state_dict", "net")):
        save({key: state(i)}, run / f"net-{i}.pt")
    save(state(9), run / "net-9.pt")
    assert len(discover(run)) == 4


def test_two_networks_in_each_file(run: Path) -> None:
    for i in (1, 2):
        save({"generator": state(i), "discriminator": state(i + 5)}, run / f"net-{i}.pt")
    with pytest.raises(UnsupportedError, match="generator, discriminator"):
        discover(run)
    found = discover(run, selection=Selection(weights="generator"))
    assert [s.variant for s in found.snapshots] == ["generator"] * 2


def test_weights_that_are_not_there(run: Path) -> None:
    fill(run, 1, 2)
    with pytest.raises(UnsupportedError, match="has no weights 'ema'; it has model"):
        discover(run, selection=Selection(weights="ema"))


# --- what is no checkpoint


def test_other_files_are_passed_over(run: Path) -> None:
    fill(run, 1, 2)
    save({"param_groups": [], "state": {}}, run / "adam.pt")
    (run / "weights").write_text("notes")
    (run / "config.json").write_text("{}")
    found = discover(run)
    assert len(found) == 2
    assert reasons(found) == {
        "adam.pt": "holds no model weights",
        "weights": "not a checkpoint",
        "config.json": "not a checkpoint",
    }


def test_named_file_must_be_a_checkpoint(run: Path) -> None:
    (run / "notes.txt").write_text("x")
    with pytest.raises(UnsupportedError):
        discover(run / "notes.txt")


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 and then nothing", b"text" * 30])
def test_file_that_claims_to_be_one(run: Path, content: bytes) -> None:
    fill(run, 1, 2)
    (run / "net-3.pt").write_bytes(content)
    with pytest.raises((DamagedError, UnsupportedError), match=r"net-3\.pt"):
        discover(run)


def test_first_of_several_errors_says_how_many(run: Path) -> None:
    fill(run, 1)
    for i in (2, 3, 4):
        (run / f"net-{i}.pt").write_bytes(b"")
    with pytest.raises(DamagedError) as caught:
        discover(run)
    assert "(2 more; see: ensemblekit inspect)" in str(caught.value.hint)


def test_empty_and_missing_folders(run: Path) -> None:
    with pytest.raises(InputError, match="no checkpoints found"):
        discover(run)
    with pytest.raises(UsageError, match="no such file or folder"):
        discover(run / "missing")


def test_everything_excluded(run: Path) -> None:
    fill(run, 1, 2)
    with pytest.raises(UsageError, match="--exclude leaves none of 2 files"):
        discover(run, selection=Selection(exclude=("*",)))


def test_selection_after_duplicates(run: Path) -> None:
    for i in (1, 2, 3):
        save(with_step(i), run / f"net-{i}.pt")
    copy(run / "net-3.pt", run / "last.pt")
    found = discover(run, selection=Selection(last=2))
    assert names(found) == ["net-2.pt", "net-3.pt"]
    assert reasons(found) == {"last.pt": "same weights as net-3.pt", "net-1.pt": "not selected"}


def test_sharded_folders(run: Path) -> None:
    for i in (5, 10):
        folder = run / f"checkpoint-{i}"
        folder.mkdir()
        value = state(i)
        safetensors.torch.save_file(value, folder / "part-1.safetensors")
        index = {"weight_map": dict.fromkeys(value, "part-1.safetensors")}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        (folder / "config.json").write_text("{}")
    found = discover(run)
    assert names(found) == ["checkpoint-5", "checkpoint-10"]
    assert found.ordered_by == "number"


def test_facts_of_a_snapshot(run: Path) -> None:
    save({"model": state(), "epoch": 2.5, "lr": 0.1, "val_acc": torch.tensor(0.5)}, run / "net.pt")
    (snapshot,) = discover(run).snapshots
    assert snapshot.facts.epoch == 2.5
    assert snapshot.facts.metrics == {"val_acc": 0.5}
    assert snapshot.parameters == sum(
        t.numel() for k, t in state().items() if "running" not in k and t.is_floating_point()
    )
    assert discover(run).norm_layers == ("bn",)


def test_tied_parameters_count_once(run: Path) -> None:
    table = torch.randn(5, 3)
    save({"embed": table, "head": table, "bias": torch.ones(5)}, run / "net.pt")
    (snapshot,) = discover(run).snapshots
    assert snapshot.parameters == 20


def test_audit_shows_what_discover_refuses(run: Path) -> None:
    fill(run / "first", 1, 2)
    fill(run / "second", 1, 2, seed=1)
    (run / "second" / "net-3.pt").write_bytes(b"")
    report = audit([run])
    assert report is not None
