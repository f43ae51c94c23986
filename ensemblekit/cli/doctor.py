"""`ensemblekit doctor`: the environment, to paste into an issue, and how to mend it."""

import json
from typing import TYPE_CHECKING

import click

from ensemblekit.cli import options, show
from ensemblekit.libraries import RUNTIMES

if TYPE_CHECKING:
    from ensemblekit.commands.doctor import Report


@click.command("doctor")
@options.JSON
@click.pass_obj
def command(obj: dict[str, bool], /, as_json: bool) -> int:
    """Show this environment, what is wrong with it and what to type about that.

    Paste the output into an issue. Libraries are imported in another process, so that a broken one
    is a line of the report. Problems do not change the exit code: it is 0.
    """
    from ensemblekit.commands.doctor import examine

    progress = show.progress(quiet=obj["quiet"] or as_json)
    report = examine(progress=progress)
    if progress is not None:
        progress("", 0, None)  # nothing is under way any more
    if as_json:
        click.echo(json.dumps(report.to_json()))
        return 0
    for label, text in _lines(report):
        click.echo(f"{label:13} {text}")
    found = report.problems
    click.echo()
    click.echo(f"{len(found)} problem{'s'[: len(found) != 1]}{':' if found else ''}")
    for number, one in enumerate(found, start=1):
        click.echo(f"{number}. {one.what}\n   fix: {one.fix}")
    return 0


def _lines(report: "Report") -> list[tuple[str, str]]:
    """The block, one fact a line."""
    files = [("any number" if n < 0 else str(n)) for n in report.open_files or ()]
    here = [one for one in report.libraries if one.version is not None]
    absent = [one.name for one in report.libraries if one.version is None]
    if any(one.name in RUNTIMES for one in here):  # one of the two is right
        absent = [name for name in absent if name not in RUNTIMES]
    lines = [
        ("ensemblekit", report.ensemblekit),
        ("Python", report.python),
        ("platform", report.platform),
        ("processor", report.processor),
        ("cores", f"{report.cores or 'unknown'}, {report.usable_cores} of them for this process"),
        ("memory", _gigabytes(report.memory_bytes)),
        ("free disk", _gigabytes(report.free_disk_bytes)),
        ("open files", f"{files[0]}, at most {files[1]}" if files else "unknown"),
        ("C++ compiler", report.compiler or "none"),
        ("NVIDIA GPU", "; ".join(report.gpus) or "none"),
        ("torch", _torch(report)),
        ("ONNX Runtime", ", ".join(report.onnxruntime.get("providers", ())) or "does not import"),
        ("libraries", ", ".join(f"{one.name} {one.version}" for one in here)),
        ("not installed", ", ".join(absent) or "-"),
    ]
    set_ = ", ".join(f"{name}={value}" for name, value in report.variables.items())
    return [*lines, ("variables", set_)] if set_ else lines


def _gigabytes(size: int | None) -> str:
    return "unknown" if size is None else f"{size / 1e9:.1f} GB"


def _torch(report: "Report") -> str:
    told = report.torch
    if not told:
        return "does not import"
    build = f"CUDA {told['cuda_build']}" if told["cuda_build"] else "CPU"
    build = f"ROCm {told['rocm_build']}" if told["rocm_build"] else build
    devices = [f"{d['name']} ({d['memory_bytes'] / 1e9:.0f} GB)" for d in told["cuda_devices"]]
    devices += ["mps"] if told["mps"] else []
    return (
        f"{told['version']}, {build} build, {told['threads']} threads, "
        f"devices: {', '.join(['cpu', *devices])}"
    )
