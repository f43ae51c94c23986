"""Owns `export`: a candidate becomes one verified ONNX file.

Input: checkpoints, a model, and which candidate of them. Attempts are made in order of hope: the
faster graph first, plainer ones and the other exporter after it. The first that passes verification
is written.
"""

import contextlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ensemblekit import __version__
from ensemblekit.atomic import check_output
from ensemblekit.candidates import mean_row
from ensemblekit.commands import chosen, provenance, triton
from ensemblekit.commands.subject import ExportOptions, Subject, doubts, subject
from ensemblekit.discovery import discover
from ensemblekit.distributed import one_process
from ensemblekit.errors import CheckFailedError, UnsupportedError, UsageError
from ensemblekit.graphs import interface as interfaces
from ensemblekit.graphs import precision as precisions
from ensemblekit.graphs import saving
from ensemblekit.graphs.choosing import Choice, attempts
from ensemblekit.graphs.making import Made
from ensemblekit.options import ModelOptions, Progress
from ensemblekit.runtimes.onnx_runtime import Session, check_provider
from ensemblekit.selection import Selection
from ensemblekit.snapshots import SnapshotSet
from ensemblekit.verification import Verification, verify
from ensemblekit.writers import manifest_path, read_manifest

_BF16_OPSET = 22  # the first in which convolutions know the type


@dataclass(frozen=True)
class ExportResult:
    """What `export --json` prints."""

    output: str | None
    sha256: str | None
    opset: int
    inputs: tuple[dict[str, Any], ...]
    outputs: tuple[dict[str, Any], ...]
    verification: dict[str, Any]
    candidate: dict[str, Any]
    snapshots: tuple[str, ...]
    exporter: str
    precision: str
    fused: int
    folded: int
    nodes: int
    shared: int
    bytes: int
    external_data: str | None
    latency: tuple[dict[str, Any], ...]
    attempts: tuple[dict[str, Any], ...]
    triton: str | None = None
    warnings: tuple[str, ...] = ()
    up_to_date: bool = False

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {"schema_version": 1, **vars(self)}


def export(
    checkpoints: str | Path | Sequence[str | Path],
    output: str | Path,
    *,
    model: ModelOptions,
    options: ExportOptions | None = None,
    selection: Selection | None = None,
    force: bool = False,
    dry_run: bool = False,
    strict: bool = False,
    command: Sequence[str] = (),
    progress: Progress | None = None,
) -> ExportResult:
    """Export one candidate of some checkpoints as a verified ONNX file.

    Args:
        checkpoints: Files, folders and globs.
        output: The file to write, ending in `.onnx`.
        model: The model, data, and how to run them.
        options: What to export and how.
        selection: Which snapshots take part.
        force: Replace an existing output.
        dry_run: Do everything but leave no file.
        strict: A warning is a failed check.
        command: What to note as the command in the manifest.
        progress: Told what is being done.

    Raises:
        UsageError: Options that do not fit, an output that exists.
        InputError: Checkpoints, model or data that cannot be used.
        MachineError: The machine said no, or the provider is missing.
        CheckFailedError: No graph passed verification.
    """
    options = options or ExportOptions()
    one_process("export")
    path = Path(output)
    if path.suffix != ".onnx":
        raise UsageError(f"output {path}: expected a name that ends in .onnx")
    check_provider(options.provider)
    paths = [checkpoints] if isinstance(checkpoints, str | os.PathLike) else list(checkpoints)
    snapshots = discover(*paths, selection=selection)
    request = _request(snapshots, model, options)
    if not force and (done := _up_to_date(path, request)) is not None:
        _check_strict(done.warnings, strict=strict)
        return done
    _check_free(path, snapshots, options, force=force)
    found = subject(snapshots, model, options, progress)
    _check_strict(found.warnings, strict=strict)
    with saving.workshop(path) as folder:
        made, choice, verification, tried = _first_that_passes(
            found, options, folder, path, progress
        )
        file = folder / path.name
        result = _result(found, options, made, choice, verification, tried, file)
        _check_strict(result.warnings, strict=strict)
        if dry_run:
            return result
        result = replace(result, output=str(path))
        if options.triton is not None:
            result = replace(result, triton=str(Path(options.triton) / path.stem))
        manifest = {
            "ensemblekit": __version__,
            **result.to_json(),
            "versions": _versions(),
            "command": list(command),
            "request": request,
            "external_sha256": None
            if result.external_data is None
            else saving.digest(file.with_name(result.external_data)),
        }
        with contextlib.ExitStack() as stack:
            put = None
            if options.triton is not None:
                repository = triton.made(Path(options.triton), path.stem, file, options.provider)
                put = stack.enter_context(repository)
            saving.publish(file, path, manifest)
            if put is not None:
                put()
    return result


def _check_strict(warnings: Sequence[str], *, strict: bool) -> None:
    if strict and warnings:
        raise CheckFailedError(f"--strict: {warnings[0]}")


def _check_free(path: Path, snapshots: SnapshotSet, options: ExportOptions, *, force: bool) -> None:
    inputs = [source.path for s in snapshots.snapshots for source in s.sources]
    outputs = [path, path.with_name(saving.data_name(path.name)), manifest_path(path)]
    if options.keep_failed:
        outputs.append(_failed(path))
    for output in outputs:
        check_output(output, inputs=inputs, force=force)
    if options.triton is not None:
        triton.check_free(Path(options.triton), path.stem, force=force)


def _failed(output: Path) -> Path:
    return output.with_name(f"{output.stem}.failed.onnx")


def _first_that_passes(
    found: Subject,
    options: ExportOptions,
    folder: Path,
    output: Path,
    progress: Progress | None,
) -> tuple[Made, Choice, Verification, list[dict[str, Any]]]:
    """The best graph that is the model, in `folder` under the output's name."""
    tried: list[dict[str, Any]] = []
    verification: Verification | None = None
    failed: Path | None = None
    say = progress or (lambda what, done, total: None)
    for choice in attempts(
        found.members,
        found.head,
        interfaces.example_of(found.samples.first, found.interface),
        found.interface,
        found.samples.first,
        folder,
        logits=found.bench.options.logits,
        exporter=options.exporter,
        opset=max(options.opset, _BF16_OPSET if options.precision == "bf16" else 0),
        fuse=options.fuse,
        provider=options.provider,
        say=lambda what: say(what, 0, None),
    ):
        if choice.made is None:
            tried.append({**choice.facts(), "passed": False, "reason": choice.reason})
            continue
        say("verifying", 0, None)
        try:
            file = _in_precision(found, choice.made, options, folder, output.name)
        except UnsupportedError as error:
            tried.append({**choice.facts(), "passed": False, "reason": error.message})
            continue
        verification = checked(found, options, file)
        reason = None if verification.failed is None else ": ".join(verification.failed)
        tried.append({**choice.facts(), "passed": verification.passed, "reason": reason})
        if verification.passed:
            return choice.made, choice, verification, tried
        failed = file
    if failed is not None and options.keep_failed:
        kept = _failed(output)
        _keep(failed, kept)
        where = f"; the last graph is kept as {kept}"
    else:
        where = "; --keep-failed keeps the file"
    if all(attempt["exporter"] is not None and choice_failed(attempt) for attempt in tried):
        raise UnsupportedError(
            f"this model cannot be exported: {tried[0]['reason']}",
            hint="try the model with torch.onnx.export; control flow on values has no graph",
        )
    last = next(a for a in reversed(tried) if not choice_failed(a))
    raise CheckFailedError(
        f"the exported graph is not the model: {last['reason']}{where}",
        hint=_advice(str(last["reason"])),
    )


def choice_failed(attempt: Mapping[str, Any]) -> bool:
    """Whether an attempt never came to a graph."""
    return attempt["nodes"] is None


def _advice(reason: str) -> str | None:
    if "frozen" in reason or reason.startswith("batch sizes"):
        return (
            "the model's code makes a number of a size (use x.shape[0], not len(x) or int(...)), or "
            "other axes than the first are open, too: --input 'NAME:TYPE[batch,length]'"
        )
    if reason.startswith("session"):
        return "another --provider or --precision"
    return None


def _in_precision(
    found: Subject, made: Made, options: ExportOptions, folder: Path, name: str
) -> Path:
    """The graph as a file in the precision that was asked for, with its metadata."""
    file = folder / name
    for old in folder.iterdir():
        if old.name != name and not old.name.startswith("variant"):
            old.unlink()
    _check_class_names(made, options)
    made.model.metadata_props.update(_metadata(found, options))
    if options.precision == "fp32":
        saving.save(made.model, file)
        return file
    plain = folder / f"fp32.{name}"
    saving.save(made.model, plain)
    precisions.convert(plain, file, options.precision, calibration=found.calibration)
    return file


def checked(found: Subject, options: ExportOptions, file: Path) -> Verification:
    """The verification of a file on the subject's samples."""
    with found.bench.builder.precision():  # TF32 off
        return verify(
            file,
            found.module,
            found.interface,
            found.samples,
            task=found.head.task,
            class_axis=found.head.class_axis,
            probabilities=options.output_kind == "probabilities",
            provider=options.provider,
            precision=found.precision(options.precision),
        )


def _keep(failed: Path, kept: Path) -> None:
    import onnx_ir as ir

    model = ir.load(failed)
    saving.save(model, kept)


def _check_class_names(made: Made, options: ExportOptions) -> None:
    names = options.metadata.get("class_names")
    shape = made.model.graph.outputs[0].shape
    if names is None or shape is None or len(shape) not in (2, 4):  # scores stand in axis 1
        return
    count, classes = len(json.loads(names)), shape[1]
    if isinstance(classes, int) and count != classes:
        raise UsageError(f"--class-names: {count} names for {classes} classes")


def _metadata(found: Subject, options: ExportOptions) -> dict[str, str]:
    facts = {
        "version": __version__,
        "candidate": found.candidate.to_json(),
        "snapshots": [
            {"file": s.path.name, "sha256": s.digest(), "weights": s.variant}
            for s in found.snapshots.snapshots
        ],
        "output": found.head.output_name,
        "task": found.head.task,
        "precision": found.precision(options.precision),
    }
    return {"ensemblekit": json.dumps(facts), **options.metadata}


def _versions() -> dict[str, str]:
    import onnx
    import onnxruntime

    return {
        "ensemblekit": __version__,
        "torch": torch.__version__,
        "onnx": onnx.__version__,
        "onnxruntime": onnxruntime.__version__,
    }


def _result(
    found: Subject,
    options: ExportOptions,
    made: Made,
    choice: Choice,
    verification: Verification,
    tried: list[dict[str, Any]],
    file: Path,
) -> ExportResult:
    session = Session(file, options.provider)
    data = file.with_name(saving.data_name(file.name))
    size = file.stat().st_size + (data.stat().st_size if data.exists() else 0)
    warnings = [*found.warnings, *doubts(found, verification)]
    warnings += [f"an attempt failed ({t['exporter']}): {t['reason']}" for t in tried[:-1]]
    return ExportResult(
        output=None,
        sha256=saving.digest(file),
        opset=made.model.graph.opset_imports.get("", options.opset),
        inputs=tuple(_slot(s) for s in session.inputs),
        outputs=tuple(_slot(s) for s in session.outputs),
        verification=verification.to_json(),
        candidate=found.candidate.to_json(),
        snapshots=tuple(str(s.path) for s in found.snapshots.snapshots),
        exporter=made.exporter,
        precision=found.precision(options.precision),
        fused=made.fused,
        folded=made.folded,
        nodes=_nodes(file),
        shared=made.shared,
        bytes=size,
        external_data=data.name if data.exists() else None,
        latency=tuple(choice.latency),
        attempts=tuple(tried),
        warnings=tuple(warnings),
    )


def _nodes(file: Path) -> int:
    """Operators of the file as it was written."""
    import onnx

    return len(onnx.load(str(file), load_external_data=False).graph.node)


def _slot(slot: Any) -> dict[str, Any]:
    return {"name": slot.name, "type": slot.dtype, "shape": list(slot.dims)}


def _request(snapshots: SnapshotSet, model: ModelOptions, options: ExportOptions) -> dict[str, Any]:
    row = mean_row(len(snapshots))
    found = provenance.request(snapshots, row, "export", options.bn, model)
    shown = {name: value for name, value in vars(options).items() if name != "keep_failed"}
    found["export"] = json.loads(json.dumps(shown, default=list))
    if options.candidate is not None:
        chosen.read(_comparison(options.candidate[1]))
        found["comparison"] = provenance.file_digest(Path(options.candidate[1]))
    return found


def _comparison(source: str) -> Path:
    path = Path(source)
    return path / "comparison.json" if path.is_dir() else path


def _up_to_date(path: Path, request: Mapping[str, Any]) -> ExportResult | None:
    earlier = read_manifest(path)
    if earlier is None or not path.is_file() or earlier.get("request") != request:
        return None
    if earlier.get("sha256") != saving.digest(path):
        return None
    data = path.with_name(saving.data_name(path.name))
    if (saving.digest(data) if data.is_file() else None) != earlier.get("external_sha256"):
        return None
    if (
        earlier.get("triton") is not None
        and not (Path(earlier["triton"]) / triton.CONFIG).is_file()
    ):
        return None
    names = ExportResult.__dataclass_fields__
    try:
        kept = {name: earlier[name] for name in names if name in earlier}
        return ExportResult(**{**kept, "up_to_date": True})
    except TypeError:
        return None
