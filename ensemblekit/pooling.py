"""Owns what is known of a layer's inputs so far: counts, means and squared deviations, in float64.

Input: activations. Pools of batches, of devices and of processes add up to the pool of all samples.

Legend of shapes: C channels, R rows of them, G groups of rows.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from math import isfinite

import torch
from torch import nn
from torch.nn.modules.instancenorm import _InstanceNorm

from ensemblekit.errors import InputError, NotFiniteError

_CHUNK = 1 << 18  # values that are widened at a time: they stay in the cache
_RUN = 1 << 12  # values that are summed in float32 at a time: the error grows with their number
_COLUMNS = 1 << 11  # sums that torch is asked for at a time; with more it gets slower
_DROWNED = 1e4  # squared mean over variance beyond which sums of squares lose digits
_HALF_DROWNED = 1e2  # the same, of sums in float32


@dataclass
class Pool:
    """Count, mean and sum of squared deviations of all values so far, by channel, in float64."""

    count: float
    mean_C: torch.Tensor
    deviations_C: torch.Tensor

    def add(self, other: "Pool") -> None:
        """Merge another pool into this one (Chan, Golub and LeVeque 1979)."""
        total = self.count + other.count
        shift_C = other.mean_C - self.mean_C
        self.mean_C = self.mean_C.add(shift_C, alpha=other.count / total)
        both_C = self.deviations_C + other.deviations_C
        self.deviations_C = both_C.addcmul_(
            shift_C, shift_C, value=self.count * other.count / total
        )
        self.count = total

    def to(self, device: str) -> "Pool":
        """The same pool elsewhere."""
        return replace(
            self, mean_C=self.mean_C.to(device), deviations_C=self.deviations_C.to(device)
        )


def statistics_of(name: str, layer: nn.Module, x: torch.Tensor, *, least: int = 2) -> Pool:
    """Mean and squared deviations of one batch at one layer, of `least` values a channel or more."""
    x = x.detach()
    exact = torch.float32 if x.device.type == "mps" else torch.float64  # MPS has no float64
    if isinstance(layer, _InstanceNorm):
        return _instance_statistics(name, layer, x.to(exact))
    count = x.numel() // max(x.shape[1], 1)
    if count == 0:
        raise InputError(f"layer '{name}' receives an empty batch", hint="check the data")
    if count < least:
        raise InputError(
            f"layer '{name}' sees a single value a channel: a batch of one sample has no variance",
            hint="use a larger batch size, or data whose last batch is larger",
        )
    pool = None
    if x.dtype in (torch.bfloat16, torch.float16) and x.device.type in ("cpu", "cuda"):
        pool = _half_pool(x, exact)
    if pool is None:
        pool = _in_parts(x, _CHUNK, _moments, exact)
        _check_finite(name, pool.mean_C, pool.deviations_C / pool.count)
    return pool


def _in_parts(
    x: torch.Tensor,
    most: int,
    moments: Callable[[torch.Tensor, torch.dtype], Pool],
    exact: torch.dtype,
) -> Pool:
    """The pool of parts of some samples each, of `most` values."""
    if x.numel() <= most:
        return moments(x, exact)
    per_sample = x.numel() // len(x)
    pool, *others = (moments(part, exact) for part in torch.split(x, max(1, most // per_sample)))
    for other in others:
        pool.add(other)
    return pool


def _moments(x: torch.Tensor, exact: torch.dtype) -> Pool:
    """In one look, where the mean is not so large that squares would drown what differs from it."""
    count = x.numel() // x.shape[1]
    sum_C, squares_C = _sums(x.to(exact, copy=True))
    mean_C = sum_C / count
    deviations_C = squares_C - sum_C * mean_C
    if bool((sum_C * mean_C > _DROWNED * deviations_C).any()):
        off_C, squares_C = _sums(x.to(exact) - mean_C.view(1, -1, *[1] * (x.ndim - 2)))
        deviations_C = (squares_C - off_C**2 / count).clamp(min=0)
        mean_C = mean_C + off_C / count
    return Pool(float(count), mean_C, deviations_C)


def _half_pool(x: torch.Tensor, exact: torch.dtype) -> Pool | None:
    """By torch's own sums, in float32: less than 1e-4 off, where rounding the values takes 1e-3.

    None where a large mean drowns what differs from it, squares overflow, something is not finite, or
    where planes are too large to be summed so.
    """
    rows = x.movedim(1, -1)
    count, channels = x.numel() // x.shape[1], x.shape[1]
    if rows.is_contiguous():
        groups = max(1, min(_COLUMNS // channels, count // _RUN))
        most = _RUN * groups * channels
        pool = _in_parts(rows.flatten(0, -2), most, partial(_folded_moments, groups), exact)
    elif x[0, 0].numel() <= 4 * _RUN:
        pool = _in_parts(x.contiguous(), 4 * _RUN * channels, _half_moments, exact)
    else:
        return None
    # what of a hundred variances the squared mean leaves
    rest_C = torch.addcmul(
        pool.deviations_C * (_HALF_DROWNED / count), pool.mean_C, pool.mean_C, value=-1
    )
    least, largest = (float(value) for value in torch.aminmax(rest_C))
    return pool if least >= 0 and largest < torch.finfo(torch.float32).max else None


def _half_moments(x: torch.Tensor, exact: torch.dtype) -> Pool:
    count = x.numel() // x.shape[1]
    mean_C, variance_C = _in_single(x).to(exact)
    return Pool(float(count), mean_C, variance_C * count)


def _folded_moments(groups: int, rows_RC: torch.Tensor, exact: torch.dtype) -> Pool:
    """Of rows that lie one behind the other: each `groups`-th makes a sum of its own."""
    length, channels = len(rows_RC) // groups, rows_RC.shape[1]
    if length < 2:
        return _moments(rows_RC, exact)
    # as an image of one column whose channels lie together: torch has a quick way for that
    wide = rows_RC[: length * groups].view(1, length, 1, groups * channels).permute(0, 3, 1, 2)
    mean_GC, variance_GC = _in_single(wide).view(2, groups, channels).to(exact)
    between_C, mean_C = torch.var_mean(mean_GC, 0, correction=0)
    count = length * groups
    pool = Pool(float(count), mean_C, (variance_GC.mean(0) + between_C) * count)
    if count < len(rows_RC):
        pool.add(_moments(rows_RC[count:], exact))
    return pool


def _in_single(x: torch.Tensor) -> torch.Tensor:
    """Means and variances by channel, in float32."""
    # running values whose type is that of the results; at momentum 0 they take no part in them
    any_C = x.new_zeros(x.shape[1], dtype=torch.float32)
    return torch.stack(torch.batch_norm_update_stats(x, any_C, any_C, 0.0))


def _sums(wide: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums and sums of squares by channel, of values that may be overwritten.

    Along what lies together in memory first.
    """
    if wide.ndim > 2 and wide.is_contiguous():
        planes = wide.flatten(2)
        return planes.sum(2).sum(0), torch.linalg.vector_norm(planes, dim=2).square().sum(0)
    rows = wide.movedim(1, -1).flatten(0, -2)
    return rows.sum(0), rows.square_().sum(0)


def _instance_statistics(name: str, layer: _InstanceNorm, wide: torch.Tensor) -> Pool:
    """Instance norm keeps the mean over samples of each sample's mean and (unbiased) variance."""
    if wide.ndim == layer._get_no_batch_dim():  # type: ignore[no-untyped-call]
        wide = wide.unsqueeze(0)
    variance_NC, mean_NC = torch.var_mean(wide, list(range(2, wide.ndim)), correction=1)
    mean_C, variance_C = mean_NC.mean(0), variance_NC.mean(0)
    _check_finite(name, mean_C, variance_C)
    return InstancePool(float(len(wide)), mean_C, variance_C * len(wide))


class InstancePool(Pool):
    """Sample-weighted mean of variances: deviations between samples do not count."""

    def add(self, other: Pool) -> None:
        """Merge another pool into this one."""
        total = self.count + other.count
        self.mean_C = self.mean_C + (other.mean_C - self.mean_C) * (other.count / total)
        self.deviations_C = self.deviations_C + other.deviations_C
        self.count = total


def _check_finite(name: str, mean_C: torch.Tensor, variance_C: torch.Tensor) -> None:
    total = float(mean_C.sum() + variance_C.sum())  # NaN and Inf do not leave a sum
    if not abs(total) < torch.finfo(torch.float32).max:
        what = "values whose variance is too large for float32" if isfinite(total) else "NaN or Inf"
        raise NotFiniteError(
            f"layer '{name}' receives {what}",
            hint="check the data for NaN, and the preprocessing against the training's",
        )
