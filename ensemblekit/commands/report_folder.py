"""Owns the folder that `compare` writes: complete or absent, never a mixture of two runs.

Input: the comparison, and recomputed BatchNorm statistics.
"""

import json
import os
import secrets
import shlex
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ensemblekit import reports
from ensemblekit.atomic import locked_folder
from ensemblekit.errors import InputError, UsageError, listing
from ensemblekit.files import from_os_error

JSON_NAME = "comparison.json"
STATISTICS_NAME = "batch_norm.npz"


def check_folder(folder: Path, *, inputs: list[Path], force: bool) -> None:
    """Refuse a folder that would overwrite something it must not.

    Raises:
        UsageError: It exists without `force`, is a file, or holds something that is not ours.
    """
    if not folder.parent.is_dir():
        raise UsageError(
            f"output folder {folder.parent} does not exist",
            hint=f"mkdir -p {shlex.quote(str(folder.parent))}",
        )
    if not os.path.lexists(folder):
        return
    if not folder.is_dir():
        raise UsageError(f"output {folder} is a file", hint="name a folder with -o")
    resolved = folder.resolve()
    for source in inputs:
        if resolved in (source.resolve(), *source.resolve().parents):
            raise UsageError(
                f"output {folder} holds an input ({source})", hint="choose another folder with -o"
            )
    if not any(folder.iterdir()):
        return
    if not force:
        raise UsageError(
            f"output {folder} exists already",
            hint="choose another folder with -o, or --force to replace it",
        )
    ours = {JSON_NAME, STATISTICS_NAME, *reports.REPORTS}
    others = sorted(entry.name for entry in folder.iterdir() if entry.name not in ours)
    if others or read_comparison(folder) is None:
        what = (
            f"files that are not ours ({listing(others, limit=3)})" if others else "no comparison"
        )
        raise UsageError(f"output {folder} holds {what}", hint="choose another folder with -o")


def read_comparison(folder: Path) -> dict[str, Any] | None:
    """The comparison in a folder, None where there is none."""
    try:
        value = json.loads((folder / JSON_NAME).read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    ours = isinstance(value, dict) and {"schema_version", "candidates", "decision"} <= set(value)
    return value if ours else None


def is_whole(folder: Path) -> bool:
    """Whether every file that belongs to a comparison is there."""
    comparison = read_comparison(folder) or {}
    wanted = [JSON_NAME, *reports.REPORTS]
    noted = comparison.get("batch_norm_statistics")
    whole = all((folder / name).is_file() for name in wanted)
    if noted is None or not whole:
        return whole
    path = folder / STATISTICS_NAME
    return path.is_file() and _sha256(path) == noted["sha256"]


def save_folder(
    folder: Path,
    comparison: dict[str, Any],
    statistics: Mapping[str, npt.NDArray[Any]],
    *,
    force: bool,
) -> None:
    """Write all files into a new folder and put it under its name.

    Raises:
        UsageError: The folder appeared in the meantime.
        MachineError: The disk is full or read-only.
    """
    folder = folder.resolve()  # a link stays one
    temporary = folder.with_name(f".{folder.name}.{secrets.token_hex(6)}.tmp")
    try:
        temporary.mkdir()
        if statistics:
            with (temporary / STATISTICS_NAME).open("wb") as file:
                arrays = [
                    np.ascontiguousarray(value).reshape(-1).view(np.uint8)
                    for value in statistics.values()
                ]
                _save_arrays(file, dict(zip(statistics, arrays, strict=True)))
            comparison["batch_norm_statistics"] = {
                "file": STATISTICS_NAME,
                "sha256": _sha256(temporary / STATISTICS_NAME),
            }
        text = json.dumps(comparison, indent=1, allow_nan=False)
        (temporary / JSON_NAME).write_text(text + "\n", encoding="utf-8")
        for name in reports.REPORTS:
            text = reports.render(name, comparison)
            (temporary / name).write_text(text, encoding="utf-8", newline="")
        for path in temporary.iterdir():
            _sync(path)
        with locked_folder(folder.parent):
            _put(temporary, folder, force=force)
    except OSError as error:
        raise from_os_error(error, folder, doing="write") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _put(temporary: Path, folder: Path, *, force: bool) -> None:
    check_folder(folder, inputs=[], force=force)
    old = folder.with_name(f".{folder.name}.{secrets.token_hex(6)}.old")
    if folder.exists():
        folder.rename(old)
    try:
        temporary.rename(folder)
    except BaseException:
        if old.exists():
            old.rename(folder)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _save_arrays(file: Any, arrays: dict[str, npt.NDArray[Any]]) -> None:
    """Bytes by name: numpy's own format has no bfloat16, so bytes it is."""
    names = np.frombuffer(json.dumps(list(arrays)).encode(), np.uint8)
    parts: dict[str, Any] = {f"a{place}": array for place, array in enumerate(arrays.values())}
    np.savez(file, names=names, **parts)


def read_statistics(
    folder: Path, comparison: Mapping[str, Any]
) -> dict[str, npt.NDArray[np.uint8]]:
    """Bytes of the recomputed statistics by CANDIDATE/MEMBER/KEY.

    Raises:
        InputError: The file is missing or is not the one that the comparison speaks of.
    """
    noted = comparison.get("batch_norm_statistics")
    if noted is None:
        return {}
    path = folder / STATISTICS_NAME
    wanted = noted.get("sha256") if isinstance(noted, dict) else None
    if not path.is_file() or _sha256(path) != wanted:
        raise InputError(
            f"{path} is not the file that {JSON_NAME} was written with",
            hint="run compare again, or keep the folder together",
        )
    with np.load(path, allow_pickle=False) as arrays:
        names = json.loads(arrays["names"].tobytes())
        return {name: arrays[f"a{place}"] for place, name in enumerate(names)}


def _sha256(path: Path) -> str:
    import hashlib

    return hashlib.sha256(path.read_bytes()).hexdigest()


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
