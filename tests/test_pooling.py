"""Pools of activations in half precision beside float64; float32 is in `test_batchnorm`."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from ensemblekit.errors import NotFiniteError
from ensemblekit.pooling import Pool, statistics_of


def wide(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and variance by channel in float64."""
    values_CN = x.double().movedim(1, 0).flatten(1)
    return values_CN.mean(1), values_CN.var(1, correction=0)


@pytest.mark.parametrize("offset", [0.0, 3.0, 100.0])
@pytest.mark.parametrize(
    "shape, channels_last",
    [
        ((64, 16, 16, 16), False),
        ((64, 16, 16, 16), True),
        ((512, 7), False),
        ((8, 5, 33), False),
        ((2, 3, 5, 6, 7), False),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_summed_in_single_precision(
    dtype: torch.dtype, shape: tuple[int, ...], channels_last: bool, offset: float
) -> None:
    """An order of magnitude nearer than the rounding of the values themselves."""
    x = (torch.randn(shape, generator=torch.Generator().manual_seed(0)) + offset).to(dtype)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    pool = statistics_of("layer", nn.BatchNorm2d(shape[1]), x)
    mean_C, variance_C = wide(x)
    assert pool.mean_C.dtype == pool.deviations_C.dtype == torch.float64
    assert float(((pool.mean_C - mean_C) / variance_C.sqrt()).abs().max()) < 1e-3
    assert float((pool.deviations_C / pool.count / variance_C - 1).abs().max()) < 3e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("offset, scale", [(0.0, 1.0), (300.0, 0.5)])
@pytest.mark.parametrize("channels_last", [False, True])
def test_large_batches_in_half_precision(
    dtype: torch.dtype, offset: float, scale: float, channels_last: bool
) -> None:
    """Where one float32 sum over all of it would lose two digits, or all of them."""
    x = torch.randn(64, 2, 160, 160, generator=torch.Generator().manual_seed(0)) * scale + offset
    x = (x if offset else x.relu()).to(dtype)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    pool = statistics_of("layer", nn.BatchNorm2d(2), x)
    mean_C, variance_C = wide(x)
    assert float(((pool.mean_C - mean_C) / variance_C.sqrt()).abs().max()) < 1e-4
    assert float((pool.deviations_C / pool.count / variance_C - 1).abs().max()) < 3e-4


def sparse(x: torch.Tensor) -> torch.Tensor:
    """Mostly zero, as behind a ReLU with a bias: one-sided rounding adds up."""
    return x * (x > 1.5)


@pytest.mark.parametrize("kind", [torch.relu, sparse, lambda x: (x > 0) * 0.37])
@pytest.mark.parametrize(
    "shape, order",
    [
        ((40_000, 16), None),
        ((2048, 24, 8, 8), torch.channels_last),
        ((61, 3, 127, 33), torch.channels_last),  # odd: nothing divides it
        ((1, 3, 700, 300), torch.channels_last),
        ((512, 16, 8, 8), torch.contiguous_format),
        ((33, 2, 128, 128), torch.contiguous_format),
        ((2, 3, 512, 301), torch.contiguous_format),  # planes that are long runs by themselves
        ((7, 5, 11), None),
    ],
    ids=str,
)
def test_the_error_does_not_grow_with_the_number_of_values(
    shape: tuple[int, ...],
    order: torch.memory_format | None,
    kind: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    x = kind(torch.randn(shape, generator=torch.Generator().manual_seed(2)))
    for dtype in (torch.bfloat16, torch.float16):
        half = x.to(dtype) if order is None else x.to(dtype).contiguous(memory_format=order)
        pool = statistics_of("layer", nn.BatchNorm2d(shape[1]), half)
        mean_C, variance_C = wide(half)
        assert pool.count == half.numel() / shape[1]
        assert float(((pool.mean_C - mean_C) / variance_C.sqrt()).abs().max()) < 1e-5
        assert float((pool.deviations_C / pool.count / variance_C - 1).abs().max()) < 1e-4


@pytest.mark.parametrize("make", ["transposed", "sliced", "expanded"])
def test_values_that_lie_apart_in_memory(make: str) -> None:
    x = torch.randn(64, 6, 40, generator=torch.Generator().manual_seed(3)).bfloat16()
    x = {
        "transposed": lambda: x.permute(2, 0, 1),
        "sliced": lambda: x[::3, 1:5, ::2],
        "expanded": lambda: x[:, :, :1].expand(64, 6, 40),
    }[make]()
    pool = statistics_of("layer", nn.BatchNorm1d(x.shape[1]), x)
    mean_C, variance_C = wide(x)
    torch.testing.assert_close(pool.mean_C, mean_C, rtol=0, atol=1e-6)
    torch.testing.assert_close(pool.deviations_C / pool.count, variance_C, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_large_values(dtype: torch.dtype) -> None:
    """Sums of squares may leave float32, what becomes a running variance may not."""
    x = torch.randn(6000, 2, generator=torch.Generator().manual_seed(4))
    large = (x * 1e18).to(dtype)
    pool = statistics_of("layer", nn.BatchNorm1d(2), large)
    _, variance_C = wide(large)
    torch.testing.assert_close(pool.deviations_C / pool.count, variance_C, rtol=1e-4, atol=0)
    with pytest.raises(NotFiniteError, match="'layer' receives values whose variance is too large"):
        statistics_of("layer", nn.BatchNorm1d(2), (x * 1e25).to(dtype))


def test_pools_of_batches_make_the_pool_of_all() -> None:
    """What is merged is float64, whatever the values were."""
    x = torch.randn(96, 4, 8, generator=torch.Generator().manual_seed(1)).bfloat16()
    layer = nn.BatchNorm1d(4)
    total: Pool = statistics_of("layer", layer, x[:50])
    total.add(statistics_of("layer", layer, x[50:53]))
    total.add(statistics_of("layer", layer, x[53:]))
    mean_C, variance_C = wide(x)
    torch.testing.assert_close(total.mean_C, mean_C, rtol=0, atol=1e-6)
    torch.testing.assert_close(total.deviations_C / total.count, variance_C, rtol=1e-4, atol=0)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_half_precision_that_is_not_finite(value: float) -> None:
    """Named by its layer."""
    x = torch.ones(4, 3, 2, dtype=torch.float16)
    x[1, 2, 0] = value
    with pytest.raises(NotFiniteError, match=r"'block\.bn' receives NaN or Inf"):
        statistics_of("block.bn", nn.BatchNorm1d(3), x)
