"""Owns `verify`: the verification alone, of a file that exists.

Input: an ONNX file, and the checkpoints it should be the model of.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ensemblekit.candidates import Candidate
from ensemblekit.commands.export import checked
from ensemblekit.commands.subject import ExportOptions, doubts, subject
from ensemblekit.discovery import discover
from ensemblekit.distributed import one_process
from ensemblekit.errors import IncompatibleError, UsageError, listing
from ensemblekit.graphs.precision import PRECISIONS
from ensemblekit.options import ModelOptions, Progress
from ensemblekit.runtimes.onnx_runtime import check_provider
from ensemblekit.selection import Selection
from ensemblekit.snapshots import Snapshot, SnapshotSet


@dataclass(frozen=True)
class VerifyResult:
    """What `verify --json` prints."""

    file: str
    verification: dict[str, Any]
    candidate: dict[str, Any]
    warnings: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {"schema_version": 1, **vars(self)}


def verify_file(
    file: str | Path,
    checkpoints: str | Path | Sequence[str | Path],
    *,
    model: ModelOptions,
    options: ExportOptions | None = None,
    selection: Selection | None = None,
    output_kind: str | None = None,
    precision: str | None = None,
    progress: Progress | None = None,
) -> VerifyResult:
    """Compare an ONNX file with the model of some checkpoints.

    Args:
        file: The file.
        checkpoints: Files, folders and globs.
        model: The model, data, and how to run them.
        options: Which candidate of the checkpoints; without one, what the file says.
        selection: Which snapshots take part.
        output_kind: What the file gives; what it says itself when None.
        precision: What it computes in; what it says itself when None.
        progress: Told what is being done.

    Raises:
        UsageError: No such file, or options that do not fit.
        InputError: Checkpoints, model or data that cannot be used.
        MachineError: The provider is missing.
    """
    one_process("verify")
    path = Path(file)
    if not path.is_file():
        raise UsageError(f"{path}: there is no such file")
    options = options or ExportOptions()
    check_provider(options.provider)
    facts = _facts(path)
    options = replace(
        options,
        output_kind=output_kind
        or ("logits" if facts.get("output") != "probabilities" else "probabilities"),
        precision=precision or _known(facts.get("precision")),
    )
    paths = [checkpoints] if isinstance(checkpoints, str | os.PathLike) else list(checkpoints)
    snapshots = discover(*paths, selection=selection)
    candidate = None
    if options.candidate is None and not options.ensemble and options.coefficients is None:
        candidate, snapshots = _candidate(path, facts, snapshots, model)
    # The ranges of activations are in the file: no training data are needed to compare.
    asked = replace(options, precision="fp32")
    found = subject(snapshots, model, asked, progress, candidate=candidate)
    verification = checked(found, options, path)
    return VerifyResult(
        str(path),
        verification.to_json(),
        found.candidate.to_json(),
        (*found.warnings, *doubts(found, verification)),
    )


def _known(precision: object) -> str:
    """The precision that a file names, where it is one."""
    return precision if isinstance(precision, str) and precision in PRECISIONS else "fp32"


def _facts(path: Path) -> Mapping[str, Any]:
    """What the file says about itself; nothing where it is not ours or damaged."""
    import onnx

    try:
        model = onnx.load(str(path), load_external_data=False)
        text = next(p.value for p in model.metadata_props if p.key == "ensemblekit")
        facts = json.loads(text)
    except Exception:  # noqa: BLE001  # the verification says what is wrong with it
        return {}
    return facts if isinstance(facts, dict) else {}


def _candidate(
    path: Path, facts: Mapping[str, Any], snapshots: SnapshotSet, model: ModelOptions
) -> tuple[Candidate | None, SnapshotSet]:
    """The candidate that the file says it was made from, over its snapshots.

    Raises:
        UsageError: Its BatchNorm statistics were recomputed, and there are no data to do it again.
        IncompatibleError: A snapshot is not there, or has changed.
    """
    try:
        candidate = Candidate.from_json(facts["candidate"])
        named: list[tuple[str, object]] = [
            (str(s["file"]), (s["sha256"], s["weights"])) for s in facts["snapshots"]
        ]
        policies = set(candidate.batch_norm)
        if not policies <= {"none", "averaged", "recomputed"}:
            return None, snapshots
        if any(len(row.coefficients) != len(named) for row in candidate.rows):
            return None, snapshots
    except (KeyError, TypeError, ValueError, AssertionError):
        return None, snapshots
    now: dict[object, Snapshot] = {s.path.name: s for s in snapshots.snapshots}
    if [name for name, _ in named] == list(now):  # the same names: whether they are the same models
        named = [(name, name) for name, _ in named]  # is what the numbers will tell
    else:
        now = {(s.digest(), s.variant): s for s in snapshots.snapshots}
    missing = [name for name, key in named if key not in now]
    if missing:
        raise IncompatibleError(
            f"{path} was made from {listing(missing)}, which is not among the {len(now)} snapshots "
            "found, or has changed since",
            hint="name the checkpoints it was made from; or say what it should be: --ensemble, "
            "--coefficients",
        )
    if "recomputed" in policies and model.train_data is None:
        raise UsageError(
            f"the BatchNorm statistics of {path} were recomputed, and do not stand in the checkpoints",
            hint="--candidate NAME --from comparison.json, or --train-data as in the export",
        )
    taken = tuple(now[key] for _, key in named)
    return candidate, SnapshotSet(taken, snapshots.skipped, (), snapshots.ordered_by)
