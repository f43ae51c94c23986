"""Owns `average`: from checkpoints to one verified file, with statistics that fit its weights.

Input: paths, a rule, and optionally a model and data. Without a model nothing here imports torch.
"""

import contextlib
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ensemblekit import averaging, writers
from ensemblekit.candidates import Candidate, Row
from ensemblekit.commands import outgoing, provenance
from ensemblekit.commands.bn_plan import BN_POLICIES, BnPlan, plan_bn
from ensemblekit.commands.result import AverageResult, Measured
from ensemblekit.discovery import discover
from ensemblekit.distributed import rank
from ensemblekit.dtypes import DTYPES, narrow
from ensemblekit.errors import CheckFailedError, UsageError, one_of
from ensemblekit.mixing import Moments
from ensemblekit.options import ModelOptions, Progress
from ensemblekit.schedule import early_span
from ensemblekit.selection import Selection
from ensemblekit.snapshots import SnapshotSet, position
from ensemblekit.state import (
    Similarity,
    Sink,
    array_sink,
    check_result,
    converted,
    similarity,
    sums,
)
from ensemblekit.writers import folder
from ensemblekit.writers.saving import save

SAME_BASIN = 0.8  # two seeds measured 0.05 to 0.46, snapshots of one run 0.85 and more
_FAR = 0.6
_LIGHT = 10  # a snapshot with so many times less weight than the heaviest hardly counts


def average(
    checkpoints: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str] | None = None,
    *,
    method: str = "uniform",
    rule_options: Mapping[str, Any] | None = None,
    selection: Selection | None = None,
    model: ModelOptions | None = None,
    bn: str = "auto",
    candidate: tuple[str, str | os.PathLike[str]] | None = None,
    dtype: str | None = None,
    shard_bytes: int = folder.SHARD_BYTES,
    force: bool = False,
    dry_run: bool = False,
    strict: bool = False,
    command: Sequence[str] = (),
    progress: Progress | None = None,
) -> AverageResult:
    """Average the weights of snapshots into one model.

    Args:
        checkpoints: Files, folders, globs.
        output: `.safetensors`, `.pt`, `.pth`, `.ckpt` (Lightning) or, without an ending, a folder
            in Hugging Face's form; None keeps the average in memory (`result.state`).
        method: Name of an averaging rule.
        rule_options: Its options.
        selection: Which weights and which snapshots.
        model: Model and data, for BatchNorm and for figures.
        bn: `auto` recomputes BatchNorm statistics when there is training data, and keeps the
            better of recomputed and averaged ones when there is validation data; `recompute`
            insists, `average` never does, `error` refuses to leave them averaged.
        candidate: (name, comparison.json): make a candidate that `compare` measured, with the
            BatchNorm statistics it was measured with. Leaves no room for a rule or for `bn`.
        dtype: Element type of all floating-point tensors, rounded to once; their own when None.
        shard_bytes: Of one file of a folder at most.
        force: Replace an existing output.
        dry_run: Say what would be done.
        strict: A warning is a failed check.
        command: What to note as the command in the manifest.
        progress: Told how far the work is.

    Raises:
        UsageError: Options that do not fit, an output that exists.
        InputError: Checkpoints, model or data that cannot be used.
        MachineError: The machine said no.
        CheckFailedError: `strict` and a warning, or `bn="error"` and statistics that do not fit.
    """
    options = model or ModelOptions()
    one_of(bn, BN_POLICIES, what="--bn policy")
    paths = [checkpoints] if isinstance(checkpoints, str | os.PathLike) else list(checkpoints)
    path = None if output is None else Path(output)
    target = outgoing.Output(path, dtype, shard_bytes, force, dry_run)
    with provenance.Digests() as digests:
        all_taken = candidate is None and (selection is None or selection.takes_all)
        wanted = path is not None and not dry_run and rank() == 0 and all_taken
        snapshots = discover(*paths, selection=selection, seen=digests.start if wanted else None)
        digests.keep(snapshots)
        if candidate is not None:
            name, comparison = candidate[0], Path(candidate[1])
            return _measured_before(
                snapshots, name, comparison, target, digests, strict=strict, command=command
            )
        options = options.with_model_from([s.facts.model_hint for s in snapshots.snapshots])
        row = _row(snapshots, method, rule_options or {}, bn, options, progress)
        unordered = snapshots.ordered_by == "content" and method not in averaging.ORDERLESS
        if unordered and len({*row.coefficients}) > 1:
            raise UsageError(
                "coefficients need an order, and neither the files nor their names tell one",
                hint="number the files, oldest first",
            )
        warnings = list(snapshots.warnings)
        plan = plan_bn(snapshots, row, bn, options, warnings)
        result = _described(snapshots, row, method, plan)
        taken = [s for s, w in zip(snapshots.snapshots, row.weights, strict=True) if w]
        if advice := early_span(taken, snapshots.ordered_by):
            result = replace(result, notes=(advice,))
        terms = outgoing.terms(target, snapshots, row, method, bn, options)
        planned = replace(result, warnings=tuple(warnings))
        if early := _settled(planned, target, snapshots, terms, digests, strict=strict):
            return early
        measured = Measured("averaged" if plan.stale else "none")
        if options.model is not None:
            from ensemblekit.commands.measure import measure

            measured = measure(snapshots, row, plan, bn, options, progress)
            warnings += measured.warnings
        if rank() != 0:  # of a torchrun: process 0 writes
            return replace(result, warnings=tuple(warnings))
        result = replace(
            result,
            batch_norm=_bn_json(plan, measured),
            evaluation=tuple(measured.evaluation),
            notes=(*result.notes, *measured.notes),
        )
        weights = _Weights(
            snapshots, row, measured, warnings, dtype=dtype, strict=strict, others=digests.at_work
        )
        if method in averaging.CHOSEN_ON_DATA:
            weights.chosen_on = "val"
        return _written(result, weights, target, terms, digests, command, options)


def _row(
    snapshots: SnapshotSet,
    method: str,
    rule_options: Mapping[str, Any],
    bn: str,
    options: ModelOptions,
    progress: Progress | None,
) -> Row:
    """What the rule makes; no model runs unless it asks for its figures."""
    rule: Callable[..., Row] = averaging.rule(method)
    if options.model is None or options.val_data is None:
        return rule(snapshots, **rule_options)
    from ensemblekit.commands.objective import ValidationObjective

    with contextlib.closing(ValidationObjective(snapshots, bn, options, progress)) as objective:
        return rule(snapshots, objective=objective, **rule_options)


def _measured_before(
    snapshots: SnapshotSet,
    name: str,
    comparison: Path,
    target: outgoing.Output,
    digests: provenance.Digests,
    *,
    strict: bool,
    command: Sequence[str],
) -> AverageResult:
    """The one model of a candidate that `compare` measured."""
    from ensemblekit.commands import chosen

    taken = chosen.take(name, comparison, snapshots)
    if len(taken.candidate.rows) > 1:
        raise UsageError(
            f"{name} is an ensemble of {len(taken.candidate.rows)} models, and average makes one",
            hint="choose a candidate of kind single or averaged",
        )
    (row,), (policy,), (statistics,) = (
        taken.candidate.rows,
        taken.candidate.batch_norm,
        taken.statistics,
    )
    warnings = list(snapshots.warnings)
    plan = BnPlan(snapshots.norm_layers, (), stale=policy == "averaged", recompute=bool(statistics))
    result = _described(taken.snapshots, row, name, plan)
    measured = Measured(policy, dict(statistics), taken.samples)
    result = replace(result, batch_norm=_bn_json(plan, measured))
    terms = outgoing.terms(target, taken.snapshots, row, name, policy, ModelOptions())
    terms["comparison"] = provenance.file_digest(comparison)
    planned = replace(result, warnings=tuple(warnings))
    if early := _settled(planned, target, taken.snapshots, terms, digests, strict=strict):
        return early
    if rank() != 0:
        return planned
    dtype, others = target.dtype, digests.at_work
    weights = _Weights(
        taken.snapshots, row, measured, warnings, dtype=dtype, strict=strict, others=others
    )
    weights.chosen_on = taken.candidate.chosen_on
    return _written(result, weights, target, terms, digests, command, ModelOptions())


def _settled(
    planned: AverageResult,
    target: outgoing.Output,
    snapshots: SnapshotSet,
    terms: dict[str, Any],
    digests: provenance.Digests,
    *,
    strict: bool,
) -> AverageResult | None:
    """What there is to say before any weights are read: it is there already, or a dry run ends here.

    Raises:
        UsageError: The output could not be written.
        CheckFailedError: `strict`, and there is a warning already.
    """
    path, found = target.path, None
    if path is not None:
        if not target.force:
            found = provenance.up_to_date(path, planned, terms, snapshots, digests)
        if found is None:
            notes = outgoing.check(target, snapshots)
            planned = replace(planned, output=str(path), warnings=(*planned.warnings, *notes))
    if found is None and target.dry_run:
        found = planned
    if found is not None and strict and found.warnings:
        raise CheckFailedError(f"--strict: {found.warnings[0]}")
    return found


def _written(
    result: AverageResult,
    weights: "_Weights",
    target: outgoing.Output,
    terms: dict[str, Any],
    digests: provenance.Digests,
    command: Sequence[str],
    options: ModelOptions,
) -> AverageResult:
    """The weights in their place, or in memory when there is no path."""
    snapshots, path = weights.snapshots, target.path
    if path is None:
        arrays, sink = array_sink(converted(snapshots.first.signature, target.dtype))
        weights.fill(sink)
        weights.done()
        cosines = weights.similarity.cosines
        return replace(result, warnings=tuple(weights.warnings), cosines=cosines, state=arrays)
    done = result

    def manifest(digest: str) -> dict[str, Any]:
        nonlocal done
        done = replace(
            result,
            output=str(path),
            sha256=digest,
            warnings=tuple(weights.warnings),
            cosines=weights.similarity.cosines,
        )
        request = {"inputs": digests.of(snapshots), **terms}
        candidate = Candidate(
            "average", (weights.row,), (weights.policy,), chosen_on=weights.chosen_on
        )
        return provenance.manifest(done, snapshots, candidate, command, request, options)

    content = outgoing.content(
        target, snapshots, provenance.metadata(snapshots, result), weights.warnings
    )
    inputs = outgoing.files(snapshots)
    if writers.is_folder(path):
        folder.save_folder(
            path,
            content,
            weights,
            manifest,
            inputs=inputs,
            force=target.force,
            shard_bytes=target.shard_bytes,
            request=provenance.digest([terms, provenance.fingerprints(snapshots), path.name]),
        )
    else:
        save(path, content, weights, manifest, inputs=inputs, force=target.force)
    return done


def _described(snapshots: SnapshotSet, row: Row, method: str, plan: BnPlan) -> AverageResult:
    used = tuple(
        {
            "path": str(snapshot.path),
            "step": position(snapshot, snapshots.ordered_by),
            "coefficient": weight,
            "weights": snapshot.variant,
            "weights_available": list(snapshot.available),
        }
        for snapshot, weight in zip(snapshots.snapshots, row.weights, strict=True)
    )
    return AverageResult(
        output=None,
        sha256=None,
        method=method,
        snapshots=used,
        skipped=tuple({"path": str(s.path), "reason": s.reason} for s in snapshots.skipped),
        tensors=len(snapshots.first.tensors),
        parameters=snapshots.first.parameters,
        batch_norm=_bn_json(plan, None),
    )


def _bn_json(plan: BnPlan, measured: Measured | None) -> dict[str, Any]:
    planned = "recomputed" if plan.recompute else "averaged" if plan.stale else "none"
    return {
        "layers": len(plan.layers),
        "frozen": len(plan.frozen),
        "policy": measured.policy if measured else planned,
        "samples": measured.samples if measured else 0,
    }


class _Weights:
    """The averaged weights on their way to a sink; checks that need the values happen there."""

    def __init__(
        self,
        snapshots: SnapshotSet,
        row: Row,
        measured: Measured,
        warnings: list[str],
        *,
        dtype: str | None,
        strict: bool,
        others: Callable[[], int],
    ) -> None:
        self.snapshots = snapshots
        self.row = row
        self.policy = measured.policy
        self.statistics = measured.statistics
        self.warnings = warnings
        self.dtype = dtype
        self.strict = strict
        self.others = others
        self.chosen_on: str | None = None
        self.similarity = Similarity(())
        self.moments: dict[str, Moments] = {}

    def fill(self, sink: Sink, keys: Collection[str] | None = None) -> None:
        """Give tensors to `sink`, recomputed statistics in the place of averaged ones."""

        def unless_replaced(key: str, offset: int, data: npt.NDArray[np.uint8]) -> None:
            if key not in self.statistics:
                sink(key, offset, data)

        self.moments |= sums(
            self.snapshots,
            [self.row],
            [unless_replaced],
            keys=keys,
            dtype=self.dtype,
            replaced=frozenset(self.statistics),
            others=self.others,
        )
        for key, values in self.statistics.items():
            if keys is None or key in keys:
                own = self.snapshots.first.tensors[key].dtype
                kind = DTYPES[self.dtype or own].numpy
                with np.errstate(over="ignore"):
                    rounded = narrow(np.ascontiguousarray(values, np.float64), kind)
                check_result(key, rounded)
                sink(key, 0, rounded.reshape(-1).view(np.uint8))

    def notes(self) -> dict[str, Any]:
        """The moments of the tensors that are filled."""
        return {key: moments.to_json() for key, moments in self.moments.items()}

    def resume(self, notes: dict[str, Any]) -> None:
        """Take up the moments of tensors that an earlier run filled."""
        self.moments |= {key: Moments.from_json(value) for key, value in notes.items()}

    def done(self) -> None:
        """What all tensors together say of the snapshots."""
        self.similarity = similarity(self.snapshots, self.row, self.moments)
        self.warnings += _basin_warnings(self.snapshots, self.row, self.similarity)
        if self.strict and self.warnings:
            raise CheckFailedError(f"--strict: {self.warnings[0]}")


def _basin_warnings(snapshots: SnapshotSet, row: Row, similarity: Similarity) -> list[str]:
    found = []
    weights = [abs(w) for w in row.weights]
    telling = [k for k, w in enumerate(weights) if w >= max(weights) / _LIGHT]
    low = min(similarity.cosines[k] for k in telling)  # what hardly counts does no harm either
    if low < SAME_BASIN:
        name = snapshots.snapshots[similarity.cosines.index(low)].name
        far = "is probably" if low < _FAR else "may well be"
        found.append(
            f"different basins: {name} has cosine {low:.2f} to the mean of the others "
            f"(one run has {SAME_BASIN} and more); their average {far} worse than each of "
            "them. Ensemble their predictions instead, or average snapshots of one run"
        )
    for name, key, ratio in similarity.outliers[:3]:
        found.append(f"{name}: '{key}' has {ratio:.2g} times the norm of its siblings")
    return found
