"""Owns settings files: `ensemblekit.toml`, or `[tool.ensemblekit]` of `pyproject.toml`.

Input: the working directory. A settings file names targets, which are code, so one that lies
beside the checkpoints is never read.
"""

from importlib import import_module
from pathlib import Path
from typing import Any

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
    everywhere = set().union(*known.values())
    found: dict[str, Any] = {}
    for key, value in table.items():
        if key in COMMANDS and isinstance(value, dict):
            for inner in value:
                one_of(inner, sorted(known[key]), what=f"setting in [{key}] of {path}")
        else:
            one_of(key, sorted(everywhere), what=f"setting in {path}")
            if command in known and key in known[command]:
                found[_parameter(key)] = _plain(value)
    own = table.get(command, {})
    found.update({_parameter(key): _plain(value) for key, value in own.items()})
    return {command: found}


def _read(config: str | None) -> tuple[Path, dict[str, Any]]:
    if config is not None and not Path(config).is_file():
        raise UsageError(f"--config {config}: there is no such file")
    path = Path(config or "ensemblekit.toml")
    if path.is_file():
        return path, _toml(path)
    path = Path("pyproject.toml")
    if path.is_file():
        return path, _toml(path).get("tool", {}).get("ensemblekit", {})
    return path, {}


def _toml(path: Path) -> dict[str, Any]:
    import tomllib  # only when there is a file: `--help` is quick

    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: is not TOML ({error})") from error


def _options(command: str) -> set[str]:
    from ensemblekit.cli.main import COMMANDS

    parameters = import_module(COMMANDS[command][0]).command.params
    names = (option.removeprefix("--") for p in parameters for option in p.opts)
    return {name for name in names if not name.startswith("-") and name.islower()}


def _parameter(key: str) -> str:
    return key.replace("-", "_")


def _plain(value: Any) -> Any:
    """A table such as `model-arg = {width = 16}` is a list of K=V."""
    return [f"{k}={v}" for k, v in value.items()] if isinstance(value, dict) else value
