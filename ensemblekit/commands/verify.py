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
from ensemblekit.commands.export import ExportOptions, checked, subject
from ensemblekit.discovery import discover
from ensemblekit.errors import UsageError
from ensemblekit.options import ModelOptions, Progress
from ensemblekit.runtimes.onnx_runtime import check_provider
from ensemblekit.selection import Selection
from ensemblekit.snapshots import SnapshotSet


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
        precision=precision or facts.get("precision", "fp32"),
    )
    paths = [checkpoints] if isinstance(checkpoints, str | os.PathLike) else list(checkpoints)
    snapshots = discover(*paths, selection=selection)
    free = options.candidate is None and not options.ensemble and options.coefficients is None
    candidate = _candidate(facts, snapshots) if free else None
    # The ranges of activations are in the file: no training data are needed to compare.
    asked = replace(options, precision="fp32")
    found = subject(snapshots, model, asked, progress, candidate=candidate)
    verification = checked(found, options, path)
    return VerifyResult(
        str(path), verification.to_json(), found.candidate.to_json(), tuple(found.warnings)
    )


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


def _candidate(facts: Mapping[str, Any], snapshots: SnapshotSet) -> Candidate | None:
    """The candidate that the file was made from, where it needs nothing but these snapshots."""
    try:
        candidate = Candidate.from_json(facts["candidate"])
        names = list(facts["snapshots"])
    except (KeyError, TypeError, ValueError, AssertionError):
        return None
    if names != [s.path.name for s in snapshots.snapshots] or "recomputed" in candidate.batch_norm:
        return None
    return candidate
