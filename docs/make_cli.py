"""Owns docs/cli.md: the reference of the command line, written from the code.

Input: the commands themselves. Run it: python docs/make_cli.py
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import click

from ensemblekit.cli.main import COMMANDS, cli

FILE = Path(__file__).with_name("cli.md")
HEAD = """# Command line

Written from the code by `make docs`; a test fails when it is out of date. What each command is for,
with examples: [docs/commands/](commands/).

Settings are taken from the command line, else from the environment variable in the last column, else
from `ensemblekit.toml` (or `[tool.ensemblekit]` of `pyproject.toml`) in the working directory, under
the long name without dashes: `batch-size = 64` for all commands, in a table such as `[compare]` for
one. Exit codes: [README](../README.md#exit-codes).
"""


def reference() -> str:
    """The whole file."""
    general = [
        "## ensemblekit",
        "`ensemblekit [OPTIONS] COMMAND ...`",
        table(cli),
        "| command | what it does |\n|---|---|\n"
        + "\n".join(
            f"| [`{name}`](#ensemblekit-{name}) ([examples](commands/{name}.md)) | {text} |"
            for name, (_, text) in COMMANDS.items()
        ),
    ]
    parts = [HEAD.rstrip(), *general]
    for name, (module, _) in COMMANDS.items():
        parts += section(name, import_module(module).command)
    return "\n\n".join(parts) + "\n"


def section(name: str, command: click.Command) -> list[str]:
    """One command: how it is called, what its help says, its options."""
    arguments = [p.make_metavar(click.Context(command)) for p in command.params if is_argument(p)]
    usage = " ".join(["ensemblekit", name, "[OPTIONS]", *arguments])
    paragraphs = (command.help or "").split("\n\n")
    texts = [" ".join(text.split()) for text in paragraphs]
    return [f"## ensemblekit {name}", f"`{usage}`", *texts, table(command)]


def is_argument(parameter: click.Parameter) -> bool:
    """Whether a parameter is no option."""
    return isinstance(parameter, click.Argument)


def table(command: click.Command) -> str:
    """The options of a command."""
    lines = ["| option | what | default | variable |", "|---|---|---|---|"]
    for option in command.params:
        if isinstance(option, click.Option):
            cells = (names(option), meaning(option), default(option), variable(option))
            lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(lines)


def names(option: click.Option) -> str:
    """As typed, with what it takes."""
    typed = ", ".join(sorted((*option.opts, *option.secondary_opts), key=len))
    if option.is_flag:
        return f"`{typed}`"
    taken = option.metavar
    if taken is None and isinstance(option.type, click.Choice):
        taken = "|".join(map(str, option.type.choices))
    return f"`{typed} {taken or option.type.name.upper()}`"


def meaning(option: click.Option) -> str:
    """The help, without the default that it may end in."""
    return split_help(option)[0]


def default(option: click.Option) -> str:
    """What holds where the option is not given."""
    if option.show_default:
        return f"`{option.default}`"
    return split_help(option)[1]


def variable(option: click.Option) -> str:
    """The environment variable."""
    return f"`{option.envvar}`" if option.envvar else ""


def split_help(option: click.Option) -> tuple[str, str]:
    """Help such as `Sizes [default: all].` in two."""
    text, found, rest = (option.help or "").partition(" [default: ")
    stated, _, more = rest.partition("]")
    return (text + more if found else text), stated


if __name__ == "__main__":
    FILE.write_text(reference(), encoding="utf-8")
