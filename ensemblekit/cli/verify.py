"""`ensemblekit verify`: whether an ONNX file is the model of these checkpoints."""

import json
from typing import Any

import click

from ensemblekit.cli import options, show
from ensemblekit.cli.allocator import keep_freed_memory
from ensemblekit.cli.export import SUBJECT, print_verification, subject_options


@click.command("verify")
@click.argument("file", metavar="MODEL.onnx", type=options.FILES)
@options.CHECKPOINTS
@SUBJECT
@options.option(
    "--output-kind",
    type=options.Choice(["logits", "probabilities"]),
    help="What the file gives [default: what it says].",
)
@options.option(
    "--precision",
    type=options.Choice(["fp32", "fp16", "bf16", "int8-dynamic", "int8-static"]),
    help="What the file computes in; it sets the tolerance [default: what the file says].",
)
@options.JSON
@click.pass_obj
def command(
    obj: dict[str, bool],
    /,
    file: str,
    checkpoints: tuple[str, ...],
    output_kind: str | None,
    precision: str | None,
    as_json: bool,
    **rest: Any,
) -> int:
    """Run MODEL.onnx beside the model of CHECKPOINTS in torch, and compare (exit 5: not the same).

    Which average or ensemble of CHECKPOINTS it should be, is what the file says, or what the flags
    say.
    """
    from ensemblekit.commands.verify import verify_file

    keep_freed_memory()
    model, selection, chosen = subject_options(rest, {})
    with show.own_stdout():
        result = verify_file(
            file,
            checkpoints,
            model=model,
            options=chosen,
            selection=selection,
            output_kind=output_kind,
            precision=precision,
            progress=show.progress(quiet=obj["quiet"] or as_json),
        )
    if as_json:
        click.echo(json.dumps(result.to_json()))
    else:
        if not obj["quiet"]:
            for text in result.warnings:
                show.warning(text)
        print_verification(result.verification)
        failed = result.verification["failed"]
        if failed is not None:
            click.echo(f"{failed['check']}: {failed['reason']}")
    return 0 if result.verification["passed"] else 5
