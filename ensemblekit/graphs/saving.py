"""Owns ONNX files: graph and external data, complete or absent, with a manifest beside them.

Input: a model. Everything is written in a folder of its own beside the output, looked at there,
and renamed: the data before the graph that names them, the graph before the manifest.
"""

import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnx_ir as ir

from ensemblekit.atomic import locked_folder
from ensemblekit.files import Source, from_os_error, sha256

EXTERNAL_ABOVE = 2_000_000_000  # bytes of weights; a protobuf holds 2 GiB
_SMALL = 1024  # bytes of a tensor that stays in the graph in any case


def data_name(name: str) -> str:
    """The file of external data of a graph of that name."""
    return f"{name}.data"


def save(model: ir.Model, path: Path, *, external_above: int = EXTERNAL_ABOVE) -> None:
    """Write a model; its weights go into a file of their own when they are large.

    Raises:
        MachineError: The machine said no.
    """
    weights = [value.const_value for value in model.graph.initializers.values()]
    size = sum(tensor.nbytes for tensor in weights if tensor is not None)
    external = data_name(path.name) if size > external_above else None
    try:
        ir.save(model, path, external_data=external, size_threshold_bytes=_SMALL)
    except OSError as error:
        raise from_os_error(error, path, doing="write") from error


@contextmanager
def workshop(output: Path) -> Iterator[Path]:
    """A folder beside the output in which it is made; gone at the end, whatever happens."""
    folder = output.with_name(f".{output.name}.{secrets.token_hex(6)}.tmp")
    try:
        try:
            folder.mkdir()
        except OSError as error:
            raise from_os_error(error, output, doing="create") from error
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def publish(made: Path, output: Path, manifest: Mapping[str, Any] | None) -> None:
    """Put a finished file, its data and its manifest under their names.

    Args:
        made: The file in its workshop; it has the output's name.
        output: The final name.
        manifest: To be written as `OUTPUT.json`.

    Raises:
        MachineError: The machine said no.
    """
    note = None
    try:
        if manifest is not None:
            note = made.with_name(f"{made.name}.json")
            note.write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
        parts = [data_name(made.name), made.name, f"{made.name}.json"]
        there = [made.with_name(name) for name in parts if made.with_name(name).exists()]
        for part in there:
            _sync(part)
        with locked_folder(output.parent):
            for part in there:
                part.replace(output.with_name(part.name))
            if made.with_name(data_name(made.name)) not in there:
                output.with_name(data_name(output.name)).unlink(missing_ok=True)  # of an older file
    except OSError as error:
        raise from_os_error(error, output, doing="write") from error


def digest(path: Path) -> str:
    """SHA-256 of the graph's file."""
    return sha256(Source(path))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
