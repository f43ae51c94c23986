"""Owns the proof that graphs are tried in order of hope, and that a failed try is told, not raised."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ensemblekit.batches import Batch
from ensemblekit.ensemble_module import Head
from ensemblekit.errors import UnsupportedError
from ensemblekit.graphs import choosing, making
from ensemblekit.graphs.choosing import Choice, attempts
from ensemblekit.graphs.template import Interface, Port
from ensemblekit.runtimes import onnx_runtime
from ensemblekit.runtimes.onnx_runtime import SessionError

torch.set_num_threads(1)

INTERFACE = Interface((Port("x", "float32", ("batch", 3, 6, 6)),), None, "logits")


def members(count: int, *, norm: bool = True) -> list[nn.Module]:
    torch.manual_seed(0)
    middle: list[nn.Module] = [nn.BatchNorm2d(4)] if norm else []
    return [
        nn.Sequential(nn.Conv2d(3, 4, 3), *middle, nn.ReLU(), nn.Flatten(), nn.Linear(64, 5)).eval()
        for _ in range(count)
    ]


def tried(folder: Path, count: int = 2, *, norm: bool = True, **options: Any) -> list[Choice]:
    images = torch.randn(8, 3, 6, 6)
    batch = Batch((images,), None, 8)
    head = Head("classification", "mean" if count > 1 else None)
    every = members(count, norm=norm)
    return list(attempts(every, head, [images[:3]], INTERFACE, batch, folder, **options))


def in_short(choices: list[Choice]) -> list[tuple[str, bool, bool]]:
    return [(choice.exporter, choice.fold, choice.fuse) for choice in choices]


def as_if(monkeypatch: pytest.MonkeyPatch, *times: float) -> None:
    """Variants take these milliseconds, plainest first."""
    monkeypatch.setattr(choosing, "_times", lambda variants, *_: list(times[: len(variants)]))


def test_the_fastest_comes_first_then_the_plain_one_then_the_other_exporter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    as_if(monkeypatch, 3.0, 2.0, 1.0)
    assert in_short(tried(tmp_path)) == [
        ("dynamo", True, True),
        ("dynamo", False, False),
        ("torchscript", True, True),
        ("torchscript", False, False),
    ]


@pytest.mark.parametrize(
    "times, first",
    [
        ((1.0, 2.0, 3.0), (False, False)),
        ((2.0, 1.0, 3.0), (True, False)),
        ((1.0, 0.99, 0.985), (False, False)),  # not worth it
        ((1.0, 0.97, 0.96), (True, False)),
        ((1.0, 0.97, 0.90), (True, True)),
        ((float("inf"), 5.0, 4.0), (True, True)),
        ((1.0, float("inf"), float("inf")), (False, False)),
    ],
)
def test_less_plain_graphs_must_be_worth_it(
    times: tuple[float, ...],
    first: tuple[bool, bool],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    as_if(monkeypatch, *times)
    choice = tried(tmp_path, exporter="torchscript")[0]
    assert (choice.fold, choice.fuse) == first
    shown = [entry["p50_ms"] for entry in choice.latency]
    assert shown == [t if t < 1e9 else None for t in sorted(times)]
    assert choice.made is not None
    assert (choice.made.folded > 0, choice.made.fused > 0) == first


def test_fusing_on_request(tmp_path: Path) -> None:
    first, *_ = tried(tmp_path, exporter="torchscript", fuse="on")
    assert (first.fold, first.fuse) == (True, True)
    assert first.facts()["fused"] > 0
    for choice in tried(tmp_path, exporter="torchscript", fuse="off"):
        assert not choice.fuse


def test_nothing_is_measured_where_there_is_one_graph(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choosing, "_times", lambda *_: pytest.fail("measured"))
    (only,) = tried(tmp_path, 1, norm=False, exporter="torchscript")
    assert only.latency == []


def test_equal_graphs_are_tried_once(tmp_path: Path) -> None:
    """Without BatchNorm the folded graph is the plain one."""
    assert len(tried(tmp_path, norm=False, exporter="torchscript", fuse="off")) == 1


def test_an_exporter_that_fails_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = making.Maker

    def failing(*args: Any, exporter: Any, **options: Any) -> Any:
        if exporter == "dynamo":
            raise UnsupportedError("the dynamo exporter failed: because")
        return real(*args, exporter=exporter, **options)

    monkeypatch.setattr(choosing, "Maker", failing)
    said: list[str] = []
    first, second, *_ = tried(tmp_path, say=said.append)
    assert first.made is None
    assert first.reason == "the dynamo exporter failed: because"
    assert first.facts() == {"exporter": "dynamo", "folded": None, "fused": None, "nodes": None}
    assert second.exporter == "torchscript"
    assert second.made is not None
    assert said[0] == "exporting with dynamo"
    assert any("measuring 3 graphs on cpu" in line for line in said)


def test_measured_latencies_are_told_and_no_file_stays(tmp_path: Path) -> None:
    first, *_ = tried(tmp_path, exporter="torchscript")
    assert len(first.latency) == 3
    times = [entry["p50_ms"] for entry in first.latency]
    assert times == sorted(times)
    assert all(0 < t < 1000 for t in times)
    assert {entry["provider"] for entry in first.latency} == {"cpu"}
    assert not list(tmp_path.iterdir())


def test_a_graph_that_does_not_run_is_never_the_fastest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = onnx_runtime.Session

    def refusing(path: Path, *args: Any, **options: Any) -> Any:
        if path.name == "variant2.onnx":  # the fused one
            raise SessionError("no")
        return real(path, *args, **options)

    monkeypatch.setattr(choosing, "Session", refusing)
    first, *_ = tried(tmp_path, exporter="torchscript")
    assert not first.fuse
    assert [entry["p50_ms"] is None for entry in first.latency] == [False, False, True]
    assert not list(tmp_path.iterdir())
