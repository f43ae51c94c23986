"""Owns the entry point: finds the command, turns errors into text and exit codes.

Input: `sys.argv`. `--help` and `--version` import neither torch nor numpy.
"""

import contextlib
import gc
import io
import json
import os
import signal
import sys
import traceback
from importlib import import_module
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn, TextIO

import click

from ensemblekit import __version__
from ensemblekit.cli import options, settings, show
from ensemblekit.errors import EnsembleKitError, MachineError, UsageError, one_of

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

# name -> (module, what the list of commands says)
COMMANDS: dict[str, tuple[str, str]] = {
    "inspect": (
        "ensemblekit.cli.inspect",
        "Look at a folder of checkpoints: what is used, and why.",
    ),
    "average": ("ensemblekit.cli.average", "Average checkpoints into one model."),
    "compare": (
        "ensemblekit.cli.compare",
        "Compare snapshots, averages and ensembles, and decide what to ship.",
    ),
    "bench": (
        "ensemblekit.cli.bench",
        "Measure latency, throughput and memory on every runtime.",
    ),
    "export": (
        "ensemblekit.cli.export",
        "Export an average or an ensemble as one verified ONNX file.",
    ),
    "verify": ("ensemblekit.cli.verify", "Check that an ONNX file is the model of checkpoints."),
    "demo": ("ensemblekit.cli.demo", "Train a small network and try everything on its snapshots."),
    "doctor": (
        "ensemblekit.cli.doctor",
        "Show this environment, to paste into an issue, with fixes.",
    ),
}

_COMPLETE = "_ENSEMBLEKIT_COMPLETE"  # set by a shell that wants completions, or their script
_COMPLETIONS = [
    f"{shell}_{what}" for shell in ("bash", "zsh", "fish") for what in ("source", "complete")
]
_ISSUES = "https://github.com/ensemblekit/ensemblekit/issues"


class _Run:
    """What is known of the run under way.

    Attributes:
        interrupted: Ctrl-C was pressed: libraries swallow the exception, or make another one of it.
        as_json: Errors are wanted as JSON.
    """

    interrupted = False
    as_json = False

    @classmethod
    def interrupt(cls, _signal: int, _frame: FrameType | None) -> None:
        """The handler of SIGINT."""
        cls.interrupted = True
        raise KeyboardInterrupt


class _Terminated(BaseException):
    """SIGTERM or SIGHUP, on its way up through every `finally`."""

    def __init__(self, number: int) -> None:
        self.exit_code = 128 + number


class _Commands(click.Group):
    """Loads a command when it is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            if ctx.resilient_parsing:  # a shell asks for completions: it wants no error
                return None
            one_of(cmd_name, COMMANDS, what="command")
        command: click.Command = import_module(COMMANDS[cmd_name][0]).command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])

    def shell_complete(self, ctx: click.Context, incomplete: str) -> "list[CompletionItem]":
        from click.shell_completion import CompletionItem

        names = [name for name in COMMANDS if name.startswith(incomplete)]  # none is loaded
        options = click.Command.shell_complete(self, ctx, incomplete)
        return [*(CompletionItem(name, help=COMMANDS[name][1]) for name in names), *options]


def _print_version(ctx: click.Context, _: click.Parameter, value: Any) -> None:
    """Our version on a line of its own, then what else bug reports need; nothing is imported."""
    if not value or ctx.resilient_parsing:
        return
    click.echo(f"ensemblekit {__version__}")
    click.echo(f"Python {sys.version.split()[0]}")
    from ensemblekit.libraries import LIBRARIES, versions  # `--help` is quicker without

    for name, version in versions(one.name for one in LIBRARIES).items():
        click.echo(f"{name} {version}")
    ctx.exit()


@click.group(
    cls=_Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Start with: ensemblekit inspect ckpts/",
)
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_print_version,
    help="Show the version, and those of the libraries, and exit.",
)
@click.option(
    "--config",
    metavar="FILE",
    type=options.FILES,
    help="Settings file [default: ensemblekit.toml here].",
)
@click.option("-v", "--verbose", is_flag=True, help="Say more.")
@click.option("-q", "--quiet", is_flag=True, help="Print results and errors only.")
@click.pass_context
def cli(ctx: click.Context, config: str | None, verbose: bool, quiet: bool) -> None:
    """Turn the checkpoints of one training run into the model to ship."""
    ctx.obj = {"verbose": verbose, "quiet": quiet}
    ctx.default_map = settings.defaults(config, ctx.invoked_subcommand)
    own = ctx.default_map.get(ctx.invoked_subcommand or "", {})
    _Run.as_json = _Run.as_json or bool(own.get("as_json"))


def main() -> NoReturn:
    """Run the command line and leave the process with its exit code."""
    gc.set_threshold(200_000, 50, 100)  # descriptions of many tensors are no cycles to look for
    sys.exit(run(sys.argv[1:]))


def run(argv: list[str]) -> int:
    """Run one command and return its exit code; see the table in the README."""
    in_environment = os.environ.get("ENSEMBLEKIT_JSON", "0") not in ("", "0", "false")
    _Run.as_json = "--json" in argv or in_environment
    _Run.interrupted = False
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed, as by `>&-`
            setattr(sys, name, Path(os.devnull).open("w"))  # noqa: SIM115  # until we end
        stream = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper):  # names of files need not be text
            stream.reconfigure(errors="backslashreplace")
    with contextlib.suppress(ValueError):  # not in the main thread
        signal.signal(signal.SIGTERM, _terminate)
        if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # as of a job in the background
            signal.signal(signal.SIGINT, _Run.interrupt)
        hang_up = getattr(signal, "SIGHUP", None)
        if hang_up is not None and signal.getsignal(hang_up) is signal.SIG_DFL:  # no nohup
            signal.signal(hang_up, _terminate)
    try:
        if asked := os.environ.get(_COMPLETE):
            one_of(asked, _COMPLETIONS, what=_COMPLETE)
        try:
            result = cli.main(args=argv, prog_name="ensemblekit", standalone_mode=False)
        except click.exceptions.NoArgsIsHelpError as error:
            click.echo(error.format_message())
            result = 0
        sys.stdout.flush()
        return result if isinstance(result, int) else 0
    except EnsembleKitError as error:
        return _report(error)
    except click.ClickException as error:
        return _report(_from_click(error))
    except (KeyboardInterrupt, click.Abort):
        return _interrupted()
    except _Terminated as stop:
        return _stopped("terminated", stop.exit_code)
    except SystemExit as stop:  # click and rich make this of a broken pipe
        if stop.code in (0, None):
            return 0
        _silence(sys.stdout)
        return 0
    except BrokenPipeError:  # the reader has gone, as in `| head`
        _silence(sys.stdout)
        return 0
    except MemoryError:
        return _report(MachineError("out of memory", hint="try --batch-size 32"))
    except OSError as error:
        try:
            sys.stdout.flush()
        except OSError:  # it is stdout that has no room
            _silence(sys.stdout)
            _Run.as_json = False
        return _report(MachineError(str(error)))
    except Exception:  # noqa: BLE001  # the one place where our own bugs come out
        if _Run.interrupted:
            return _interrupted()
        traceback.print_exc()
        click.echo(
            f"\nThis is a bug in ensemblekit {__version__}. Please report it, with the "
            f"lines above: {_ISSUES}",
            err=True,
        )
        return 1


def _interrupted() -> int:
    return _stopped("interrupted", 130)


def _stopped(how: str, exit_code: int) -> int:
    text = f"{how}; nothing half-written is left behind"
    if not _told_as_json(how, text, None):
        _tell(text, err=True)
    return exit_code


def _report(error: EnsembleKitError) -> int:
    if _Run.interrupted:
        return _interrupted()
    if not _told_as_json(error.kind, error.message, error.hint):
        place = _rank()
        who = f"[rank {place}] " if place else ""
        _tell(who + show.styled("error: ", fg="red") + error.message, err=True)
        if error.hint:
            _tell(show.styled("hint: ", fg="cyan") + error.hint, err=True)
    return error.exit_code


def _told_as_json(kind: str, message: str, hint: str | None) -> bool:
    if not _Run.as_json or _rank() != 0:
        return False
    body = {"kind": kind, "message": message, "hint": hint}
    return _tell(json.dumps({"schema_version": 1, "error": body}))


def _rank() -> int:
    return int(os.environ.get("RANK", "0")) if "MASTER_ADDR" in os.environ else 0


def _tell(text: str, *, err: bool = False) -> bool:
    """Print, if that can be done: the disk behind the stream may be full, the terminal gone."""
    stream = sys.stderr if err else sys.stdout
    try:
        click.echo(text, err=err)
        stream.flush()
    except OSError:
        _silence(stream)
        return False
    return True


def _silence(stream: TextIO) -> None:
    """Let what the stream still holds go nowhere, instead of failing once more at the end."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _from_click(error: click.ClickException) -> EnsembleKitError:
    context = getattr(error, "ctx", None)
    path = context.command_path if context is not None else "ensemblekit"
    before = {name for parameter in cli.params for name in parameter.opts}
    if isinstance(error, click.NoSuchOption) and error.option_name in before:
        name = path.removeprefix("ensemblekit ")
        return UsageError(
            f"{error.option_name} stands before the command",
            hint=f"ensemblekit {error.option_name} {name} ...",
        )
    parameter, hint = getattr(error, "param", None), getattr(error, "hint", None)
    if context is not None and parameter is not None and parameter.name is not None:
        source = context.get_parameter_source(parameter.name)
        if source is click.core.ParameterSource.ENVIRONMENT:
            text = f"{parameter.envvar}: {error.message}"
            where = "a variable of the environment; unset it, or mend it"
            return UsageError(text, hint=f"{hint} It is {where}" if hint else where)
    return UsageError(error.format_message(), hint=hint or f"see: {path} --help")


def _terminate(number: int, _: FrameType | None) -> Any:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch would report its loaders' end as an error
    raise _Terminated(number)
