"""Owns members: rows become weights, weights ready modules with BatchNorm statistics that fit.

Input: snapshots, a model and training data. Each member's statistics are recomputed once, all
members of a build in one pass over the data, and kept for later runs.
"""

import copy
import hashlib
import json
import os
import random
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from ensemblekit import __version__, build
from ensemblekit.batches import Plan, batches, count, digest
from ensemblekit.batchnorm import recompute_all
from ensemblekit.cache import Cache
from ensemblekit.candidates import Member
from ensemblekit.distributed import World
from ensemblekit.dtypes import narrow
from ensemblekit.errors import IncompatibleError, NotFiniteError, UsageError, listing
from ensemblekit.options import ModelOptions, Progress
from ensemblekit.snapshots import SnapshotSet
from ensemblekit.state import materialize
from ensemblekit.targets import fingerprint, load_data, load_model

SMALL_BATCH = 128


@dataclass(frozen=True)
class Statistics:
    """Recomputed BatchNorm statistics of one member, as they will be stored.

    Attributes:
        values: By the snapshots' keys, in their dtypes.
        samples: Training samples they were made from.
        notes: What a user should know.
    """

    values: Mapping[str, npt.NDArray[Any]]
    samples: int
    notes: tuple[str, ...] = ()


@dataclass
class Passes:
    """Walks over data that were needed, in units of one model over one split."""

    forward: int = 0
    batch_norm: int = 0
    gradient: int = 0
    reused: int = 0


Built = dict[Member, nn.Module]
"""Members that are loaded at the moment."""


class Builder:
    """A model that takes any member's weights.

    Args:
        snapshots: K snapshots.
        options: Model and training data.
        cache: Where recomputed statistics are kept.
        frozen: Normalisation layers whose statistics are kept.
        world: The processes that share the work.
        progress: Told how far the work is.

    Raises:
        UsageError: A target that does not exist.
        IncompatibleError: A model that does not fit the checkpoints.
    """

    def __init__(
        self,
        snapshots: SnapshotSet,
        options: ModelOptions,
        *,
        cache: Cache,
        frozen: Iterable[str],
        world: World,
        progress: Progress | None,
    ) -> None:
        self.snapshots = snapshots
        self.options = options
        self.cache = cache
        self.frozen = tuple(frozen)
        self.world = world
        self.progress = progress
        self.passes = Passes()
        self.device = build.device_from_name(options.device, world.local_rank)
        model = options.model
        if isinstance(model, str):
            self.skeleton = load_model(model, options.model_args)
        else:
            self.skeleton = copy.deepcopy(model)  # the caller's stays as it is
        self.skeleton = self.skeleton.to(self.device)
        self.mapping = build.key_map(self.skeleton, list(snapshots.first.tensors))
        self.identity = _identity(options)
        self.training = Data(options.train_data, "train")
        self._statistics: dict[Member, Statistics] = {}
        self._training: tuple[Data, str] | None = None  # the data, and their digest

    @cached_property
    def digests(self) -> list[str]:
        """SHA-256 of each snapshot."""
        workers = min(4, os.cpu_count() or 1)
        with ThreadPoolExecutor(workers) as pool:
            return list(pool.map(lambda snapshot: snapshot.digest(), self.snapshots.snapshots))

    def name(self, member: Member) -> str:
        """A short name for errors."""
        only = member.row.only
        return "a mix of snapshots" if only is None else self.snapshots.snapshots[only].name

    def models(self, members: Sequence[Member]) -> list[nn.Module]:
        """Ready modules in eval mode on the device; new ones each time."""
        built: Built = {}
        self.build(members, built)
        return [built[member] for member in members]

    def build(self, members: Sequence[Member], built: Built) -> None:
        """Add the modules of members that are not there yet; on every process."""
        wanted = [m for m in dict.fromkeys(members) if m not in built]
        for policy in ("none", "averaged", "recomputed"):
            same = [m for m in wanted if m.batch_norm == policy]
            if not same:
                continue
            replaced = self._to_replace() if policy == "recomputed" else frozenset()
            weights, _ = materialize(self.snapshots, [m.row for m in same], replaced=replaced)
            for m, arrays in zip(same, weights, strict=True):
                model = copy.deepcopy(self.skeleton)
                build.load_weights(model, arrays)
                built[m] = model
        self._recompute([m for m in wanted if m.batch_norm == "recomputed"], built)

    def give(self, member: Member, statistics: Statistics) -> None:
        """Statistics of a member that were recomputed before."""
        self._statistics[member] = statistics

    def statistics(self, member: Member) -> Statistics | None:
        """The recomputed statistics of a member that was built."""
        return self._statistics.get(member)

    def _recompute(self, members: Sequence[Member], built: Built) -> None:
        self.remember(members)
        new = [m for m in members if m not in self._statistics]
        if new:
            options = self.options
            limit = min(options.bn_samples, options.limit or options.bn_samples)
            part = (self.world.rank, self.world.size)
            plan = Plan(options.batch_size, options.seed, limit, options.workers, part=part)
            data = self.training.ready()
            total = None if options.bn_layerwise else count(data, plan)

            def report(done: int) -> None:
                if self.progress is not None:
                    self.progress(f"recomputing BatchNorm of {len(new)} members", done, total)

            self.passes.batch_norm += len(new)
            with self.precision() as autocast, seeded(options.seed):
                outcomes = recompute_all(
                    [built[m] for m in new],
                    lambda: batches(data, plan),
                    frozen={self._layer(name) for name in self.frozen},
                    device=self.device,
                    autocast=autocast,
                    layerwise=options.bn_layerwise,
                    channels_last=options.channels_last,
                    progress=report,
                    world=self.world,
                )
            for m, outcome in zip(new, outcomes, strict=True):
                exact = {own: values.numpy() for own, values in outcome.statistics.items()}
                notes = [*outcome.warnings]
                if outcome.kept:
                    notes.append(
                        f"{len(outcome.kept)} BatchNorm layers have the same statistics in all "
                        f"snapshots: they were frozen, and are kept ({listing(outcome.kept, limit=3)})"
                    )
                self._statistics[m] = self._stored(exact, outcome.samples, tuple(notes))
                if self.world.rank == 0 and self.known(m):
                    told = {"samples": np.array(outcome.samples), "notes": np.array(notes, "U")}
                    self.cache.keep_statistics(self._statistics_key(m), {**exact, **told})
        for m in members:
            buffers = dict(built[m].named_buffers(remove_duplicate=False))
            for name, value in self._statistics[m].values.items():
                buffers[self.mapping[name]].copy_(build.to_torch(np.array(value)))

    def remember(self, members: Sequence[Member]) -> None:
        """Statistics that an earlier run has left in the cache."""
        for m in members:
            earlier = None
            if m not in self._statistics and self.world.rank == 0 and self.known(m):
                earlier = self.cache.statistics(self._statistics_key(m))
            earlier = self.world.from_first(earlier)
            if earlier is not None:
                samples, notes = int(earlier.pop("samples")), earlier.pop("notes").tolist()
                self._statistics[m] = self._stored(earlier, samples, tuple(notes))

    def _stored(
        self, exact: Mapping[str, npt.NDArray[np.float64]], samples: int, notes: tuple[str, ...]
    ) -> Statistics:
        """Statistics by the snapshots' keys, rounded as they will be stored."""
        by_key = {own: key for key, own in self.mapping.items()}
        tensors = self.snapshots.first.tensors
        values = {}
        for own, value in exact.items():
            if own not in by_key:
                raise IncompatibleError(
                    f"the model's statistics '{own}' are not in the checkpoints"
                )
            spec = tensors[by_key[own]]
            rounded = narrow(np.asarray(value), np.dtype(spec.type.numpy)).reshape(spec.shape)
            if not np.isfinite(rounded.astype(np.float64)).all():
                raise NotFiniteError(
                    f"'{by_key[own]}': the recomputed statistics do not fit its dtype"
                )
            values[by_key[own]] = rounded
        told = list(notes)
        if self.options.batch_size < SMALL_BATCH and not self.options.bn_layerwise:
            told.append(
                f"BatchNorm was recomputed in batches of {self.options.batch_size}: deeper layers "
                f"see batch-normalised inputs, so {SMALL_BATCH} or more samples give better "
                "statistics"
            )
        if left := sorted(self._to_replace() - set(values)):
            told.append(
                f"{len(left)} running statistics belong to layers that are not torch's BatchNorm "
                f"or InstanceNorm, and stay averaged ({listing(left, limit=3)})"
            )
        return Statistics(values, samples, tuple(told))

    def _statistics_key(self, member: Member) -> str:
        facts = (__version__, self.identity, self.device.type, self.options.precision)
        text = json.dumps([*facts, self.facts(member)])
        return "bn-" + hashlib.sha256(text.encode()).hexdigest()

    def _to_replace(self) -> frozenset[str]:
        """Keys of the statistics that are recomputed: averaged ones need not make sense."""
        live = [
            f"{name}." if name else ""
            for name in self.snapshots.norm_layers
            if name not in self.frozen
        ]
        return frozenset(p + key for p in live for key in ("running_mean", "running_var"))

    def _layer(self, layer: str) -> str:
        """The model's name of a normalisation layer of the snapshots."""
        prefix = f"{layer}." if layer else ""
        own = self.mapping[f"{prefix}running_mean"]
        return own.removesuffix("running_mean").removesuffix(".")

    @contextmanager
    def recomputing_on(self, data: "Data") -> Iterator[None]:
        """Other data in the place of the training data, while the context lasts."""
        before, self.training = self.training, data
        try:
            yield
        finally:
            self.training = before

    def known(self, member: Member) -> bool:
        """Whether a later run can tell what this member was made of: objects have no name."""
        named = member.batch_norm != "recomputed" or isinstance(self.training.given, str)
        return named and self.identity is not None

    def facts(self, member: Member) -> list[Any]:
        """What the member's weights are made of."""
        taken = [
            (sha256, snapshot.variant, coefficient)
            for sha256, snapshot, coefficient in zip(
                self.digests, self.snapshots.snapshots, member.row.coefficients, strict=True
            )
            if coefficient != 0
        ]
        facts: list[Any] = [taken, member.row.divisor, member.batch_norm]
        return [*facts, self._training_facts()] if member.batch_norm == "recomputed" else facts

    def _training_facts(self) -> list[Any]:
        options = self.options
        if self._training is None or self._training[0] is not self.training:
            self._training = (self.training, self._training_digest())
        digest = self._training[1]
        plan = (options.batch_size, options.seed, options.bn_samples, options.limit)
        how = (options.bn_layerwise, options.channels_last)
        return [digest, *plan, *how, self.frozen]

    def _training_digest(self) -> str:
        """What recomputed statistics come from: the code, and all batches.

        Data that differ when they are read twice with the same seed are never known again.
        """
        given, options = self.training.given, self.options
        facts = [fingerprint(given) if isinstance(given, str) else str(id(given))]
        limit = min(options.bn_samples, options.limit or options.bn_samples)
        data = self.training
        plan = Plan(options.batch_size, options.seed, limit, options.workers)
        facts.append(str(count(data.ready(), plan)))
        codes = set()
        for _ in range(2):
            with seeded(options.seed):
                codes.add(digest(next(batches(data.ready(), plan))))
        if len(codes) == 1:
            with seeded(options.seed):
                facts += [digest(batch).hex() for batch in batches(data.ready(), plan)]
        else:
            facts.append(secrets.token_hex())
        return hashlib.sha256("\n".join(facts).encode()).hexdigest()

    @contextmanager
    def precision(self) -> Iterator[torch.dtype | None]:
        """The autocast type; TF32 is on if it was asked for and off otherwise, and put back."""
        switches: list[Any] = [torch.backends.cuda.matmul, torch.backends.cudnn]
        before = [switch.allow_tf32 for switch in switches]
        for switch in switches:
            switch.allow_tf32 = self.options.precision == "tf32"
        try:
            yield {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.options.precision)
        finally:
            for switch, value in zip(switches, before, strict=True):
                switch.allow_tf32 = value


class Data:
    """Data that can be walked through again and again; a generator is asked for anew."""

    def __init__(self, given: Any, split: str) -> None:
        self.given = given
        self.split = split
        self.loaded: Any = None

    def ready(self) -> Any:
        """The data, at their beginning.

        Raises:
            UsageError: A Python caller's iterator, which would be empty the second time.
        """
        if not isinstance(self.given, str):
            if isinstance(self.given, Iterator):
                raise UsageError(
                    f"the {self.split} data are an iterator, which can be read only once",
                    hint="give a Dataset, a DataLoader, a list of batches or arrays",
                )
            return self.given
        if self.loaded is None or isinstance(self.loaded, Iterator):
            self.loaded = load_data(self.given, self.split)
        return self.loaded


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Random augmentation that comes out the same each time; the generators are put back."""
    python, numpy_ = random.getstate(), np.random.get_state()  # noqa: NPY002  # the user's code uses it
    with torch.random.fork_rng():
        random.seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy_)  # noqa: NPY002


def _identity(options: ModelOptions) -> str | None:
    """Digest of the model's code and arguments; None for a module, which has none."""
    if not isinstance(options.model, str):
        return None
    files = [Path(v) for v in options.model_args.values() if isinstance(v, str)]
    contents = [hashlib.sha256(f.read_bytes()).hexdigest() for f in files if f.is_file()]
    facts = (fingerprint(options.model), repr(sorted(options.model_args.items())), contents)
    return hashlib.sha256(repr(facts).encode()).hexdigest()
