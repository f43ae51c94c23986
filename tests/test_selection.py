"""Which snapshots are taken, by the words of the command line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from ensemblekit.errors import UsageError
from ensemblekit.layouts import Facts
from ensemblekit.selection import Selection, select
from ensemblekit.snapshots import Snapshot


def snapshot(
    step: int | None = None,
    *,
    epoch: float | None = None,
    numbers: Sequence[int] = (),
    metrics: Mapping[str, float] | None = None,
) -> Snapshot:
    name = f"net-{step or epoch or numbers}.pt"
    return Snapshot(
        path=Path(name),
        name=name,
        format="torch-zip/state-dict",
        variant="model",
        role="model",
        available=("model",),
        tensors={},
        ties=(),
        facts=Facts(step=step, epoch=epoch, metrics=metrics or {}),
        extras=(),
        is_average=False,
        sources=(),
        numbers=tuple(numbers),
        found_in=None,
    )


STEPS = [
    snapshot(100 * i, epoch=i / 2, metrics={"acc": (i * 7) % 10, "loss": i}) for i in range(1, 11)
]


@pytest.mark.parametrize(
    "options, kept",
    [
        ({}, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]),
        ({"last": 3}, [8, 9, 10]),
        ({"last": 99}, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]),
        ({"every": 3}, [1, 4, 7, 10]),
        ({"every": 4}, [2, 6, 10]),
        ({"every": 99}, [10]),
        ({"from_step": 800}, [8, 9, 10]),
        ({"to_step": 200}, [1, 2]),
        ({"from_step": 250, "to_step": 500}, [3, 4, 5]),
        ({"best": 2, "by": "acc"}, [4, 7]),
        ({"best": 3, "by": "acc:max"}, [1, 4, 7]),
        ({"best": 1, "by": "acc:min"}, [10]),
        ({"best": 2, "by": "loss"}, [1, 2]),
        ({"best": 2, "by": "loss:max"}, [9, 10]),
        ({"from_step": 300, "every": 2, "last": 3}, [6, 8, 10]),
        ({"last": 4, "best": 1, "by": "loss"}, [7]),
    ],
    ids=str,
)
def test_select(options: dict[str, Any], kept: list[int]) -> None:
    found, skipped = select(STEPS, Selection(**options), "step")
    assert [s.facts.step for s in found] == [100 * i for i in kept]
    assert len(found) + len(skipped) == 10
    assert {item.reason for item in skipped} <= {"not selected"}
    assert all(item.snapshot not in found for item in skipped)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"from_step": 2000}, "leave none of 10 snapshots; they run from step 100 to 1000"),
        ({"from_step": 300, "to_step": 200}, "leave none"),
        ({"best": 1, "by": "f1"}, "states no metric 'f1'"),
        ({"best": 1, "by": "acc:up"}, "NAME:min or NAME:max"),
    ],
)
def test_cannot_select(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        select(STEPS, Selection(**options), "step")


def test_metrics_found_are_the_hint() -> None:
    with pytest.raises(UsageError) as caught:
        select(STEPS, Selection(best=1, by="f1"), "step")
    assert caught.value.hint == "metrics found: acc, loss"


@pytest.mark.parametrize(
    "options, message",
    [
        ({"last": 0}, "--last 0: must be at least 1"),
        ({"every": -1}, "--every -1: must be at least 1"),
        ({"best": 0, "by": "acc"}, "--best 0: must be at least 1"),
        ({"best": 1}, "go together"),
        ({"by": "acc"}, "go together"),
    ],
)
def test_impossible_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Selection(**options)


@pytest.mark.parametrize("name", ["val_loss", "nll", "test_error", "ppl", "mse"])
def test_metrics_that_are_better_when_small(name: str) -> None:
    items = [snapshot(i, metrics={name: float(i)}) for i in (1, 2, 3)]
    found, _ = select(items, Selection(best=1, by=name), "step")
    assert [s.facts.step for s in found] == [1]


def test_steps_may_be_epochs_or_numbers() -> None:
    epochs = [snapshot(epoch=i / 2) for i in range(1, 6)]
    found, _ = select(epochs, Selection(from_step=1.5), "epoch")
    assert [s.facts.epoch for s in found] == [1.5, 2, 2.5]
    numbers = [snapshot(numbers=[i]) for i in (8, 9, 10)]
    found, _ = select(numbers, Selection(from_step=9), "number")
    assert [s.numbers for s in found] == [(9,), (10,)]


def test_position_among_several_numbers() -> None:
    """Names `net-9-of-20` are ordered by 9, but `--from-step` looks at 20."""
    items = [snapshot(numbers=[i, 20]) for i in (8, 9, 10)]
    found, _ = select(items, Selection(from_step=9, to_step=10), "number")
    assert [s.numbers[0] for s in found] == [9, 10]


def test_no_order_no_steps() -> None:
    with pytest.raises(UsageError, match="need steps, epochs or numbered names"):
        select([snapshot(), snapshot()], Selection(from_step=1), "content")


def test_nothing_to_select_from() -> None:
    assert select([], Selection(last=3), "content") == ([], [])
