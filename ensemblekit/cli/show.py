"""Owns how results look in a terminal: tables, notes, progress.

Input: plain values. Data goes to stdout, everything else to stderr; no bars and no colour where
there is no terminal.
"""

import contextlib
import ctypes
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence

import click


def table(
    columns: Sequence[str], rows: Iterable[Sequence[object]], *, right: Sequence[str] = ()
) -> None:
    """Print a table; `right` names the columns that hold numbers."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from ensemblekit.errors import printable

    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    for column in columns:
        numbers = column in right
        shown.add_column(column, justify="right" if numbers else "left", no_wrap=numbers)
    for row in rows:
        shown.add_row(*(Text("" if cell is None else printable(str(cell))) for cell in row))
    width = None if sys.stdout.isatty() else 4096  # cut to no width but a terminal's
    Console(file=sys.stdout, width=width, highlight=False).print(shown)


def warning(text: str) -> None:
    """A warning on stderr."""
    click.echo(styled("warning: ", fg="yellow") + text, err=True)


def error(text: str) -> None:
    """An error on stderr."""
    click.echo(styled("error: ", fg="red") + text, err=True)


def styled(text: str, *, fg: str) -> str:
    """Bold and coloured, unless NO_COLOR (https://no-color.org) is set."""
    return text if os.environ.get("NO_COLOR") else click.style(text, fg=fg, bold=True)


def note(text: str) -> None:
    """A remark on stderr."""
    click.echo(text, err=True)


def progress(*, quiet: bool) -> Callable[[str, int, int | None], None] | None:
    """A reporter of progress: one line that is rewritten, only where stderr is a terminal."""
    if quiet or not sys.stderr.isatty():
        return None

    def report(what: str, done: int, total: int | None) -> None:
        part = f"{done:,} of {total:,} samples" if total else f"{done:,} samples" if done else ""
        click.echo(f"\r\x1b[2K{what} {part}\r", err=True, nl=False)

    return report


def number(value: float | None) -> str:
    """A step, epoch or rate as people write it."""
    if value is None:
        return ""
    return f"{value:g}" if abs(value) < 1e6 else f"{value:,.0f}"


@contextlib.contextmanager
def own_stdout() -> Iterator[None]:
    """What the user's code prints goes to stderr: stdout is for our data.

    What C libraries and other processes print goes by the descriptor.
    """
    try:
        sys.stdout.flush()
        ours = sys.stdout.fileno() == 1
        other = sys.stderr.fileno()
    except (OSError, ValueError):  # other streams, as in a notebook
        ours = False
    if not ours:
        with contextlib.redirect_stdout(sys.stderr):
            yield
        return
    shown, kept = sys.stdout, os.dup(1)
    os.dup2(other, 1)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        shown.flush()  # what others hold of it is theirs
        with contextlib.suppress(AttributeError, OSError, TypeError):  # no C library to ask
            ctypes.CDLL(None).fflush(None)
        os.dup2(kept, 1)
        os.close(kept)
