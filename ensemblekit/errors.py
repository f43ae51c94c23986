"""Owns the exception tree: every mistake that is not ours has a class, an exit code and a way out.

Input: nothing. Each module raises these; only `cli/` turns them into text and exit codes.
"""

import difflib
from collections.abc import Iterable

_LONGEST = 4000


class EnsembleKitError(Exception):
    """Base of every error that a user can cause or must act on.

    Args:
        message: What failed, in which file and key, what was expected and what was found.
        hint: What to do or type next.
    """

    exit_code = 3
    kind = "bad-input"

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        self.message = printable(message)
        self.hint = None if hint is None else printable(hint)
        super().__init__(self.message)


class UsageError(EnsembleKitError):
    """Flags, targets or settings are wrong, or the output exists already."""

    exit_code = 2
    kind = "usage"


class InputError(EnsembleKitError):
    """A checkpoint, a data set or a model cannot be used."""


class DamagedError(InputError):
    """The bytes do not form what the format promises: truncated, overwritten, forged."""

    kind = "damaged"


class HostileError(InputError):
    """A file would run code in a reader that trusts it. Nothing of it has run here."""

    kind = "hostile"


class UnsupportedError(InputError):
    """The file is sound, but its content has no meaningful average or is of no known format."""

    kind = "unsupported"


class IncompatibleError(InputError):
    """Things that are each sound do not fit together: keys, shapes, dtypes, model, data."""

    kind = "incompatible"


class NotFiniteError(InputError):
    """NaN or Inf where numbers were expected."""

    kind = "not-finite"


class UserCodeError(InputError):
    """The user's own target raised; `traceback` is theirs."""

    kind = "user-code"

    def __init__(self, message: str, *, traceback: str, hint: str | None = None) -> None:
        super().__init__(f"{message}\n{traceback.rstrip()}", hint=hint)


class MachineError(EnsembleKitError):
    """The machine said no: disk full, permission, memory, device or provider missing."""

    exit_code = 4
    kind = "machine"


class CheckFailedError(EnsembleKitError):
    """A check that the user asked for said no."""

    exit_code = 5
    kind = "check-failed"


def printable(text: str) -> str:
    r"""`text` fit for a terminal: names out of files may hold escape sequences, or be endless.

    >>> printable("key \x1b[2J")
    'key \\x1b[2J'
    """
    shown = "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text[:_LONGEST])
    return shown if len(text) <= _LONGEST else f"{shown} ... ({len(text) - _LONGEST} more)"


def one_of(name: str, valid: Iterable[str], *, what: str) -> str:
    """Return `name` if it is among `valid`, else raise naming the valid ones and the nearest.

    Raises:
        UsageError: `name` is not among `valid`.

    >>> one_of("unform", ["uniform", "weighted"], what="method")
    Traceback (most recent call last):
    ensemblekit.errors.UsageError: unknown method 'unform'; valid: uniform, weighted
    """
    names = list(valid)
    if name in names:
        return name
    hint = did_you_mean(name, names)
    raise UsageError(f"unknown {what} '{name}'; valid: {', '.join(names)}", hint=hint)


def did_you_mean(name: str, valid: Iterable[str]) -> str | None:
    """A question after the nearest of `valid`, None where none is near.

    >>> did_you_mean("averge", ["auto", "average"]), did_you_mean("gpu", ["cpu", "cuda"])
    ("did you mean 'average'?", None)
    """
    near = difflib.get_close_matches(name, list(valid), n=1, cutoff=0.67)  # not cpu for gpu
    return f"did you mean '{near[0]}'?" if near else None


def listing(names: Iterable[str], *, limit: int = 5) -> str:
    """The first `limit` of `names`, and how many more there are, on one line.

    >>> listing(["a", "b", "c"], limit=2)
    'a, b and 1 more'
    """
    items = [name if len(name) <= 200 else f"{name[:200]}..." for name in names]
    shown = ", ".join(items[:limit])
    return f"{shown} and {len(items) - limit} more" if len(items) > limit else shown
