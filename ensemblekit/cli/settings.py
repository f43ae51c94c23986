"""Owns settings files: `ensemblekit.toml`, or `[tool.ensemblekit]` of `pyproject.toml`.

Input: the working directory. A settings file names targets, which are code, so one that lies
beside the checkpoints is never read.
"""

from importlib import import_module
from pathlib import Path
from typing import Any

import click

from ensemblekit.errors import UsageError, one_of


def defaults(config: str | None, command: str | None) -> dict[str, dict[str, Any]]:
    """Values for click's `default_map`.

    Keys at the top hold for every command that has such an option, those in a table of a
    command's name for that command alone.

    Raises:
        UsageError: No such file, not TOML, or a key that is no option.
    """
    path, table = _read(config)
    if command is None or not table:
        return {}
    from ensemblekit.cli.main import COMMANDS

    known = {name: _options(name) for name in COMMANDS}
    everywhere = {key for options in known.values() for key in options}
    own = known.get(command, {})
    found: dict[str, Any] = {}
    for key, value in table.items():
        if key in COMMANDS and isinstance(value, dict):
            for inner in value:
                one_of(inner, sorted(known[key]), what=f"setting in [{key}] of {path}")
        else:
            one_of(key, sorted(everywhere), what=f"setting in {path}")
            if key in own:
                found[own[key].name or key] = _checked(own[key], value, f"{path}: {key}")
    for key, value in table.get(command, {}).items():
        found[own[key].name or key] = _checked(own[key], value, f"{path}: [{command}] {key}")
    return {command: found}


def _read(config: str | None) -> tuple[Path, dict[str, Any]]:
    if config is not None and not Path(config).is_file():
        raise UsageError(f"--config {config}: there is no such file")
    path = Path(config or "ensemblekit.toml")
    if path.is_file():
        return path, _toml(path)
    path = Path("pyproject.toml")
    if not path.is_file():
        return path, {}
    tool = _toml(path).get("tool", {})
    table = tool.get("ensemblekit", {}) if isinstance(tool, dict) else {}
    if not isinstance(table, dict):
        raise UsageError(f"{path}: [tool.ensemblekit] is no table")
    return path, table


def _toml(path: Path) -> dict[str, Any]:
    import tomllib  # only when there is a file: `--help` is quick

    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: is not TOML ({error})") from error


def _options(command: str) -> dict[str, click.Option]:
    """The command's options by their long names, without dashes."""
    from ensemblekit.cli.main import COMMANDS

    parameters = import_module(COMMANDS[command][0]).command.params
    found = {}
    for parameter in parameters:
        if isinstance(parameter, click.Option):
            names = [name for name in parameter.opts if name.startswith("--")]
            found[names[0].removeprefix("--")] = parameter
    return found


def _checked(option: click.Option, value: Any, where: str) -> Any:
    """The value, if it is of the kind that the option takes.

    A table such as `model-arg = {width = 16}` is a list of K=V.
    """
    if option.multiple:
        if isinstance(value, dict):
            value = [f"{key}={inner}" for key, inner in value.items()]
        values = value if isinstance(value, list) else [value]
        if all(isinstance(item, str | int | float) for item in values):
            return [str(item) for item in values]
        raise UsageError(f"{where} = {value!r}: expected a text or a list of texts")
    kinds: Any = bool if option.is_flag else str | int | float
    if not isinstance(value, kinds) or (isinstance(value, bool) and not option.is_flag):
        raise UsageError(
            f"{where} = {value!r}: expected {'true or false' if option.is_flag else 'a text or a number'}"
        )
    if isinstance(option.type, click.types.IntParamType) and isinstance(value, float):
        raise UsageError(f"{where} = {value!r}: expected a whole number")
    try:
        return option.type.convert(value, None, None)
    except click.BadParameter as error:
        hint = getattr(error, "hint", None)
        raise UsageError(f"{where} = {value!r}: {error.message}", hint=hint) from error
