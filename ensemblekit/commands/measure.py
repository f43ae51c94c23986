"""Owns the part of `average` that runs the model: statistics that fit, and figures.

Input: snapshots, a row, a model and data. Imported only when there is a model.
"""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ensemblekit import build, metrics
from ensemblekit.batches import Plan, batches, count
from ensemblekit.batchnorm import Recomputed, recompute_bn
from ensemblekit.candidates import Row, mean_row
from ensemblekit.commands.bn_plan import BnPlan
from ensemblekit.commands.model_options import ModelOptions
from ensemblekit.commands.result import Evaluation, Measured, Progress
from ensemblekit.dtypes import narrow
from ensemblekit.errors import IncompatibleError, NotFiniteError, UsageError, listing
from ensemblekit.predict import predict
from ensemblekit.snapshots import SnapshotSet
from ensemblekit.state import materialize
from ensemblekit.targets import load_data, load_model

_SMALL_BATCH = 128


def measure(
    snapshots: SnapshotSet,
    row: Row,
    plan: BnPlan,
    bn: str,
    options: ModelOptions,
    progress: Progress | None,
) -> Measured:
    """Recompute statistics, evaluate the members and the average, choose on validation data."""
    found = Measured("averaged" if plan.stale else "none")
    model = options.model
    if isinstance(model, str):
        model = load_model(model, options.model_args)
    else:
        model = copy.deepcopy(model)  # the caller's stays as it is
    model = model.to(build.device_from_name(options.device))
    runner = _Runner(model, options, progress)
    for snapshot in snapshots.snapshots if runner.splits else ():
        (arrays,), _ = materialize(SnapshotSet((snapshot,)), [mean_row(1)])
        build.load_weights(model, arrays)
        found.evaluation += runner.evaluate(snapshot.name, "own")
    (arrays,), _ = materialize(snapshots, [row], replaced=_to_replace(plan))
    mapping = build.load_weights(model, arrays)
    sound = all((arrays[key] >= 0).all() for key in arrays if key.endswith("running_var"))
    averaged = runner.evaluate("average", found.policy) if sound else []
    found.evaluation += averaged
    if plan.recompute:
        statistics, samples, notes = _recomputed(runner, plan, arrays, mapping)
        recomputed = runner.evaluate("average", "recomputed")
        found.evaluation += recomputed
        found.warnings += notes
        if bn != "auto" or not sound or not _worse_on_val(recomputed, averaged):
            found.policy, found.statistics, found.samples = "recomputed", statistics, samples
    found.warnings += _quality_warnings(found)
    return found


def _to_replace(plan: BnPlan) -> frozenset[str]:
    """Keys of the statistics that will be recomputed: averaged ones need not make sense."""
    if not plan.recompute:
        return frozenset()
    live = [f"{name}." if name else "" for name in plan.layers if name not in plan.frozen]
    return frozenset(p + key for p in live for key in ("running_mean", "running_var"))


def _recomputed(
    runner: "_Runner",
    plan: BnPlan,
    arrays: Mapping[str, npt.NDArray[Any]],
    mapping: Mapping[str, str],
) -> tuple[dict[str, npt.NDArray[Any]], int, list[str]]:
    """Statistics by the snapshots' keys, rounded as they will be stored, and put in the model."""
    outcome = runner.recompute({_model_layer(mapping, name) for name in plan.frozen})
    by_key = {own: key for key, own in mapping.items()}
    statistics = {}
    for own, values in outcome.statistics.items():
        if own not in by_key:
            raise IncompatibleError(f"the model's statistics '{own}' are not in the checkpoints")
        key = by_key[own]
        rounded = narrow(values.numpy(), arrays[key].dtype).reshape(arrays[key].shape)
        if not np.isfinite(rounded.astype(np.float64)).all():
            raise NotFiniteError(f"'{key}': the recomputed statistics do not fit its dtype")
        statistics[key] = rounded
    runner.set_buffers({mapping[key]: build.to_torch(v) for key, v in statistics.items()})
    notes = list(outcome.warnings)
    if runner.options.batch_size < _SMALL_BATCH:
        notes.append(
            f"BatchNorm was recomputed in batches of {runner.options.batch_size}: deeper layers see "
            f"batch-normalised inputs, so {_SMALL_BATCH} or more samples give better statistics"
        )
    if left := sorted(_to_replace(plan) - set(statistics)):
        notes.append(
            f"{len(left)} running statistics belong to layers that are not torch's BatchNorm or "
            f"InstanceNorm, and stay averaged ({listing(left, limit=3)})"
        )
    if outcome.kept:
        notes.append(
            f"{len(outcome.kept)} BatchNorm layers have the same statistics in all snapshots: "
            f"they were frozen, and are kept ({listing(outcome.kept, limit=3)})"
        )
    return statistics, outcome.samples, notes


def _model_layer(mapping: Mapping[str, str], layer: str) -> str:
    """The model's name of a normalisation layer of the snapshots."""
    prefix = f"{layer}." if layer else ""
    return mapping[f"{prefix}running_mean"].removesuffix("running_mean").removesuffix(".")


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


class _Runner:
    """A model on its device and the data, loaded once."""

    def __init__(self, model: Any, options: ModelOptions, progress: Progress | None) -> None:
        self.model = model
        self.options = options
        self.progress = progress
        self.device = build.device_from_name(options.device)
        given = {"val": options.val_data, "test": options.test_data}
        self.splits = {
            split: _Data(data, split) for split, data in given.items() if data is not None
        }

    def evaluate(self, candidate: str, batch_norm: str) -> list[Evaluation]:
        """Accuracy and NLL of the model as it is, on every labelled split."""
        found = []
        options = self.options
        plan = Plan(options.batch_size, None, options.limit, options.workers, options.seed)
        for split, data in self.splits.items():
            if self.progress is not None:
                self.progress(f"evaluating {candidate} on {split}", 0, None)
            with self._precision() as autocast:
                predictions = predict(
                    self.model,
                    batches(data.ready(), plan),
                    device=self.device,
                    autocast=autocast,
                    logits_key=self.options.logits,
                )
            found.append(
                Evaluation(
                    candidate,
                    batch_norm,
                    split,
                    len(predictions.targets_N),
                    metrics.accuracy(predictions),
                    metrics.nll(predictions),
                )
            )
        return found

    def recompute(self, frozen: set[str]) -> Recomputed:
        """New BatchNorm statistics from the training data."""
        options = self.options
        limit = min(options.bn_samples, options.limit or options.bn_samples)
        plan = Plan(options.batch_size, options.seed, limit, options.workers)
        data = _Data(options.train_data, "train").ready()
        total = count(data, plan)

        def report(done: int) -> None:
            if self.progress is not None:
                self.progress("recomputing BatchNorm", done, total)

        with self._precision() as autocast:
            return recompute_bn(
                self.model,
                batches(data, plan),
                frozen=frozen,
                device=self.device,
                autocast=autocast,
                progress=report,
            )

    def set_buffers(self, values: Mapping[str, Any]) -> None:
        """Copy values into the model's buffers."""
        buffers = dict(self.model.named_buffers(remove_duplicate=False))
        for key, value in values.items():
            buffers[key].copy_(value)

    @contextmanager
    def _precision(self) -> Iterator[torch.dtype | None]:
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


def _worse_on_val(recomputed: list[Evaluation], averaged: list[Evaluation]) -> bool:
    val = [e.nll for e in (*recomputed, *averaged) if e.split == "val"]
    return len(val) == 2 and val[0] > val[1]


def _quality_warnings(found: Measured) -> list[str]:
    """The average against its worst member, on validation data where there are any."""
    splits = [e.split for e in found.evaluation]
    if not splits:
        return []
    split = "val" if "val" in splits else "test"
    members = [e for e in found.evaluation if e.split == split and e.candidate != "average"]
    final = [
        e
        for e in found.evaluation
        if e.split == split and e.candidate == "average" and e.batch_norm == found.policy
    ]
    worst = min(members, key=lambda e: e.accuracy)
    if not final or final[0].accuracy >= worst.accuracy:
        return []
    text = (
        f"the average is worse than its worst member on {split}: accuracy "
        f"{final[0].accuracy:.4f} against {worst.accuracy:.4f} ({worst.candidate}); do not ship "
        "it. Average fewer, later snapshots (--last N), or ensemble their predictions"
    )
    return [text]
