"""Owns the options that commands share, each with its environment variable.

Input: nothing; commands apply these as decorators.
"""

import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import click

from ensemblekit.errors import UsageError, did_you_mean

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

F = TypeVar("F", bound=Callable[..., Any])


class _Completed(click.types.StringParamType):
    """A text that a shell completes as the name of a file or folder; it need not exist."""

    def __init__(self, kind: str) -> None:
        self._kind = kind

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> "list[CompletionItem]":
        from click.shell_completion import CompletionItem

        return [CompletionItem(incomplete, type=self._kind)]


def numbers(text: str) -> tuple[float, ...]:
    """Numbers such as 1,1,2.

    Raises:
        UsageError: Something else.
    """
    try:
        return tuple(float(part) for part in text.replace(" ", "").split(","))
    except ValueError as error:
        raise UsageError(f"{text!r} is not a list of numbers such as 1,1,2") from error


def size(text: str) -> int:
    """Bytes of a size such as 5GB or 200MB.

    Raises:
        UsageError: Something else.

    >>> size("5GB"), size("1.5 mb"), size("1GiB"), size("1_000")
    (5000000000, 1500000, 1073741824, 1000)
    """
    form = r"\s*\+?(\d{1,30}(?:\.\d{1,9})?)\s*([kmgt]?)(i?)b?\s*"
    found = re.fullmatch(form, text.replace("_", ""), re.IGNORECASE)
    if found is None:
        raise UsageError(f"{text[:40]!r} is not a size such as 5GB or 200MB")
    number, unit, binary = found.groups()
    power = " kmgt".index(unit.lower() or " ")
    factor = (1024 if binary else 1000) ** power
    return int(float(number) * factor) if "." in number else int(number) * factor


class Choice(click.Choice):  # type: ignore[type-arg]  # generic in newer versions only
    """One of some words; a wrong one is told the nearest."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """One of the words.

        Raises:
            Refused: It is none of them.
        """
        try:
            word: str = super().convert(value, param, ctx)
        except click.BadParameter as error:
            hint = did_you_mean(str(value), self.choices)
            raise Refused(error.message, ctx, param, hint) from None
        return word


class Refused(click.BadParameter):
    """A value that an option does not take, and what to do about it."""

    def __init__(
        self,
        message: str,
        ctx: click.Context | None,
        param: click.Parameter | None,
        hint: str | None,
    ) -> None:
        super().__init__(message, ctx, param)
        self.hint = hint


class _Converted(click.ParamType):  # type: ignore[type-arg]
    """A value that one of our functions makes of the text, or refuses."""

    def __init__(self, name: str, make: Callable[[str], Any]) -> None:
        self.name = name
        self._make = make

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if isinstance(value, tuple):  # converted already, as out of the settings
            return value
        try:
            return self._make(str(value))
        except UsageError as error:
            raise Refused(error.message, ctx, param, error.hint) from error


SIZE = _Converted("size", size)
NUMBERS = _Converted("numbers", numbers)
FILES = _Completed("file")
FOLDERS = _Completed("dir")
_BY_METAVAR = {"FILE": FILES, "PATH": FILES, "TARGET": FILES, "DIR": FOLDERS}


def option(*names: str, **attributes: Any) -> Callable[[F], F]:
    """A click option that can also be set by `ENSEMBLEKIT_<NAME>`.

    Where its metavar says that it names a file, a shell completes it as one.
    """
    long = next(name for name in names if name.startswith("--")).split("/")[0]
    variable = "ENSEMBLEKIT_" + long.removeprefix("--").replace("-", "_").upper()
    if attributes.get("metavar") in _BY_METAVAR:
        attributes.setdefault("type", _BY_METAVAR[attributes["metavar"]])
    return click.option(*names, envvar=variable, **attributes)


def stack(*decorators: Callable[[F], F]) -> Callable[[F], F]:
    def apply(function: F) -> F:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return apply


CHECKPOINTS: Callable[[Any], Any] = click.argument(
    "checkpoints", nargs=-1, required=True, metavar="CHECKPOINTS...", type=FILES
)

SELECTION: Callable[[Any], Any] = stack(
    option(
        "--weights",
        default="auto",
        metavar="auto|model|ema|KEY",
        show_default=True,
        help="Which weights of a file that holds several.",
    ),
    option("--exclude", multiple=True, metavar="GLOB", help="Leave files out. Repeatable."),
    option("--last", type=int, metavar="N", help="Only the newest N."),
    option("--every", type=int, metavar="N", help="Only each N-th, counted back from the newest."),
    option("--from-step", type=float, metavar="S", help="Nothing before step (or epoch) S."),
    option("--to-step", type=float, metavar="S", help="Nothing after step (or epoch) S."),
    option("--best", type=int, metavar="N", help="Only the N best, see --by."),
    option("--by", metavar="NAME[:min|:max]", help="The metric in the files that --best goes by."),
)

PRECISION: Callable[[Any], Any] = option(
    "--precision",
    default="fp32",
    show_default=True,
    type=Choice(["fp32", "tf32", "bf16", "fp16"]),
    help="Of the forward pass.",
)

MODEL_AND_DATA: Callable[[Any], Any] = stack(
    option(
        "--model",
        metavar="TARGET",
        help="FILE.py:NAME, package.module:NAME, timm:NAME or torchvision:NAME.",
    ),
    option("--model-arg", multiple=True, metavar="K=V", help="Argument of the model. Repeatable."),
    option(
        "--train-data",
        metavar="TARGET",
        help="FILE.py:NAME, package.module:NAME or arrays.npz; "
        "BatchNorm statistics are recomputed on it.",
    ),
    option("--val-data", metavar="TARGET", help="Choices are made on it."),
    option("--test-data", metavar="TARGET", help="Final figures are reported on it."),
    option("--logits", metavar="KEY", help="Entry of a dict output that holds the logits."),
    option(
        "--device",
        default="auto",
        show_default=True,
        metavar="auto|cpu|cuda[:N]|mps",
        help="Where the model runs.",
    ),
    option(
        "--batch-size",
        type=int,
        default=128,
        show_default=True,
        metavar="N",
        help="Samples in a batch.",
    ),
    option(
        "--workers",
        type=int,
        default=0,
        show_default=True,
        metavar="N",
        help="Data-loading processes.",
    ),
    option("--limit", type=int, metavar="N", help="At most N samples of each data set."),
    option(
        "--seed",
        type=int,
        default=0,
        show_default=True,
        metavar="N",
        help="Of the order of training samples.",
    ),
)

MODEL: Callable[[Any], Any] = stack(MODEL_AND_DATA, PRECISION)

CANDIDATE: Callable[[Any], Any] = stack(
    option("--candidate", metavar="NAME", help="Take a candidate that compare measured."),
    option("--from", "source", metavar="FILE", help="The comparison.json that it stands in."),
)


def candidate(name: str | None, source: str | None) -> tuple[str, str] | None:
    """Both of `--candidate` and `--from`, or neither.

    Raises:
        UsageError: One without the other.
    """
    if (name is None) != (source is None):
        raise UsageError(
            "--candidate NAME and --from comparison.json go together",
            hint="ensemblekit compare prints the command",
        )
    return None if name is None or source is None else (name, source)


TASK: Callable[[Any], Any] = stack(
    option(
        "--task",
        default="auto",
        show_default=True,
        type=Choice(
            ["auto", "classification", "segmentation", "tokens", "multilabel", "regression"]
        ),
        help="What outputs and labels are.",
    ),
    option(
        "--ignore-index",
        type=int,
        default=-100,
        show_default=True,
        metavar="LABEL",
        help="Label of pixels or tokens that do not count.",
    ),
)

BN_SAMPLES: Callable[[Any], Any] = stack(
    option(
        "--bn-samples",
        type=int,
        default=50_000,
        show_default=True,
        metavar="N",
        help="At most N training samples for BatchNorm.",
    ),
    option(
        "--bn-layerwise",
        is_flag=True,
        help="BatchNorm statistics one layer after the other: exact, about half a pass over the "
        "data for each.",
    ),
    option(
        "--channels-last",
        is_flag=True,
        help="Recompute BatchNorm statistics with convolutions in that memory format.",
    ),
)

WRITING: Callable[[Any], Any] = stack(
    option("--force", is_flag=True, help="Replace an existing output."),
    option("--dry-run", is_flag=True, help="Say what would be done, and do nothing."),
    option("--strict", is_flag=True, help="Treat a warning as a failure (exit 5)."),
)

JSON: Callable[[Any], Any] = option(
    "--json", "as_json", is_flag=True, help="Print one JSON object."
)


def pairs(texts: tuple[str, ...]) -> Mapping[str, Any]:
    """K=V texts as a dict, values as Python literals.

    Raises:
        UsageError: A text without `=`.
    """
    from ensemblekit.targets import literal

    found: dict[str, Any] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key.isidentifier():
            raise UsageError(f"--model-arg {text}: write NAME=VALUE")
        found[key] = literal(value)
    return found
