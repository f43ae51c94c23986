"""Owns `average`: from checkpoints to one verified file, with statistics that fit its weights.

Input: paths, a rule, and optionally a model and data. Without a model nothing here imports torch.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ensemblekit import averaging, writers
from ensemblekit.candidates import Row
from ensemblekit.commands import provenance
from ensemblekit.commands.bn_plan import BN_POLICIES, BnPlan, plan_bn
from ensemblekit.commands.result import AverageResult, Measured
from ensemblekit.discovery import discover
from ensemblekit.distributed import rank
from ensemblekit.errors import CheckFailedError, UsageError, one_of
from ensemblekit.files import check_output
from ensemblekit.options import ModelOptions, Progress
from ensemblekit.selection import Selection
from ensemblekit.snapshots import SnapshotSet, position
from ensemblekit.state import Similarity, Sink, array_sink, weighted_sums

SAME_BASIN = 0.8  # two seeds measured 0.05 to 0.46, snapshots of one run 0.85 and more


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
    force: bool = False,
    dry_run: bool = False,
    strict: bool = False,
    command: Sequence[str] = (),
    progress: Progress | None = None,
) -> AverageResult:
    """Average the weights of snapshots into one model.

    Args:
        checkpoints: Files, folders, globs.
        output: The file to write; None keeps the average in memory (`result.state`).
        method: Name of an averaging rule.
        rule_options: Its options.
        selection: Which weights and which snapshots.
        model: Model and data, for BatchNorm and for figures.
        bn: `auto` recomputes BatchNorm statistics when there is training data, and keeps the
            better of recomputed and averaged ones when there is validation data; `recompute`
            insists, `average` never does, `error` refuses to leave them averaged.
        candidate: (name, comparison.json): make a candidate that `compare` measured, with the
            BatchNorm statistics it was measured with. Leaves no room for a rule or for `bn`.
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
    if path is not None:
        writers.check_format(path)
    snapshots = discover(*paths, selection=selection)
    if candidate is not None:
        return _measured_before(
            snapshots,
            candidate[0],
            Path(candidate[1]),
            path,
            force=force,
            dry_run=dry_run,
            strict=strict,
            command=command,
        )
    options = options.with_model_from([s.facts.model_hint for s in snapshots.snapshots])
    row = averaging.rule(method)(snapshots, **(rule_options or {}))
    if snapshots.ordered_by == "content" and len({*row.coefficients}) > 1:
        raise UsageError(
            "coefficients need an order, and neither the files nor their names tell one",
            hint="number the files, oldest first",
        )
    warnings = list(snapshots.warnings)
    plan = plan_bn(snapshots, row, bn, options, warnings)
    result = _described(snapshots, row, method, plan)
    request: dict[str, Any] = {}
    if path is not None:
        if not force or not dry_run:
            request = provenance.request(snapshots, row, method, bn, options)
        if not force and (done := provenance.up_to_date(path, result, request)):
            if strict and done.warnings:
                raise CheckFailedError(f"--strict: {done.warnings[0]}")
            return done
        check_output(path, inputs=_files(snapshots), force=force)
        writers.plan(path, snapshots.first.signature, {})
    if dry_run:
        shown = None if path is None else str(path)
        return replace(result, output=shown, warnings=tuple(warnings))
    measured = Measured("averaged" if plan.stale else "none")
    if options.model is not None:
        from ensemblekit.commands.measure import measure

        measured = measure(snapshots, row, plan, bn, options, progress)
        warnings += measured.warnings
    if rank() != 0:  # of a torchrun: process 0 writes
        return replace(result, warnings=tuple(warnings))
    result = replace(
        result, batch_norm=_bn_json(plan, measured), evaluation=tuple(measured.evaluation)
    )
    weights = _Weights(snapshots, row, measured, warnings, strict=strict)
    return _written(result, weights, path, request, command, force=force)


def _measured_before(
    snapshots: SnapshotSet,
    name: str,
    comparison: Path,
    path: Path | None,
    *,
    force: bool,
    dry_run: bool,
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
    request: dict[str, Any] = {}
    if path is not None:
        request = provenance.request(taken.snapshots, row, name, policy, ModelOptions())
        request["comparison"] = provenance.file_digest(comparison)
        if not force and (done := provenance.up_to_date(path, result, request)):
            return done
        check_output(path, inputs=_files(taken.snapshots), force=force)
    if dry_run or rank() != 0:
        shown = None if path is None else str(path)
        return replace(result, output=shown, warnings=tuple(warnings))
    weights = _Weights(taken.snapshots, row, measured, warnings, strict=strict)
    return _written(result, weights, path, request, command, force=force)


def _written(
    result: AverageResult,
    weights: "_Weights",
    path: Path | None,
    request: dict[str, Any],
    command: Sequence[str],
    *,
    force: bool,
) -> AverageResult:
    """The weights in their file, or in memory when there is no path."""
    snapshots = weights.snapshots
    if path is None:
        arrays, sink = array_sink(snapshots)
        cosines = weights.fill(sink).cosines
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
        return provenance.manifest(done, snapshots, weights.row, weights.policy, command, request)

    writers.save(
        path,
        snapshots.first.signature,
        provenance.metadata(snapshots, result),
        weights.fill,
        manifest,
        inputs=_files(snapshots),
        force=force,
    )
    return done


def _files(snapshots: SnapshotSet) -> list[Path]:
    return [source.path for s in snapshots.snapshots for source in s.sources]


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
        strict: bool,
    ) -> None:
        self.snapshots = snapshots
        self.row = row
        self.policy = measured.policy
        self.statistics = measured.statistics
        self.warnings = warnings
        self.strict = strict
        self.similarity = Similarity(())

    def fill(self, sink: Sink) -> Similarity:
        """Give every tensor to `sink`, recomputed statistics in the place of averaged ones."""

        def unless_replaced(key: str, offset: int, data: npt.NDArray[np.uint8]) -> None:
            if key not in self.statistics:
                sink(key, offset, data)

        self.similarity = weighted_sums(
            self.snapshots, [self.row], [unless_replaced], replaced=frozenset(self.statistics)
        )
        for key, values in self.statistics.items():
            sink(key, 0, np.ascontiguousarray(values).reshape(-1).view(np.uint8))
        self.warnings += _basin_warnings(self.snapshots, self.similarity)
        if self.strict and self.warnings:
            raise CheckFailedError(f"--strict: {self.warnings[0]}")
        return self.similarity


def _basin_warnings(snapshots: SnapshotSet, similarity: Similarity) -> list[str]:
    found = []
    low = min(similarity.cosines)
    if low < SAME_BASIN:
        name = snapshots.snapshots[similarity.cosines.index(low)].name
        found.append(
            f"different basins: {name} has cosine {low:.2f} to the mean of the others "
            f"(one run has {SAME_BASIN} and more); their average is probably worse than each of "
            "them. Ensemble their predictions instead, or average snapshots of one run"
        )
    for name, key, ratio in similarity.outliers[:3]:
        found.append(f"{name}: '{key}' has {ratio:.2g} times the norm of its siblings")
    return found
