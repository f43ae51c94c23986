"""`ensemblekit inspect`: the audit of a folder."""

import json
from typing import Any

import click

from ensemblekit.cli import options, show

_COLUMNS = (
    *("checkpoint", "step", "epoch", "lr", "metrics", "weights", "tensors", "parameters"),
    "status",
)
_NUMBERS = ("step", "epoch", "lr", "tensors", "parameters")
_DISTANCES = ("checkpoint", "to previous", "cosine to previous", "to mean")


@click.command("inspect")
@options.CHECKPOINTS
@options.SELECTION
@options.option("--deep", is_flag=True, help="Read everything: digests, checksums, NaN.")
@options.option(
    "--distances", is_flag=True, help="Distances and cosines between snapshots and to their mean."
)
@options.JSON
@click.pass_obj
def command(
    obj: dict[str, bool],
    /,
    checkpoints: tuple[str, ...],
    deep: bool,
    distances: bool,
    as_json: bool,
    **selecting: Any,
) -> int:
    """Show what CHECKPOINTS hold: order, learning rate, metrics, what is used and why not.

    CHECKPOINTS are files, folders and globs. Nothing in them is executed.
    """
    from ensemblekit.commands.audit import audit
    from ensemblekit.selection import Selection

    report = audit(checkpoints, Selection(**selecting), deep=deep, with_distances=distances)
    failed = report.errors[0] if report.errors else None
    if as_json:
        body = report.to_json()
        if failed:
            body["error"] = {"kind": failed.kind, "message": failed.message, "hint": failed.hint}
        click.echo(json.dumps(body))
        return failed.exit_code if failed else 0
    described = [row for row in report.snapshots if row["format"]]
    show.table(_COLUMNS, [_cells(row) for row in described], right=_NUMBERS)
    if any("to_mean" in row for row in described):
        show.table(_DISTANCES, [_distances(row) for row in described], right=_DISTANCES[1:])
    used = sum(row["status"] == "used" for row in described)
    others = len(report.snapshots) - len(described)
    click.echo(
        f"{used} snapshots, ordered by {report.ordered_by}"
        + (f"; {others} other files" if others else "")
    )
    failures = [error.message for error in report.errors]
    for text in report.problems:
        (show.error if text in failures else show.warning)(text)
    if failed and failed.hint:
        show.note(f"hint: {failed.hint}")
    return failed.exit_code if failed else 0


def _cells(row: dict[str, Any]) -> list[object]:
    metrics = " ".join(f"{name}={value:.4g}" for name, value in list(row["metrics"].items())[:3])
    weights = row["weights"]
    others = [name for name in row["weights_available"] if name != weights]
    reason = f" ({row['reason']})" if row["reason"] else ""
    return [
        row["path"],
        show.number(row["step"]),
        show.number(row["epoch"]),
        show.number(row["lr"]),
        metrics,
        weights + (f" (not {', '.join(others)})" if others else ""),
        row["tensors"],
        f"{row['parameters']:,}",
        row["status"] + reason,
    ]


def _distances(row: dict[str, Any]) -> list[object]:
    figures = (row.get(k) for k in ("to_previous", "cosine_to_previous", "to_mean"))
    return [row["path"], *("" if value is None else f"{value:.4g}" for value in figures)]
