"""Owns what export, verify and bench are about: a candidate, ready to run, and samples for it.

Input: snapshots, a model, and which candidate of them.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ensemblekit.batches import Plan, batches
from ensemblekit.cache import Cache
from ensemblekit.candidates import Candidate, Row, mean_row, one_hot
from ensemblekit.combiners import combiner as known_combiner
from ensemblekit.commands import chosen
from ensemblekit.commands.bn_plan import plan_bn
from ensemblekit.commands.measure import measure
from ensemblekit.ensemble_module import EnsembleModule, Head
from ensemblekit.errors import UsageError, one_of
from ensemblekit.graphs import interface as interfaces
from ensemblekit.graphs import precision as precisions
from ensemblekit.graphs.template import EXPORTERS, OPSET, Interface
from ensemblekit.members import Statistics
from ensemblekit.options import ModelOptions, Progress
from ensemblekit.snapshots import SnapshotSet
from ensemblekit.tasks import logits_of
from ensemblekit.verification import Samples, Verification
from ensemblekit.workbench import Workbench

LEAST_OPSET, MOST_OPSET = 18, 23
_NO_LIMIT = 1 << 62
_GENERATED = 64  # samples
_CALIBRATION = 512  # samples that int8 ranges come from


@dataclass(frozen=True)
class ExportOptions:
    """What to export and how.

    Attributes:
        candidate: (name, comparison.json) of a candidate that `compare` measured.
        ensemble: All checkpoints as one ensemble.
        combiner: Of that ensemble.
        coefficients: One average with these weights, oldest first.
        bn: BatchNorm policy of an average.
        inputs: What `--input` says, one text an input.
        output_kind: `logits` or `probabilities`.
        exporter: `auto`, `dynamo` or `torchscript`.
        opset: Operator set.
        fuse: `auto`, `on` or `off`.
        precision: What the file computes in.
        provider: That it is verified and measured on.
        metadata: Facts of the user's to put into the file.
        triton: Folder of a Triton model repository to write as well.
        keep_failed: Keep a file that fails under another name.
    """

    candidate: tuple[str, str] | None = None
    ensemble: bool = False
    combiner: str = "mean"
    coefficients: Sequence[float] | None = None
    bn: str = "auto"
    inputs: Sequence[str] = ()
    output_kind: str = "logits"
    exporter: str = "auto"
    opset: int = OPSET
    fuse: str = "auto"
    precision: str = "fp32"
    provider: str = "cpu"
    metadata: Mapping[str, str] = field(default_factory=dict)
    triton: str | None = None
    keep_failed: bool = False

    def __post_init__(self) -> None:
        one_of(self.exporter, ("auto", *EXPORTERS), what="exporter")
        one_of(self.fuse, ("auto", "on", "off"), what="--fuse")
        one_of(self.precision, precisions.PRECISIONS, what="precision")
        known_combiner(self.combiner)
        if self.combiner != "mean" and not self.ensemble:
            raise UsageError(f"--combiner {self.combiner} goes with --ensemble")
        kinds = (self.candidate is not None, self.ensemble, self.coefficients is not None)
        if sum(kinds) > 1:
            raise UsageError("only one of --candidate, --ensemble and --coefficients")
        if not LEAST_OPSET <= self.opset <= MOST_OPSET:
            raise UsageError(f"--opset {self.opset}: from {LEAST_OPSET} to {MOST_OPSET}")


class Subject:
    """A candidate that is ready to be exported or verified.

    Attributes:
        candidate: Which.
        snapshots: Those that take part.
        module: All members and the head; what the file is compared with.
        head: How outputs become one.
        interface: How the file is called.
        samples: To verify with.
        warnings: What the user should know.
    """

    def __init__(
        self,
        candidate: Candidate,
        snapshots: SnapshotSet,
        bench: Workbench,
        head: Head,
        interface: Interface,
        samples: Samples,
        members: Sequence[nn.Module],
    ) -> None:
        self.candidate = candidate
        self.snapshots = snapshots
        self.bench = bench
        self.head = head
        self.interface = interface
        self.samples = samples
        self.members = members
        self.module = EnsembleModule(members, head, logits=bench.options.logits).eval()
        self.warnings: list[str] = []

    def precision(self, asked: str) -> str:
        """What the file computes in: what was asked for, or what members that are half have."""
        types = {p.dtype for member in self.members for p in member.parameters()}
        for dtype, name in {torch.bfloat16: "bf16", torch.float16: "fp16"}.items():
            if asked == "fp32" and dtype in types:
                return name
        return asked

    def calibration(self) -> Iterator[dict[str, torch.Tensor]]:
        """Inputs of some training samples, by name."""
        options = self.bench.options
        data = self.bench.builder.training.ready()
        plan = Plan(32, options.seed, min(_CALIBRATION, options.limit or _CALIBRATION))
        for batch in batches(data, plan):
            yield interfaces.inputs_of(batch, self.interface)


def subject(
    snapshots: SnapshotSet,
    model: ModelOptions,
    options: ExportOptions,
    progress: Progress | None,
    *,
    candidate: Candidate | None = None,
) -> Subject:
    """Build the candidate that the options name, and everything to check it with.

    Args:
        snapshots: K snapshots.
        model: The model, data, and how to run them.
        options: Which candidate.
        progress: Told what is being done.
        candidate: Instead of the one that the options name; its statistics are not recomputed.

    Raises:
        UsageError: No model, no example of an input, or options that do not fit.
        InputError: Checkpoints, model or data that cannot be used.
    """
    model = model.with_model_from([s.facts.model_hint for s in snapshots.snapshots])
    if model.model is None:
        raise UsageError("the checkpoints need a model to run", hint="--model FILE.py:NAME")
    if options.precision == "int8-static" and model.train_data is None:
        raise UsageError(
            "--precision int8-static takes the ranges of activations from training data",
            hint="--train-data TARGET, or --precision int8-dynamic",
        )
    warnings = list(snapshots.warnings)
    statistics: list[Statistics | None]
    if candidate is not None:
        statistics = [None for _ in candidate.rows]
    else:
        candidate, snapshots, statistics = _candidate(snapshots, model, options, progress, warnings)
    with Cache(None, _NO_LIMIT) as cache:
        bench = Workbench(snapshots, model, cache=cache, progress=progress)
        for member, found in zip(candidate.members, statistics, strict=True):
            if found is not None:
                bench.builder.give(member, found)
        members = bench.builder.models(candidate.members)
    specs = [interfaces.parse_spec(text) for text in options.inputs]
    example = bench.example if bench.splits else None
    first = interfaces.interface_of(members[0], example, specs, "logits")
    if example is None:
        example = interfaces.generated(members[0], first, specs, _GENERATED, seed=model.seed)
    task = _task(bench, members[0], example, model)
    head = Head(task, candidate.combiner, candidate.params, options.output_kind)
    interface = replace(first, output=head.output_name)
    samples = _samples(bench, example, model)
    made = Subject(candidate, snapshots, bench, head, interface, samples, members)
    made.warnings = warnings
    return made


def _candidate(
    snapshots: SnapshotSet,
    model: ModelOptions,
    options: ExportOptions,
    progress: Progress | None,
    warnings: list[str],
) -> tuple[Candidate, SnapshotSet, list[Statistics | None]]:
    if options.candidate is not None:
        taken = chosen.take(options.candidate[0], Path(options.candidate[1]), snapshots)
        given = [Statistics(s, taken.samples) if s else None for s in taken.statistics]
        return taken.candidate, taken.snapshots, given
    count = len(snapshots)
    if options.ensemble and count > 1:
        rows = tuple(one_hot(k, count) for k in range(count))
        if known_combiner(options.combiner).fit is not None or options.combiner == "weighted":
            raise UsageError(
                f"--combiner {options.combiner} has numbers that are fitted on data",
                hint="ensemblekit compare fits them; then --candidate NAME --from comparison.json",
            )
        return (
            Candidate("ensemble", rows, tuple("none" for _ in rows), options.combiner),
            snapshots,
            [None for _ in rows],
        )
    row = mean_row(count)
    if options.coefficients is not None:
        from ensemblekit.averaging import rule

        row = rule("weighted")(snapshots, coefficients=options.coefficients)
    plan = plan_bn(snapshots, row, options.bn, model, warnings)
    name = "average" if row.only is None else snapshots.snapshots[row.only].path.name
    if not plan.recompute:
        policy: Any = "averaged" if plan.stale else "none"
        return Candidate(name, (_as_one_hot(row),), (policy,)), snapshots, [None]
    bare = replace(model, val_data=None, test_data=None)
    found = measure(snapshots, row, plan, options.bn, bare, progress)
    warnings += found.warnings
    statistics = Statistics(dict(found.statistics), found.samples)
    return Candidate(name, (_as_one_hot(row),), ("recomputed",)), snapshots, [statistics]


def _as_one_hot(row: Row) -> Row:
    """A single snapshot is itself, whatever its coefficient."""
    return row if row.only is None else one_hot(row.only, len(row.coefficients))


def _task(bench: Workbench, member: nn.Module, example: Any, model: ModelOptions) -> str:
    if bench.form is not None:
        return bench.form.task
    if model.task != "auto":
        return model.task
    from ensemblekit.batches import forward

    with torch.inference_mode():
        outputs = logits_of(forward(member, example.head(2).to(bench.device)), model.logits)
    guessed = {2: "classification", 3: "tokens", 4: "segmentation"}.get(outputs.ndim)
    if guessed is None or outputs.shape[1] < 2:
        raise UsageError(
            f"outputs of shape {tuple(outputs.shape)} and no labels do not tell the task",
            hint="--task regression (or multilabel), or --val-data TARGET",
        )
    return guessed


def _samples(bench: Workbench, example: Any, model: ModelOptions) -> Samples:
    if not bench.splits:
        return Samples(lambda: (), example, real=False)
    place = next(iter(bench.splits.values()))
    shifted = bench.form is not None and bench.form.shifted
    return Samples(
        lambda: batches(place.data.ready(), place.plan), example, True, model.ignore_index, shifted
    )


def doubts(found: Subject, verification: Verification) -> list[str]:
    """What makes a verification say less than it could."""
    more = "more samples" if verification.real else "--val-data with real ones"
    told = []
    if verification.classes_seen == 1 and found.head.task != "regression":
        told.append(
            "torch decided for one class on all samples, so the verification says little; "
            f"{more} would say more"
        )
    elif not verification.real:
        told.append(
            "verified on generated samples; --val-data TARGET makes it real ones, with the accuracy"
        )
    once = {
        label
        for port in found.interface.ports
        for axis, label in enumerate(port.dims)
        if axis and isinstance(label, str) and label not in verification.open_sizes
    }
    told += [
        f"axis '{label}' is open, and the model in torch takes no other size of it than that of the "
        "samples: it could not be checked"
        for label in sorted(once)
    ]
    return told
