"""Owns the recomputing of BatchNorm statistics: the only place where they change.

Input: a module with averaged weights and batches of training data. Averaged weights give other
activations than any snapshot had, so the snapshots' statistics do not fit them (Izmailov 2018,
section 3.2).
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from ensemblekit.batches import Batch, forward
from ensemblekit.distributed import World
from ensemblekit.errors import InputError
from ensemblekit.pooling import Pool, statistics_of

Progress = Callable[[int], None]


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
    layerwise: bool = False,
    channels_last: bool = False,
    progress: Progress | None = None,
) -> Recomputed:
    """Replace running statistics by the population statistics of the data.

    Only the layers recomputed normalise by the batch, so dropout and stochastic depth stay off.
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
        layerwise: One layer after the other, each on inputs that the finished statistics of the
            earlier ones normalise: exact whatever the batch size, for about half a pass over the
            data a layer. The batches are gone through again and again.
        channels_last: Convolutions see that memory format, which is faster where the hardware
            prefers it.
        progress: Called with the number of samples done.

    Returns:
        The statistics by key, and what was done.

    Raises:
        InputError: No layers, no data, batches of a single value, or labels instead of inputs.
        NotFiniteError: NaN or Inf in a layer's input.
    """
    again = batches if isinstance(batches, Sequence) or not layerwise else list(batches)
    (found,) = recompute_all(
        [model],
        lambda: again,
        frozen=frozen,
        device=device,
        autocast=autocast,
        layerwise=layerwise,
        channels_last=channels_last,
        progress=progress,
    )
    return found


def recompute_all(
    models: Sequence[nn.Module],
    batches: Callable[[], Iterable[Batch]],
    *,
    frozen: Iterable[str] = (),
    device: torch.device | str = "cpu",
    autocast: torch.dtype | None = None,
    layerwise: bool = False,
    channels_last: bool = False,
    progress: Progress | None = None,
    world: World | None = None,
) -> list[Recomputed]:
    """`recompute_bn` of several models of one network in the same passes over the data.

    Args:
        models: Each is changed in place.
        batches: Gives this process's share of them, from the start each time it is called.
        frozen: As for `recompute_bn`, in all models.
        device: As for `recompute_bn`.
        autocast: As for `recompute_bn`.
        layerwise: As for `recompute_bn`.
        channels_last: As for `recompute_bn`.
        progress: As for `recompute_bn`; with `layerwise`, samples of all passes.
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
    device = torch.device(device)
    run = _Passes(models, batches, device, world, channels_last=channels_last, progress=progress)
    with ExitStack() as stack:
        for model, own in zip(models, layers, strict=True):
            stack.enter_context(_prepared(model, own))
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.autocast(device.type, autocast, autocast is not None))
        if channels_last:
            stack.enter_context(_in_channels_last(models))
        if layerwise:
            pools = _one_by_one(run, models, layers)
        else:
            pools = run.over_all(layers)
    samples, notes = run.samples, run.order.warnings(world)
    found = []
    for model, own, pool in zip(models, layers, pools, strict=True):
        statistics = _write(model, own, pool)
        unseen = [name for name in own if name not in pool]
        told = list(notes)
        if unseen:
            told.append(
                f"no data reached {len(unseen)} normalisation layers, such as '{unseen[0]}'"
            )
        found.append(Recomputed(statistics, tuple(pool), kept, samples, tuple(told)))
    return found


class _Passes:
    """Passes of some models over the data: what each layer sees is pooled, over all processes."""

    def __init__(
        self,
        models: Sequence[nn.Module],
        batches: Callable[[], Iterable[Batch]],
        device: torch.device,
        world: World,
        *,
        channels_last: bool,
        progress: Progress | None,
    ) -> None:
        self.models = models
        self.batches = batches
        self.device = device
        self.world = world
        self.channels_last = channels_last
        self.progress = progress
        self.samples = 0
        self.order = _LabelOrder()
        self._done = 0

    def over_all(
        self, layers: Sequence[dict[str, nn.Module]], *, stop: bool = False
    ) -> list[dict[str, Pool]]:
        """One pass; the pools of the layers by name, for each model.

        Args:
            layers: Of each model.
            stop: Nothing behind the layers needs to run.

        Raises:
            InputError: There are no data.
        """
        pools: list[dict[str, Pool]] = [{} for _ in self.models]
        order, samples = _LabelOrder(), 0
        with ExitStack() as stack:
            for own, pool in zip(layers, pools, strict=True):
                stack.enter_context(_watched(own, pool, stop=stop))
            for batch in self.batches():
                order.see(batch)
                moved = batch.to(self.device)
                if self.channels_last:
                    moved = moved.map(_to_channels_last)
                for model in self.models:
                    with suppress(_Enough):
                        forward(model, moved)
                samples += batch.size
                self._done += batch.size
                if self.progress is not None:
                    self.progress(self._done)
        self.order, self.samples = order, sum(self.world.gather(samples))
        if self.samples == 0:
            raise InputError("the data are empty: no batch came out of them")
        return _merged(pools, self.world)

    def uses(self, layers: dict[str, nn.Module]) -> dict[str, int]:
        """How often the first batch reaches each layer of the first model, in the order of reaching.

        Raises:
            InputError: There are no data.
        """
        found: dict[str, int] = {}
        # only process 0 looks: its batch is the first, others may have none
        batch = next(iter(self.batches()), None) if self.world.rank == 0 else None
        if batch is None:
            found = self.world.from_first(found)
            if not found:
                raise InputError("the data are empty: no batch came out of them")
            return found

        def note(name: str) -> Callable[..., None]:
            return lambda *_: found.update({name: found.get(name, 0) + 1})

        handles = [layer.register_forward_pre_hook(note(name)) for name, layer in layers.items()]
        try:
            forward(self.models[0], batch.to(self.device))
        finally:
            for handle in handles:
                handle.remove()
        return self.world.from_first(found)


def _one_by_one(
    run: _Passes, models: Sequence[nn.Module], layers: Sequence[dict[str, nn.Module]]
) -> list[dict[str, Pool]]:
    """Each layer's pool on inputs that the layers before it, finished, have normalised."""
    pools: list[dict[str, Pool]] = [{} for _ in models]
    for name, uses in run.uses(layers[0]).items():
        alone = [{name: own[name]} for own in layers]
        seen = run.over_all(alone, stop=uses == 1)
        for model, own, pool, new in zip(models, layers, pools, seen, strict=True):
            _write(model, own, new)
            for done in new:
                own[done].training = False  # from here on it normalises by what is finished
            pool.update(new)
    return pools


class _Enough(BaseException):
    """The layer that was looked at has its input; user code must not catch this."""


def _to_channels_last(value: torch.Tensor) -> torch.Tensor:
    if value.ndim != 4:
        return value
    return value.contiguous(memory_format=torch.channels_last)


@contextmanager
def _in_channels_last(models: Sequence[nn.Module]) -> Iterator[None]:
    """Weights of convolutions in that memory format, and back as they were."""
    weights = [p for model in models for p in model.parameters() if p.ndim == 4]
    before = [weight.data for weight in weights]
    for weight in weights:
        weight.data = weight.data.contiguous(memory_format=torch.channels_last)
    try:
        yield
    finally:
        for weight, value in zip(weights, before, strict=True):
            weight.data = value


def _merged(pools: list[dict[str, Pool]], world: World) -> list[dict[str, Pool]]:
    """The pools of all processes in one, in the order of ranks."""
    if world.size == 1:
        return pools
    total: list[dict[str, Pool]] = [{} for _ in pools]
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
def _prepared(model: nn.Module, layers: dict[str, nn.Module]) -> Iterator[None]:
    """Everything in eval mode, but layers that must normalise by themselves.

    Flags and running values are put back.
    """
    flags = {module: module.training for module in model.modules()}
    values = {
        layer: {key: value.clone() for key, value in layer.named_buffers(recurse=False)}
        for layer in layers.values()
    }
    model.eval()
    for layer in layers.values():  # not train(): that would wake what lies inside, such as dropout
        layer.training = not _takes_statistics(layer)
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
def _watched(layers: dict[str, nn.Module], pools: dict[str, Pool], *, stop: bool) -> Iterator[None]:
    handles = []
    try:
        for name, layer in layers.items():

            def see(
                module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], name: str = name
            ) -> None:
                x = args[0] if args else kwargs["input"]
                seen = statistics_of(name, module, x, least=1 if stop else 2)
                if not module.training:  # it normalises the batch by these: no second look at it
                    _put(module, seen)
                if name in pools:
                    pools[name].add(seen)
                else:
                    pools[name] = seen
                if stop:
                    raise _Enough

            handles.append(layer.register_forward_pre_hook(see, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _write(
    model: nn.Module, layers: dict[str, nn.Module], pools: dict[str, Pool]
) -> dict[str, torch.Tensor]:
    """Put the statistics into the layers; a layer under several names has them under each."""
    statistics: dict[str, torch.Tensor] = {}
    names: defaultdict[nn.Module, list[str]] = defaultdict(list)
    for name, module in model.named_modules(remove_duplicate=False):
        names[module].append(f"{name}." if name else "")
    with torch.no_grad():
        for name, pool in pools.items():
            layer = layers[name]
            _put(layer, pool)
            values = {"running_mean": pool.mean_C, "running_var": pool.deviations_C / pool.count}
            for key, value in values.items():
                statistics.update({prefix + key: value.cpu() for prefix in names[layer]})
    return statistics


def _put(layer: nn.Module, pool: Pool) -> None:
    """A pool's mean and variance as the running ones."""
    cast(torch.Tensor, layer.running_mean).copy_(pool.mean_C)
    cast(torch.Tensor, layer.running_var).copy_(pool.deviations_C / pool.count)


def _takes_statistics(layer: nn.Module) -> bool:
    """Whether a layer in eval mode normalises by the running values as well as in train mode by its own.

    Instance norm has values of each sample; half precision would round the values.
    """
    wide = cast(torch.Tensor, layer.running_var).dtype in (torch.float32, torch.float64)
    return isinstance(layer, _BatchNorm) and wide


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
