"""Owns folders in Hugging Face's form: shards, an index, and the files that travel with weights.

Input: a content, and a filler that gives the tensors' values. A run that is stopped between two
shards leaves them beside the output, under a hidden name; the same command goes on from there.
"""

import contextlib
import fnmatch
import json
import os
import re
import shlex
import shutil
import stat
from collections.abc import Iterator, Mapping
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

from ensemblekit.atomic import AtomicFile, check_output, lock, replace_folder, sync_folder
from ensemblekit.dtypes import DTYPES
from ensemblekit.errors import EnsembleKitError, MachineError, UsageError
from ensemblekit.files import Source, from_os_error, sha256
from ensemblekit.writers import Content, Filler, folder_digest, read_manifest
from ensemblekit.writers.safetensors import layout
from ensemblekit.writers.saving import Filling, Manifest, publish

SHARD_BYTES = 5_000_000_000  # as transformers cuts them
_COPIED = (
    *("config.json", "generation_config.json", "preprocessor_config.json", "processor_config.json"),
    *("tokenizer*.json", "tokenizer*.model", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.*", "merges.txt", "spiece.model", "sentencepiece*.model", "chat_template.*"),
    *("image_processor*.json", "feature_extractor*.json", "video_preprocessor*.json"),
)
_PROGRESS = "progress.json"


def companions(folder: Path, dtype: str | None) -> dict[Path, dict[str, Any]]:
    """Files beside a snapshot's weights that `from_pretrained` needs, and changes to their JSON.

    Args:
        folder: Of the snapshot.
        dtype: The weights' new element type, which the configuration names.
    """
    found: dict[Path, dict[str, Any]] = {}
    for path in sorted(folder.iterdir()):
        if not any(fnmatch.fnmatchcase(path.name, pattern) for pattern in _COPIED):
            continue
        try:
            regular = stat.S_ISREG(path.stat().st_mode)
        except OSError as error:
            raise from_os_error(error, path, doing="read") from error
        if regular:
            new = {"dtype": dtype, "torch_dtype": dtype} if dtype else {}
            found[path] = new if path.name == "config.json" else {}
    return found


def shards(content: Content, limit: int) -> dict[str, list[str]]:
    """Keys by file name, in the network's order, each file at most `limit` bytes (or one tensor)."""
    groups: list[list[str]] = [[]]
    room = limit
    for key, (shape, dtype) in content.signature.items():
        nbytes = prod(shape) * DTYPES[dtype].itemsize
        if groups[-1] and nbytes > room:
            groups.append([])
            room = limit
        groups[-1].append(key)
        room -= nbytes
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    count = len(groups)
    return {f"model-{n:05}-of-{count:05}.safetensors": g for n, g in enumerate(groups, 1)}


def save_folder(
    path: Path,
    content: Content,
    filler: Filler,
    manifest: Manifest,
    *,
    inputs: list[Path],
    force: bool,
    shard_bytes: int = SHARD_BYTES,
    request: str,
) -> str:
    """Write a folder and its manifest, read back and verified, and return its digest.

    Args:
        path: The folder; where one exists it is replaced as a whole, with `force`.
        content: What it holds. Tied tensors are written once when a configuration says how the
            network is built.
        filler: Gives every tensor's values.
        manifest: Makes the manifest.
        inputs: Files that must not be overwritten.
        force: Replace an existing output.
        shard_bytes: Of a file at most.
        request: Digest of all that determines the output: shards of the same request are taken up.

    Raises:
        UsageError: The output exists and `force` is not given, holds an input or files of others.
        MachineError: The disk is full, gave back other bytes, or another process writes the same.
    """
    check_replaceable(path, inputs=inputs, force=force)
    if content.followers and any(copy.name == "config.json" for copy in content.copies):
        kept = {k: v for k, v in content.signature.items() if k not in content.followers}
        content = replace(content, signature=kept, ties=())
    plan = shards(content, shard_bytes)
    with _partial(path, request) as partial:
        done = _progress(partial, filler)
        for name, keys in plan.items():
            if name in done:
                continue
            part = replace(content, signature={key: content.signature[key] for key in keys})
            with AtomicFile(partial / name) as file:
                filling = Filling(file, layout(part))
                filler.fill(filling.sink, keys)
                done[name] = filling.seal()
                file.rename()
            _write(partial / _PROGRESS, {"files": done, "notes": filler.notes()})
        filler.done()
        files = done | _finish(partial, content, plan)
        digest = folder_digest(files)
        (partial / _PROGRESS).unlink(missing_ok=True)
        sync_folder(partial)
        publish(
            path,
            partial,
            {**manifest(digest), "files": files, "replaces": _names(path)},
            lambda: replace_folder(partial, path),
            lambda: check_replaceable(path, inputs=inputs, force=force),
            inputs=inputs,
            force=force,
        )
    return digest


def check_replaceable(path: Path, *, inputs: list[Path], force: bool) -> None:
    """Refuse a folder that would take others' files with it when it is replaced.

    Raises:
        UsageError: As `check_output`, or the folder holds files that its manifest does not name.
    """
    if path.is_symlink():
        raise UsageError(f"output {path} is a link", hint="name the folder itself with -o")
    if path.is_mount():
        raise UsageError(
            f"output {path} is a mount point, which cannot be replaced as a whole",
            hint=f"-o {shlex.quote(str(path / 'averaged'))}",
        )
    empty = path.is_dir() and not any(path.iterdir())
    check_output(path, inputs=inputs, force=force or empty, folder=True)
    if empty or not path.exists():
        return
    known = _names(path)
    others = sorted(file.name for file in path.iterdir() if file.name not in known)
    if others:
        raise UsageError(
            f"output {path} holds files that are not ours, such as {others[0]}",
            hint="choose another name with -o",
        )


def _names(path: Path) -> list[str]:
    """Files that the folder's manifest names.

    If a run was stopped between putting the manifest and the folder in place, those that were to be
    replaced are in the folder still.
    """
    manifest = read_manifest(path) or {}
    lists = (manifest.get("files"), manifest.get("replaces"))
    return [name for names in lists if isinstance(names, dict | list) for name in names]


@contextlib.contextmanager
def _partial(path: Path, request: str) -> Iterator[Path]:
    """A hidden folder for the parts; kept only when the run was stopped with some of them done."""
    partial = path.with_name(f".{path.name}.{request[:12]}.partial")
    try:
        partial.mkdir(exist_ok=True)
        descriptor = os.open(partial, os.O_RDONLY)
    except OSError as error:
        raise from_os_error(error, path, doing="create") from error
    try:
        if not lock(descriptor):
            raise MachineError(
                f"another process is writing {path}", hint="wait for it, or choose another -o"
            )
        yield partial
        _drop_others(path, partial)
    except BaseException as error:
        if isinstance(error, MachineError) and "another process" in error.message:
            raise
        stopped = not isinstance(error, Exception)
        if stopped and (partial / _PROGRESS).exists():
            error.add_note("the same command goes on with the files that are done")
        else:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    finally:
        os.close(descriptor)


def _drop_others(path: Path, own: Path) -> None:
    """Parts of stopped runs that wanted another content of the same name are of no use any more."""
    ours = re.compile(re.escape(f".{path.name}.") + r"[0-9a-f]{12}\.partial")
    try:
        entries = list(path.parent.iterdir())
    except OSError:  # one may write there, and not look
        return
    for other in entries:
        if other == own or not ours.fullmatch(other.name) or other.is_symlink():
            continue
        with contextlib.suppress(OSError):  # another user's: none of our business
            descriptor = os.open(other, os.O_RDONLY | os.O_DIRECTORY)
            if lock(descriptor):
                shutil.rmtree(other, ignore_errors=True)
            os.close(descriptor)


def _progress(partial: Path, filler: Filler) -> dict[str, str]:
    """Files that an earlier run of the same command completed, if they are still whole."""
    found: dict[str, str] = {}
    damaged = (TypeError, AttributeError, RecursionError, ValueError, KeyError)
    with contextlib.suppress(EnsembleKitError, OSError, *damaged):
        known = json.loads((partial / _PROGRESS).read_bytes())
        found = {
            name: digest
            for name, digest in known["files"].items()
            if sha256(Source(partial / name)) == digest
        }
        if len(found) == len(known["files"]):
            filler.resume(known["notes"])
        else:
            found = {}
    for file in partial.iterdir():
        if file.name not in {*found, *([_PROGRESS] if found else [])}:
            shutil.rmtree(file) if file.is_dir() else file.unlink()
    return found


def _finish(partial: Path, content: Content, plan: Mapping[str, list[str]]) -> dict[str, str]:
    """The index and the companions; their digests by name."""
    found = {}
    if len(plan) > 1:
        sizes = (
            prod(shape) * DTYPES[dtype].itemsize for shape, dtype in content.signature.values()
        )
        weight_map = {key: name for name, keys in plan.items() for key in keys}
        index = {"metadata": {"total_size": sum(sizes)}, "weight_map": weight_map}
        name = "model.safetensors.index.json"
        found[name] = _write(partial / name, index)
    for source, changes in content.copies.items():
        try:
            data = source.read_bytes()
        except OSError as error:
            raise from_os_error(error, source, doing="read") from error
        if changes:
            with contextlib.suppress(ValueError, RecursionError):  # odd, but not ours to judge
                value = json.loads(data)
                if isinstance(value, dict):
                    value.update({k: v for k, v in changes.items() if k in value})
                    data = json.dumps(value, indent=2).encode() + b"\n"
        found[source.name] = _write_bytes(partial / source.name, data)
    return found


def _write(path: Path, value: Any) -> str:
    return _write_bytes(path, json.dumps(value, indent=2).encode() + b"\n")


def _write_bytes(path: Path, data: bytes) -> str:
    with AtomicFile(path) as file:
        file.write_at(data, 0)
        source = file.seal()
        digest = sha256(source)
        source.close()
        file.rename()
    return digest
