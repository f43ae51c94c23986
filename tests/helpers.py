"""Owns what many tests need: small checkpoints on disk, snapshots without discovery, the command."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from ensemblekit.discovery import read_snapshot
from ensemblekit.dtypes import DTYPES
from ensemblekit.snapshots import SnapshotSet
from ensemblekit.walk import Place

Array = npt.NDArray[Any]
CODES = {DTYPES[name].numpy: code for name in DTYPES if (code := DTYPES[name].safetensors)}
ROOT = Path(__file__).resolve().parents[1]


def make_arrays(seed: int, *, size: int = 24) -> dict[str, Array]:
    """The weights of a small network without BatchNorm, around a point that all seeds share."""
    centre, own = np.random.default_rng(0), np.random.default_rng(seed + 1)
    shapes = {"fc.weight": (4, size), "fc.bias": (4,), "head.weight": (3, 4)}
    return {
        key: (centre.normal(size=shape) + 0.1 * own.normal(size=shape)).astype(np.float32)
        for key, shape in shapes.items()
    }


def with_batch_norm(arrays: Mapping[str, Array], seed: int) -> dict[str, Array]:
    """The same network with one BatchNorm layer, whose statistics differ from seed to seed."""
    rng = np.random.default_rng(seed)
    return {
        **arrays,
        "bn.weight": np.ones(4, np.float32),
        "bn.bias": np.zeros(4, np.float32),
        "bn.running_mean": rng.normal(size=4).astype(np.float32),
        "bn.running_var": rng.uniform(1, 2, size=4).astype(np.float32),
        "bn.num_batches_tracked": np.array(10 * seed, np.int64),
    }


def write_safetensors(
    path: Path, arrays: Mapping[str, Array], metadata: Mapping[str, str] | None = None
) -> Path:
    """Write a safetensors file with neither torch nor the library that it is compared with."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    blobs, place = [], 0
    for key, array in arrays.items():
        blob = np.ascontiguousarray(array).tobytes()
        span = [place, place + len(blob)]
        header[key] = {
            "dtype": CODES[array.dtype],
            "shape": list(array.shape),
            "data_offsets": span,
        }
        blobs.append(blob)
        place += len(blob)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(blobs))
    return path


def write_torch(path: Path, value: object) -> Path:
    """Write what `torch.save` writes."""
    import torch

    torch.save(value, path)
    return path


def write_series(folder: Path, count: int = 3, *, batch_norm: bool = False, **sizes: int) -> Path:
    """`count` snapshots of one run, `snap_1.safetensors` and so on."""
    folder.mkdir(parents=True, exist_ok=True)
    for n in range(1, count + 1):
        arrays = make_arrays(n, **sizes)
        arrays = with_batch_norm(arrays, n) if batch_norm else arrays
        write_safetensors(folder / f"snap_{n}.safetensors", arrays)
    return folder


def read_set(*paths: Path) -> SnapshotSet:
    """Snapshots in the order given: no sorting, and nothing is left out as a repetition."""
    places = [Place(path, path.name, None, claims=True) for path in paths]
    return SnapshotSet(tuple(read_snapshot(place) for place in places))


def as_torch(array: Array) -> Any:
    """A torch tensor with the same bits, bfloat16 and float8 included."""
    import torch

    views = {ml_dtypes.bfloat16: np.int16, ml_dtypes.float8_e4m3fn: np.uint8}
    for small in ("float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz"):
        views[getattr(ml_dtypes, small)] = np.uint8
    view = views.get(array.dtype.type)
    if view is None:
        return torch.from_numpy(array.copy())
    name = next(name for name, dtype in DTYPES.items() if dtype.numpy == array.dtype)
    return torch.from_numpy(array.view(view).copy()).view(getattr(torch, name))


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def contents(folder: Path) -> dict[str, tuple[int, str]]:
    """Time of change and digest of every file in a folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(p.relative_to(folder)): (p.stat().st_mtime_ns, sha256(p)) for p in files}


def environment(**variables: str) -> dict[str, str]:
    """The tests' own environment, without settings of the person who runs them."""
    own = {k: v for k, v in os.environ.items() if not k.startswith("ENSEMBLEKIT_")}
    for name in ("NO_COLOR", "FORCE_COLOR", "CLICOLOR_FORCE", "PYTHONUNBUFFERED"):
        own.pop(name, None)
    return {**own, "COLUMNS": "200", "PYTHONPATH": str(ROOT), **variables}


def command(*args: object) -> list[str]:
    """The installed script, else the module."""
    script = Path(sys.executable).with_name("ensemblekit")
    line = [str(script)] if script.exists() else [sys.executable, "-m", "ensemblekit"]
    return [*line, *map(str, args)]


def run(
    *args: object, cwd: Path, env: Mapping[str, str] | None = None, timeout_s: float = 60
) -> subprocess.CompletedProcess[str]:
    """Run the command line; a traceback fails the test whatever it looks for."""
    done = subprocess.run(
        command(*args),
        cwd=cwd,
        env=environment(**(env or {})),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        errors="surrogateescape",  # file names need not be text
        timeout=timeout_s,
        check=False,
    )
    assert "Traceback" not in done.stdout + done.stderr, done.stderr
    assert done.returncode != 1, done.stderr
    return done


def run_json(
    *args: object, cwd: Path, exit_code: int = 0, env: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Run with `--json` and return the one object on stdout."""
    done = run(*args, "--json", cwd=cwd, env=env)
    assert done.returncode == exit_code, done.stdout + done.stderr
    value: dict[str, Any] = json.loads(done.stdout)
    assert value["schema_version"] == 1
    return value


def files_of(result: Mapping[str, Any]) -> list[str]:
    """Names of the snapshots that took part."""
    return [Path(item["path"]).name for item in result["snapshots"]]


def numbers_of(names: Sequence[str]) -> list[int]:
    """`snap_3.safetensors` as 3."""
    return [int(name.partition("_")[2].partition(".")[0]) for name in names]
