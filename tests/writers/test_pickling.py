"""The pickle that we write: plain values come back as they were, through every reader."""

from __future__ import annotations

import io
import math
import pickle
import struct
from collections import OrderedDict
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ensemblekit.errors import UnsupportedError
from ensemblekit.writers.pickling import Ordered, is_plain, pickled

scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(2**200), 2**200)
    | st.floats(allow_nan=False)
    | st.text(st.characters(exclude_categories=()))  # halves of surrogate pairs, too
)
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(st.text(max_size=5) | st.integers(), inner, max_size=4)
    ),
    max_leaves=20,
)


def same(one: Any, other: Any) -> bool:
    """Equal, of the same types, in the same order; 0.0 is not -0.0, nor 1 True."""
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return same(list(one.items()), list(other.items()))
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, float):
        return struct.pack("d", one) == struct.pack("d", other)
    return bool(one == other)


@settings(max_examples=150, deadline=None)
@given(values)
@example([2**31, 2**31 - 1, -(2**31), -(2**31) - 1, 255, 256, -1, 2**63, 2**64])
@example([math.inf, -math.inf, -0.0, 5e-324])
@example({"": {}, 3: (), "a": [(), [], {}]})
def test_comes_back(value: Any) -> None:
    assert is_plain(value)
    found = pickle.loads(pickled(value))
    assert same(found, value)


def test_nan() -> None:
    assert math.isnan(pickle.loads(pickled(math.nan)))


def test_ordered() -> None:
    found = pickle.loads(pickled(Ordered({"b": 1, "a": 2})))
    assert type(found) is OrderedDict
    assert list(found.items()) == [("b", 1), ("a", 2)]


@pytest.mark.parametrize("value", [b"bytes", {1, 2}, 1j, object(), range(3), bytearray(b"x"), len])
def test_not_plain(value: object) -> None:
    assert not is_plain(value)
    assert not is_plain([{"a": (value,)}])
    with pytest.raises(UnsupportedError, match=type(value).__name__):
        pickled([value])


class Text(str):
    """A text that may be more than a text."""


class Number(int):
    """A number likewise."""


class Pair(tuple[int, int]):
    """Of a class of its own, such as a named tuple: not a plain tuple."""


class Attributes(dict[str, int]):
    """And a dict."""


@pytest.mark.parametrize(
    "value",
    [
        Text("a"),
        Number(3),
        pytest.param(Pair((1, 2))),
        pytest.param(Attributes(a=1)),
    ],
    ids=["Text", "Number", "Pair", "Attributes"],
)
def test_subclasses_are_not_plain(value: object) -> None:
    """They would come back as something else than they were."""
    assert not is_plain(value)
    assert not is_plain({"a": [value]})


def test_an_endless_integer() -> None:
    with pytest.raises(UnsupportedError, match="integer of"):
        pickled(1 << 4000)
    assert pickle.loads(pickled(1 << 2030)) == 1 << 2030


@pytest.mark.parametrize("bits", [64, 2031, 2032, 2033, 2040, 8 * 300])
@pytest.mark.parametrize("sign", [1, -1])
def test_integers_that_are_plain_can_be_written(bits: int, sign: int) -> None:
    """Up to the limit, and not one bit further: else a run would end with an error at its end."""
    for value in (sign * (1 << (bits - 1)), sign * ((1 << bits) - 1)):
        assert is_plain([value]) == (bits <= 2032)
        if is_plain([value]):
            assert pickle.loads(pickled([value])) == [value]


def test_only_plain_opcodes() -> None:
    """Nothing is imported for plain values, so that any reader takes them."""
    import pickletools

    value = {"a": [1, 2.5, "x", None, True, (1 << 70,)], "b": {}}
    names = {op.name for op, _, _ in pickletools.genops(io.BytesIO(pickled(value)))}
    assert not names & {"GLOBAL", "STACK_GLOBAL", "REDUCE", "INST", "OBJ", "NEWOBJ", "BUILD"}
