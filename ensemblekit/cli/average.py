"""`ensemblekit average`: many checkpoints, one model."""

import json
import os
import shlex
import sys
from typing import TYPE_CHECKING, Any

import click

from ensemblekit import averaging
from ensemblekit.averaging import RULES
from ensemblekit.cli import options, show
from ensemblekit.cli.allocator import keep_freed_memory
from ensemblekit.errors import UsageError, listing

if TYPE_CHECKING:
    from ensemblekit.commands.result import AverageResult

_KINDS: dict[type, dict[str, Any]] = {
    int: {"type": int, "metavar": "N"},
    float: {"type": float, "metavar": "X"},
    tuple: {"type": options.NUMBERS, "metavar": "X1,X2,..."},
}
_RULE_OPTIONS = averaging.options()
RULE_OPTIONS = options.stack(
    *(
        options.option(
            one.flag, **_KINDS[one.kind], help=f"For --method {' or '.join(one.rules)}: {one.help}."
        )
        for one in _RULE_OPTIONS.values()
    )
)
_SELECTION = ("weights", "exclude", "last", "every", "from_step", "to_step", "best", "by")


@click.command("average")
@options.CHECKPOINTS
@options.option(
    "-o",
    "--output",
    default="averaged.safetensors",
    show_default=True,
    metavar="PATH",
    help="What to write: .safetensors, .pt, .pth, .ckpt (Lightning), or a folder (no ending).",
)
@options.option(
    "--dtype",
    metavar="TYPE",
    help="Element type of the result, such as bfloat16 [default: that of the checkpoints].",
)
@options.option(
    "--max-shard-size",
    type=options.SIZE,
    default="5GB",
    show_default=True,
    metavar="SIZE",
    help="Of one file of a folder.",
)
@options.option(
    "--method",
    type=options.Choice(list(RULES)),
    help="The averaging rule [default: uniform, or the one whose option is given].",
)
@RULE_OPTIONS
@options.CANDIDATE
@options.SELECTION
@options.MODEL
@options.option(
    "--bn",
    default="auto",
    show_default=True,
    type=options.Choice(["auto", "recompute", "average", "error"]),
    help="BatchNorm statistics: recompute when there are data, insist, keep the "
    "averaged ones, or refuse those.",
)
@options.BN_SAMPLES
@options.WRITING
@options.JSON
@click.pass_obj
def command(
    obj: dict[str, bool],
    /,
    checkpoints: tuple[str, ...],
    output: str,
    dtype: str | None,
    max_shard_size: int,
    method: str | None,
    candidate: str | None,
    source: str | None,
    bn: str,
    force: bool,
    dry_run: bool,
    strict: bool,
    as_json: bool,
    model_arg: tuple[str, ...],
    **rest: Any,
) -> int:
    """Average the weights of CHECKPOINTS into one model.

    CHECKPOINTS are files, folders and globs; nothing in them is executed. With --model and
    --train-data BatchNorm statistics are recomputed, with --val-data or --test-data the members
    and the average are evaluated.
    """
    if rest["model"] is None:  # numpy's BLAS, which nothing here uses, would start its threads
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    from ensemblekit.commands.average import average
    from ensemblekit.distributed import rank
    from ensemblekit.options import ModelOptions
    from ensemblekit.selection import Selection

    taken = options.candidate(candidate, source)
    rule_options = {name: value for name in _RULE_OPTIONS if (value := rest.pop(name)) is not None}
    if taken is not None and (rule_options or method is not None or bn != "auto"):
        raise UsageError("--candidate has its own coefficients and BatchNorm statistics")
    selecting = {name: rest.pop(name) for name in _SELECTION}
    method = averaging.method_for(method, rule_options)
    if rest.get("model") is not None:
        keep_freed_memory()
    with show.own_stdout():
        result = average(
            checkpoints,
            output,
            method=method,
            rule_options=rule_options,
            selection=Selection(**selecting),
            model=ModelOptions(model_args=options.pairs(model_arg) if model_arg else {}, **rest),
            bn=bn,
            candidate=taken,
            dtype=dtype,
            shard_bytes=max_shard_size,
            force=force,
            dry_run=dry_run,
            strict=strict,
            command=["ensemblekit", *sys.argv[1:]],
            progress=show.progress(quiet=obj["quiet"] or as_json),
        )
    if rank() != 0:  # of a torchrun: process 0 prints
        return 0
    if as_json:
        click.echo(json.dumps(result.to_json()))
    else:
        _print(result, dry_run=dry_run, quiet=obj["quiet"], verbose=obj["verbose"])
    return 0


def _print(result: "AverageResult", *, dry_run: bool, quiet: bool, verbose: bool) -> None:
    uneven = len({s["coefficient"] for s in result.snapshots}) > 1
    for snapshot in result.snapshots if dry_run or uneven or verbose else ():
        step = "" if snapshot["step"] is None else f"  at {show.number(snapshot['step'])}"
        click.echo(f"{snapshot['coefficient']:.6g} x {snapshot['path']}{step}")
    if result.evaluation:
        _print_evaluation(result)
    if not quiet:
        _note_weights(result)
        for text in result.warnings:
            show.warning(text)
        for text in result.notes:
            show.note(text)
        _note_skipped(result, verbose=verbose)
    verb = "up to date:" if result.up_to_date else "would average" if dry_run else "averaged"
    norm = result.batch_norm
    live = norm["layers"] - norm["frozen"]
    statistics = {
        "none": "",
        "averaged": f", {live} BatchNorm layers with averaged statistics",
        "recomputed": f", {live} BatchNorm layers recomputed"
        + (f" on {norm['samples']:,} samples" if norm["samples"] else ""),
    }[norm["policy"]]
    used = sum(snapshot["coefficient"] != 0 for snapshot in result.snapshots)
    click.echo(
        f"{verb} {used} snapshot{'s' * (used != 1)} ({result.method}, {result.parameters:,} "
        f"parameters{statistics}) -> {shlex.quote(str(result.output))}"
    )


def _print_evaluation(result: "AverageResult") -> None:
    """One row a candidate, the splits side by side."""
    splits = {e.split: e.samples for e in result.evaluation}
    cells = {(e.candidate, e.batch_norm, e.split): e for e in result.evaluation}
    columns = [f"{split} {metric}" for split in splits for metric in ("accuracy", "NLL")]
    rows = []
    for candidate, batch_norm in dict.fromkeys((c, b) for c, b, _ in cells):
        found = [cells[candidate, batch_norm, split] for split in splits]
        figures = [figure for e in found for figure in (f"{e.accuracy:.4f}", f"{e.nll:.4f}")]
        chosen = candidate == "average" and batch_norm == result.batch_norm["policy"]
        rows.append([candidate, batch_norm, *figures, "<- written" if chosen else ""])
    show.table(["candidate", "BatchNorm", *columns, ""], rows, right=columns)
    click.echo(", ".join(f"{split}: {count:,} samples" for split, count in splits.items()))


def _note_weights(result: "AverageResult") -> None:
    """Which weights were taken, where a file holds several sets."""
    first = result.snapshots[0]
    others = [name for name in first["weights_available"] if name != first["weights"]]
    if others:
        show.note(
            f"took '{first['weights']}' of each file, not '{listing(others)}' (see --weights)"
        )


def _note_skipped(result: "AverageResult", *, verbose: bool) -> None:
    plain = [s for s in result.skipped if s["reason"] == "not a checkpoint" and not verbose]
    for item in result.skipped:
        if item not in plain:
            show.note(f"skipped {item['path']}: {item['reason']}")
    if plain:
        files = (
            "1 file that is no checkpoint"
            if len(plain) == 1
            else (f"{len(plain)} files that are no checkpoints")
        )
        show.note(f"skipped {files} (ensemblekit -v average names them)")
