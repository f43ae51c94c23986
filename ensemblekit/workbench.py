"""Owns one run's data and the passes over them: every member predicts every sample once.

Input: snapshots and options. Everything that `average` and `compare` let a model do goes through
here and through `members`: as many members as fit see a batch before the next one is loaded.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

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
from ensemblekit.cache import Cache, Log
from ensemblekit.candidates import Member, mean_row
from ensemblekit.distributed import World
from ensemblekit.errors import (
    InputError,
    MachineError,
    UserCodeError,
)
from ensemblekit.members import Builder, Built, Data
from ensemblekit.options import ModelOptions, Progress
from ensemblekit.predict import Keep, Seen, Stale, run_pass
from ensemblekit.predictions import Predictions
from ensemblekit.rivals import Rivals, join
from ensemblekit.snapshots import SnapshotSet
from ensemblekit.state import materialize
from ensemblekit.tasks import Form, detect

_UNKNOWN_MEMORY = 4 << 30  # where the system does not say
_HALF_ABOVE = 1 << 30  # bytes of float32 outputs beyond which float16 is kept


@dataclass
class _Split:
    data: "Data"
    plan: Plan
    first: Batch
    seen: Seen | None = None
    codes: list[bytes] | None = None
    expected: int | None = None


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
        self.cache = cache
        self.progress = progress
        self.builder = Builder(
            snapshots,
            options,
            cache=cache,
            frozen=frozen,
            world=world or World(),
            progress=progress,
        )
        self.device = self.builder.device
        self.passes = self.builder.passes
        self.splits: dict[str, _Split] = {}
        for split, given in {"val": options.val_data, "test": options.test_data}.items():
            if given is not None:
                self.splits[split] = self._opened(Data(given, split))
        self.form: Form | None = None
        if self.splits:
            self.form = self._probe()

    @property
    def options(self) -> ModelOptions:
        """Model, data, and how to run them."""
        return self.builder.options

    @property
    def world(self) -> World:
        """The processes that share the work."""
        return self.builder.world

    def alone(self) -> None:
        """From here on this process works by itself."""
        self.builder.world = World()

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
            built: Built = {}
            for split in wanted:
                self._walk(group, split, built)
        recomputed = [m for m in members if m.batch_norm == "recomputed"]
        self.builder.remember(recomputed)  # of those whose predictions were there already
        lost = [m for m in recomputed if m not in self.builder._statistics]
        self.builder.build(lost, {})

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

    def _walk(self, group: Sequence[Member], split: str, built: Built) -> None:
        keep, place = self._keep(split), self.splits[split]
        units = [tuple(group)] if keep.jointly else [(member,) for member in group]
        logs = [self._log(unit, split) for unit in units] if self.world.rank == 0 else None
        missing: list[Member] = []

        def report(samples: int) -> None:
            if self.progress is not None:
                what = f"predicting {split} with {len(missing)} members"
                self.progress(what, samples, place.expected)

        names = [self.builder.name(m) for m in group]
        while True:
            done = self.world.from_first(None if logs is None else [log.complete for log in logs])
            assert done is not None
            missing = [
                m for unit, whole in zip(units, done, strict=True) if not whole for m in unit
            ]
            self.builder.build(missing, built)
            try:
                with self.builder.precision() as autocast, _about(split):
                    seen = run_pass(
                        logs,
                        lambda log, index: built[units[log][index]],
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
        return self.cache.log(key, keep=all(self.builder.known(member) for member in unit))

    def _key(self, unit: Sequence[Member], split: str) -> str:
        """What the predictions depend on; the batches themselves are checked one by one."""
        place, keep = self.splits[split], self._keep(split)
        facts = (
            *(__version__, self.builder.identity, self.device.type, self.options.precision),
            *([self.builder.facts(member) for member in unit], keep.dtype, repr(keep.form)),
            *(digest(place.first).hex(), place.expected, place.plan.batch_size),
        )
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

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

    def _groups(self, members: Sequence[Member]) -> list[list[Member]]:
        """Members that are loaded at the same time."""
        assert self.form is not None
        size = sum(
            t.numel() * t.element_size() for t in self.builder.skeleton.state_dict().values()
        )
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
        (model,) = self.builder.models([Member(member.row, "averaged")])
        if like is not None and (statistics := self.builder.statistics(like)) is not None:
            buffers = dict(model.named_buffers(remove_duplicate=False))
            for key, value in statistics.values.items():
                buffers[self.builder.mapping[key]].copy_(build.to_torch(np.array(value)))
        place = self.splits[split]
        weights = [p for p in model.parameters() if p.is_floating_point()]
        for weight in weights:
            weight.requires_grad = True
        whole = replace(place.plan, part=(0, 1))  # positions in `taken_N` count every batch
        first, total, rows = 0, 0.0, 0
        self.passes.gradient += 1
        with self.builder.precision() as autocast:
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
            for key, own in self.builder.mapping.items():
                if own in by_name:
                    flat = build.to_torch(arrays[key]).double().reshape(-1)
                    slope_K[k] += float(by_name[own] @ flat)
        sums = self.world.sum(np.array([total, rows, *slope_K]))
        return float(sums[0] / sums[1]), sums[2:] / sums[1]

    # --------------------------------------------------------------------- data

    def _opened(self, data: "Data") -> _Split:
        options = self.options
        part = (self.world.rank, self.world.size)
        plan = Plan(
            options.batch_size, None, options.limit, options.workers, options.seed, part=part
        )
        loaded = data.ready()
        with _about(data.split):
            first = check_repeatable(loaded, data.ready, plan, what=data.split)
        expected = count(data.ready(), plan)
        if len(set(self.world.gather((digest(first), expected)))) > 1:
            raise InputError(
                f"the {data.split} data are not the same in all processes: each would predict "
                "samples of its own order",
                hint="seed the data target: no shuffling, no random split",
            )
        return _Split(data, plan, first, expected=expected)

    def _probe(self) -> Form:
        """What the outputs are, from the first snapshot and the first batch."""
        first = next(iter(self.splits.values())).first
        (arrays,), _ = materialize(SnapshotSet(self.snapshots.snapshots[:1]), [mean_row(1)])
        build.load_weights(self.builder.skeleton, arrays)
        options = self.options
        with torch.inference_mode(), self.builder.precision() as autocast:
            precision = torch.autocast(self.device.type, autocast, autocast is not None)
            with precision, _about(next(iter(self.splits))):
                outputs = forward(self.builder.skeleton, first.to(self.device))
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
