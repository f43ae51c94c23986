"""Pools of activations in half precision beside float64; float32 is in `test_batchnorm`."""

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
