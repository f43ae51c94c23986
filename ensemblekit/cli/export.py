"""`ensemblekit export`: one candidate as a verified ONNX file."""

import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ensemblekit.cli import options, show
from ensemblekit.cli.allocator import keep_freed_memory
from ensemblekit.errors import UsageError

if TYPE_CHECKING:
    from ensemblekit.commands.export import ExportResult
    from ensemblekit.commands.subject import ExportOptions
    from ensemblekit.options import ModelOptions
    from ensemblekit.selection import Selection

_SELECTION = ("weights", "exclude", "last", "every", "from_step", "to_step", "best", "by")
_KINDS = ("fp32", "fp16", "bf16", "int8-dynamic", "int8-static")

SUBJECT: Callable[[Any], Any] = options.stack(
    options.CANDIDATE,
    options.option("--ensemble", is_flag=True, help="All checkpoints as one ensemble."),
    options.option(
        "--combiner",
        default="mean",
        show_default=True,
        metavar="NAME",
        help="Of --ensemble: mean (of probabilities), mean-logits or vote.",
    ),
    options.option(
        "--coefficients",
        type=options.NUMBERS,
        metavar="C1,C2,...",
        help="One average with these weights, oldest first [default: equal ones].",
    ),
    options.SELECTION,
    options.MODEL_AND_DATA,
    options.TASK,
    options.option(
        "--bn",
        default="auto",
        show_default=True,
        type=options.Choice(["auto", "recompute", "average", "error"]),
        help="BatchNorm statistics of an average.",
    ),
    options.BN_SAMPLES,
    options.option(
        "--input",
        "inputs",
        multiple=True,
        metavar="NAME:TYPE[SIZES]",
        help="An input, as in 'image:float32[batch,3,32,32]'; open sizes are words, word=N gives "
        "generated samples a size [default: from the data]. Repeatable.",
    ),
    options.option(
        "--provider",
        default="cpu",
        show_default=True,
        type=options.Choice(["cpu", "cuda", "tensorrt"]),
        help="Of ONNX Runtime, to verify and measure on.",
    ),
)


@click.command("export")
@options.CHECKPOINTS
@options.option(
    "-o",
    "--output",
    default="model.onnx",
    show_default=True,
    metavar="FILE",
    help="The file to write.",
)
@SUBJECT
@options.option(
    "--output-kind",
    default="logits",
    show_default=True,
    type=options.Choice(["logits", "probabilities"]),
    help="What the file gives.",
)
@options.option(
    "--precision",
    default="fp32",
    show_default=True,
    type=options.Choice(_KINDS),
    help="What the file computes in; int8-static needs --train-data.",
)
@options.option(
    "--fuse",
    default="auto",
    show_default=True,
    type=options.Choice(["auto", "on", "off"]),
    help="Run the members of an ensemble as one operator: where measured to be faster, always, never.",
)
@options.option(
    "--exporter",
    default="auto",
    show_default=True,
    type=options.Choice(["auto", "dynamo", "torchscript"]),
    help="Of torch; auto tries both in this order.",
)
@options.option(
    "--opset",
    type=int,
    default=20,
    show_default=True,
    metavar="N",
    help="Operator set, 18 to 23; 20 is what torch writes without conversion.",
)
@options.option(
    "--class-names", metavar="FILE", help="One class a line, or a JSON list; kept in the file."
)
@options.option(
    "--meta",
    multiple=True,
    metavar="K=V",
    help="A fact to keep in the file, as mean=0.5. Repeatable.",
)
@options.option("--triton", metavar="DIR", help="Also write a Triton model repository.")
@options.option("--keep-failed", is_flag=True, help="Keep a file that fails as NAME.failed.onnx.")
@options.WRITING
@options.JSON
@click.pass_obj
def command(
    obj: dict[str, bool],
    /,
    checkpoints: tuple[str, ...],
    output: str,
    force: bool,
    dry_run: bool,
    strict: bool,
    as_json: bool,
    class_names: str | None,
    meta: tuple[str, ...],
    **rest: Any,
) -> int:
    """Export the average, the ensemble or a measured candidate of CHECKPOINTS as one ONNX file.

    The file is run beside the model in torch, on --val-data where given, before it appears. Several
    checkpoints are averaged, unless --ensemble or --candidate says otherwise.
    """
    from ensemblekit.commands.export import export

    keep_freed_memory()
    own = {
        name: rest.pop(name)
        for name in ("output_kind", "precision", "fuse", "exporter", "opset", "triton")
    }
    own |= {"keep_failed": rest.pop("keep_failed"), "metadata": _facts(meta, class_names)}
    model, selection, chosen = subject_options(rest, own)
    with show.own_stdout():
        result = export(
            checkpoints,
            output,
            model=model,
            options=chosen,
            selection=selection,
            force=force,
            dry_run=dry_run,
            strict=strict,
            command=["ensemblekit", *sys.argv[1:]],
            progress=show.progress(quiet=obj["quiet"] or as_json),
        )
    if as_json:
        click.echo(json.dumps(result.to_json()))
    else:
        _print(result, dry_run=dry_run, quiet=obj["quiet"])
    return 0


def subject_options(
    rest: dict[str, Any], own: dict[str, Any]
) -> "tuple[ModelOptions, Selection, ExportOptions]":
    """What `SUBJECT` collected, as the commands take it."""
    from ensemblekit.commands.subject import ExportOptions
    from ensemblekit.options import ModelOptions
    from ensemblekit.selection import Selection

    selection = Selection(**{name: rest.pop(name) for name in _SELECTION})
    coefficients = rest.pop("coefficients")
    chosen = ExportOptions(
        candidate=options.candidate(rest.pop("candidate"), rest.pop("source")),
        coefficients=coefficients,
        **{name: rest.pop(name) for name in ("ensemble", "combiner", "bn", "inputs", "provider")},
        **own,
    )
    model_arg = rest.pop("model_arg")
    model = ModelOptions(model_args=options.pairs(model_arg) if model_arg else {}, **rest)
    return model, selection, chosen


def _facts(meta: tuple[str, ...], class_names: str | None) -> dict[str, str]:
    """What the user wants to find in the file again."""
    found = {}
    for text in meta:
        key, equals, value = text.partition("=")
        if not equals or not key or key == "ensemblekit":
            raise UsageError(f"--meta {text}: write NAME=VALUE")
        found[key] = value
    if class_names is not None:
        path = Path(class_names)
        if not path.is_file():
            raise UsageError(f"--class-names {path}: there is no such file")
        try:
            text = path.read_text(encoding="utf-8")
        except ValueError as error:
            raise UsageError(f"--class-names {path}: it is no UTF-8 text") from error
        try:
            names = json.loads(text)
        except ValueError:
            names = text.splitlines()
        if not isinstance(names, list) or not all(isinstance(n, str) for n in names):
            raise UsageError(f"--class-names {path}: expected one class a line, or a JSON list")
        found["class_names"] = json.dumps(names)
    return found


def _print(result: "ExportResult", *, dry_run: bool, quiet: bool) -> None:
    if not quiet:
        for text in result.warnings:
            show.warning(text)
    print_verification(result.verification)
    if len(result.latency) > 1:
        shown = ", ".join(
            f"{_name(one)} {one['p50_ms']:.3g} ms" for one in result.latency if one["p50_ms"]
        )
        click.echo(
            f"chosen by latency of the fp32 graph at batch 1 ({result.latency[0]['provider']}): {shown}"
        )
    members = len(result.candidate["rows"])
    what = (
        f"ensemble of {members} ({result.candidate['combiner']})"
        if members > 1
        else result.candidate["name"]
    )
    verb = "would export" if dry_run else "up to date:" if result.up_to_date else "exported"
    target = "" if result.output is None else f" -> {shlex.quote(result.output)}"
    beside = "" if result.external_data is None else f" and {result.external_data}"
    click.echo(
        f"{verb} {what} ({result.precision}, {result.nodes} nodes, {result.bytes / 1e6:.2f} MB, "
        f"opset {result.opset}, by {result.exporter}){target}{beside}"
    )
    if result.triton is not None:
        click.echo(f"Triton model: {result.triton}")


def _name(one: dict[str, Any]) -> str:
    words = [word for word in ("folded", "fused") if one[word]]
    return " and ".join(words) if words else "plain"


def print_verification(found: dict[str, Any]) -> None:
    """What the checks found, in two lines."""
    if found["max_abs_diff"] is None:
        return
    kind = "samples" if found["real"] else "generated samples"
    sizes = ", ".join(map(str, found["batch_sizes"]))
    text = (
        f"{'verified' if found['passed'] else 'NOT the same model'} on {found['provider']}: "
        f"{found['samples']:,} {kind} in batches of {sizes}: largest difference "
        f"{found['max_abs_diff']:.2g} ({found['max_rel_diff']:.1e} of the largest output)"
    )
    if found["decision_flips"] is not None:
        text += f", {found['decision_flips']} decisions differ"
        text += f" ({found['ties']} ties left out)" if found.get("ties") else ""
    click.echo(text)
    if found["metric"] is not None:
        click.echo(
            f"{found['metric']}: {found['metric_torch']:.4f} in torch, "
            f"{found['metric_onnx']:.4f} in ONNX Runtime"
        )
