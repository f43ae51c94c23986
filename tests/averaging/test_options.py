"""Options of rules: read off their signatures, and what they imply."""

from __future__ import annotations

import inspect
from typing import Any

import pytest

from ensemblekit import averaging
from ensemblekit.averaging import RULES, Option, method_for, options
from ensemblekit.errors import UsageError

EXPECTED = {
    "coefficients": ("--coefficients", tuple, ("weighted",)),
    "decay": ("--decay", float, ("ema",)),
    "half_life": ("--half-life", float, ("ema",)),
    "k": ("--k", int, ("lawa",)),
    "width": ("--width", float, ("posthoc-ema",)),
    "stored_widths": ("--stored-widths", tuple, ("posthoc-ema",)),
}


def test_every_option() -> None:
    found = {key: (one.flag, one.kind, one.rules) for key, one in options().items()}
    assert found == EXPECTED
    assert all(one.help and not one.help.endswith(".") for one in options().values())


@pytest.mark.parametrize("name", sorted(RULES))
def test_rules_take_what_the_registry_promises(name: str) -> None:
    """Snapshots, an objective, and options that can be left out."""
    first, *rest = inspect.signature(averaging.rule(name)).parameters.values()
    assert first.name == "snapshots"
    assert all(p.kind is p.KEYWORD_ONLY and p.default is None for p in rest)
    own = {key for key, one in options().items() if name in one.rules}
    assert {p.name for p in rest} == {"objective", *own}


@pytest.mark.parametrize(
    "method, given, expected",
    [
        (None, {}, "uniform"),
        ("lawa", {}, "lawa"),
        (None, {"decay": 0.9}, "ema"),
        (None, {"half_life": 3.0}, "ema"),
        (None, {"k": 3}, "lawa"),
        (None, {"width": 0.1, "stored_widths": (0.05,)}, "posthoc-ema"),
        (None, {"coefficients": (1.0,)}, "weighted"),
        ("ema", {"decay": 0.9}, "ema"),
    ],
)
def test_method_for(method: str | None, given: dict[str, Any], expected: str) -> None:
    assert method_for(method, given) == expected


@pytest.mark.parametrize(
    "method, given, words, hint",
    [
        ("uniform", {"decay": 0.9}, "--decay is no option of method 'uniform'", "ema"),
        ("ema", {"k": 3}, "--k is no option of method 'ema'", "lawa"),
        (None, {"decay": 0.9, "k": 3}, "--k is no option of method 'ema'", "lawa"),
        (None, {"k": 3, "width": 0.1}, "--width is no option of method 'lawa'", "posthoc-ema"),
    ],
)
def test_options_that_do_not_fit(
    method: str | None, given: dict[str, Any], words: str, hint: str
) -> None:
    with pytest.raises(UsageError, match=words) as raised:
        method_for(method, given)
    assert raised.value.hint == f"it is for --method {hint}"


def test_flag() -> None:
    assert Option("half_life", float, "", ("ema",)).flag == "--half-life"
