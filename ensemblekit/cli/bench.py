"""`ensemblekit bench`: latency, throughput and memory of candidates, on every runtime."""

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ensemblekit.cli import options, show
from ensemblekit.cli.allocator import keep_freed_memory
from ensemblekit.errors import UsageError

if TYPE_CHECKING:
    from ensemblekit.commands.bench import BenchResult, Row

_SELECTION = ("weights", "exclude", "last", "every", "from_step", "to_step", "best", "by")
_COLUMNS = ("candidate", "members", "runtime", "execution", "precision", "batch_size")
_FIGURES = ("p50_ms", "p95_ms", "p99_ms", "throughput_per_s", "peak_memory_bytes")


@click.command("bench")
@options.CHECKPOINTS
@options.CANDIDATE
@options.option("--ensemble", is_flag=True, help="The ensemble of all checkpoints alone.")
@options.option(
    "--coefficients",
    type=options.NUMBERS,
    metavar="C1,C2,...",
    help="One average with these weights alone.",
)
@options.option(
    "--members", metavar="K1,K2,...", help="Sizes of ensembles [default: all checkpoints]."
)
@options.option(
    "--combiner", default="mean", show_default=True, metavar="NAME", help="Of ensembles."
)
@options.SELECTION
@options.MODEL_AND_DATA
@options.TASK
@options.option(
    "--input",
    "inputs",
    multiple=True,
    metavar="NAME:TYPE[SIZES]",
    help="An input, as in 'image:float32[batch,3,32,32]', where there are no data. Repeatable.",
)
@options.option(
    "--runtime",
    "runtimes",
    metavar="R1,R2,...",
    help="torch, torch-fused, torch-compile, torch-cudagraph, onnxruntime [default: all that run "
    "here].",
)
@options.option(
    "--precision",
    "precisions",
    default="fp32",
    show_default=True,
    metavar="P1,P2,...",
    help="fp32, tf32, bf16, fp16.",
)
@options.option(
    "--batches", default="1,8", show_default=True, metavar="N1,N2,...", help="Batch sizes."
)
@options.option(
    "--provider",
    type=options.Choice(["cpu", "cuda", "tensorrt"]),
    help="Of ONNX Runtime [default: that of the device].",
)
@options.option("--threads", type=int, metavar="N", help="Of one operator on the CPU.")
@options.option(
    "--seconds",
    type=float,
    default=0.5,
    show_default=True,
    metavar="S",
    help="For each row at most, the warm-up left out.",
)
@options.option(
    "--max-latency-ms",
    type=float,
    metavar="MS",
    help="Report the highest throughput whose p95 keeps this.",
)
@options.option("--cold", is_flag=True, help="Clear caches between runs.")
@options.option("--export-markdown", metavar="FILE", help="Write the table as Markdown.")
@options.option("--export-csv", metavar="FILE", help="Write the table as CSV.")
@options.option("--export-html", metavar="FILE", help="Write plots over batch size and members.")
@options.option("--force", is_flag=True, help="Replace existing files.")
@options.JSON
@click.pass_obj
def command(
    obj: dict[str, bool],
    /,
    checkpoints: tuple[str, ...],
    coefficients: tuple[float, ...] | None,
    candidate: str | None,
    source: str | None,
    members: str | None,
    runtimes: str | None,
    precisions: str,
    batches: str,
    seconds: float,
    export_markdown: str | None,
    export_csv: str | None,
    export_html: str | None,
    force: bool,
    as_json: bool,
    model_arg: tuple[str, ...],
    **rest: Any,
) -> int:
    """Measure one checkpoint, the average and the ensemble of CHECKPOINTS side by side.

    All rows of a batch size take turns, so that a machine that slows down slows all of them.
    """
    from ensemblekit.commands.bench import BenchOptions, bench
    from ensemblekit.latency import Effort
    from ensemblekit.options import ModelOptions
    from ensemblekit.selection import Selection

    keep_freed_memory()
    files = {"markdown": export_markdown, "csv": export_csv, "html": export_html}
    paths = {kind: Path(name) for kind, name in files.items() if name is not None}
    if len(set(paths.values())) < len(paths):
        raise UsageError("two of --export-markdown, --export-csv and --export-html are one file")
    for path in paths.values():
        _check_free(path, force=force)
    if not seconds > 0:
        raise UsageError(f"--seconds {seconds:g}: must be more than 0")
    selection = Selection(**{name: rest.pop(name) for name in _SELECTION})
    names = ("ensemble", "combiner", "provider", "threads", "cold", "max_latency_ms", "inputs")
    chosen = BenchOptions(
        candidate=options.candidate(candidate, source),
        coefficients=coefficients,
        members=_whole(members, "--members"),
        runtimes=_words(runtimes),
        precisions=_words(precisions),
        batches=_whole(batches, "--batches"),
        effort=Effort(seconds=seconds),
        **{name: rest.pop(name) for name in names},
    )
    model = ModelOptions(model_args=options.pairs(model_arg) if model_arg else {}, **rest)
    with show.own_stdout():
        result = bench(
            checkpoints,
            model=model,
            options=chosen,
            selection=selection,
            progress=show.progress(quiet=obj["quiet"] or as_json),
        )
    _write(result, paths)
    if as_json:
        click.echo(json.dumps(_finite(result.to_json())))
    else:
        _print(result, quiet=obj["quiet"])
    return 0


def _whole(text: str | None, flag: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in _words(text))
    except ValueError as error:
        raise UsageError(f"{flag} {text}: expected whole numbers such as 1,8,64") from error


def _words(text: str | None) -> tuple[str, ...]:
    return tuple(part for part in (text or "").replace(" ", "").split(",") if part)


def _finite(value: Any) -> Any:
    """The same with None for numbers that JSON does not have."""
    from ensemblekit.commands.compare import finite

    return finite(value)


def _check_free(path: Path, *, force: bool) -> None:
    from ensemblekit.atomic import check_output

    check_output(path, inputs=[], force=force)


def _print(result: "BenchResult", *, quiet: bool) -> None:
    right = ["members", "batch", "p50 ms", "+-", "p95 ms", "samples/s", "memory MB"]
    rows = [_cells(row) for row in result.rows]
    memory = any(row.peak_memory_bytes is not None for row in result.rows)
    columns = ["candidate", "runtime", "precision", *right[1:], ""]
    if not memory:
        rows = [[*row[:-2], row[-1]] for row in rows]
        columns.remove("memory MB")
    show.table(columns, rows, right=right)
    for text in result.summary:
        click.echo(text)
    for target in result.targets:
        found = target["throughput_per_s"]
        said = (
            f"{found:,.0f} samples/s at batch {target['batch_size']} on {target['runtime']}"
            if found is not None
            else "no row keeps it"
        )
        click.echo(f"{target['candidate']} within {target['max_latency_ms']:g} ms: {said}")
    facts = result.environment
    click.echo(
        f"{facts['device_name']}, {facts['threads']} threads, torch {facts['torch']}; "
        f"{facts['caches']} caches"
    )
    if not quiet:
        for text in result.warnings:
            show.warning(text)


def _cells(row: "Row") -> list[str]:
    how = row.runtime if row.execution in (None, "loop", "graph") else f"{row.runtime} fused"
    if row.runtime == "torch-fused":
        how = row.runtime
    start = [row.candidate, how, row.precision, str(row.batch_size)]
    if row.latency is None:
        return [*start, "", "", "", "", "", row.error or ""]
    latency = row.latency
    memory = "" if row.peak_memory_bytes is None else f"{row.peak_memory_bytes / 1e6:,.1f}"
    note = "" if row.agrees else "<- other outputs"
    return [
        *start,
        f"{latency.p50_ms:.3g}",
        f"{latency.error:.1%}",
        f"{latency.p95_ms:.3g}",
        f"{latency.throughput_per_s:,.0f}",
        memory,
        note,
    ]


def _write(result: "BenchResult", paths: dict[str, Path]) -> None:
    from ensemblekit.atomic import AtomicFile

    makers = {"markdown": _markdown, "csv": _csv, "html": _html}
    for kind, path in paths.items():
        text = makers[kind](result)
        with AtomicFile(path) as file:
            file.write_at(text.encode(), 0)
            file.seal()
            file.rename()


def _table(result: "BenchResult") -> tuple[Sequence[str], list[list[Any]]]:
    columns = [*_COLUMNS, *_FIGURES, "error"]
    return columns, [[row.to_json()[name] for name in columns] for row in result.rows]


def _markdown(result: "BenchResult") -> str:
    columns, rows = _table(result)
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for row in rows:
        cells = ["" if v is None else f"{v:.4g}" if isinstance(v, float) else str(v) for v in row]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    environment = ", ".join(f"{key}: {value}" for key, value in result.environment.items())
    return "\n".join([*lines, "", *(f"- {text}" for text in result.summary), "", environment, ""])


def _csv(result: "BenchResult") -> str:
    import io

    columns, rows = _table(result)
    sink = io.StringIO()
    writer = csv.writer(sink, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(rows)
    return sink.getvalue()


def _html(result: "BenchResult") -> str:
    from ensemblekit.reports.latency import page

    return page(_finite(result.to_json()))
