"""Ten large checkpoints are described in seconds and in little memory: nothing is read through."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from .helpers import command, environment

FILES, FILE_BYTES = 10, 1 << 30
PEAK_MIB, SECONDS = 200, 10
MEASURED = """
import resource, subprocess, sys
done = subprocess.run(sys.argv[1:], capture_output=True, text=True)
peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024
print(peak, done.returncode, file=sys.stderr)
print(done.stdout)
"""


def sparse_file(path: Path, step: int) -> None:
    """A safetensors file of 1 GiB that takes a few blocks on disk."""
    tensors, count = {}, 8
    share = FILE_BYTES // count
    for i in range(count):
        tensors[f"layers.{i}.weight"] = {
            "dtype": "F32",
            "shape": [share // 4096, 1024],
            "data_offsets": [i * share, (i + 1) * share],
        }
    text = json.dumps({"__metadata__": {"step": str(step)}, **tensors}).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(path, 8 + len(text) + FILE_BYTES)
    with path.open("r+b") as file:  # a few weights of its own at both ends of every tensor
        for i in range(2 * count):
            file.seek(8 + len(text) + i * share // 2)
            file.write(step.to_bytes(4, "little"))


def test_inspect_of_ten_gigabytes(tmp_path: Path) -> None:
    for step in range(1, FILES + 1):
        sparse_file(tmp_path / f"snap_{step}.safetensors", step)
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, *command("inspect", tmp_path, "--json")],
        capture_output=True, text=True, env=environment(), timeout=100,
    )  # fmt: skip
    seconds = time.perf_counter() - start
    peak, code = map(int, done.stderr.split())
    report = json.loads(done.stdout)
    assert code == 0, report
    assert len(report["snapshots"]) == FILES
    assert {row["status"] for row in report["snapshots"]} == {"used"}
    assert all(row["sha256"] is None for row in report["snapshots"])
    assert peak < PEAK_MIB
    assert seconds < SECONDS
