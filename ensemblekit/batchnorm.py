"""Owns the recomputing of BatchNorm statistics: the only place where they change.

Input: a module with averaged weights and batches of training data. Averaged weights give other
activations than any snapshot had, so the snapshots' statistics do not fit them (Izmailov 2018,
section 3.2).
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from ensemblekit.batches import Batch, forward
from ensemblekit.distributed import World
from ensemblekit.errors import InputError, NotFiniteError

Progress = Callable[[int], None]

_CHUNK = 1 << 18  # values that are widened at a time: they stay in the cache


@dataclass(frozen=True)
class Recomputed:
    """What a recompute did.

    Attributes:
        statistics: New `running_mean` and `running_var` by state-dict key, float64.
        layers: Layers that were recomputed.
        kept: Layers that were left as they are.
        samples: Samples seen.
        warnings: What a user should know.
    """

    statistics: dict[str, torch.Tensor]
    layers: tuple[str, ...]
    kept: tuple[str, ...]
    samples: int
    warnings: tuple[str, ...] = ()


@dataclass
class _Pool:
    """Count, mean and sum of squared deviations of all values so far, by channel, in float64."""

    count: float
    mean_C: torch.Tensor
    deviations_C: torch.Tensor

    def add(self, other: "_Pool") -> None:
        """Merge another pool into this one (Chan, Golub and LeVeque 1979)."""
        total = self.count + other.count
        shift_C = other.mean_C - self.mean_C
        self.mean_C = self.mean_C + shift_C * (other.count / total)
        self.deviations_C = (
            self.deviations_C + other.deviations_C + shift_C**2 * (self.count * other.count / total)
        )
        self.count = total

    def to(self, device: str) -> "_Pool":
        """The same pool elsewhere."""
        return replace(
            self, mean_C=self.mean_C.to(device), deviations_C=self.deviations_C.to(device)
        )


def norm_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Layers that keep running statistics and update them in train mode, by name.

    A layer that occurs under several names is listed under the first.
    """
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm | _InstanceNorm) and module.running_mean is not None
    }


def recompute_bn(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    frozen: Iterable[str] = (),
    device: torch.device | str = "cpu",
    autocast: torch.dtype | None = None,
    progress: Progress | None = None,
) -> Recomputed:
    """Replace running statistics by the population statistics of the data.

    Only the layers recomputed are in train mode, so dropout and stochastic depth stay off.
    Statistics are pooled over samples in float64: a short last batch counts for what it is
    (torch's `update_bn` gives each batch the same weight). The variance is the population's
    (divisor N). Flags, momentum, counters and hooks are as before afterwards; after an
    exception the statistics are, too.

    Args:
        model: On `device`; its running statistics are replaced in place.
        batches: At least one batch, with at least two values a channel each.
        frozen: Names of layers to keep, and to leave in eval mode.
        device: Where the batches go.
        autocast: Element type of the forward pass, None for the weights' own.
        progress: Called with the number of samples done.

    Returns:
        The statistics by key, and what was done.

    Raises:
        InputError: No layers, no data, batches of a single value, or labels instead of inputs.
        NotFiniteError: NaN or Inf in a layer's input.
    """
    (found,) = recompute_all(
        [model], batches, frozen=frozen, device=device, autocast=autocast, progress=progress
    )
    return found


def recompute_all(
    models: Sequence[nn.Module],
    batches: Iterable[Batch],
    *,
    frozen: Iterable[str] = (),
    device: torch.device | str = "cpu",
    autocast: torch.dtype | None = None,
    progress: Progress | None = None,
    world: World | None = None,
) -> list[Recomputed]:
    """`recompute_bn` of several models of one network in one pass over the data.

    Args:
        models: Each is changed in place.
        batches: This process's share of them.
        frozen: As for `recompute_bn`, in all models.
        device: As for `recompute_bn`.
        autocast: As for `recompute_bn`.
        progress: As for `recompute_bn`.
        world: The processes that share the batches; each batch is seen whole by one of them.

    Raises:
        InputError: As `recompute_bn`.
        NotFiniteError: As `recompute_bn`.
    """
    world = world or World()
    frozen = set(frozen)
    every = norm_layers(models[0])
    kept = tuple(name for name in every if name in frozen)
    layers = [
        {name: layer for name, layer in norm_layers(model).items() if name not in frozen}
        for model in models
    ]
    if not layers[0]:
        raise InputError("the model has no normalisation layer with statistics to recompute")
    pools: list[dict[str, _Pool]] = [{} for _ in models]
    samples = 0
    order = _LabelOrder()
    device = torch.device(device)
    precision = torch.autocast(device.type, dtype=autocast, enabled=autocast is not None)
    with ExitStack() as stack:
        for model, own, pool in zip(models, layers, pools, strict=True):
            stack.enter_context(_only_in_train_mode(model, own))
            stack.enter_context(_watched(own, pool))
        stack.enter_context(torch.no_grad())
        stack.enter_context(precision)
        for batch in batches:
            order.see(batch)
            moved = batch.to(device)
            for model in models:
                forward(model, moved)
            samples += batch.size
            if progress is not None:
                progress(samples)
    samples = sum(world.gather(samples))
    if samples == 0:
        raise InputError("the data are empty: no batch came out of them")
    notes = order.warnings(world)
    found = []
    for model, own, pool in zip(models, layers, _merged(pools, world), strict=True):
        statistics = _write(model, own, pool)
        unseen = [name for name in own if name not in pool]
        told = list(notes)
        if unseen:
            told.append(
                f"no data reached {len(unseen)} normalisation layers, such as '{unseen[0]}'"
            )
        found.append(Recomputed(statistics, tuple(pool), kept, samples, tuple(told)))
    return found


def _merged(pools: list[dict[str, _Pool]], world: World) -> list[dict[str, _Pool]]:
    """The pools of all processes in one, in the order of ranks."""
    if world.size == 1:
        return pools
    total: list[dict[str, _Pool]] = [{} for _ in pools]
    sent = [{name: pool.to("cpu") for name, pool in one.items()} for one in pools]
    for part in world.gather(sent):
        for mine, theirs in zip(total, part, strict=True):
            for name, pool in theirs.items():
                if name in mine:
                    mine[name].add(pool)
                else:
                    mine[name] = pool
    return total


@contextmanager
def _only_in_train_mode(model: nn.Module, layers: dict[str, nn.Module]) -> Iterator[None]:
    """Everything in eval mode but the layers; flags and running values are put back."""
    flags = {module: module.training for module in model.modules()}
    values = {
        layer: {key: value.clone() for key, value in layer.named_buffers(recurse=False)}
        for layer in layers.values()
    }
    model.eval()
    for layer in layers.values():
        layer.training = True  # not train(): that would wake what lies inside, such as dropout
    try:
        yield
    finally:
        for module, flag in flags.items():
            module.training = flag
        with torch.no_grad():
            for layer, buffers in values.items():
                for key, value in buffers.items():
                    getattr(layer, key).copy_(value)


@contextmanager
def _watched(layers: dict[str, nn.Module], pools: dict[str, _Pool]) -> Iterator[None]:
    handles = []
    try:
        for name, layer in layers.items():

            def see(
                module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], name: str = name
            ) -> None:
                seen = _statistics(name, module, args[0] if args else kwargs["input"])
                if name in pools:
                    pools[name].add(seen)
                else:
                    pools[name] = seen

            handles.append(layer.register_forward_pre_hook(see, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _statistics(name: str, layer: nn.Module, x: torch.Tensor) -> _Pool:
    """Mean and squared deviations of one batch at one layer."""
    x = x.detach()
    exact = torch.float32 if x.device.type == "mps" else torch.float64  # MPS has no float64
    if isinstance(layer, _InstanceNorm):
        return _instance_statistics(name, layer, x.to(exact))
    dims = [d for d in range(x.ndim) if d != 1]
    count = x.numel() // max(x.shape[1], 1)
    if count < 2:
        raise InputError(
            f"layer '{name}' sees a single value a channel: a batch of one sample has no variance",
            hint="use a larger batch size, or data whose last batch is larger",
        )
    per_sample = max(x.numel() // max(len(x), 1), 1)
    parts = torch.split(x, max(1, _CHUNK // per_sample))
    pool, *others = (_moments(part.to(exact, copy=True), dims) for part in parts)
    for other in others:
        pool.add(other)
    _check_finite(name, pool.mean_C, pool.deviations_C)
    return pool


def _moments(wide: torch.Tensor, dims: list[int]) -> _Pool:
    """Of values that may be overwritten."""
    mean_C = wide.mean(dims)
    wide -= mean_C.view(1, -1, *[1] * (wide.ndim - 2))
    count = wide.numel() // len(mean_C)
    return _Pool(float(count), mean_C, wide.square_().sum(dims))


def _instance_statistics(name: str, layer: _InstanceNorm, wide: torch.Tensor) -> _Pool:
    """Instance norm keeps the mean over samples of each sample's mean and (unbiased) variance."""
    if wide.ndim == layer._get_no_batch_dim():  # type: ignore[no-untyped-call]
        wide = wide.unsqueeze(0)
    variance_NC, mean_NC = torch.var_mean(wide, list(range(2, wide.ndim)), correction=1)
    mean_C, variance_C = mean_NC.mean(0), variance_NC.mean(0)
    _check_finite(name, mean_C, variance_C)
    return _InstancePool(float(len(wide)), mean_C, variance_C * len(wide))


class _InstancePool(_Pool):
    """Sample-weighted mean of variances: deviations between samples do not count."""

    def add(self, other: _Pool) -> None:
        total = self.count + other.count
        self.mean_C = self.mean_C + (other.mean_C - self.mean_C) * (other.count / total)
        self.deviations_C = self.deviations_C + other.deviations_C
        self.count = total


def _check_finite(name: str, mean_C: torch.Tensor, variance_C: torch.Tensor) -> None:
    if not bool(torch.isfinite(mean_C).all() and torch.isfinite(variance_C).all()):
        raise NotFiniteError(
            f"layer '{name}' receives NaN or Inf",
            hint="check the data for NaN, and the preprocessing against the training's",
        )


def _write(
    model: nn.Module, layers: dict[str, nn.Module], pools: dict[str, _Pool]
) -> dict[str, torch.Tensor]:
    """Put the statistics into the layers; a layer under several names has them under each."""
    statistics: dict[str, torch.Tensor] = {}
    names: defaultdict[nn.Module, list[str]] = defaultdict(list)
    for name, module in model.named_modules(remove_duplicate=False):
        names[module].append(f"{name}." if name else "")
    with torch.no_grad():
        for name, pool in pools.items():
            layer = layers[name]
            values = {"running_mean": pool.mean_C, "running_var": pool.deviations_C / pool.count}
            for key, value in values.items():
                getattr(layer, key).copy_(value)
                statistics.update({prefix + key: value.cpu() for prefix in names[layer]})
    return statistics


class _LabelOrder:
    """Notices data sorted by class: then every batch is one class, and no batch is typical."""

    def __init__(self) -> None:
        self._last: int | None = None
        self._sorted = True
        self._seen: set[int] = set()
        self._batches = 0

    def see(self, batch: Batch) -> None:
        labels = batch.target
        if labels is None or labels.ndim != 1 or labels.is_floating_point():
            self._sorted = False
            return
        values = [int(v) for v in labels]
        if self._last is not None:
            values = [self._last, *values]
        self._sorted = self._sorted and values == sorted(values)
        self._last = values[-1]
        self._seen.update(values)
        self._batches += 1

    def warnings(self, world: World) -> list[str]:
        parts = world.gather((self._sorted, self._seen, self._batches))
        in_order = all(part[0] for part in parts)
        classes = set().union(*(part[1] for part in parts))
        if not in_order or len(classes) < 2 or sum(part[2] for part in parts) < 2:
            return []
        text = (
            "the BatchNorm data come sorted by label, so their batches are not typical: "
            "deeper layers get wrong statistics; shuffle them"
        )
        return [text]
