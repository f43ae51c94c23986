"""Digests that are made beside other work, and what a manifest says of a model."""

from __future__ import annotations

import hashlib
import threading
from pathlib import Path

import numpy as np
import pytest

from ensemblekit.commands import provenance
from ensemblekit.commands.provenance import Digests
from ensemblekit.files import Source
from ensemblekit.options import ModelOptions
from ensemblekit.snapshots import SnapshotSet

from ..helpers import read_set, write_safetensors


def saved(folder: Path, count: int) -> SnapshotSet:
    """Snapshots of different bytes."""
    paths = [folder / f"step_{k}.safetensors" for k in range(count)]
    for k, path in enumerate(paths):
        write_safetensors(path, {"w": np.full(1000 + k, k, np.float32)[:1000]})
    return read_set(*paths)


def expected(snapshots: SnapshotSet) -> list[dict[str, str]]:
    """By the standard library."""
    paths = [snapshot.path for snapshot in snapshots.snapshots]
    return [
        {"file": str(path), "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        for path in paths
    ]


class Gate:
    """Holds digests back; notes which thread made which."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.opened = threading.Event()
        self.makers: dict[str, str] = {}
        honest = provenance.sha256

        def slow(source: Source, stopped: object = None) -> str:
            self.makers[source.path.name] = threading.current_thread().name
            if threading.current_thread() is not threading.main_thread():
                assert self.opened.wait(10)
            return honest(source)

        monkeypatch.setattr(provenance, "sha256", slow)


@pytest.mark.parametrize("started", [0, 1, 7])
def test_digests_of_all_inputs(tmp_path: Path, started: int) -> None:
    snapshots = saved(tmp_path, 7)
    with Digests() as digests:
        for snapshot in snapshots.snapshots[:started]:
            digests.start(snapshot)
        assert digests.of(snapshots) == expected(snapshots)
        assert digests.at_work() == 0
        assert digests.of(snapshots) == expected(snapshots)


def test_the_waiting_thread_makes_those_not_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, snapshots = Gate(monkeypatch), saved(tmp_path, 6)
    with Digests() as digests:
        for snapshot in snapshots.snapshots:
            digests.start(snapshot)
        assert digests.at_work() > 0
        threading.Timer(0.2, gate.opened.set).start()
        assert digests.of(snapshots) == expected(snapshots)
    assert gate.makers["step_5.safetensors"] == threading.main_thread().name
    assert gate.makers["step_0.safetensors"] != threading.main_thread().name


def test_no_digest_is_made_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshots, made = saved(tmp_path, 5), []
    honest = provenance.sha256

    def counted(source: Source, stopped: object = None) -> str:
        made.append(source.path.name)
        return honest(source)

    monkeypatch.setattr(provenance, "sha256", counted)
    with Digests() as digests:
        assert digests.of(snapshots) == digests.of(snapshots) == expected(snapshots)
    assert sorted(made) == [f"step_{k}.safetensors" for k in range(5)]


def test_what_was_not_taken_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, snapshots = Gate(monkeypatch), saved(tmp_path, 6)
    fewer = read_set(*(s.path for s in snapshots.snapshots[:2]))
    with Digests() as digests:
        for snapshot in snapshots.snapshots:
            digests.start(snapshot)
        digests.keep(fewer)
        gate.opened.set()
        assert digests.of(fewer) == expected(fewer)
        assert "step_5.safetensors" not in gate.makers
        # and can be asked for later all the same
        assert digests.of(snapshots) == expected(snapshots)


def test_a_manifest_says_how_the_model_was_run() -> None:
    options = ModelOptions(
        model="train.py:Net",
        model_args={"width": 16},
        train_data=[object()],
        bn_layerwise=True,
        precision="bf16",
        seed=7,
    )
    found = provenance.settings(options)
    assert found is not None
    assert found["model"] == "train.py:Net"
    assert found["model_args"] == {"width": 16}
    assert found["train_data"] == "a list in memory"
    assert (found["bn_layerwise"], found["precision"], found["seed"]) == (True, "bf16", 7)
    assert provenance.settings(ModelOptions()) is None
