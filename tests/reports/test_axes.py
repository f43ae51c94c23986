"""Scales, ticks and labels: the arithmetic below the plots."""

from __future__ import annotations

import pytest

from ensemblekit.reports.axes import Scale, across, spanning
from ensemblekit.reports.labels import Label, place


@pytest.mark.parametrize(
    "values", [[0.0], [5.0, 5.0], [1e-9, 2e-9], [-3.0, 1e7], [91.2, 94.9], [1e-4, 0.1]]
)
@pytest.mark.parametrize("log", [False, True])
def test_scale_holds_its_values(values: list[float], log: bool) -> None:
    if log and min(values) <= 0:
        pytest.skip("no logarithm")
    scale = spanning(values, 0, 100, log=log)
    assert all(0 <= scale(value) <= 100 for value in values)
    ticks = scale.ticks()
    assert all(-0.1 <= scale(value) <= 100.1 for value, _ in ticks)
    assert len({text for _, text in ticks}) == len(ticks)
    assert len(ticks) <= 12


def test_upwards_is_downwards_in_a_drawing() -> None:
    assert Scale(0, 10, start=200, stop=100)(10) == 100


def test_log_ticks() -> None:
    assert [text for _, text in across([1, 60], log=True).ticks()] == [
        "1",
        "2",
        "5",
        "10",
        "20",
        "50",
    ]


def test_labels_never_overlap() -> None:
    labels = [Label(f"name {i}", (200 + 3 * i, 150), 140, 160) for i in range(30)]
    texts = place(labels, [])
    assert 1 <= len(texts) < 30
    assert "name 0" in texts[0]


def test_long_label_is_cut_and_flat() -> None:
    (text,) = place([Label("a\nb" * 40, (100, 150), 140, 160)], [])
    assert "a ba ba b" in text
    assert text.endswith("…</text>")
