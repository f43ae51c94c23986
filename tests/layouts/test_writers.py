"""Folders of every tool that the documentation names: right weights, order, facts, warnings."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from ensemblekit import Selection, average, discover
from ensemblekit.errors import UnsupportedError
from ensemblekit.layouts import LAYOUTS
from ensemblekit.snapshots import SnapshotSet

from ..checkpoints import State, assert_same_tensors, tensor_bytes
from ..helpers import contents
from .writers import REFUSED, WRITERS, Expected, mean_of, swa_repo

# Bare state dicts, whole modules and dicts without a tool of their own have test files of theirs.
GENERAL = {"torch-module"}


def built(name: str, folder: Path) -> tuple[Path, Expected]:
    run = folder / "run"
    run.mkdir()
    return run, WRITERS[name].build(run)


def check(found: SnapshotSet, expected: tuple[State, ...]) -> None:
    for snapshot, weights in zip(found.snapshots, expected, strict=True):
        own = snapshot.tensors
        assert_same_tensors(dict(sorted(own.items())), dict(sorted(weights.items())))


def test_every_layout_has_a_writer() -> None:
    assert {writer.layout for writer in WRITERS.values()} | GENERAL == set(LAYOUTS)


@pytest.mark.parametrize("name", WRITERS)
def test_found_as_it_was_written(name: str, tmp_path: Path) -> None:
    run, expected = built(name, tmp_path)
    found = discover(run)
    assert tuple(s.name for s in found.snapshots) == expected.names
    assert {s.format.partition("/")[2] for s in found.snapshots} == {WRITERS[name].layout}
    check(found, expected.states)
    for attribute, values in expected.facts.items():
        assert [getattr(s.facts, attribute) for s in found.snapshots] == values, attribute
    reasons = {item.name: item.reason for item in found.skipped}
    for file, reason in expected.skipped.items():
        assert reason in reasons[file]
    for text in expected.warnings:
        assert any(text in warning for warning in found.warnings), found.warnings
    assert expected.warnings or not found.warnings


@pytest.mark.parametrize("name", WRITERS)
def test_averaged(name: str, tmp_path: Path) -> None:
    run, expected = built(name, tmp_path)
    before = contents(run)
    made = average(run).state
    assert contents(run) == before
    assert made is not None
    wanted = mean_of(*expected.states)
    assert made.keys() == wanted.keys()
    for key, tensor in wanted.items():
        assert np.ascontiguousarray(made[key]).tobytes() == tensor_bytes(tensor), key
    for text in expected.warnings:
        assert any(text in warning for warning in average(run).warnings)


@pytest.mark.parametrize("name", [n for n in WRITERS if "ema" in n or n == "swa-repo"])
@pytest.mark.parametrize("wanted", ["model", "ema"])
def test_other_weights(name: str, wanted: str, tmp_path: Path) -> None:
    run, expected = built(name, tmp_path)
    states = expected.model if wanted == "model" else expected.ema
    if not states:
        pytest.skip("the tool does not write such a set")
    check(discover(run, selection=Selection(weights=wanted)), states)


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    expected = REFUSED[name].build(run)
    with pytest.raises(UnsupportedError) as caught:
        discover(run)
    assert expected.message in str(caught.value.message)
    assert expected.hint in str(caught.value.hint)
    path = next(path for path in sorted(run.rglob("*")) if path.is_file())
    with pytest.raises(UnsupportedError):
        discover(path)


@pytest.mark.parametrize("fresh", [True, False])
def test_running_average_with_fresh_batch_norm(fresh: bool, tmp_path: Path) -> None:
    """The SWA authors' script saves it before the statistics are recomputed, mostly."""
    swa_repo(tmp_path)
    if not fresh:
        for path in tmp_path.iterdir():
            value = torch.load(path, weights_only=True)
            value["swa_state_dict"]["bn.running_mean"] += 1
            torch.save(value, path)
    last = tmp_path / "checkpoint-10.pt"
    found = discover(last, selection=Selection(weights="swa"))
    assert found.first.is_average
    assert any("BatchNorm" in text for text in found.warnings) is fresh
    assert not discover(last).warnings
