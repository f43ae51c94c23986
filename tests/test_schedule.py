"""What learning rates and steps tell about a series."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from ensemblekit.layouts import Facts
from ensemblekit.schedule import at_high_rate, early_span, high_rate_warning
from ensemblekit.snapshots import Snapshot

LOW, HIGH = 5e-4, 1e-2


def series(
    rates: Sequence[float | None] = (), steps: Sequence[float | None] = ()
) -> list[Snapshot]:
    """Snapshots that know their learning rate, or their step; nothing else matters here."""
    facts = [Facts(lr=rate) for rate in rates] or [
        Facts(step=None if step is None else int(step), epoch=step) for step in steps
    ]
    return [
        Snapshot(
            path=Path(f"s{k}.pt"), name=f"s{k}.pt", format="torch-zip/x", variant="model",
            role="model", available=("model",), tensors={}, ties=(), facts=own, extras=(),
            is_average=False, sources=(), numbers=(k + 1,), found_in=None,
        )
        for k, own in enumerate(facts)
    ]  # fmt: skip


RATES: dict[str, tuple[list[float | None], list[int]]] = {
    "half-cycles": ([LOW, HIGH, LOW, HIGH, LOW], [1, 3]),
    "half-cycles-that-end-high": ([LOW, HIGH, LOW, HIGH], [1, 3]),
    "half-cycles-that-begin-high": ([HIGH, LOW, HIGH, LOW], [2]),
    "cycle-ends-alone": ([LOW, LOW, LOW], []),
    "constant": ([0.05] * 4, []),
    "step-decay": ([0.1, 0.1, 0.01, 0.001], []),
    "cosine": ([0.09, 0.05, 0.01, 0.0001], []),
    "warm-up": ([0.001, 0.01, 0.1, 0.1, 0.09], []),
    "warm-up-then-decay": ([0.01, 0.1, 0.09, 0.08], []),
    "restart-below-three-times": ([0.01, 0.029, 0.01], []),
    "restart-of-three-times": ([0.01, 0.03, 0.01], [1]),
    "an-unknown-rate": ([LOW, HIGH, None, HIGH, LOW], []),
    "zero": ([0.0, HIGH, 0.0], []),
    "negative": ([-1.0, HIGH, LOW], []),
    "one": ([HIGH], []),
    "none": ([], []),
}


@pytest.mark.parametrize("name", RATES)
def test_high_rates(name: str) -> None:
    rates, expected = RATES[name]
    snapshots = series(rates)
    assert at_high_rate(snapshots) == [snapshots[k] for k in expected]
    text = high_rate_warning(snapshots)
    assert (text is not None) == bool(expected)
    for k in expected:
        assert f"s{k}.pt" in str(text)


def test_many_are_listed_in_short() -> None:
    text = str(high_rate_warning(series([LOW, HIGH] * 9)))
    assert text.startswith("9 of 18 snapshots")
    assert "--exclude" in text
    assert len(text) < 300


SPANS: dict[str, tuple[list[float | None], int | None]] = {
    "from-the-start": ([1, 2, 3, 4, 5, 6, 7, 8, 9, 10], 6),
    "first-third": ([30, 60, 100], 2),
    "just-not-the-first-third": ([34, 60, 100], None),
    "late": ([8, 9, 10], None),
    "two": ([1, 10], None),
    "one-late": ([1, 2, 10], None),
    "unknown": ([1, None, 10, 11], None),
    "one": ([1], None),
    "none": ([], None),
}


@pytest.mark.parametrize("ordered_by", ["step", "epoch"])
@pytest.mark.parametrize("name", SPANS)
def test_early_span(name: str, ordered_by: str) -> None:
    steps, last = SPANS[name]
    text = early_span(series(steps=steps), ordered_by)
    if last is None:
        assert text is None
    else:
        assert text is not None
        assert f"{ordered_by} {steps[0]} of {steps[-1]}" in text
        assert text.endswith(f"--last {last}")


def test_numbers_in_names_do_not_tell_how_far_the_training_was() -> None:
    assert early_span(series(steps=[None] * 6), "number") is None
    assert early_span(series(steps=[None] * 6), "content") is None
