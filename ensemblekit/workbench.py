"""Owns one run's model, data and members: rows become weights, weights predictions.

Input: snapshots and options. Everything that `average` and `compare` let a model do goes through
here: members are built, their BatchNorm statistics recomputed, their predictions made, each once.
"""

import contextlib
import copy
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from ensemblekit import __version__, build
from ensemblekit.batches import (
    Batch,
    Plan,
    batches,
    check_repeatable,
    count,
    digest,
    forward,
)
from ensemblekit.batchnorm import recompute_all
from ensemblekit.cache import Cache, Log
from ensemblekit.candidates import Member, mean_row
from ensemblekit.distributed import World
from ensemblekit.dtypes import narrow
from ensemblekit.errors import (
    IncompatibleError,
    InputError,
    MachineError,
    NotFiniteError,
    UsageError,
    UserCodeError,
    listing,
)
from ensemblekit.options import ModelOptions, Progress
from ensemblekit.predict import Keep, Seen, Stale, run_pass
from ensemblekit.rivals import Rivals, join
from ensemblekit.snapshots import SnapshotSet
from ensemblekit.state import materialize
from ensemblekit.targets import fingerprint, load_data, load_model
from ensemblekit.tasks import Form, detect

SMALL_BATCH = 128
_UNKNOWN_MEMORY = 4 << 30  # where the system does not say
_ROWS_BLOCK = 1 << 22  # elements read at once
_HALF_ABOVE = 1 << 30  # bytes of float32 outputs beyond which float16 is kept


class Picked:
    """Some rows of an array that may lie on disk; only the slices asked for are read."""

    def __init__(self, array: Any, rows: npt.NDArray[np.int64]) -> None:
        self.array = array
        self.rows = rows
        self.shape = (len(rows), *array.shape[1:])
        self.dtype = array.dtype

    def __getitem__(self, index: slice) -> npt.NDArray[Any]:
        found: npt.NDArray[Any] = self.array[self.rows[index]]
        return found

    def __len__(self) -> int:
        return len(self.rows)


Kept = npt.NDArray[Any] | Picked
"""Outputs of a member (R, C); `kept[start:stop]` gives an array."""


def true_outputs(kept: Kept, targets_R: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
    """The entry of each row's target."""
    step = max(1, _ROWS_BLOCK // max(kept.shape[1], 1))
    parts = [
        np.take_along_axis(kept[i : i + step], targets_R[i : i + step, None], axis=1)[:, 0]
        for i in range(0, len(targets_R), step)
    ]
    return np.concatenate(parts)


@dataclass(frozen=True)
class Predictions:
    """What members said about every row of a split.

    Attributes:
        form: What the outputs are.
        outputs: Of each member (R, C), as `Form.outputs` gives them; tokens (R, 2): log-probability
            of the true class, and whether it is the most probable. Empty for segmentation.
        rivals: For segmentation: the true class and its rivals, of all members.
        targets: One a row.
        sizes_N: Rows of each sample; None where each has one.
    """

    form: Form
    outputs: tuple[Kept, ...]
    rivals: Rivals | None
    targets: npt.NDArray[Any]
    sizes_N: npt.NDArray[np.int64] | None

    @property
    def samples(self) -> int:
        """Items of the data set."""
        return len(self.targets) if self.sizes_N is None else len(self.sizes_N)

    @property
    def members(self) -> int:
        """M."""
        return len(self.outputs) if self.rivals is None else len(self.rivals.true_MR)

    def of(self, members: Sequence[int]) -> "Predictions":
        """Some of the members, in the order given."""
        rivals = None if self.rivals is None else self.rivals.members(members)
        outputs = () if rivals is not None else tuple(self.outputs[m] for m in members)
        return replace(self, outputs=outputs, rivals=rivals)

    def part(self, mask_N: npt.NDArray[np.bool_]) -> "Predictions":
        """Some of the samples; nothing is copied before it is looked at."""
        mask_R = mask_N if self.sizes_N is None else np.repeat(mask_N, self.sizes_N)
        rows = np.nonzero(mask_R)[0]
        return Predictions(
            self.form,
            tuple(
                Picked(kept.array, kept.rows[rows])
                if isinstance(kept, Picked)
                else Picked(kept, rows)
                for kept in self.outputs
            ),
            None if self.rivals is None else self.rivals.rows(mask_R),
            self.targets[mask_R],
            None if self.sizes_N is None else self.sizes_N[mask_N],
        )


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


@dataclass
class _Split:
    data: "_Data"
    plan: Plan
    first: Batch
    seen: Seen | None = None
    codes: list[bytes] | None = None
    expected: int | None = None


@dataclass
class _Built:
    """Members that are loaded at the moment."""

    models: dict[Member, nn.Module] = field(default_factory=dict)


class Workbench:
    """A model, data and snapshots; `predict` and `statistics` make each result once.

    Args:
        snapshots: K snapshots.
        options: Model, data, and how to run them.
        frozen: Normalisation layers whose statistics are kept.
        cache: Where predictions are kept.
        world: The processes that share the work.
        progress: Told how far the work is.

    Raises:
        UsageError: A target that does not exist.
        InputError: A model that does not fit the checkpoints, or data that do not fit the model.
    """

    def __init__(
        self,
        snapshots: SnapshotSet,
        options: ModelOptions,
        *,
        cache: Cache,
        frozen: Iterable[str] = (),
        world: World | None = None,
        progress: Progress | None = None,
    ) -> None:
        self.snapshots = snapshots
        self.options = options
        self.cache = cache
        self.world = world or World()
        self.progress = progress
        self.passes = Passes()
        self.device = build.device_from_name(options.device, self.world.local_rank)
        model = options.model
        if isinstance(model, str):
            self.skeleton = load_model(model, options.model_args)
        else:
            self.skeleton = copy.deepcopy(model)  # the caller's stays as it is
        self.skeleton = self.skeleton.to(self.device)
        self.mapping = build.key_map(self.skeleton, list(snapshots.first.tensors))
        self.frozen = tuple(frozen)
        self._statistics: dict[Member, Statistics] = {}
        self._training: tuple[Any, str] | None = None  # the data, and their digest
        self._identity = _identity(options)
        self.splits: dict[str, _Split] = {}
        for split, given in {"val": options.val_data, "test": options.test_data}.items():
            if given is not None:
                self.splits[split] = self._opened(_Data(given, split))
        self.form: Form | None = None
        if self.splits:
            self.form = self._probe()

    @cached_property
    def digests(self) -> list[str]:
        """SHA-256 of each snapshot."""
        workers = min(4, os.cpu_count() or 1)
        with ThreadPoolExecutor(workers) as pool:
            return list(pool.map(lambda snapshot: snapshot.digest(), self.snapshots.snapshots))

    # -------------------------------------------------------------- predictions

    def predict(self, members: Sequence[Member], splits: Sequence[str] | None = None) -> None:
        """Make sure that the members' predictions exist, by as few walks over the data as fit.

        Raises:
            InputError: Data that do not fit, are shuffled, or change from walk to walk.
            MachineError: The predictions would be larger than the cache may grow.
        """
        members = list(dict.fromkeys(members))
        wanted = [s for s in self.splits if splits is None or s in splits]
        self._check_size(members, wanted)
        for group in self._groups(members):
            built = _Built()
            for split in wanted:
                self._walk(group, split, built)
        recomputed = [m for m in members if m.batch_norm == "recomputed"]
        self._remember(recomputed)  # of those whose predictions were there already
        lost = [m for m in recomputed if m not in self._statistics]
        self._build(lost, _Built())

    def predictions(self, members: Sequence[Member], split: str) -> Predictions:
        """What was predicted, members in the order given; on process 0 only."""
        keep = self._keep(split)
        seen = self.splits[split].seen
        assert seen is not None
        if keep.jointly:
            log = self._log(tuple(members), split)
            rivals = join([Rivals.from_bytes(record) for record in log.records()])
            return Predictions(keep.form, (), rivals, seen.targets, seen.sizes_N)
        outputs = tuple(
            self._log((member,), split).rows(keep.dtype, keep.width) for member in members
        )
        return Predictions(keep.form, outputs, None, seen.targets, seen.sizes_N)

    def _walk(self, group: Sequence[Member], split: str, built: _Built) -> None:
        keep, place = self._keep(split), self.splits[split]
        units = [tuple(group)] if keep.jointly else [(member,) for member in group]
        logs = [self._log(unit, split) for unit in units] if self.world.rank == 0 else None
        missing: list[Member] = []

        def report(samples: int) -> None:
            if self.progress is not None:
                what = f"predicting {split} with {len(missing)} members"
                self.progress(what, samples, place.expected)

        names = [self.name(m) for m in group]
        while True:
            done = self.world.from_first(None if logs is None else [log.complete for log in logs])
            assert done is not None
            missing = [
                m for unit, whole in zip(units, done, strict=True) if not whole for m in unit
            ]
            self._build(missing, built)
            try:
                with self.precision() as autocast, _about(split):
                    seen = run_pass(
                        logs,
                        lambda log, index: built.models[units[log][index]],
                        len(group) if keep.jointly else 1,
                        batches(place.data.ready(), place.plan),
                        keep,
                        device=self.device,
                        autocast=autocast,
                        world=self.world,
                        progress=report,
                        names=names,
                    )
                break
            except Stale as stale:
                for m in stale.logs if logs is not None else ():
                    assert logs is not None
                    logs[m].clear()
        self.passes.forward += len(missing)
        self.passes.reused += len(group) - len(missing)
        if seen is not None:
            assert logs is not None
            self._check_seen(split, seen, logs[0].digests)

    def _check_seen(self, split: str, seen: Seen, codes: list[bytes]) -> None:
        place = self.splits[split]
        if place.expected is not None and seen.samples != place.expected:
            raise InputError(
                f"the {split} data say that they have {place.expected} samples and gave "
                f"{seen.samples}: some were dropped",
                hint="DataLoader(..., drop_last=False), or return the Dataset itself",
            )
        if len(seen.targets) == 0:
            raise InputError(
                f"the {split} data hold no {'pixel' if self._keep(split).jointly else 'row'} that counts: every "
                "label is the ignored one",
                hint="--ignore-index LABEL names the label that does not count",
            )
        classes = self.form.classes if self.form and self.form.task == "classification" else 0
        if seen.samples < classes:
            raise InputError(
                f"the {split} data have {seen.samples} samples for {classes} classes: no figure "
                "would mean anything",
                hint="give more data, or raise --limit",
            )
        if place.seen is not None and not np.array_equal(place.seen.targets, seen.targets):
            raise InputError(
                f"the labels of the {split} data are not the same when they are read twice",
                hint="no shuffling for validation and test data",
            )
        if place.codes is not None and place.codes != codes:
            raise InputError(
                f"the inputs of the {split} data are not the same when they are read twice",
                hint="no shuffling and no random augmentation for validation and test data",
            )
        place.seen, place.codes = seen, codes

    def _log(self, unit: Sequence[Member], split: str) -> Log:
        key = self._key(unit, split)
        return self.cache.log(key, keep=all(self._known(member) for member in unit))

    def _known(self, member: Member) -> bool:
        """Whether a later run can tell what this member was made of: objects have no name."""
        named = member.batch_norm != "recomputed" or isinstance(self.options.train_data, str)
        return named and self._identity is not None

    def _key(self, unit: Sequence[Member], split: str) -> str:
        """What the predictions depend on; the batches themselves are checked one by one."""
        place, keep = self.splits[split], self._keep(split)
        facts = (
            *(__version__, self._identity, self.device.type, self.options.precision),
            *([self._member_facts(member) for member in unit], keep.dtype, repr(keep.form)),
            *(digest(place.first).hex(), place.expected, place.plan.batch_size),
        )
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def _member_facts(self, member: Member) -> list[Any]:
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
        if self._training is None or self._training[0] is not options.train_data:
            self._training = (options.train_data, self._training_digest())
        digest = self._training[1]
        plan = (options.batch_size, options.seed, options.bn_samples, options.limit)
        return [digest, *plan, self.frozen]

    def _training_digest(self) -> str:
        """What recomputed statistics come from: code, and the data as far as they stay the same.

        Data whose first batch is the same when it is read twice count as a whole; of randomly
        augmented data only the code and the number of samples can be known again.
        """
        given, options = self.options.train_data, self.options
        facts = [fingerprint(given) if isinstance(given, str) else str(id(given))]
        limit = min(options.bn_samples, options.limit or options.bn_samples)
        data = _Data(given, "train")
        plan = Plan(options.batch_size, options.seed, limit, options.workers)
        facts.append(str(count(data.ready(), plan)))
        codes = {digest(next(batches(data.ready(), plan))) for _ in range(2)}
        if len(codes) == 1:
            facts += [digest(batch).hex() for batch in batches(data.ready(), plan)]
        return hashlib.sha256("\n".join(facts).encode()).hexdigest()

    def _keep(self, split: str) -> Keep:
        assert self.form is not None
        jointly = self.form.task == "segmentation"
        width = 1 if jointly else self.form.classes
        size = self._rows(split) * width * 4 * max(len(self.snapshots), 1)
        large = size > _HALF_ABOVE and self.form.task in ("classification", "segmentation")
        return Keep(self.form, "float16" if large else "float32", jointly)

    def _rows(self, split: str) -> int:
        """Rows of a split, as far as its first batch tells; 0 where its length is not known."""
        assert self.form is not None
        place = self.splits[split]
        samples = place.expected or 0
        if not self.form.dense:
            return samples
        return samples * len(self.form.targets(place.first).values_R) // max(place.first.size, 1)

    def _check_size(self, members: Sequence[Member], splits: Sequence[str]) -> None:
        needed = 0
        for split in splits:
            keep = self._keep(split)
            width = 1 if keep.jointly else keep.width
            size = self._rows(split) * width * np.dtype(keep.dtype).itemsize
            needed += size * len(members)
        if needed > self.cache.limit_bytes:
            raise MachineError(
                f"the predictions of {len(members)} members need {needed / 1e9:.1f} GB, the cache "
                f"may take {self.cache.limit_bytes / 1e9:.1f} GB",
                hint=f"--cache-size {needed / 1e9 * 1.1:.0f}, fewer samples with --limit N, or "
                "fewer candidates with --candidates",
            )

    def kept_as(self, split: str) -> str:
        """Element type of the predictions on disk."""
        return self._keep(split).dtype

    # ------------------------------------------------------------------ members

    def name(self, member: Member) -> str:
        """A short name for errors."""
        only = member.row.only
        return "a mix of snapshots" if only is None else self.snapshots.snapshots[only].name

    def models(self, members: Sequence[Member]) -> list[nn.Module]:
        """Ready modules in eval mode on the device; new ones each time."""
        built = _Built()
        self._build(members, built)
        return [built.models[member] for member in members]

    def statistics(self, member: Member) -> Statistics | None:
        """The recomputed statistics of a member that was built."""
        return self._statistics.get(member)

    def adopt(self, member: Member, statistics: Statistics) -> None:
        """Use statistics that were recomputed earlier."""
        self._statistics[member] = statistics

    def _groups(self, members: Sequence[Member]) -> list[list[Member]]:
        """Members that are loaded at the same time."""
        assert self.form is not None
        size = sum(t.numel() * t.element_size() for t in self.skeleton.state_dict().values())
        shared = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if self.world.size > 1 else 1
        free = _free_memory(self.device) // (1 if self.device.type == "cuda" else shared)
        fit = min(self.world.gather(max(1, free // 2 // max(2 * size, 1))))
        if self.form.task == "segmentation" and fit < len(members):
            raise MachineError(
                f"{len(members)} members of {size / 1e6:.0f} MB do not fit into memory together, "
                "which segmentation needs",
                hint="take fewer snapshots: --last N",
            )
        return [list(members[i : i + fit]) for i in range(0, len(members), fit)]

    def _build(self, members: Sequence[Member], built: _Built) -> None:
        wanted = [m for m in dict.fromkeys(members) if m not in built.models]
        for policy in ("none", "averaged", "recomputed"):
            same = [m for m in wanted if m.batch_norm == policy]
            if not same:
                continue
            replaced = self._to_replace() if policy == "recomputed" else frozenset()
            weights, _ = materialize(self.snapshots, [m.row for m in same], replaced=replaced)
            for m, arrays in zip(same, weights, strict=True):
                model = copy.deepcopy(self.skeleton)
                build.load_weights(model, arrays)
                built.models[m] = model
        self._recompute([m for m in wanted if m.batch_norm == "recomputed"], built)

    def _recompute(self, members: Sequence[Member], built: _Built) -> None:
        self._remember(members)
        new = [m for m in members if m not in self._statistics]
        if new:
            options = self.options
            limit = min(options.bn_samples, options.limit or options.bn_samples)
            part = (self.world.rank, self.world.size)
            plan = Plan(options.batch_size, options.seed, limit, options.workers, part=part)
            data = _Data(options.train_data, "train").ready()
            total = count(data, plan)

            def report(done: int) -> None:
                if self.progress is not None:
                    self.progress(f"recomputing BatchNorm of {len(new)} members", done, total)

            self.passes.batch_norm += len(new)
            with self.precision() as autocast:
                outcomes = recompute_all(
                    [built.models[m] for m in new],
                    batches(data, plan),
                    frozen={self._layer(name) for name in self.frozen},
                    device=self.device,
                    autocast=autocast,
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
                if self.world.rank == 0 and self._known(m):
                    told = {"samples": np.array(outcome.samples), "notes": np.array(notes, "U")}
                    self.cache.keep_statistics(self._statistics_key(m), {**exact, **told})
        for m in members:
            buffers = dict(built.models[m].named_buffers(remove_duplicate=False))
            for name, value in self._statistics[m].values.items():
                buffers[self.mapping[name]].copy_(build.to_torch(np.array(value)))

    def _remember(self, members: Sequence[Member]) -> None:
        """Statistics that an earlier run has left in the cache."""
        for m in members:
            earlier = None
            if m not in self._statistics and self.world.rank == 0 and self._known(m):
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
        if self.options.batch_size < SMALL_BATCH:
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
        facts = (__version__, self._identity, self.device.type, self.options.precision)
        text = json.dumps([*facts, self._member_facts(member)])
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

    # ---------------------------------------------------------------- gradients

    def gradient(
        self, member: Member, split: str, taken_N: npt.NDArray[np.bool_], like: Member | None
    ) -> tuple[float, npt.NDArray[np.float64]]:
        """The mean loss of a mixed model on samples of a split, by its K coefficients.

        dL/da_k is the product of dL/dw with the k-th snapshot's weights: the mixed weights are
        linear in the coefficients.

        Args:
            member: A mixed row.
            split: Of the labelled data.
            taken_N: Which samples count.
            like: The member whose recomputed statistics stand in for this one's; they change
                little between neighbouring rows.
        """
        assert self.form is not None
        (model,) = self.models([Member(member.row, "averaged")])
        if like is not None and (statistics := self.statistics(like)) is not None:
            buffers = dict(model.named_buffers(remove_duplicate=False))
            for key, value in statistics.values.items():
                buffers[self.mapping[key]].copy_(build.to_torch(np.array(value)))
        place = self.splits[split]
        weights = [p for p in model.parameters() if p.is_floating_point()]
        for weight in weights:
            weight.requires_grad = True
        whole = replace(place.plan, part=(0, 1))  # positions in `taken_N` count every batch
        first, total, rows = 0, 0.0, 0
        self.passes.gradient += 1
        with self.precision() as autocast:
            for index, batch in enumerate(batches(place.data.ready(), whole)):
                inside = torch.from_numpy(taken_N[first : first + batch.size].copy())
                first += batch.size
                if index % self.world.size != self.world.rank or not bool(inside.any()):
                    continue
                chosen = batch.only(inside).to(self.device)
                precision = torch.autocast(self.device.type, autocast, autocast is not None)
                with precision:
                    outputs_RC = self.form.outputs(forward(model, chosen), chosen)
                truth = self.form.targets(chosen).values_R
                loss = self.form.loss(outputs_RC, truth)
                loss.backward()  # type: ignore[no-untyped-call]
                total += float(loss.detach())
                rows += len(truth)
        by_name = {
            key: p.grad.detach().double().cpu().reshape(-1)
            for key, p in model.named_parameters()
            if p.grad is not None
        }
        slope_K = np.zeros(len(self.snapshots))
        for k, snapshot in enumerate(self.snapshots.snapshots):
            (arrays,), _ = materialize(SnapshotSet((snapshot,)), [mean_row(1)])
            for key, own in self.mapping.items():
                if own in by_name:
                    flat = build.to_torch(arrays[key]).double().reshape(-1)
                    slope_K[k] += float(by_name[own] @ flat)
        sums = self.world.sum(np.array([total, rows, *slope_K]))
        return float(sums[0] / sums[1]), sums[2:] / sums[1]

    # --------------------------------------------------------------------- data

    def _opened(self, data: "_Data") -> _Split:
        options = self.options
        part = (self.world.rank, self.world.size)
        plan = Plan(
            options.batch_size, None, options.limit, options.workers, options.seed, part=part
        )
        loaded = data.ready()
        with _about(data.split):
            first = check_repeatable(loaded, data.ready, plan, what=data.split)
        return _Split(data, plan, first, expected=count(data.ready(), plan))

    def _probe(self) -> Form:
        """What the outputs are, from the first snapshot and the first batch."""
        first = next(iter(self.splits.values())).first
        (arrays,), _ = materialize(SnapshotSet(self.snapshots.snapshots[:1]), [mean_row(1)])
        build.load_weights(self.skeleton, arrays)
        options = self.options
        with torch.inference_mode(), self.precision() as autocast:
            precision = torch.autocast(self.device.type, autocast, autocast is not None)
            with precision, _about(next(iter(self.splits))):
                outputs = forward(self.skeleton, first.to(self.device))
                form = detect(
                    outputs,
                    first,
                    task=options.task,
                    logits_key=options.logits,
                    ignore_index=options.ignore_index,
                )
        for split, place in self.splits.items():
            with _about(split):
                form.targets(place.first)  # labels that do not fit are told before any work
        return form

    @property
    def example(self) -> Batch:
        """The first batch of the first split."""
        return next(iter(self.splits.values())).first

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


class _Data:
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
def _about(split: str) -> Iterator[None]:
    """Errors that concern data say which."""
    try:
        yield
    except UserCodeError:
        raise
    except InputError as error:
        if f"the {split} data" in error.message:
            raise
        raise type(error)(f"{split} data: {error.message}", hint=error.hint) from error


def _identity(options: ModelOptions) -> str | None:
    """Digest of the model's code and arguments; None for a module, which has none."""
    if not isinstance(options.model, str):
        return None
    files = [Path(v) for v in options.model_args.values() if isinstance(v, str)]
    contents = [hashlib.sha256(f.read_bytes()).hexdigest() for f in files if f.is_file()]
    facts = (fingerprint(options.model), repr(sorted(options.model_args.items())), contents)
    return hashlib.sha256(repr(facts).encode()).hexdigest()


def _free_memory(device: torch.device) -> int:
    if device.type == "cuda":
        free: int = torch.cuda.mem_get_info(device)[0]
        return free
    with contextlib.suppress(OSError, StopIteration, ValueError):  # Linux: the page cache is free
        lines = Path("/proc/meminfo").read_text().splitlines()
        return 1024 * next(int(v.split()[1]) for v in lines if v.startswith("MemAvailable:"))
    with contextlib.suppress(AttributeError, OSError, ValueError):  # all there is: macOS
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    return _UNKNOWN_MEMORY
