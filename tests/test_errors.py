"""Errors carry their exit code, kind and way out, and print safely."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ensemblekit import errors
from ensemblekit.errors import EnsembleKitError, UsageError, UserCodeError, listing, one_of

CODES = {
    "UsageError": (2, "usage"),
    "InputError": (3, "bad-input"),
    "DamagedError": (3, "damaged"),
    "HostileError": (3, "hostile"),
    "UnsupportedError": (3, "unsupported"),
    "IncompatibleError": (3, "incompatible"),
    "NotFiniteError": (3, "not-finite"),
    "UserCodeError": (3, "user-code"),
    "MachineError": (4, "machine"),
    "CheckFailedError": (5, "check-failed"),
}


@pytest.mark.parametrize("name", CODES)
def test_exit_codes(name: str) -> None:
    kind = getattr(errors, name)
    assert issubclass(kind, EnsembleKitError)
    assert (kind.exit_code, kind.kind) == CODES[name]


def test_table_is_complete() -> None:
    found = {
        name
        for name, kind in vars(errors).items()
        if isinstance(kind, type) and issubclass(kind, EnsembleKitError)
    }
    assert found - {"EnsembleKitError"} == set(CODES)


def test_message_and_hint() -> None:
    error = UsageError("wrong", hint="do this")
    assert (str(error), error.message, error.hint) == ("wrong", "wrong", "do this")
    assert UsageError("wrong").hint is None


def test_traceback_of_the_users_code() -> None:
    error = UserCodeError("model.py:net raised", traceback="Traceback\n  line\nKeyError: 1\n\n")
    assert error.message == "model.py:net raised\nTraceback\n  line\nKeyError: 1"


@given(st.text(max_size=60))
def test_messages_are_printable(text: str) -> None:
    for shown in (UsageError(text).message, UsageError("x", hint=text).hint):
        assert shown is not None
        assert all(c.isprintable() or c == "\n" for c in shown)
        shown.encode()  # surrogates would not pass


def test_plain_text_stays() -> None:
    assert errors.printable("a 'b' \u00fc\nc") == "a 'b' \u00fc\nc"
    assert errors.printable("\x1b[2J\r\u202e\ud800") == r"\x1b[2J\r\u202e\ud800"


def test_endless_text_is_cut() -> None:
    shown = errors.printable("x" * 10_000)
    assert len(shown) < 4100
    assert shown.endswith("(6000 more)")


@pytest.mark.parametrize(
    "name, hint",
    [
        ("averge", "did you mean 'average'?"),
        ("insepct", "did you mean 'inspect'?"),
        ("zzz", None),
        ("", None),
    ],
)
def test_unknown_name(name: str, hint: str | None) -> None:
    with pytest.raises(UsageError, match="valid: average, inspect") as caught:
        one_of(name, ["average", "inspect"], what="command")
    assert f"unknown command '{name}'" in caught.value.message
    assert caught.value.hint == hint


def test_known_name() -> None:
    assert one_of("b", iter(["a", "b"]), what="x") == "b"


@pytest.mark.parametrize(
    "count, shown",
    [(0, ""), (1, "k0"), (5, "k0, k1, k2, k3, k4"), (7, "k0, k1, k2, k3, k4 and 2 more")],
)
def test_listing(count: int, shown: str) -> None:
    assert listing(f"k{i}" for i in range(count)) == shown


def test_listing_of_endless_names() -> None:
    assert listing(["x" * 999]) == "x" * 200 + "..."
