"""Owns what an output says about where it came from, and whether a command needs to run again.

Input: snapshots, a row, and the result so far.
"""

import hashlib
import json
import secrets
import sys
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ensemblekit import __version__, writers
from ensemblekit.candidates import Candidate, Row
from ensemblekit.commands.result import AverageResult, Evaluation
from ensemblekit.files import Source, sha256
from ensemblekit.machine import usable_cores
from ensemblekit.options import ModelOptions
from ensemblekit.snapshots import Snapshot, SnapshotSet


def metadata(snapshots: SnapshotSet, result: AverageResult) -> dict[str, str]:
    """Facts that travel inside the file; nothing in them depends on the order of naming."""
    facts = {
        "version": __version__,
        "method": result.method,
        "snapshots": [
            {"file": s.path.name, "step": used["step"], "coefficient": used["coefficient"]}
            for s, used in zip(snapshots.snapshots, result.snapshots, strict=True)
        ],
        "batch_norm": result.batch_norm,
    }
    found = {"ensemblekit": json.dumps(facts)}
    if snapshots.ties:
        found["tied"] = json.dumps(snapshots.ties)
    return found


def manifest(
    result: AverageResult,
    snapshots: SnapshotSet,
    candidate: Candidate,
    command: Sequence[str],
    request: dict[str, Any],
    options: ModelOptions,
) -> dict[str, Any]:
    """Everything that is needed to know, or to make, the output again."""
    versions = {"ensemblekit": __version__, "numpy": np.__version__}
    if (torch := sys.modules.get("torch")) is not None:
        versions["torch"] = torch.__version__
    return {
        **result.to_json(),
        "candidate": candidate.to_json(),
        "ordered_by": snapshots.ordered_by,
        "versions": versions,
        "settings": settings(options),
        "command": list(command),
        "request": request,
    }


def settings(options: ModelOptions) -> dict[str, Any] | None:
    """How model and data were made and run, as plain values; None where no model ran."""
    if options.model is None:
        return None
    found = {name: value for name, value in vars(options).items() if value is not None}
    for name, value in found.items():
        if not isinstance(value, str | int | float | bool | Mapping):
            found[name] = f"a {type(value).__name__} in memory"
    found["model_args"] = {k: v if _is_plain(v) else repr(v) for k, v in options.model_args.items()}
    return found


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, str | int | float | bool)


class Digests:
    """SHA-256 of inputs, made beside other work: leaving the context stops what is left.

    They take half of the cores, at most four, and `at_work` tells the other work of them: more
    threads than cores only take the interpreter from each other.
    """

    def __init__(self) -> None:
        self._stop = threading.Event()
        self._threads = max(1, min(4, usable_cores() // 2))
        self._pool = ThreadPoolExecutor(self._threads)
        self._futures: dict[Source, Future[str]] = {}
        self._open = 0
        self._lock = threading.Lock()

    def __enter__(self) -> "Digests":
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._pool.shutdown(cancel_futures=True)

    def start(self, snapshot: Snapshot) -> None:
        """Begin with the files of a snapshot, if that has not happened yet."""
        for source in snapshot.sources:
            if source not in self._futures:
                future = self._pool.submit(sha256, source, self._stop.is_set)
                with self._lock:
                    self._open += 1
                future.add_done_callback(self._closed)
                self._futures[source] = future

    def _closed(self, _: Future[str]) -> None:
        with self._lock:
            self._open -= 1

    def at_work(self) -> int:
        """Threads that make digests now."""
        return self._threads if self._open else 0

    def keep(self, snapshots: SnapshotSet) -> None:
        """Make none of files that turned out to be no inputs."""
        taken = {source for snapshot in snapshots.snapshots for source in snapshot.sources}
        for source, future in self._futures.items():
            if source not in taken:
                future.cancel()

    def of(self, snapshots: SnapshotSet) -> list[dict[str, str]]:
        """The file and digest of each input; waits for the last one, and makes some meanwhile."""
        self.keep(snapshots)
        for snapshot in snapshots.snapshots:
            self.start(snapshot)
        sources = [source for snapshot in snapshots.snapshots for source in snapshot.sources]
        for source in reversed(sources):
            if self._futures[source].cancel():
                made: Future[str] = Future()
                made.set_result(sha256(source))
                self._futures[source] = made
        return [
            {"file": str(source.path), "sha256": self._futures[source].result()}
            for source in sources
        ]


def fingerprints(snapshots: SnapshotSet) -> list[list[Any]]:
    """What tells without reading that the inputs are the same as before, most likely.

    The time of the last change of an inode is there because programs cannot set it.
    """
    sources = [source for snapshot in snapshots.snapshots for source in snapshot.sources]
    return [[str(s.path), *s.fingerprint, s.path.stat().st_ctime_ns] for s in sources]


def request(
    snapshots: SnapshotSet, row: Row, method: str, bn: str, options: ModelOptions
) -> dict[str, Any]:
    """What determines the output: the same request over the same inputs gives the same file."""
    with Digests() as digests:
        return {"inputs": digests.of(snapshots), **terms(snapshots, row, method, bn, options)}


def terms(
    snapshots: SnapshotSet,
    row: Row,
    method: str,
    bn: str,
    options: ModelOptions,
    dtype: str | None = None,
) -> dict[str, Any]:
    """A request without its inputs."""
    return {
        "weights": [s.variant for s in snapshots.snapshots],
        "method": method,
        "coefficients": [*row.coefficients, row.divisor],
        "bn": bn,
        "dtype": dtype,
        "model": None if options.model is None else _options_digest(options),
        "version": __version__,
    }


def digest(value: Any) -> str:
    """SHA-256 of plain values."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 of a comparison, named by its file or its folder."""
    return sha256(Source(path / "comparison.json" if path.is_dir() else path))


def up_to_date(
    path: Path,
    result: AverageResult,
    terms: dict[str, Any],
    snapshots: SnapshotSet,
    digests: Digests,
) -> AverageResult | None:
    """The result of the earlier identical command, if its output is still there and whole."""
    earlier = writers.read_manifest(path)
    if earlier is None or not path.exists() or not isinstance(earlier.get("request"), dict):
        return None
    before = dict(earlier["request"])
    inputs = before.pop("inputs", None)
    if before != terms or inputs != digests.of(snapshots):
        return None
    if path.is_dir() != writers.is_folder(path) or earlier.get("sha256") != writers.digest(path):
        return None
    try:
        return _earlier(path, result, earlier)
    except (KeyError, TypeError):
        return None


def _earlier(path: Path, result: AverageResult, earlier: dict[str, Any]) -> AverageResult:
    return replace(
        result,
        output=str(path),
        sha256=earlier["sha256"],
        batch_norm=earlier["batch_norm"],
        evaluation=tuple(Evaluation(**e) for e in earlier["evaluation"]),
        warnings=tuple(earlier["warnings"]),
        notes=tuple(earlier["notes"]),
        cosines=tuple(earlier["cosines"]),
        up_to_date=True,
    )


def _options_digest(options: ModelOptions) -> str:
    """Digest of targets, of the files behind them, and of every setting.

    Python objects have no digest: what is made with them is never taken for up to date.
    """
    from ensemblekit.targets import fingerprint

    parts = []
    for name, value in sorted(vars(options).items()):
        if name in ("model", "train_data", "val_data", "test_data") and value is not None:
            shown = fingerprint(value) if isinstance(value, str) else secrets.token_hex()
        else:
            shown = repr(value)
        parts.append(f"{name}={shown}")
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
