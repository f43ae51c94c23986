"""Plain means of bfloat16 values, beside exact arithmetic on fractions."""

from fractions import Fraction

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ensemblekit.bfloat16 import mean
from ensemblekit.candidates import mean_row
from ensemblekit.mixing import Moments, NotRegular, Scratch, quick

KIND = np.dtype(ml_dtypes.bfloat16)
Bits = npt.NDArray[np.uint16]


def values(bits: Bits) -> npt.NDArray[np.float64]:
    """What the bits mean."""
    return bits.view(KIND).astype(np.float64)


def mean_bits(bits_KN: Bits) -> Bits:
    """Ours."""
    block_KB = np.ascontiguousarray(bits_KN).view(np.uint8)
    return mean(block_KB, Scratch()).view(np.uint16).copy()


def nearest(total: Fraction, count: int) -> int:
    """Bits of the bfloat16 that is nearest to total / count, the even one of two."""
    exact = total / count
    low, high = 0, 0x7F7F
    while high - low > 1:  # sizes are in the order of their bits
        middle = (low + high) // 2
        if Fraction(float(values(np.array([middle], np.uint16))[0])) <= abs(exact):
            low = middle
        else:
            high = middle
    below, above = (Fraction(float(v)) for v in values(np.array([low, high], np.uint16)))
    left, right = abs(exact) - below, above - abs(exact)
    found = low if left < right or (left == right and low % 2 == 0) else high
    return found | (0x8000 if exact < 0 else 0)


def near(seed: int, count: int, size: int, spread: float) -> Bits:
    """Snapshots of one run: values around common ones."""
    rng = np.random.default_rng(seed)
    centre_N = rng.standard_normal(size)
    found_KN = centre_N + spread * rng.standard_normal((count, size))
    return found_KN.astype(KIND).view(np.uint16)


@settings(max_examples=150, deadline=None)
@given(
    st.integers(2, 64).flatmap(
        lambda k: hnp.arrays(
            np.uint16,
            (k, 64),
            elements=st.integers(0x3F00, 0x4080) | st.integers(0xBF00, 0xC080),
        )
    )
)
@example(np.zeros((3, 64), np.uint16))
def test_equals_exact_arithmetic(bits_KN: Bits) -> None:
    """Values of a few neighbouring exponents, where exact ties are common."""
    found_N = mean_bits(bits_KN)
    for n, column_K in enumerate(values(bits_KN).T):
        total = sum(map(Fraction, column_K.tolist()), Fraction(0))
        expected = nearest(total, len(column_K))
        assert int(found_N[n]) & 0x7FFF == expected & 0x7FFF
        assert total == 0 or int(found_N[n]) == expected


@settings(max_examples=100, deadline=None)
@given(
    bits_KN=st.integers(2, 12).flatmap(
        lambda k: hnp.arrays(np.uint16, (k, 128), elements=st.integers(0, 0xFFFF))
    )
)
def test_equals_float64_or_refuses(bits_KN: Bits) -> None:
    """Any bits at all: what is not the business of float32 is refused, never wrong."""
    block_KB = bits_KN.view(np.uint8)
    try:
        found = mean(block_KB, Scratch())
    except NotRegular:
        return
    expected = quick(block_KB, KIND, [mean_row(len(bits_KN))], None, Scratch(), None)[0]
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    "count, spread",
    [(k, s) for k in (2, 3, 5, 8, 10, 16, 33, 64) for s in (0.001, 0.1, 3.0) if k < 33 or s < 1],
)
@pytest.mark.parametrize("seed", range(3))
def test_snapshots_of_a_run(seed: int, spread: float, count: int) -> None:
    """Many values, some of them near zero: a few are summed again."""
    bits_KN = near(seed, count, 20_000, spread)
    block_KB = bits_KN.view(np.uint8)
    expected = quick(block_KB, KIND, [mean_row(count)], None, Scratch(), None)[0]
    np.testing.assert_array_equal(mean_bits(bits_KN), expected.view(np.uint16))


def test_denormals() -> None:
    """The smallest values there are have exact means, too."""
    rng = np.random.default_rng(0)
    bits_KN = rng.integers(0, 0x0100, (6, 4096)).astype(np.uint16)
    bits_KN |= (rng.integers(0, 2, bits_KN.shape) << 15).astype(np.uint16)
    expected = quick(bits_KN.view(np.uint8), KIND, [mean_row(6)], None, Scratch(), None)[0]
    np.testing.assert_array_equal(mean_bits(bits_KN), expected.view(np.uint16))


def test_zeros_keep_their_sign() -> None:
    """All negative zeros stay what they are; with others they become positive."""
    bits_KN = np.zeros((4, 8), np.uint16)
    bits_KN[:, ::2] = 0x8000
    bits_KN[1, 2] = 0
    assert mean_bits(bits_KN).tolist() == [0x8000, 0, 0, 0, 0x8000, 0, 0x8000, 0]


@pytest.mark.parametrize("bits", [0x7F80, 0xFF80, 0x7FC1, 0xFFFF, 0x7F7F], ids=hex)
def test_refuses_what_float32_cannot_hold(bits: int) -> None:
    """Inf, NaN and the largest numbers, in whichever snapshot."""
    bits_KN = near(0, 3, 64, 0.1)
    bits_KN[2, 63] = bits
    with pytest.raises(NotRegular):
        mean_bits(bits_KN)


def test_refuses_odd_numbers_of_values_and_many_snapshots() -> None:
    """The general way is for them."""
    with pytest.raises(NotRegular):
        mean_bits(near(0, 3, 63, 0.1))
    with pytest.raises(NotRegular):
        mean_bits(near(0, 65, 64, 0.1))


def test_refuses_exponents_that_lie_far_apart() -> None:
    """Where most elements would be summed twice."""
    bits_KN = near(0, 4, 64, 0.1)
    bits_KN[0] -= 20 << 7
    with pytest.raises(NotRegular):
        mean_bits(bits_KN)


def test_the_result_does_not_depend_on_what_the_memory_held() -> None:
    """The same memory serves every block."""
    scratch = Scratch()
    first, second = near(1, 4, 256, 0.1), near(2, 4, 128, 0.1)
    alone = mean_bits(second)
    mean(first.view(np.uint8), scratch)
    np.testing.assert_array_equal(mean(second.view(np.uint8), scratch).view(np.uint16), alone)


@pytest.mark.parametrize("count", [2, 5, 8])
def test_moments_are_those_of_the_values(count: int) -> None:
    """Beside float64, over two blocks."""
    bits_KN = near(3, count, 80_000, 0.1)
    values_KN, mean_N = values(bits_KN), values(bits_KN).mean(0)
    moments = Moments.none(count)
    for block_KN in np.split(bits_KN, 2, axis=1):
        mean(np.ascontiguousarray(block_KN).view(np.uint8), Scratch(), moments)
    assert moments.values == 80_000
    np.testing.assert_allclose(moments.squares_K, (values_KN**2).sum(1), rtol=1e-5)
    np.testing.assert_allclose(moments.products_K, values_KN @ mean_N, rtol=1e-5)
    assert moments.square == pytest.approx(float(mean_N @ mean_N), rel=1e-5)


@pytest.mark.parametrize(
    "odd",
    [
        float("nan"),
        float("inf"),
        2.0**101,
        2.0**34,  # sums of such squares are left to float64
    ],
)
def test_what_is_refused_leaves_no_moments(odd: float) -> None:
    bits_KN = near(4, 3, 40_000, 0.1)
    bits_KN[1, 77] = np.array(odd).astype(KIND).view(np.uint16)
    moments = Moments.none(3)
    with pytest.raises(NotRegular):
        mean(bits_KN.view(np.uint8), Scratch(), moments)
    assert not moments.squares_K.any()
    assert not moments.values
    if odd == 2.0**34:
        mean(bits_KN.view(np.uint8), Scratch())  # the mean itself is sound


def test_moments_of_few_values_are_worth_float64() -> None:
    """Squares of a tensor of tiny values vanish in float32."""
    bits_KN = near(5, 4, 512, 0.1)
    with pytest.raises(NotRegular):
        mean(bits_KN.view(np.uint8), Scratch(), Moments.none(4))
