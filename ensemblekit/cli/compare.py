"""`ensemblekit compare`: every candidate on one table, and what to ship."""

import json
import math
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ensemblekit.cli import options, show
from ensemblekit.cli.allocator import keep_freed_memory

if TYPE_CHECKING:
    from ensemblekit.commands.compare import CompareResult

_SELECTION = ("weights", "exclude", "last", "every", "from_step", "to_step", "best", "by")
_BUDGET = ("max_latency_ms", "latency_batch", "max_members", "max_bytes", "margin", "runtime")


@click.command("compare")
@options.CHECKPOINTS
@options.option(
    "-o",
    "--output",
    default="comparison",
    show_default=True,
    metavar="DIR",
    help="Folder of the reports.",
)
@options.option(
    "--candidates",
    metavar="LIST",
    help="Groups (singles, singles-bn, averages, soups, swag, ensembles, combiners) and names or "
    "globs of candidates [default: all].",
)
@options.option(
    "--add",
    "added",
    multiple=True,
    metavar="NAME=C1,C2,...",
    help="A further weight average, one coefficient a snapshot. Repeatable.",
)
@options.SELECTION
@options.MODEL
@options.TASK
@options.option(
    "--metric",
    metavar="NAME|TARGET",
    help="What choices and gains go by (accuracy, nll, ...), or FILE.py:FUNCTION to report beside.",
)
@options.BN_SAMPLES
@options.option("--max-latency-ms", type=float, metavar="MS", help="Budget at p95.")
@options.option(
    "--latency-batch",
    type=int,
    default=1,
    show_default=True,
    metavar="N",
    help="Samples in a batch of that budget.",
)
@options.option("--max-members", type=int, metavar="M", help="Budget: models that run.")
@options.option(
    "--max-bytes", type=options.SIZE, metavar="SIZE", help="Budget: bytes of weights, as 200MB."
)
@options.option(
    "--runtime",
    default="torch",
    show_default=True,
    type=options.Choice(["torch"]),
    help="Where latency is measured.",
)
@options.option(
    "--margin",
    type=float,
    default=0.2,
    show_default=True,
    metavar="PP",
    help="What something cheaper may lose against the best: percentage points of a share, per "
    "cent of other figures.",
)
@options.option("--require-gain", is_flag=True, help="Exit 5 when no gain is sure.")
@options.option(
    "--cache-dir",
    metavar="DIR",
    help="Where predictions are kept between runs [default: ~/.cache/ensemblekit].",
)
@options.option(
    "--cache-size",
    type=float,
    default=20.0,
    show_default=True,
    metavar="GB",
    help="How large that may grow; 0 keeps nothing.",
)
@options.WRITING
@options.JSON
@click.pass_obj
def command(
    obj: dict[str, bool],
    /,
    checkpoints: tuple[str, ...],
    output: str,
    candidates: str | None,
    added: tuple[str, ...],
    metric: str | None,
    require_gain: bool,
    cache_dir: str | None,
    cache_size: float,
    force: bool,
    dry_run: bool,
    strict: bool,
    as_json: bool,
    model_arg: tuple[str, ...],
    **rest: Any,
) -> int:
    """Compare single snapshots, weight averages and prediction ensembles of CHECKPOINTS.

    All are measured on the same data. Choices are made on --val-data, the figures are those of
    --test-data; one labelled set is cut in two. Ends with what to ship, and why.
    """
    from ensemblekit.commands.compare import ComparedButFailedError, CompareOptions, compare
    from ensemblekit.decision import Budget
    from ensemblekit.options import ModelOptions
    from ensemblekit.selection import Selection

    keep_freed_memory()
    selecting = {name: rest.pop(name) for name in _SELECTION}
    budget = Budget(**{name: rest.pop(name) for name in _BUDGET})
    failed = None
    try:
        with show.own_stdout():
            result = compare(
                checkpoints,
                output,
                model=ModelOptions(
                    model_args=options.pairs(model_arg) if model_arg else {}, **rest
                ),
                options=CompareOptions(
                    candidates=candidates,
                    added=tuple(_added(text) for text in added),
                    metric=metric,
                    budget=budget,
                    require_gain=require_gain,
                    cache_dir=None if cache_dir is None else Path(cache_dir),
                    cache_bytes=round(cache_size * 1e9) if math.isfinite(cache_size) else -1,
                ),
                selection=Selection(**selecting),
                force=force,
                dry_run=dry_run,
                strict=strict,
                command=["ensemblekit", *sys.argv[1:]],
                progress=show.progress(quiet=obj["quiet"] or as_json),
                announce=None if obj["quiet"] else show.note,
            )
    except ComparedButFailedError as error:  # the figures are shown all the same
        result, failed = error.result, error
    if result is None:  # another process of a torchrun
        return 0
    if as_json and failed is None:
        click.echo(json.dumps(result.comparison))
    elif not as_json and not dry_run:
        _print(result, quiet=obj["quiet"], verbose=obj["verbose"])
    if failed is not None:
        raise failed
    return 0


def _added(text: str) -> tuple[str, tuple[float, ...]]:
    name, equals, numbers = text.partition("=")
    if not equals or not name:
        raise click.BadParameter(f"--add {text}: write NAME=C1,C2,...")
    return name, options.numbers(numbers)


def _print(result: "CompareResult", *, quiet: bool, verbose: bool) -> None:
    comparison = result.comparison
    _print_table(comparison, everything=verbose)
    if not quiet:
        for text in comparison["warnings"]:
            show.warning(text)
    decision = comparison["decision"]
    click.echo(show.styled(decision["headline"], fg="green"))
    for text in decision["because"]:
        click.echo(f"- {text}")
    if decision["next"]:
        click.echo(f"\nnext: {decision['next']}")
    if result.output is not None:
        verb = "up to date" if result.up_to_date else "report"
        click.echo(f"{verb}: {shlex.quote(str(result.output / 'report.html'))}")


def _print_table(comparison: dict[str, Any], *, everything: bool) -> None:
    """The candidates that matter; all of them with -v."""
    metric, unit = comparison["metric"]["name"], comparison["metric"]["unit"]
    rows = comparison["candidates"]
    shown = rows if everything else _essential(comparison)
    chosen, reported = (comparison["data"][k]["split"] for k in ("choosing", "reporting"))
    has_nll = metric != "nll" and any("nll" in row["evaluation"] for row in rows)
    columns = [f"{chosen} {metric}", f"{reported} {metric}"]
    columns += [f"{reported} NLL"] if has_nll else []
    limited = comparison["decision"]["budget"]["max_latency_ms"] is not None
    time = "p95" if limited else "p50"  # what the limit is about
    columns += ["gain (95%)", "members", f"{time} ms"]
    cells = []
    for row in shown:
        figures = [e.get(metric) for e in row["evaluations"]]
        figures += [row["evaluation"].get("nll")] if has_nll else []
        cells.append(
            [
                row["name"],
                *("" if figure is None else f"{figure:.4f}" for figure in figures),
                _gain(row["gain"], unit),
                row["members"],
                "" if row["latency"] is None else f"{row['latency'][f'{time}_ms']:.2f}",
                _mark(row, comparison),
            ]
        )
    show.table(["candidate", *columns, ""], cells, right=columns)
    sizes = ", ".join(
        f"{comparison['data'][k]['split']}: {comparison['data'][k]['samples']:,} samples"
        for k in ("choosing", "reporting")
    )
    left = len(rows) - len(shown)
    click.echo(sizes + (f"; {left} more candidates in the report (or -v)" if left else ""))


def _gain(gain: dict[str, Any] | None, unit: str) -> str:
    if gain is None:
        return ""
    low, high = gain["ci"]
    if unit == "pp":
        return f"{gain['value'] * 100:+.2f} ({low * 100:+.2f} to {high * 100:+.2f}) pp"
    return f"{gain['value']:+.3g} ({low:+.3g} to {high:+.3g})"


def _mark(row: dict[str, Any], comparison: dict[str, Any]) -> str:
    marks = []
    if row["name"] == comparison["decision"]["ship"]:
        marks.append("<- ship")
    if row["name"] == comparison["baseline"]:
        marks.append("baseline")
    if not row.get("within_budget", True):  # reports of earlier versions do not say
        marks.append("over budget")
    return ", ".join(marks)


def _essential(comparison: dict[str, Any]) -> list[dict[str, Any]]:
    """The first of each family, and whatever the decision speaks of."""
    named = {comparison["baseline"], comparison["decision"]["ship"], comparison["decision"]["best"]}
    named |= {"uniform", "uniform+bn", "ensemble", "greedy-soup", "greedy-soup+bn"}
    families: set[str] = set()
    found = []
    for row in comparison["candidates"]:
        family = _family(row)
        if row["name"] in named or family not in families:
            found.append(row)
        families.add(family)
    return found


def _family(row: dict[str, Any]) -> str:
    """Names without their numbers: last-3 and last-5 are one family."""
    if row["kind"] == "single" and row["chosen_on"] is None:
        return f"single {row['batch_norm']['policy']}"
    return "".join(c for c in row["name"] if not c.isdigit())
