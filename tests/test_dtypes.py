"""Names agree with torch and safetensors; `narrow` rounds once, to nearest, ties to even."""

from __future__ import annotations

import math
from bisect import bisect_left
from fractions import Fraction
from functools import cache
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ensemblekit.dtypes import DTYPES, FROM_SAFETENSORS, STORAGES, from_torch_name, narrow

NARROW = [
    *("float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz"),
]


@pytest.mark.parametrize("name", DTYPES)
def test_same_as_torch(name: str) -> None:
    ours, theirs = DTYPES[name], getattr(torch, name)
    assert ours.name == name
    assert ours.itemsize == theirs.itemsize
    assert (ours.kind == "complex") == theirs.is_complex
    assert (ours.kind == "float") == theirs.is_floating_point
    if ours.kind == "complex":
        assert ours.real.itemsize == theirs.to_real().itemsize
    else:
        assert ours.real == ours.numpy


def test_same_codes_as_safetensors() -> None:
    theirs = {
        code: str(dtype).removeprefix("torch.") for code, dtype in safetensors.torch._TYPES.items()
    }
    for code, dtype in FROM_SAFETENSORS.items():
        assert theirs[str(code)] == dtype.name


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
@pytest.mark.parametrize("name", STORAGES)
def test_same_storages_as_torch(name: str) -> None:
    if name != "UntypedStorage":
        assert str(getattr(torch, name)(0).dtype) == f"torch.{STORAGES[name]}"


@pytest.mark.parametrize(
    "alias", ["float", "double", "half", "long", "int", "short", "chalf", "cfloat", "cdouble"]
)
def test_aliases(alias: str) -> None:
    found = from_torch_name(alias)
    assert found is not None
    assert f"torch.{found.name}" == str(getattr(torch, alias))


@pytest.mark.parametrize("name", ["qint8", "float4_e2m1fn_x2", "", "Tensor", "bits8"])
def test_unknown_names(name: str) -> None:
    assert from_torch_name(name) is None


@cache
def grid(name: str) -> tuple[list[Fraction], list[int]]:
    """All finite values >= 0 of a type in order, and the bits of each."""
    dtype = DTYPES[name].numpy
    width = np.dtype(f"u{dtype.itemsize}")
    codes = np.arange(1 << (8 * dtype.itemsize - 1), dtype=width)
    with np.errstate(invalid="ignore"):  # signalling NaN
        values = codes.view(dtype).astype(np.float64)
    finite = [(Fraction(v), int(c)) for v, c in zip(values, codes, strict=True) if math.isfinite(v)]
    finite.sort()
    return [v for v, _ in finite], [c for _, c in finite]


def expected(value: float, name: str) -> float:
    """Exact rational rounding: nearest, ties to even bits, beyond the largest to inf or NaN."""
    values, codes = grid(name)
    exact = abs(Fraction(value))
    place = bisect_left(values, exact)
    if place == len(values):
        step = values[-1] - values[-2]
        half = values[-1] + step / 2
        beyond = exact > half or (exact == half and codes[-1] % 2 == 1)
        overflow = np.array([math.inf]).astype(DTYPES[name].numpy).astype(np.float64)[0]
        return math.copysign(overflow if beyond else float(values[-1]), value)
    if values[place] == exact or place == 0:
        found = place
    else:
        below, above = exact - values[place - 1], values[place] - exact
        even = place if codes[place] % 2 == 0 else place - 1
        found = even if below == above else (place - 1 if below < above else place)
    return math.copysign(float(values[found]), value)


def check(value: float, name: str) -> None:
    with np.errstate(all="ignore"):  # beyond the largest float32
        got = float(narrow(np.array([value]), DTYPES[name].numpy).astype(np.float64)[0])
    want = expected(value, name)
    if math.isnan(want):
        assert math.isnan(got)
    else:
        assert got == want
        if not name.endswith("fnuz"):  # these have one zero
            assert math.copysign(1, got) == math.copysign(1, want)


@st.composite
def near_ties(draw: st.DrawFn, name: str) -> float:
    """A value of the type or the middle of two, moved by nothing or by very little."""
    values, _ = grid(name)
    place = draw(st.integers(0, len(values) - 2))
    part = draw(st.sampled_from([Fraction(0), Fraction(1, 2), Fraction(1, 4)]))
    middle = float(values[place] + (values[place + 1] - values[place]) * part)
    tiny = draw(st.sampled_from([0.0, 2.0**-52, 2.0**-40, 2.0**-30, 2.0**-24, 2.0**-12]))
    return middle * (1 + draw(st.sampled_from([-1, 1])) * tiny) * draw(st.sampled_from([-1, 1]))


@pytest.mark.parametrize("name", NARROW)
def test_nearest_even_beside_ties(name: str) -> None:
    """See test_one_step_where_two_would_err."""

    @settings(max_examples=250, deadline=None)
    @given(near_ties(name))
    @example(5e-324)
    @example(-5e-324)
    @example(2.0**-150)
    @example(1e308)
    @example(0.0)
    @example(-0.0)
    def held(value: float) -> None:
        check(value, name)

    held()


@pytest.mark.parametrize("name", NARROW)
def test_nearest_even_anywhere(name: str) -> None:
    values, _ = grid(name)
    top = float(values[-1])

    @settings(max_examples=150, deadline=None)
    @given(st.floats(allow_nan=False, allow_infinity=False) | st.floats(-2 * top, 2 * top))
    def held(value: float) -> None:
        check(value, name)

    held()


@pytest.mark.parametrize("name", NARROW)
def test_every_value_stays(name: str) -> None:
    dtype = DTYPES[name].numpy
    codes = np.arange(1 << (8 * dtype.itemsize)).astype(f"u{dtype.itemsize}").view(dtype)
    with np.errstate(invalid="ignore"):  # signalling NaN
        wide = codes.astype(np.float64)
        finite = np.isfinite(wide)
        assert narrow(wide[finite], dtype).tobytes() == codes[finite].tobytes()
        back = narrow(wide[~finite], dtype).astype(np.float64)
    np.testing.assert_array_equal(back, wide[~finite])


@pytest.mark.parametrize("name", ["float64", "float32", *NARROW])
def test_special_values(name: str) -> None:
    dtype = DTYPES[name].numpy
    values = np.array([np.nan, np.inf, -np.inf])
    with np.errstate(invalid="ignore"):
        plain = values.astype(dtype).astype(np.float64)
        np.testing.assert_array_equal(narrow(values, dtype).astype(np.float64), plain)


@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 0), (2, 3)])
@pytest.mark.parametrize("name", ["float64", "float32", *NARROW])
def test_shapes_stay(name: str, shape: tuple[int, ...]) -> None:
    values = np.full(shape, 0.1)
    found: Any = narrow(values, DTYPES[name].numpy)
    assert np.shape(found) == shape
    assert found.dtype == DTYPES[name].numpy
    assert np.all(values == 0.1), "the argument was changed"


@pytest.mark.parametrize(
    "name, unit", [("bfloat16", 2.0**-7), ("float8_e4m3fn", 2.0**-3), ("float8_e5m2", 0.25)]
)
@pytest.mark.parametrize("hair", [2.0**-20, 2.0**-40])
def test_one_step_where_two_would_err(name: str, unit: float, hair: float) -> None:
    """Its numpy kind is "f" too, so it takes the way of numpy's own types."""
    dtype = DTYPES[name].numpy
    assert float(narrow(np.array([1 + unit / 2 + hair]), dtype)[0]) == 1 + unit
    assert float(narrow(np.array([1 + 3 * unit / 2 - hair]), dtype)[0]) == 1 + unit


def test_plain_casts_round_twice() -> None:
    """The reason why `narrow` exists; when this fails it may go."""
    value = np.array([1 + 2.0**-8 + 2.0**-40])
    assert float(value.astype(ml_dtypes.bfloat16)[0]) == 1.0


def test_every_tie_of_bfloat16_and_its_neighbours() -> None:
    """The middle of any two bfloat16, and the doubles just beside it, of both signs."""
    form = DTYPES["bfloat16"].numpy
    codes = np.arange(0x7F80, dtype=np.uint16)  # all finite values from 0 on
    low = codes.view(form).astype(np.float64)
    step = np.append(np.diff(low), low[-1] - low[-2])
    middle = low + step / 2
    up = np.append(codes[1:], np.uint16(0x7F80))  # beyond the largest there is infinity
    even = np.where(codes % 2 == 0, codes, up)
    for values, expected in (
        (middle, even),
        (np.nextafter(middle, 0), codes),
        (np.nextafter(middle, np.inf), up),
        (middle - step * 2.0**-20, codes),
        (middle + step * 2.0**-20, up),
        (low, codes),
        (np.nextafter(low, np.inf), codes),
        (np.nextafter(low[1:], 0), codes[1:]),
    ):
        for sign, bit in ((1.0, 0), (-1.0, 0x8000)):
            found = narrow(sign * values, form).view(np.uint16)
            assert (found == (expected | bit)).all()


@pytest.mark.parametrize("shape", [(), (1,), (2, 3), (4, 1, 2)])
@pytest.mark.parametrize("value", [1 + 2.0**-8, 1 + 2.0**-8 + 2.0**-40, np.nan])
@pytest.mark.parametrize("name", NARROW)
def test_shapes_stay_where_a_value_lies_between_two(
    name: str, value: float, shape: tuple[int, ...]
) -> None:
    found = narrow(np.full(shape, value), DTYPES[name].numpy)
    flat = narrow(np.full(8, value), DTYPES[name].numpy)
    assert np.shape(found) == shape
    assert np.ravel(found).tobytes() == flat[: np.size(found)].tobytes()
